"""One concept's training inside the host: its progress bar, previews and cancel, checkpoints and kept files.

output/modular_concepts/NAME/    checkpoints; those of trainings before in before/, before-2/, ...
output/modular_concepts_latents  pictures as the VAE encodes them, where that is asked for
models/concepts/                 what a cancelled training had learned by then
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from torch import Tensor

from ...modular_concepts.adapters.basis import OrthogonalBasis
from ...modular_concepts.adapters.own_words import METHOD as OWN_WORDS
from ...modular_concepts.adapters.sites import put_together
from ...modular_concepts.concept import Concept, check_token
from ...modular_concepts.data.dataset import Dataset, filled_in
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.families.family import Family
from ...modular_concepts.files.concept import layer_tensors, save_concept
from ...modular_concepts.merging.compatibility import trained_for_words
from ...modular_concepts.models.layers import file_key
from ...modular_concepts.models.schedules import FlowSchedule
from ...modular_concepts.models.targets import Targets
from ...modular_concepts.sampling import SampleSettings
from ...modular_concepts.settings.training import BESIDE_TRAINING, COMPANY_PICTURES, NOISE, TRAINING
from ...modular_concepts.storage.keeping import check_room, free_name, keep, last_places
from ...modular_concepts.storage.names import safe_name
from ...modular_concepts.training.caption_checks import find_unused
from ...modular_concepts.training.checkpoint import Changed, newest_checkpoint
from ...modular_concepts.training.company import Company
from ...modular_concepts.training.drawn import COMPANY_SEED, Prior
from ...modular_concepts.training.estimate import Estimate
from ...modular_concepts.training.loop import Cancelled, Keeping, Listeners, Unfinished
from ...modular_concepts.training.memory import memory_advice, ran_out_of_memory
from ...modular_concepts.training.ownership import checkpoints_in, checkpoints_to_come
from ...modular_concepts.training.problem import Examples
from ...modular_concepts.training.run import TrainResult
from ...modular_concepts.training.settings import TrainSettings
from ...modular_concepts.training.teach import (
    Subject,
    check_training,
    company_examples,
    concept_from,
    prior_examples,
    train_concept,
    trigger_of,
)
from ...modular_concepts.unread import TRAIN, find_unread
from ..messages import show_text
from .base import HostBase, draw
from .progress import Previews, Watch

# What the nodes call what the engine calls otherwise.
NODE_NAMES = {
    **{name: setting.widget_name for name, setting in {**TRAINING, **BESIDE_TRAINING}.items()},
    "accept_changes": "on_change",
}
PRIOR_SEED = 1000
PRIOR_STEPS = 12


@dataclass(frozen=True)
class Plan:
    """What a training in the host needs beside the engine's settings.

    prior_pictures: how many pictures of its own the base draws first, for prior preservation.
    company_pictures: how many of others, where the settings ask for company.
    preview_every, preview_prompts: see `progress.Previews`.
    resume: go on from the newest checkpoint of this name, where there is one; accept_changes: with other settings too.
    keep_latents: keep the pictures' latents on disk, for the next training on them.
    chosen: settings that a person chose, of which the node says those that this training does not read.
    notes: what else is to be said on the node all along.
    """

    subject: Subject
    settings: TrainSettings
    targets: Targets
    basis: OrthogonalBasis
    prior_pictures: int = 0
    preview_every: int = 0
    preview_prompts: tuple[str, ...] = ()
    resume: bool = False
    accept_changes: bool = False
    keep_latents: bool = False
    chosen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    company_pictures: int = COMPANY_PICTURES.default

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures, the first one's where they differ."""
        height, width = self.subject.pictures[0].shape[1:]
        return height, width

    @property
    def previews(self) -> Previews:
        return Previews(self.preview_every, self.preview_prompts, self.settings.seed, self.size)


@dataclass(frozen=True)
class Rates:
    """Step sizes of AdamW for the layers and for the learned word."""

    adapter: float
    token: float


def checked_name(name: str) -> str:
    """A concept's name that can be a trigger word and a file, or AdapterError."""
    name = name.strip()
    if safe_name(name) != name:
        raise AdapterError(
            f"name {name!r} cannot be a trigger word and a file; write it {safe_name(name)!r}, for instance"
        )
    check_token(trigger_of(name), (1, 1))
    return name


def subject_of(dataset: Dataset, name: str, class_word: str, description: str = "") -> Subject:
    """The data set under a name, its trigger for {concept} in captions.  Raises AdapterError for a bad name or word."""
    name, class_word = checked_name(name), " ".join(class_word.split())
    if not class_word:
        raise AdapterError("the class word is empty; say in the base's words what the concept is, such as man or dog")
    dataset = filled_in(dataset, (trigger_of(name),))
    return Subject(
        name,
        dataset.pictures,
        dataset.captions,
        class_word,
        dataset.masks,
        dataset.fingerprint,
        description.strip(),
        dataset.repeats,
    )


def settings_for(family: Family, rates: Rates, **chosen) -> TrainSettings:
    """The settings that a person chose, with ours for the rest.  Raises AdapterError for values that cannot work."""
    if chosen.get("method") == OWN_WORDS and family.denoiser.joint:
        raise AdapterError(
            f"{family.title} reads text and picture in one attention, so no layer hears a word alone; train an "
            "orthogonal concept on it"
        )
    ours: dict[str, Any] = dict(
        adapter_lr=rates.adapter,
        token_lr=rates.token,
        warmup=min(20, chosen["steps"] // 10),
        schedule="cosine",
        weight_decay=0.0,
        token_noise=family.token_noise,
    )
    return TrainSettings(**{**ours, **chosen})


def train_in_host(base: HostBase, plan: Plan) -> tuple[Concept, TrainResult]:
    """Train one concept on the host's loaded models, which stay bit for bit as they are.

    An interrupt keeps a checkpoint and a concept file NAME-cancelled-stepN, then goes on to the host.
    Raises AdapterError for what cannot work, most of it before anything is drawn or trained.
    """
    subject = plan.subject
    base = replace(base, class_words={subject.trigger: subject.class_word})
    check_training(base, subject, plan.settings, plan.targets)
    folder, notes = checkpoint_folder(subject.name), _notes(base, plan)

    def keep_learned(result: TrainResult) -> Path | None:
        return keep_unfinished(concept_from(base, subject, result, plan.basis, plan.targets), result)

    with base.trainable(), _allow_interrupts(), _advise_on_memory(plan.settings):
        subject = replace(subject, prior=_draw_prior(base, plan), company=_draw_company(base, plan))
        watch = Watch(plan.settings.steps, plan.previews, partial(draw, base), notes)
        resume = _find_checkpoint(folder, plan)
        keeping = Keeping(folder, resume, plan.accept_changes, not plan.resume, _find_cache(plan))
        listeners = Listeners(watch, partial(_announce, plan, notes), keep_learned)
        try:
            concept, result = train_concept(base, subject, plan.settings, plan.targets, listeners, keeping, plan.basis)
        except Changed as error:
            raise AdapterError(f"{error}; on_change set to go on resumes all the same") from error
        except Unfinished as error:
            place = keep_learned(error.result)
            raise AdapterError(f"{error} in {place}" if place else str(error)) from error
    if not result.finished:
        keep_unfinished(concept, result)
        # The flag is cleared when it is raised, by us or by whichever layer saw it first.
        comfy.model_management.interrupt_current_processing(False)
        raise comfy.model_management.InterruptProcessingException
    return concept, result


def _announce(plan: Plan, notes: Sequence[str], estimate: Estimate) -> None:
    """Time and memory, before the first step, and what was chosen and is not read.

    Raises AdapterError where there is no room for what will be written.
    """
    folder = checkpoint_folder(plan.subject.name)
    count = checkpoints_to_come(folder, plan.settings, estimate.done)
    check_room([(_find_concepts_folder(), estimate.concept_bytes), (folder, count * estimate.checkpoint_bytes)])
    logging.info("%s: %s", plan.subject.name, estimate)
    for sentence in notes:
        logging.warning("%s: %s", plan.subject.name, sentence)
    show_text("\n".join([*notes, str(estimate)]))


def _notes(base: HostBase, plan: Plan) -> list[str]:
    there = {
        "text_encoder": plan.targets.text_encoder is not None,
        "prior": plan.prior_pictures > 0,
        "company": plan.settings.company > 0,
        "checkpoints": True,
        "resume": plan.resume,
        NOISE: not isinstance(base.schedule, FlowSchedule),
    }
    present = [name for name, is_there in there.items() if is_there]
    chosen = [name for name in plan.chosen if name in TRAIN]
    chosen += ["accept_changes"] if plan.accept_changes else []
    return [
        *plan.notes,
        *_note_nothing_to_resume(plan),
        *_find_unused(base, plan),
        *find_unread(TRAIN, chosen, plan.settings.method, present, lambda name: NODE_NAMES.get(name, name)),
    ]


def _find_unused(base: HostBase, plan: Plan) -> list[str]:
    subject = plan.subject
    return find_unused(base, subject.captions, subject.trigger, plan.settings)


def _note_nothing_to_resume(plan: Plan) -> list[str]:
    if not plan.resume or checkpoints_in(checkpoint_folder(plan.subject.name)):
        return []
    return [f"resume is on, but there is no checkpoint of {plan.subject.name} yet, so it starts from the beginning"]


@contextmanager
def _advise_on_memory(settings: TrainSettings) -> Generator[None]:
    """Memory that runs out outside of the training's own steps, in the VAE for instance, as a sentence that helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        comfy.model_management.soft_empty_cache()
        raise AdapterError(f"memory ran out; {memory_advice(settings)}") from error


@contextmanager
def _allow_interrupts() -> Generator[None]:
    """A cancel outside of the training loop, as the host's own interrupt."""
    try:
        yield
    except Cancelled as cancelled:
        raise comfy.model_management.InterruptProcessingException from cancelled


def checkpoint_folder(name: str) -> Path:
    return Path(folder_paths.get_output_directory()) / "modular_concepts" / safe_name(name)


def latents_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "modular_concepts_latents"


def keep_unfinished(concept: Concept, result: TrainResult) -> Path | None:
    """Save what was learned as models/concepts/NAME-cancelled-stepN.safetensors, or, where that fails, elsewhere.

    None after no step, and where nothing can be written at all, which is said: the checkpoint may still be there.
    """
    if not result.step:
        return None
    path = free_name(_find_concepts_folder() / f"{safe_name(concept.name)}-cancelled-step{result.step}.safetensors")
    try:
        written = keep(partial(save_concept, concept), path, [checkpoint_folder(concept.name), *last_places()])
    except AdapterError as error:
        sentence = f"stopped after {result.step} steps; what was learned could not be written: {error}"
        logging.warning("%s: %s", concept.name, sentence)
        show_text(sentence)
        return None
    why = "" if written.fault is None else f", since {written.fault}"
    logging.info(
        "%s: stopped after %d steps; what was learned is in %s%s", concept.name, result.step, written.path, why
    )
    place = f"models/concepts/{written.path.name}" if written.fault is None else written.path
    show_text(f"stopped after {result.step} steps; what was learned is in {place}{why}")
    return written.path


def _find_concepts_folder() -> Path:
    return Path(folder_paths.get_folder_paths("concepts")[0])


def lora_of(concept: Concept) -> dict[str, Tensor]:
    """The adapters under kohya's names, as the host's own LoRA nodes take them (LORA_MODEL).

    Those of a concept for its own words have names as in files, of which these nodes say that they know none.
    """
    before = f"{OWN_WORDS}." if trained_for_words(concept) else ""
    return {
        f"{before}{key}": tensor
        for name, adapter in put_together(concept.layers).items()
        for key, tensor in layer_tensors(file_key(name, concept.recipe.architecture), adapter).items()
    }


def _draw_prior(base: HostBase, plan: Plan) -> Examples | None:
    if plan.prior_pictures < 1:
        return None
    prior = _drawing(plan, plan.prior_pictures, PRIOR_SEED)
    return prior_examples(base, prior, comfy.utils.ProgressBar(1).update_absolute, _find_cache(plan))


def _draw_company(base: HostBase, plan: Plan) -> Company | None:
    if not plan.settings.company:
        return None
    drawing = _drawing(plan, plan.company_pictures, COMPANY_SEED)
    bar = comfy.utils.ProgressBar(1)
    return company_examples(base, plan.subject, drawing, bar.update_absolute, _find_cache(plan))


def _drawing(plan: Plan, count: int, seed: int) -> Prior:
    """What the base draws by itself, in the size of the pictures."""
    height, width = plan.size
    return Prior(
        plan.subject.class_word, count, seed, SampleSettings(steps=PRIOR_STEPS, height=height, width=width), draw
    )


def _find_cache(plan: Plan) -> Path | None:
    return latents_folder() if plan.keep_latents else None


def _find_checkpoint(folder: Path, plan: Plan) -> Path | None:
    """The checkpoint to go on from; the training itself puts aside what is another's."""
    return newest_checkpoint(folder) if plan.resume and checkpoints_in(folder) else None
