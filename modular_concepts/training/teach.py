"""From pictures to a concept on a base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import __version__
from ..adapters.basis import OrthogonalBasis
from ..concept import Concept, Recipe
from ..data.dataset import PLACE
from ..data.latents import encoded, kept, latent_masks, mirrored
from ..errors import AdapterError, listed
from ..models.base import Base
from ..models.targets import DEFAULT_TARGETS, Targets, concept_layers
from ..sampling import SampleSettings, sample
from ..text.triggers import says
from .estimate import Estimate
from .loop import Progress, train
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
    """

    name: str
    pictures: Tensor | Sequence[Tensor]
    captions: Sequence[str]
    class_word: str
    masks: Tensor | Sequence[Tensor] | None = None
    fingerprint: str = ""
    description: str = ""
    repeats: Sequence[int] | None = None

    @property
    def trigger(self) -> str:
        return trigger_of(self.name)


def trigger_of(name: str) -> str:
    """The word that calls a concept; lower case, as text models read their prompts."""
    return f"<{name.lower()}>"


class Draw(Protocol):
    """`sampling.sample`, or what a host has in its place."""

    __name__: str

    def __call__(self, *args: Any, **options: Any) -> Tensor: ...


def prior_examples(
    base: Base,
    class_word: str,
    count: int,
    seed: int = 0,
    settings: SampleSettings | None = None,
    callback: Callable[[int, int], None] | None = None,
    draw: Draw = sample,
    cache: Path | None = None,
) -> Examples:
    """Pictures that the base draws by itself; training on them too keeps an adapter silent without its trigger.

    draw: `sampling.sample`, or what a host has in its place.
    cache: a folder to keep them in, as latents; the next training draws none.
    Source: prior preservation of DreamBooth (Ruiz et al. 2023); here also what lets a sum of concepts keep each.
    """
    prompts, settings = base.prior_prompts(class_word, count), settings or SampleSettings()

    def drawn() -> list[Tensor]:
        return list(base.encode(draw(base, prompts, range(seed, seed + count), None, settings, callback=callback)))

    # How they were made and not their bits, so that a training resumes where drawing is not exact to the bit.
    made = f"{base.hash} {draw.__name__} {prompts} {seed} {settings}"
    size = (settings.height or base.size[0], settings.width or base.size[1])
    latents = drawn() if cache is None else kept(base, cache, made, drawn, [size] * count)
    return Examples(torch.stack(latents), prompts, fingerprint=sha256(made.encode()).hexdigest()[:16])


def problem_for(
    base: Base,
    subject: Subject,
    targets: Targets = DEFAULT_TARGETS,
    prior: Examples | None = None,
    *,
    flip: bool = False,
    cache: Path | None = None,
) -> Problem:
    """The training problem of one subject on one base.

    flip: with the mirrored pictures too.  cache: a folder to keep latents in.
    """
    start = _start_rows(base, subject)
    layers, examples = concept_layers(base, targets), _examples(base, subject, flip, cache)
    return Problem(base, layers, examples, {subject.trigger: start}, prior)


def check_training(base: Base, subject: Subject, settings: TrainSettings, targets: Targets = DEFAULT_TARGETS) -> None:
    """Raise AdapterError at once for words, rank, slot and options that a training refuses, before a prior is drawn."""
    new_words({subject.trigger: _start_rows(base, subject)}, settings, base.cross_attention_layers)
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
    basis: OrthogonalBasis | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    checkpoints: Path | None = None,
    resume: Path | None = None,
    prior: Examples | None = None,
    *,
    accept_changes: bool = False,
    set_aside: bool = False,
    cache: Path | None = None,
    estimate: Callable[[Estimate], None] | None = None,
    on_fault: Callable[[TrainResult], object] | None = None,
) -> tuple[Concept, TrainResult]:
    """Train one concept; the base is left as it was.  After a cancel it is what was reached by then.

    checkpoints, resume, accept_changes, set_aside, estimate, on_fault: as `train`.  cache: a folder to keep latents in.
    """
    basis = OrthogonalBasis() if basis is None else basis
    problem = problem_for(base, subject, targets, prior, flip=settings.flip, cache=cache)
    result = train(
        problem,
        settings,
        callback,
        resume,
        basis=basis,
        checkpoints=checkpoints,
        accept_changes=accept_changes,
        set_aside=set_aside,
        estimate=estimate,
        on_fault=on_fault,
    )
    return concept_from(base, subject, result, basis, targets), result


def concept_from(
    base: Base, subject: Subject, result: TrainResult, basis: OrthogonalBasis, targets: Targets
) -> Concept:
    """Give a training's result its recipe; on the CPU, as from a file, for it may outlive what it was trained on."""
    settings = result.settings
    frozen = settings.method in ("orthogonal", "block_orthogonal")
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
