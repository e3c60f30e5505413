"""The command that trains: a folder of pictures becomes a concept file."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import AdapterError
from ..families.toy import TOY
from ..settings.training import BUCKETS, CHECKPOINTED, NOISE, ONE_ROW, TOKEN_STARTS
from ..typed import read_whole
from .declared import add_option
from .options import add_checkpoint_every, add_training_options, choose_preset
from .paths import (
    add_overwrite,
    base_named,
    check_concept_output,
    check_folder_place,
    check_name,
    note,
    note_repeated,
    read_file,
    read_path,
    say,
    take_free_names,
)
from .progress import Bar, Interruption

if TYPE_CHECKING:
    from ..adapters.basis import OrthogonalBasis
    from ..models.base import BaseModel
    from ..models.targets import Targets
    from ..storage.keeping import Kept
    from ..training.estimate import Estimate
    from ..training.presets import Preset
    from ..training.run import TrainResult
    from ..training.settings import TrainSettings
    from ..training.teach import Subject


def add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="a folder of pictures, optional captions and masks -> a concept file",
        description="Train one concept on a folder of pictures, with captions and masks where there are any, and write "
        "it as a file that merge, sample and other programs read.",
    )
    train.add_argument("pictures", type=read_path, help="folder: NAME.png, optional NAME.txt and NAME.mask.png")
    train.add_argument("--name", required=True, help="the concept's name; its trigger word is <NAME>")
    train.add_argument("--class-word", required=True, help="what the base calls it: man, dog, ...")
    train.add_argument(
        "--description",
        type=str.strip,
        default="",
        metavar="WORDS",
        help="what it looks like, in words that the base knows, such as 'man red shirt brown hair': the learned word "
        "starts there (default: from the class word)",
    )
    train.add_argument("--out", type=read_file, help="concept file (default concepts/NAME.safetensors)")
    add_overwrite(train)
    train.add_argument("--base", default=TOY.name, help="toy (default), or a diffusers folder")
    add_training_options(train)
    train.add_argument("--size", type=_read_size, help="WIDTHxHEIGHT to train at (default: the base's own)")
    add_option(train, BUCKETS, default=False, usual="", action="store_true")
    train.add_argument("--cache", type=read_path, metavar="DIR", help="folder to keep the pictures' latents in")
    train.add_argument("--compact", action="store_true", help="leave the frozen factors out of the file")
    train.add_argument(
        "--checkpoints", type=read_path, help="folder for checkpoints (default none: the training cannot be resumed)"
    )
    add_checkpoint_every(train)
    train.add_argument("--resume", type=read_path, help="a checkpoint, or a folder for its newest")
    train.add_argument(
        "--accept-changes", action="store_true", help="resume although pictures, captions, base or settings changed"
    )
    train.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> None:
    from ..adapters.basis import OrthogonalBasis
    from ..models.targets import Targets
    from ..training.teach import check_training

    name = check_name(args.name)
    out = args.out or Path("concepts") / f"{name}.safetensors"
    _check_places(args, out)
    base = base_named(args.base)
    preset, settings = _choose_settings(args, base, name)
    size = _choose_size(args, base, settings)
    subject = _load_subject(args, base, preset, settings, size)
    targets = Targets(preset.targets, preset.text_encoder_targets)
    check_training(base, subject, settings, targets)
    resumed = args.resume is not None and out.exists()
    if resumed and not args.overwrite and not _is_of_this_training(out, args.resume, subject, base):
        raise AdapterError(
            f"{out} is there already and not of the training that is resumed: its class word, description, settings, "
            "pictures or base are others; choose another --out, or replace it with --overwrite"
        )
    subject = replace(subject, prior=_prior(base, args.class_word, preset.prior, *size))
    if settings.company:
        subject = replace(subject, company=_company(base, subject, preset.company_pictures, size, args.cache))
    _teach(args, Lesson(base, subject, settings, targets, OrthogonalBasis()), out, args.overwrite or resumed)


class Lesson(NamedTuple):
    """What one training is of; see `training.teach.train_concept`."""

    base: BaseModel
    subject: Subject
    settings: TrainSettings
    targets: Targets
    basis: OrthogonalBasis


def _check_places(args: argparse.Namespace, out: Path) -> None:
    """Refuse, before anything is loaded, what cannot be read or written."""
    from ..storage.names import resolved
    from ..training.checkpoint import check_checkpoint
    from ..training.ownership import PATTERN

    # Whether it holds the training that is resumed can be told once the pictures are read.
    check_concept_output(out, args.overwrite or args.resume is not None)
    if args.resume:
        check_checkpoint(args.resume)
    if args.checkpoints:
        _check_checkpoints(args)
    if args.cache:
        check_folder_place(args.cache, "--cache")
    if args.checkpoints and PATTERN.fullmatch(out.name) and resolved(out).parent == resolved(args.checkpoints):
        raise AdapterError(f"{out} is what a checkpoint there is called; choose another --out")
    for option, place in (("--checkpoints", args.checkpoints), ("--cache", args.cache)):
        if place is not None and resolved(out) in (resolved(place), *resolved(place).parents):
            raise AdapterError(
                f"{out} would be the concept's file, and {option} {place} a folder there; choose another {option}"
            )


def _choose_settings(args: argparse.Namespace, base: BaseModel, name: str) -> tuple[Preset, TrainSettings]:
    from ..toy.presets import SETTINGS, UNDESCRIBED, on_toy_base
    from ..training.settings import TrainSettings

    toy = base.architecture == TOY.name
    usual = (SETTINGS if args.description else UNDESCRIBED) if toy else TrainSettings()
    preset = choose_preset(args, usual, lambda own: on_toy_base(own, described=bool(args.description)) if toy else own)
    settings = replace(preset.settings, name=name)
    return preset, replace(settings, checkpoint_every=_choose_interval(args)) if args.checkpoints else settings


def _choose_size(args: argparse.Namespace, base: BaseModel, settings: TrainSettings) -> tuple[int, int]:
    """(height, width) of the pictures, if the base and the memory can take them."""
    from ..models.budget import check_pictures

    height, width = args.size or base.size
    if height % base.multiple or width % base.multiple:
        raise AdapterError(
            f"training size {width}x{height} does not fit this base; choose multiples of {base.multiple}"
        )
    check_pictures(base, width, height, 1, training=True)
    if settings.company:
        _check_canvas(base, width, height)
    return height, width


def _check_canvas(base: BaseModel, width: int, height: int) -> None:
    from ..models.budget import check_pictures

    try:
        check_pictures(base, 2 * width, height, 1, training=True)
    except AdapterError as error:
        raise AdapterError(
            f"--company trains on pictures twice as wide, and {error}; or leave --company away"
        ) from error


def _load_subject(
    args: argparse.Namespace, base: BaseModel, preset: Preset, settings: TrainSettings, size: tuple[int, int]
) -> Subject:
    """The folder's pictures as what is taught; what was left out, and what is not used, is noted."""
    from ..data.dataset import filled_in, load_folder, refuse_single
    from ..models.prompts import unheard_of
    from ..training.caption_checks import find_unused
    from ..training.teach import Subject, trigger_of

    trigger = trigger_of(settings.name)
    template = "a {concept}" if base.architecture == TOY.name else "a photo of {concept}"
    data = load_folder(args.pictures, size, (trigger,), template=template, buckets=args.buckets, multiple=base.multiple)
    note_repeated(args)
    captions = filled_in(data, (trigger,)).captions
    unheard = unheard_of(base, captions, {trigger: settings.token_vectors}, "caption")
    unused = find_unused(base, captions, trigger, settings, lambda name: f"--{name.replace('_', '-')}")
    for sentence in [*_find_unread(args, settings.method, preset, base), *unheard, *unused]:
        note(sentence)
    say(data.report.summary())
    for remark in data.report.remarks():
        note(remark)
    refuse_single(data)
    data = filled_in(data, (trigger,))
    return Subject(
        settings.name,
        data.pictures,
        data.captions,
        args.class_word,
        data.masks,
        data.fingerprint,
        args.description,
        data.repeats,
    )


def _teach(args: argparse.Namespace, lesson: Lesson, out: Path, replaces: bool) -> None:
    """Train, and keep what was learned whatever becomes of it.

    replaces: whether a file that is there by then may be replaced.
    """
    from ..files.modelspec import dated
    from ..training.checkpoint import Changed
    from ..training.loop import Keeping, Listeners, Unfinished
    from ..training.ownership import Occupied
    from ..training.teach import concept_from, train_concept

    settings, broken = lesson.settings, []
    fault = None
    with Bar(f"train {settings.name} ({settings.method})", settings.steps) as advance, Interruption() as interrupted:

        def after_step(at) -> bool:
            advance(at.step)
            return interrupted()

        try:
            concept, result = train_concept(
                lesson.base,
                lesson.subject,
                settings,
                lesson.targets,
                Listeners(after_step, partial(_announce, args, out, settings), broken.append),
                Keeping(args.checkpoints, args.resume, args.accept_changes, args.overwrite, args.cache),
                lesson.basis,
            )
        except Changed as error:
            raise _explain_changed(error, args, lesson) from error
        except Occupied as error:
            raise _explain_occupied(error, args.checkpoints) from error
        except Unfinished as error:
            fault, result = error, error.result
        except Exception as error:
            if not broken:
                raise
            (result,) = broken
            fault = _explain_unexpected(error, result)
        interrupted.hold()
        if fault is not None:
            concept = concept_from(lesson.base, lesson.subject, result, lesson.basis, lesson.targets)
        written = _keep(args, dated(concept), result, out, replaces) if result.step else None
    _end(args, result, written, fault)


def _keep(args: argparse.Namespace, concept, result: TrainResult, out: Path, replaces: bool) -> Kept:
    """Write what was learned: where it was to be, or, if that fails, wherever it can be."""
    from ..files.concept import save_concept
    from ..storage.keeping import free_name, keep, last_places

    if not result.finished:
        out, replaces = out.with_name(f"{out.stem}-step{result.step}.safetensors"), args.overwrite
        out = out if replaces else free_name(out)
    places = [*filter(None, [args.checkpoints]), *last_places()]
    with take_free_names(replaces):
        written = keep(lambda path: save_concept(concept, path, compact=args.compact), out, places)
    say(f"wrote {written.path}: {_say_learned(concept)}, last loss {result.losses[-1]:.4f}")
    return written


def _end(args: argparse.Namespace, result: TrainResult, kept: Kept | None, fault: AdapterError | None) -> None:
    """Raise what there is to say of a training that did not end as it should."""
    from ..training.loop import Diverged

    misplaced = None if kept is None or kept.fault is None else kept
    if fault is not None:
        place = f" in {kept.path}" if kept else ""
        rates = ". The learning rates are --adapter-lr and --token-lr" if isinstance(fault, Diverged) else ""
        raise AdapterError(f"{fault}{place}{rates}{f', for {misplaced.fault}' if misplaced else ''}") from fault
    if misplaced is not None:
        fault, path = misplaced.fault, misplaced.path
        raise AdapterError(f"{fault}. What was learned is in {path} instead") from fault
    if not result.finished:
        raise KeyboardInterrupt


def _choose_interval(args: argparse.Namespace) -> int:
    return CHECKPOINTED if args.checkpoint_every is None else args.checkpoint_every


def _find_unread(args: argparse.Namespace, method: str, preset, base) -> list[str]:
    """A sentence for each option that was typed and that this training does not read."""
    from ..unread import TRAIN, find_unread

    typed = [name for name in TRAIN if getattr(args, name, None) not in (None, False, "")]
    alone = len(base.word_rows(args.description or args.class_word)) == 1
    there = {
        "text_encoder": bool(preset.text_encoder_targets),
        "prior": preset.prior > 0,
        "company": preset.settings.company > 0,
        "checkpoints": args.checkpoints is not None,
        "resume": args.resume is not None,
        NOISE: True,
        ONE_ROW: alone and preset.settings.token_start == TOKEN_STARTS[0],
    }
    present = [name for name, is_there in there.items() if is_there]
    late = args.warmup is not None and args.warmup >= preset.settings.steps
    never = f"--warmup {args.warmup} is no shorter than --steps, so no rate is ever reached in full"
    sentences = [never] if late else []
    rates = [preset.settings.token_lr, *([] if method == "words" else [preset.settings.adapter_lr])]
    if not any(rates):
        sentences.append("all learning rates are 0, so nothing is learned; leave --token-lr or --adapter-lr away")
    return sentences + find_unread(TRAIN, typed, method, present, lambda name: f"--{name.replace('_', '-')}")


def _explain_unexpected(error: Exception, result: TrainResult) -> AdapterError:
    reason = " ".join(str(error).split())[:300]
    kind = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return AdapterError(
        f"an unexpected fault after step {result.step} ({kind}). What was learned up to step {result.step} is kept"
    )


def _explain_changed(error: AdapterError, args: argparse.Namespace, lesson: Lesson) -> AdapterError:
    """With the option that makes the difference, and the way on."""
    from ..training.checkpoint import checkpoint_settings, checkpoint_step
    from ..training.settings import changes

    settings, before = lesson.settings, checkpoint_settings(args.resume)
    differing = changes(before, settings.decisive())
    if len(differing) == 1 and before.get("steps") == checkpoint_step(args.resume) < settings.steps:
        return AdapterError(
            f"{error}; that training is finished, and --accept-changes trains on to step {settings.steps}, not as "
            f"one of {settings.steps} steps from the start would have"
        )
    otherwise = argparse.Namespace(**{**vars(args), "description": "" if args.description else args.class_word})
    _, other = _choose_settings(otherwise, lesson.base, settings.name)
    if len(changes(before, other.decisive())) < len(differing):
        now = "--description is there, and was not" if args.description else "--description was there, and is not"
        return AdapterError(
            f"{now}, by which other settings are usual here: {error}; --accept-changes resumes all the same"
        )
    return AdapterError(f"{error}; --accept-changes resumes all the same")


def _explain_occupied(error, checkpoints: Path) -> AdapterError:
    """With the ways out that the shell has."""
    if not error.movable:
        return AdapterError(str(error))
    return AdapterError(
        f"{error}: --resume {checkpoints}, another --checkpoints, or --overwrite, which moves them to "
        f"{checkpoints / 'before'}"
    )


def _check_checkpoints(args: argparse.Namespace) -> None:
    """Refuse another training's folder before the base is loaded; say what will be moved."""
    from ..training.ownership import BEFORE, Occupied, check_folder, checkpoints_in

    check_folder_place(args.checkpoints, "--checkpoints")
    try:
        check_folder(args.checkpoints, args.resume)
    except Occupied as error:
        if not (args.overwrite and error.movable):
            raise _explain_occupied(error, args.checkpoints) from error
        there = str(error).partition(";")[0]
        place = args.checkpoints / BEFORE
        instead = ", in the place of those of a training that was finished" if checkpoints_in(place) else ""
        note(f"{there}; they move to {place}{instead}")


def _announce(args: argparse.Namespace, out: Path, settings: TrainSettings, estimate: Estimate) -> None:
    """Say what the training will take, and refuse what this machine does not have."""
    from ..models.budget import machine_memory
    from ..storage.keeping import check_room
    from ..training.ownership import checkpoints_to_come

    room = machine_memory()
    if room is not None and estimate.memory_bytes > room:
        raise AdapterError(
            f"this training would take about {estimate.memory_bytes / 2**30:.3g} GiB of memory beside the model, and "
            f"this machine has {room / 2**30:.3g} GiB; lower --batch or --size, or add --gradient-checkpointing"
        )
    needs = [(out.parent, estimate.concept_bytes)]
    if args.checkpoints:
        count = checkpoints_to_come(args.checkpoints, settings, estimate.done)
        needs.append((args.checkpoints, count * estimate.checkpoint_bytes))
    check_room(needs)
    say(str(estimate))


def _is_of_this_training(out: Path, checkpoint: Path, subject, base) -> bool:
    """Whether a concept file came from the training that a checkpoint is of: settings, pictures and base."""
    from ..files.concept import load_concept
    from ..training.checkpoint import checkpoint_settings

    try:
        recipe = load_concept(out).recipe
    except AdapterError:
        return False
    settings = checkpoint_settings(checkpoint) | {"description": subject.description}
    same = {name: recipe.training.get(name) for name in settings} == settings
    same = same and recipe.class_word == subject.class_word
    return same and (recipe.base_hash, recipe.origin.get("fingerprint")) == (base.hash, subject.fingerprint)


def _say_learned(concept) -> str:
    ranks = sorted({adapter.rank for adapter in concept.layers.values()})
    if not ranks:
        return f"{' '.join(concept.tokens)}, no layers"
    if all(adapter.kind == "full" for adapter in concept.layers.values()):
        return f"{len(concept.layers)} layers in full"
    return f"{len(concept.layers)} layers of rank {ranks[-1]}"


def _prior(base, class_word: str, count: int, height: int, width: int):
    """Pictures of the base's own for prior preservation, in the training's size, or None."""
    from ..sampling import SampleSettings
    from ..training.teach import Prior, prior_examples

    if count < 1:
        return None
    settings = SampleSettings(steps=12, height=height, width=width, batch=24)
    with Bar("draw what the base knows", settings.steps * -(-count // settings.batch)) as advance:
        return prior_examples(base, Prior(class_word, count, 1000, settings), lambda done, total: advance(done))


def _company(base, subject: Subject, count: int, size: tuple[int, int], cache: Path | None):
    """Others whom the base draws, in the training's size."""
    from ..sampling import SampleSettings
    from ..training.drawn import COMPANY_SEED, Prior
    from ..training.teach import company_examples

    height, width = size
    settings = SampleSettings(steps=12, height=height, width=width, batch=24)
    drawing = Prior(subject.class_word, count, COMPANY_SEED, settings)
    with Bar("draw company", settings.steps * -(-count // settings.batch)) as advance:
        return company_examples(base, subject, drawing, lambda done, total: advance(done), cache)


def _read_size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().replace("×", "x").partition("x")
    try:
        return read_whole(height), read_whole(width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as in 512x512") from error
