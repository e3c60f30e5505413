"""The headless face: demo, pictures, train, merge, sample, inspect, export.

Every command reads its arguments, calls the engine once and says what it wrote.  A fault that a person can
mend is one sentence on the error stream and exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..errors import AdapterError, cut_in_the_middle, in_one_line, listed
from ..families.toy import TOY
from ..toy.vocabulary import STANDARD_NAMES
from ..typed import read_number, read_whole
from .environment import explain_variables, ignore_unusable_bars
from .merge import add_export, add_inspect, add_merge
from .paths import (
    add_overwrite,
    base_named,
    folder,
    note,
    note_repeated,
    read_path,
    refuse_existing,
    say,
    take_free_names,
)
from .progress import Bar, Interrupts, close_bars
from .sample import add_sample
from .train import add_train

# What other programs call an option -> what it is called here.
ELSEWHERE = {
    **dict.fromkeys(("lr", "learning-rate", "unet-lr"), "--adapter-lr"),
    **dict.fromkeys(("network-dim", "lora-rank", "dim"), "--rank"),
    **dict.fromkeys(("network-alpha", "lora-alpha"), "--alpha"),
    **dict.fromkeys(("max-train-steps", "num-train-steps", "num-inference-steps", "sampling-steps"), "--steps"),
    **dict.fromkeys(("train-batch-size", "batch-size"), "--batch"),
    **dict.fromkeys(("batch-count", "n-iter", "num-images"), "--count"),
    **dict.fromkeys(("cfg-scale", "guidance-scale"), "--cfg"),
    **dict.fromkeys(("output", "output-name", "output-dir", "o"), "--out"),
    **dict.fromkeys(("pretrained-model-name-or-path", "model", "ckpt", "checkpoint"), "--base"),
    **dict.fromkeys(("lora", "loras"), "--concept"),
    **dict.fromkeys(("instance-prompt", "trigger"), "--name"),
    "resolution": "--size",
    "class-prompt": "--class-word",
    "num-class-images": "--prior",
    "noise-offset-strength": "--noise-offset",
    "min-snr-gamma": "--min-snr",
    "lr-scheduler": "--schedule",
    "lr-warmup-steps": "--warmup",
    "mixed-precision": "--precision",
    "neg": "--negative",
}
EXTRA = ("diffusers", "transformers", "tqdm", "matplotlib", "PIL")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, 2 for a fault that a person can mend, 130 when interrupted."""
    with Interrupts() as interrupts:
        try:
            return _run(arguments)
        except KeyboardInterrupt:
            interrupts.end()
            return _report_stop()
        except Warning as warning:  # a library's, as Python was told to raise
            return _report_fault(
                f"a library's warning ended this, for PYTHONWARNINGS or -W says error; leave that ({warning!s:.200})"
            )
        except Exception as error:
            if interrupts.asked:  # a library's own words for what Ctrl-C did to it
                interrupts.end()
                return _report_stop()
            if blamed := explain_variables(error):
                return _report_fault(blamed)
            raise


def _report_stop() -> int:
    close_bars()
    print("stopped", file=sys.stderr)
    return 130


def _run(arguments: Sequence[str] | None) -> int:
    args = _parser().parse_args(arguments)
    if sys.flags.optimize > 1:
        return _report_fault(
            "Python runs with -OO or PYTHONOPTIMIZE=2, which takes away what transformers reads; leave it"
        )
    for sentence in ignore_unusable_bars():
        note(sentence)
    try:
        args.run(args)
    except AdapterError as error:
        return _report_fault(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        return _report_fault(
            f"{error.name} is not installed; install the headless extra: pip install 'modular-concepts[headless]'"
        )
    except RuntimeError as error:
        if not re.match(r"Failed to import (diffusers|transformers)", str(error)):
            raise
        return _report_fault(_explain_import(str(error)))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _report_fault(f"{place}{error.strerror or error}; {_way_out(error)}")
    return 0


def _way_out(error: OSError) -> str:
    ways = {
        errno.ENAMETOOLONG: "give a shorter one",
        errno.EACCES: "look at its permissions, or take another",
        errno.EPERM: "look at its permissions, or take another",
        errno.ENOSPC: "make room on the disk",
    }
    return ways.get(error.errno or 0, "check the path, and that the disk has room")


def _explain_import(said: str) -> str:
    """A sentence for a library that is there and cannot be imported."""
    library = re.findall(r"\w+", said)[3]  # "Failed to import diffusers.pipelines because ..."
    reason = " ".join(said.splitlines()[-1].split())[:200]
    return f"{library} is installed but cannot be imported ({reason}); install the versions in requirements/lock.txt"


def _report_fault(sentence: str) -> int:
    print(f"error: {in_one_line(_shorten(sentence))}", file=sys.stderr)
    return 2


def _shorten(sentence: str) -> str:
    return re.sub(r"\S{250,}", lambda word: cut_in_the_middle(word[0], 120), sentence)


# --- commands -----------------------------------------------------------------------------------------------


def _make_demo(args: argparse.Namespace) -> None:
    from ..toy.demo import Steps, run_demo
    from ..toy.judges import load_judges

    if not args.overwrite:
        _keep_persons_files(args.out)
    note_repeated(args)
    out = folder(args.out)
    report = run_demo(base_named(TOY.name), load_judges(), out, Steps(print, Bar))
    print((out / "report.md").read_text(encoding="utf-8"))
    say(f"pictures and figures are in {out} ({report['seconds']:.0f} s)")


def _keep_persons_files(out: Path) -> None:
    """Refuse to replace what no demo has written; one that was broken off has begun its report."""
    from ..toy.demo import OUTPUTS
    from ..toy.report import HEADING

    report = out / "report.md"
    if report.is_file():
        with open(report, "rb") as file:
            if file.read(len(HEADING.encode())) == HEADING.encode():
                return
    if there := [out / name for name in OUTPUTS if os.path.lexists(out / name)]:
        refuse_existing(there[0])


def _write_pictures(args: argparse.Namespace) -> None:
    from ..pictures import to_image
    from ..storage.atomic import all_or_none, write_atomically
    from ..toy.standard import BY_NAME, lesson_of

    if args.concept not in BY_NAME:
        raise AdapterError(f"there is no standard concept {args.concept!r}; choose one of {', '.join(BY_NAME)}")
    out = args.out or Path("pictures") / args.concept
    lesson, files = lesson_of(BY_NAME[args.concept]), {}
    for number, (picture, caption) in enumerate(zip(lesson.pictures, lesson.captions, strict=True)):
        to_image(picture).save(png := io.BytesIO(), "PNG")
        files |= {out / f"{number:02d}.png": png.getvalue(), out / f"{number:02d}.txt": caption.encode()}
    there = [] if args.overwrite else [path for path in files if os.path.lexists(path)]
    for path in there:
        same = path.is_file() and path.stat().st_size == len(files[path])
        if not (same and path.read_bytes() == files[path]):
            refuse_existing(path)
    others = (
        sorted(path.name for path in out.iterdir() if path not in files and not path.name.startswith("."))
        if out.is_dir()
        else []
    )
    if others and not args.overwrite:
        raise AdapterError(
            f"{out} holds other files ({listed(others, 3)}), among which a training would find these pictures; "
            "choose another --out, or write there all the same with --overwrite"
        )
    note_repeated(args)
    folder(out)
    with take_free_names(args.overwrite), all_or_none():
        for path, data in files.items():
            if path not in there:
                write_atomically(path, data)
    say(
        f"wrote {len(lesson.pictures)} pictures with captions to {out}; train on them with this, in which each concept "
        "has a slot of its own:"
    )
    described = f' --description "{lesson.description}"' if lesson.description else ""
    train = f"train {out} --name {args.concept} --class-word {lesson.class_word}"
    say(f"  python -m modular_concepts {train}{described} --slot {list(BY_NAME).index(args.concept)}")


# --- reading arguments --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse, with faults in one sentence, which names every option that there is not, or that is there twice."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        for name in (None, "store"):
            self.register("action", name, _Once)
        self.register("type", int, _read_whole)
        self.register("type", float, _read_number)

    def parse_known_args(self, args=None, namespace=None):
        self.unknown = [text.partition("=")[0] for text in _take_options(args or ()) if self._is_unknown(text)]
        self.seen: dict[str, object] = {}
        if self._subparsers is not None and args and args[0].startswith("-") and args[0] not in self._options():
            self.error(f"{args[0]} stands before the command; options stand behind theirs, as in train {args[0]} …")
        namespace, left = super().parse_known_args(args, namespace)
        if left and self._subparsers is None:  # here and not in the parser above, whose --help says less
            several = (
                "put a text of several words in quotes, and an option that can come again before each of its values"
            )
            if set("“”„‘’«»") & set("".join(args or ())):
                several = "the quotes are a text program's, which no shell reads; type plain ones: \""
            self.error("" if self.unknown else f"nothing is meant by {' '.join(left)}; {several}")
        return namespace, left

    def error(self, message: str) -> NoReturn:
        unknown = [f"there is no option {name}{self._guess_meant(name)}" for name in self.unknown]
        if any(not name.startswith("--") for name in self.unknown):
            unknown.append("what begins with - and is no option stands behind an =, and a path as ./-name")
            message = ""
        sentence = _shorten("; ".join([*unknown, *filter(None, [message])]))
        self.exit(2, f"error: {sentence}; see {self.prog} --help\n")

    def _is_unknown(self, text: str) -> bool:
        """Whether a text looks like an option and is none; a number below 0 is a value."""
        name = text.partition("=")[0]
        if self._subparsers is not None or not name.startswith("-") or name == "-":
            return False
        if self._negative_number_matcher.match(text) or any(option.startswith(name) for option in self._options()):
            return False
        return name.startswith("--") or not any(name.startswith(short) for short in self._options() if len(short) == 2)

    def _options(self) -> list[str]:
        return list(self._option_string_actions)

    def _guess_meant(self, name: str) -> str:
        here = ELSEWHERE.get(name.lstrip("-").replace("_", "-").lower())
        if here in self._option_string_actions:
            return f"; {here} is what is meant, perhaps"
        near = difflib.get_close_matches(name, self._option_string_actions, 1, 0.7)
        return f", perhaps {near[0]}" if near else ""


def _take_options(args: Sequence[str]) -> list[str]:
    """What can be options: all before a --, behind which all is meant as it stands."""
    return list(itertools.takewhile(lambda text: text != "--", args))


class _Once(argparse._StoreAction):
    """Stores a value; a second, other one is said before the work, and a second list refused: both may be meant."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = parser.seen.get(self.dest, values)
        if option_string and before != values and before is not values:
            if self.nargs == "+":
                raise argparse.ArgumentError(self, f"is there twice; give all of them after one {option_string}")
            last, first = (cut_in_the_middle(str(value), 60) for value in (values, before))
            sentence = f"{option_string} is there twice; the last counts, {last}, and not {first}"
            namespace.repeated = [*getattr(namespace, "repeated", ()), sentence]
        parser.seen[self.dest] = values
        super().__call__(parser, namespace, values, option_string)


def _read_whole(text: str) -> int:
    try:
        return read_whole(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error


def _read_number(text: str) -> float:
    try:
        return read_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m modular_concepts", description="Train concepts apart, sum them, draw them together."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="three concepts trained, summed, drawn and judged on the toy base",
        description="Train three concepts on the toy base, sum them, draw them alone and together and judge the "
        "pictures; writes concepts, pictures and a report.",
    )
    demo.add_argument("--out", type=read_path, default=Path("demo_output"), help="folder (default demo_output)")
    add_overwrite(demo)
    demo.set_defaults(run=_make_demo)

    pictures = commands.add_parser(
        "pictures",
        help="write the 16 pictures of a standard toy concept, to train on",
        description="Write the 16 pictures of one of the toy base's standard concepts, with captions, and say the "
        "command that trains on them.",
    )
    pictures.add_argument("concept", metavar="CONCEPT", help=f"one of {', '.join(STANDARD_NAMES)}")
    pictures.add_argument("--out", type=read_path, help="folder (default pictures/CONCEPT)")
    add_overwrite(pictures)
    pictures.set_defaults(run=_write_pictures)

    add_train(commands)
    add_merge(commands)
    add_sample(commands)
    add_inspect(commands)
    add_export(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
