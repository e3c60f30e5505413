"""The headless face: demo, pictures, train, merge, sample, inspect, export.

Every command reads its arguments, calls the engine once and says what it wrote.  A fault that a person can
mend is one sentence on the error stream and exit code 2.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__
from .cli_merging import add_export, add_inspect, add_merge
from .cli_paths import base_named, check_output, concepts_at, folder, note
from .cli_training import add_training_options, chosen_preset
from .errors import AdapterError
from .files.safe import safe_name

EXTRA = ("diffusers", "transformers", "tqdm", "matplotlib", "PIL")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, 2 for a fault that a person can mend, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except AdapterError as error:
        return _fault(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        return _fault(
            f"{error.name} is not installed; install the headless extra: pip install 'modular-concepts[headless]'"
        )
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fault(f"{place}{error.strerror or error}; check the path, and that the disk has room")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _fault(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


# --- commands -----------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> None:
    from .toy.demo import Steps, run_demo
    from .toy.judges import load_judges

    out = folder(args.out)
    report = run_demo(base_named("toy"), load_judges(), out, Steps(print, _Bar))
    print((out / "report.md").read_text(encoding="utf-8"))
    print(f"pictures and figures are in {out} ({report['seconds']:.0f} s)")


def _pictures(args: argparse.Namespace) -> None:
    from .files.safe import replacing
    from .toy.report import to_image
    from .toy.standard import BY_NAME, pictures_of

    if args.concept not in BY_NAME:
        raise AdapterError(f"there is no standard concept {args.concept!r}; choose one of {', '.join(BY_NAME)}")
    out = folder(args.out or Path("pictures") / args.concept)
    pictures, captions = pictures_of(BY_NAME[args.concept])
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        with replacing(out / f"{number:02d}.png") as file:
            to_image(picture).save(file, "PNG")
        with replacing(out / f"{number:02d}.txt") as file:
            file.write(caption.encode())
    print(f"wrote {len(pictures)} pictures with captions to {out}; train on them with")
    concept = BY_NAME[args.concept]
    told = f' --description "{concept.description}"' if concept.description else ""
    word = concept.class_word or "style"
    print(f"  python -m modular_concepts train {out} --name {args.concept} --class-word {word}{told} --slot 0")


def _train(args: argparse.Namespace) -> None:
    from .bases import OrthogonalBasis
    from .customisation import Subject, Targets, check_training, concept_from, train_concept, trigger_of
    from .dataset import filled_in, load_folder
    from .files.concept import save_concept
    from .files.modelspec import dated
    from .toy.demo import SETTINGS, UNDESCRIBED
    from .toy.presets import on_toy_base
    from .training import TrainSettings, Unfinished, check_checkpoint

    name = safe_name(args.name)
    out = args.out or Path("concepts") / f"{name}.safetensors"
    check_output(out)
    if args.checkpoints:
        folder(args.checkpoints, "--checkpoints")
    base = base_named(args.base)
    toy = base.architecture == "toy"
    usual = (SETTINGS if args.description else UNDESCRIBED) if toy else TrainSettings()
    preset = chosen_preset(args, usual, lambda own: on_toy_base(own, described=bool(args.description)) if toy else own)
    settings = _settings(preset.settings, name=name)
    if args.checkpoints:
        settings = _settings(settings, checkpoint_every=args.checkpoint_every)
    height, width = args.size or base.size
    if height % base.multiple or width % base.multiple:
        raise AdapterError(
            f"training size {width}x{height} does not fit this base; choose multiples of {base.multiple}"
        )
    trigger = trigger_of(name)
    template = "a {concept}" if toy else "a photo of {concept}"
    data = load_folder(
        args.pictures, (height, width), (trigger,), template=template, buckets=args.buckets, multiple=base.multiple
    )
    data = filled_in(data, (trigger,))
    captions = [text.replace("<TOK>", trigger) for text in data.captions]
    subject = Subject(
        name,
        data.pictures,
        captions,
        args.class_word,
        data.masks,
        data.fingerprint,
        args.description,
        data.repeats,
    )
    targets = Targets(preset.targets, preset.text_encoder_targets)
    check_training(base, subject, settings, targets)
    if args.resume:
        check_checkpoint(args.resume)
    prior, basis = _prior(base, args.class_word, preset.prior, height, width), OrthogonalBasis()
    fault = None
    try:
        with _Bar(f"train {name} ({settings.method})", settings.steps) as advance, _Interruption() as interrupted:

            def after_step(at) -> bool:
                advance(at.step)
                return interrupted()

            concept, result = train_concept(
                base,
                subject,
                settings,
                targets,
                basis,
                after_step,
                args.checkpoints,
                args.resume,
                prior,
                accept_changes=args.accept_changes,
                cache=args.cache,
                estimate=print,
            )
    except Unfinished as error:
        fault, result = error, error.result
        concept = concept_from(base, subject, result, basis, targets)
    if not result.finished:
        out = out.with_name(f"{out.stem}-step{result.step}.safetensors")
    if result.losses:
        folder(out.parent)
        save_concept(dated(concept), out, compact=args.compact)
        print(f"wrote {out}: {_what_learned(concept)}, last loss {result.losses[-1]:.4f}")
    if fault is not None:
        raise AdapterError(f"{fault}" + (f" in {out}" if result.losses else "")) from fault
    if not result.finished:
        raise KeyboardInterrupt


def _what_learned(concept) -> str:
    ranks = sorted({adapter.rank for adapter in concept.layers.values()})
    if not ranks:
        return f"{' '.join(concept.tokens)}, no layers"
    if all(adapter.kind == "full" for adapter in concept.layers.values()):
        return f"{len(concept.layers)} layers in full"
    return f"{len(concept.layers)} layers of rank {ranks[-1]}"


def _prior(base, class_word: str, count: int, height: int, width: int):
    """Pictures of the base's own for prior preservation, in the training's size, or None."""
    from .customisation import prior_examples
    from .sampling import SampleSettings

    if count < 1:
        return None
    settings = SampleSettings(steps=12, height=height, width=width, batch=24)
    with _Bar("draw what the base knows", settings.steps * -(-count // settings.batch)) as advance:
        return prior_examples(base, class_word, count, 1000, settings, lambda done, total: advance(done))


def _sample(args: argparse.Namespace) -> None:
    from .customisation import customised
    from .explain import warnings_on_base
    from .files.safe import replacing
    from .sampling import SampleSettings, sample
    from .toy.report import to_image

    check_output(args.out)
    base = base_named(args.base)
    concepts, strengths, _ = concepts_at(args.concept or [])
    for sentence in warnings_on_base(concepts, base.hash, base.sample):
        note(sentence)
    settings = SampleSettings(args.steps, args.cfg, args.height, args.width, args.negative)
    height = base.size[0] if args.height is None else args.height
    width = base.size[1] if args.width is None else args.width
    regions = [_region(text, width, height) for text in args.region or []]
    prompts = [args.prompt] * args.count
    seeds = [args.seed + number for number in range(args.count)]
    bar = _Bar("sample", args.steps * -(-args.count // settings.batch))
    texts, triggers = (
        [args.prompt, *(region.prompt for region in regions)],
        [word for concept in concepts for word in concept.tokens],
    )
    _warn_unknown(base, texts, triggers)
    if regions and args.mode == "gated":
        how = dict(mode="gated", stack=list(zip(concepts, strengths, strict=True)))
        with bar as advance:
            pictures = sample(base, prompts, seeds, None, settings, regions, lambda done, _: advance(done), **how)
    else:
        with bar as advance, customised(base, concepts, strengths) as tokens:
            pictures = sample(base, prompts, seeds, tokens, settings, regions, lambda done, _: advance(done))
    folder(args.out.parent)
    for number, picture in enumerate(pictures):
        path = args.out if args.count == 1 else args.out.with_stem(f"{args.out.stem}-{number:02d}")
        image = to_image(picture)
        if args.zoom > 1:
            image = image.resize((image.width * args.zoom, image.height * args.zoom), 0)
        with replacing(path) as file:
            image.save(file, "PNG")
        print(f"wrote {path} (seed {seeds[number]})")


# --- reading arguments --------------------------------------------------------------------------------------


def _settings(preset, **changes):
    from dataclasses import replace

    return replace(preset, **changes)


def _region(text: str, width: int, height: int):
    from .regions.geometry import Region, fractions

    box, colon, prompt = text.partition(":")
    try:
        numbers = [float(number) for number in box.split(",")]
    except ValueError:
        numbers = []
    if not colon or len(numbers) != 4 or not prompt.strip():
        raise AdapterError(f"region {text!r} is not LEFT,TOP,RIGHT,BOTTOM:PROMPT, as in 0,0,0.5,1:a <tom> on the beach")
    return Region(prompt.strip(), fractions(numbers, width, height))


def _warn_unknown(base, prompts: Sequence[str], triggers: Sequence[str]) -> None:
    unknown = sorted({word for prompt in prompts for word in base.unknown_words(prompt, triggers)})
    if unknown:
        note(f"the base does not know {', '.join(unknown)}; these words change nothing")


class _Interruption:
    """Within the block the first Ctrl-C is only noted, so that a step is finished; the second one acts at once."""

    def __enter__(self) -> _Interruption:
        self.asked = False
        self.in_main = threading.current_thread() is threading.main_thread()
        if self.in_main:
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_main:
            signal.signal(signal.SIGINT, self.before)

    def __call__(self) -> bool:
        return self.asked

    def _note(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        print("stopping after this step; once more to stop at once", file=sys.stderr)


class _Bar:
    """A progress bar that appears with the first step; call it with the amount done so far."""

    def __init__(self, text: str, total: int):
        self.text, self.total, self.bar = text, total, None

    def __call__(self, done: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=self.total, desc=self.text, dynamic_ncols=True, mininterval=0.5)
        self.bar.update(done - self.bar.n)
        if done >= self.total:
            self.bar.close()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


class _Parser(argparse.ArgumentParser):
    """argparse, with faults in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        return int(height), int(width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as in 512x512") from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="modular_concepts", description="Train concepts apart, sum them, draw them together.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="three concepts trained, summed, drawn and judged on the toy base")
    demo.add_argument("--out", type=Path, default=Path("demo_output"))
    demo.set_defaults(run=_demo)

    pictures = commands.add_parser("pictures", help="write the 16 pictures of a standard toy concept, to train on")
    pictures.add_argument("concept")
    pictures.add_argument("--out", type=Path, help="folder (default pictures/CONCEPT)")
    pictures.set_defaults(run=_pictures)

    train = commands.add_parser("train", help="a folder of pictures, optional captions and masks -> a concept file")
    train.add_argument("pictures", type=Path, help="folder: NAME.png, optional NAME.txt and NAME.mask.png")
    train.add_argument("--name", required=True, help="the concept's name; its trigger word is <NAME>")
    train.add_argument("--class-word", required=True, help="what the base calls it: man, dog, ...")
    train.add_argument(
        "--description",
        default="",
        metavar="WORDS",
        help="what it looks like, in words that the base knows, such as 'man red shirt brown hair': the learned word "
        "starts there (default: from the class word)",
    )
    train.add_argument("--out", type=Path, help="concept file (default concepts/NAME.safetensors)")
    train.add_argument("--base", default="toy", help="toy, or a diffusers folder")
    add_training_options(train)
    train.add_argument("--size", type=_size, help="WIDTHxHEIGHT to train at (default: the base's own)")
    train.add_argument(
        "--buckets", action="store_true", help="keep each picture's aspect, at sizes of about the same area"
    )
    train.add_argument("--cache", type=Path, metavar="DIR", help="folder to keep the pictures' latents in")
    train.add_argument("--compact", action="store_true", help="leave the frozen factors out of the file")
    train.add_argument("--checkpoints", type=Path, help="folder for checkpoints")
    train.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    train.add_argument("--resume", type=Path, help="a checkpoint, or a folder for its newest")
    train.add_argument(
        "--accept-changes", action="store_true", help="resume although pictures, captions, base or settings changed"
    )
    train.set_defaults(run=_train)

    add_merge(commands)

    sample = commands.add_parser("sample", help="draw a prompt with any number of concepts and regions")
    sample.add_argument("prompt")
    sample.add_argument("--concept", action="append", metavar="FILE[:STRENGTH]")
    sample.add_argument("--region", action="append", metavar="LEFT,TOP,RIGHT,BOTTOM:PROMPT", help="pixels or fractions")
    sample.add_argument(
        "--mode",
        choices=["gated", "merged"],
        default="gated",
        help="with regions: a concept acts in those alone that call it (gated), or everywhere (merged)",
    )
    sample.add_argument("--out", type=Path, default=Path("sample.png"))
    sample.add_argument("--base", default="toy")
    sample.add_argument("--negative", default="")
    sample.add_argument("--width", type=int)
    sample.add_argument("--height", type=int)
    sample.add_argument("--steps", type=int, default=20)
    sample.add_argument("--cfg", type=float, default=4.0)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--count", type=_count, default=1)
    sample.add_argument("--zoom", type=_count, default=1, help="enlarge the file, each pixel to ZOOM x ZOOM")
    sample.set_defaults(run=_sample)

    add_inspect(commands)
    add_export(commands)
    return parser
