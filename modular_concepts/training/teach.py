"""From pictures to a concept on a base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..adapters.basis import OrthogonalBasis
from ..adapters.own_words import METHOD as OWN_WORDS
from ..concept import Concept, Recipe
from ..data.buckets import sizes_of
from ..data.dataset import PLACE
from ..data.latents import encoded, latent_masks, mirrored
from ..errors import AdapterError, listed
from ..models.base import Base
from ..models.targets import DEFAULT_TARGETS, Targets, concept_layers
from ..text.triggers import says
from .company import Company, check_reach, company_for
from .drawn import Prior, drawn_latents, drawn_pictures, fingerprint_of, how_drawn
from .loop import NOBODY, NOWHERE, Keeping, Listeners, train
from .methods import new_adapters, new_words
from .needs import check_needs
from .problem import Examples, Problem, predicting
from .run import TrainResult
from .settings import TrainSettings


@dataclass(frozen=True)
class Subject:
    """What is taught: pictures (N, 3, H, W) in 0..1 and captions in which the trigger word stands for it.

    Pictures of several sizes are a list, and so are their masks.
    masks: (N, 1, H, W) in 0..1, in the pictures' size or the latents', or None.
    class_word: what the base calls it, "man" for instance.
    description: what it looks like, in words that the base knows; the learned vectors start from their rows, one for
    each word, or from the class word's where it is empty.
    fingerprint: of the files that the pictures came from, kept in the concept.
    repeats: how often each picture comes in an epoch; None is once.
    prior: class pictures that the base drew itself, to be trained on too (`prior_examples`).
    company: others whom it drew, for the other half of wide canvases (`company_examples`).
    """

    name: str
    pictures: Tensor | Sequence[Tensor]
    captions: Sequence[str]
    class_word: str
    masks: Tensor | Sequence[Tensor] | None = None
    fingerprint: str = ""
    description: str = ""
    repeats: Sequence[int] | None = None
    prior: Examples | None = None
    company: Company | None = None

    @property
    def trigger(self) -> str:
        return trigger_of(self.name)


def trigger_of(name: str) -> str:
    """The word that calls a concept; lower case, as text models read their prompts."""
    return f"<{name.lower()}>"


def prior_examples(
    base: Base, prior: Prior, callback: Callable[[int, int], None] | None = None, cache: Path | None = None
) -> Examples:
    """Pictures that the base draws by itself; training on them too keeps an adapter silent without its trigger.

    cache: a folder to keep them in, as latents; the next training draws none.
    Source: prior preservation of DreamBooth (Ruiz et al. 2023); here also what lets a sum of concepts keep each.
    """
    prompts = base.prior_prompts(prior.class_word, prior.count)

    def draw_anew() -> list[Tensor]:
        return list(base.encode(drawn_pictures(base, prior, prompts, callback)))

    made = how_drawn(base, prior, prompts)
    latents = drawn_latents(base, made, [prior.size(base)] * prior.count, draw_anew, cache)
    return Examples(torch.stack(latents), prompts, fingerprint=fingerprint_of(made))


def company_examples(
    base: Base,
    subject: Subject,
    drawing: Prior,
    callback: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> Company:
    """Others whom the base draws by itself, in the surroundings that the subject's captions name.

    drawing: how many of what size; for pictures of other heights they are scaled.  callback, cache: `prior_examples`.
    """
    heights = {height for height, _ in sizes_of(subject.pictures)}
    return company_for(base, subject.captions, subject.trigger, drawing, heights, callback, cache)


def problem_for(
    base: Base,
    subject: Subject,
    targets: Targets = DEFAULT_TARGETS,
    *,
    flip: bool = False,
    cache: Path | None = None,
) -> Problem:
    """The training problem of one subject on one base.

    flip: with the mirrored pictures too.  cache: a folder to keep latents in.
    """
    start = _start_rows(base, subject)
    layers, examples = concept_layers(base, targets), _examples(base, subject, flip, cache)
    return Problem(base, layers, examples, {subject.trigger: start}, subject.prior, subject.company)


def check_training(base: Base, subject: Subject, settings: TrainSettings, targets: Targets = DEFAULT_TARGETS) -> None:
    """Raise AdapterError at once for words, rank, slot and options that a training refuses, before a prior is drawn."""
    tokens = new_words({subject.trigger: _start_rows(base, subject)}, settings, base.cross_attention_layers)
    if settings.company:
        check_reach(base, subject.captions, subject.class_word, tokens)
    new_adapters(concept_layers(base, targets), settings)
    attends = bool(base.cross_attentions())
    check_needs(settings, masked=subject.masks is not None, attends=attends, networks=predicting(base))


def _examples(base: Base, subject: Subject, flip: bool, cache: Path | None) -> Examples:
    latents = encoded(base, subject.pictures, cache)
    return Examples(
        latents,
        list(subject.captions),
        latent_masks(subject.masks, latents),
        subject.fingerprint,
        encoded(base, mirrored(subject.pictures), cache) if flip else None,
        subject.repeats,
    )


def _start_rows(base: Base, subject: Subject) -> Tensor:
    """(k, width) rows that the learned word starts from, when its words and the captions can be used."""
    missing = [text for text in subject.captions if not says(text, subject.trigger)]
    if missing:
        raise AdapterError(
            f"caption {missing[0]!r} does not contain the trigger word {subject.trigger}; "
            f"write {PLACE} in it where the concept's word belongs"
        )
    start = base.word_rows(subject.class_word)
    if not len(start) or base.unknown_words(subject.class_word, []):
        raise AdapterError(
            f"class word {subject.class_word!r} is not one that the base knows; "
            "say in its words what the concept is, such as man, dog or style"
        )
    if not subject.description.strip():
        return start
    if unknown := base.unknown_words(subject.description, []):
        raise AdapterError(
            f"description {subject.description!r}: the base does not know {listed(unknown)}; use other words for it"
        )
    return base.word_rows(subject.description)


def train_concept(
    base: Base,
    subject: Subject,
    settings: TrainSettings,
    targets: Targets = DEFAULT_TARGETS,
    listeners: Listeners = NOBODY,
    keeping: Keeping = NOWHERE,
    basis: OrthogonalBasis | None = None,
) -> tuple[Concept, TrainResult]:
    """Train one concept; the base is left as it was.  After a cancel it is what was reached by then.

    listeners: who is told of each step, of the time and memory that it will take, and of a fault.
    keeping: where checkpoints and latents are kept, and what it goes on from.  Raises as `loop.train`.
    """
    basis = OrthogonalBasis() if basis is None else basis
    problem = problem_for(base, subject, targets, flip=settings.flip, cache=keeping.latents)
    result = train(problem, settings, listeners, keeping, basis)
    return concept_from(base, subject, result, basis, targets), result


def concept_from(
    base: Base, subject: Subject, result: TrainResult, basis: OrthogonalBasis, targets: Targets
) -> Concept:
    """Give a training's result its recipe; on the CPU, as from a file, for it may outlive what it was trained on."""
    settings = result.settings
    in_columns = settings.method == OWN_WORDS and settings.slot is not None
    frozen = settings.method in ("orthogonal", "block_orthogonal") or in_columns
    in_blocks = settings.method in ("block", "block_orthogonal")
    rank, alpha = settings.rank, settings.alpha
    if settings.method in ("custom_diffusion", "words"):
        rank, alpha = max((adapter.rank for adapter in result.layers.values()), default=1), None
    recipe = Recipe(
        method=settings.method,
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        base_hash=base.hash,
        architecture=base.architecture,
        triggers=(subject.trigger,),
        class_word=subject.class_word,
        basis=basis.identity if frozen else None,
        basis_kind=basis.kind if frozen else None,
        basis_seed=basis.seed if frozen else None,
        slot=settings.slot if frozen or in_blocks else None,
        slot_policy=("slot" if settings.slot is not None else "hashed") if frozen else None,
        blocks=settings.blocks if in_blocks else None,
        layout=settings.layout if in_blocks else None,
        training={
            **asdict(settings),
            "targets": list(targets.unet),
            "text_encoder_targets": list(targets.text_encoder or ()),
            "description": subject.description,
            "steps_done": result.step,
            "finished": result.finished,
        },
        origin={
            "pictures": len(subject.pictures),
            "fingerprint": subject.fingerprint,
            "program": f"modular-concepts {__version__}",
            "base_sample": base.sample,
        },
    )
    layers = {name: adapter.to("cpu") for name, adapter in result.layers.items()}
    return Concept(subject.name, layers, {word: rows.cpu() for word, rows in result.tokens.items()}, recipe)
