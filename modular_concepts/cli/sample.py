"""The command that draws: a prompt, any concepts with strengths, any regions."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..errors import AdapterError, listed
from ..families.toy import TOY
from ..settings import drawing
from ..settings.merging import ACT_ON
from ..typed import read_number
from .declared import add_option, spell_flag
from .paths import (
    add_overwrite,
    base_named,
    check_output,
    concepts_at,
    folder,
    note,
    note_repeated,
    read_file,
    refuse_existing,
    say,
    take_free_names,
)
from .progress import Bar

CFG = 4.0  # the toy base's, which the shell draws with where no other is named
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}


def add_sample(commands) -> None:
    sample = commands.add_parser(
        "sample",
        help="draw a prompt with any number of concepts and regions",
        description="Draw a prompt with any number of concepts, each at its strength, and with prompts of their own "
        "for parts of the picture.",
    )
    sample.add_argument("prompt", help="what to draw; a concept's trigger word, such as <rex>, calls it")
    sample.add_argument(
        "--concept",
        action="append",
        metavar="FILE[:STRENGTH]",
        help="a concept or a LoRA (kohya's or diffusers' keys), at a strength from -100 to 100 (default 1); once for "
        "each",
    )
    sample.add_argument(
        "--region",
        action="append",
        metavar="LEFT,TOP,RIGHT,BOTTOM:PROMPT",
        help="a box with a prompt of its own, as in 0,0,0.5,1:a <rex>; once for each",
    )
    add_option(sample, drawing.UNITS)
    add_option(sample, drawing.MODE)
    add_option(sample, ACT_ON)
    sample.add_argument(
        "--out",
        type=read_file,
        help=f"the picture's file (default sample.png, or the first of sample-2.png, sample-3.png, ... that is free), "
        f"ending in {', '.join(FORMATS)}; several are numbered",
    )
    add_overwrite(sample)
    sample.add_argument("--base", default=TOY.name, help="toy (default), or the folder of a diffusers model")
    add_option(sample, drawing.NEGATIVE, default="", usual="(default nothing)", metavar="PROMPT")
    add_option(sample, drawing.WIDTH, metavar="PIXELS")
    add_option(sample, drawing.HEIGHT, metavar="PIXELS")
    add_option(sample, drawing.STEPS, default=drawing.STEPS.default)
    add_option(sample, drawing.CFG, default=CFG, usual=f"(default {CFG:g})")
    add_option(sample, drawing.SEED, default=drawing.SEED.default)
    add_option(sample, drawing.COUNT, default=drawing.COUNT.default, type=_read_count)
    add_option(sample, drawing.ZOOM, default=drawing.ZOOM.default, type=_read_count)
    sample.set_defaults(run=run_sample)


def run_sample(args: argparse.Namespace) -> None:
    from ..crosstalk.report import warnings_on_base
    from ..models.budget import check_zoom
    from ..models.prompts import unheard_of
    from ..regions.warnings import doubtful_places
    from ..sampling import SampleSettings, check_drawing, customised, sample, warnings_on_guidance
    from ..stack import Stack
    from ..text.ordinary import tell_taken_words

    paths = _choose_outputs(args)
    base = base_named(args.base)
    concepts, strengths, _ = concepts_at(args.concept or [], "each after a --concept of its own")
    for sentence in warnings_on_base(concepts, base.hash, base.sample, base.architecture):
        note(sentence)
    settings = SampleSettings(args.steps, args.cfg, args.height, args.width, args.negative)
    height = base.size[0] if args.height is None else args.height
    width = base.size[1] if args.width is None else args.width
    regions = [_read_region(text, args.units or "fractions", width, height) for text in args.region or []]
    check_zoom(width, height, args.zoom)
    seeds = [args.seed + number for number in range(args.count)]
    check_drawing(base, seeds, settings)
    written: list[Path] = []
    bar = Bar("sample", args.steps * -(-args.count // settings.batch))
    texts = [args.prompt, *(region.prompt for region in regions)]
    learned = {word: rows.shape[-2] for concept in concepts for word, rows in concept.tokens.items()}
    _warn_unknown(base, texts, list(learned))
    heard = unheard_of(base, [*texts, *([args.negative] if args.negative else [])], learned)
    for sentence in [*tell_taken_words(learned, base.ordinary), *heard]:
        note(sentence)
    gated, act_on = bool(regions) and args.mode != "merged", args.act_on or ACT_ON.default
    note_repeated(args)
    size = (height // base.downscale, width // base.downscale)
    odd = [
        *_find_unread(args),
        *_find_odd_prompts(args),
        *warnings_on_guidance(args.cfg),
        *doubtful_places(regions, size),
    ]
    for sentence in odd:
        note(sentence)
    stack = Stack(zip(concepts, strengths, strict=True))
    for sentence in [*_find_unfelt(concepts, strengths), *_find_unheard(stack, args, regions, gated, act_on)]:
        note(sentence)
    how: dict[str, Any] = dict(mode="gated", stack=stack, act_on=act_on) if gated else {}
    try:
        merged = nullcontext() if gated else customised(base, concepts, strengths, act_on=act_on)
        with bar as advance, merged as tokens:
            # A batch at a time, written before the next: all of them at once could be more than the memory holds.
            for first in range(0, args.count, settings.batch):
                some = seeds[first : first + settings.batch]

                def step_done(done: int, _: int, before: int = args.steps * (first // settings.batch)) -> None:
                    advance(before + done)

                drawn = sample(base, [args.prompt] * len(some), some, tokens, settings, regions, step_done, **how)
                for number, picture in enumerate(drawn, first):
                    written.append(_write(paths[number], args.zoom, picture, args.overwrite))
    finally:
        for number, path in enumerate(written):
            say(f"wrote {path} (seed {seeds[number]})")


def _find_unfelt(concepts: Sequence, strengths: Sequence[float]) -> list[str]:
    return [
        f"{concept.name} has strength 0, so nothing of what its layers learned is drawn; 1 is as it was trained"
        for concept, strength in zip(concepts, strengths, strict=True)
        if strength == 0
    ]


def _find_unheard(stack, args: argparse.Namespace, regions: Sequence, gated: bool, act_on: str) -> list[str]:
    """Sentences on concepts that no prompt calls, and on what is left out of those that act at their own words."""
    from ..merging.own_words import notes_on_gated, split
    from ..regions.assignment import unheard

    divided = split(stack, act_on)
    owners = {residual.owner for residual in divided.by_word}
    way_out = "draw with --mode merged, where it acts everywhere"
    sentences = unheard(stack, args.prompt, regions, gated, way_out, owners, args.negative)
    return [*sentences, *(notes_on_gated(stack, act_on) if gated else divided.notes)]


def _find_unread(args: argparse.Namespace) -> list[str]:
    """A sentence for each option that was typed and that this drawing does not read."""
    from ..unread import SAMPLE, find_unread

    typed = [name for name in SAMPLE if getattr(args, name) not in (None, "", [])]
    present = [name for name in ("region", "concept") if getattr(args, name)]
    present += [*([drawing.GUIDANCE] if args.cfg != 1 else [])]
    return find_unread(SAMPLE, typed, present=present, called=spell_flag)


def _find_odd_prompts(args: argparse.Namespace) -> list[str]:
    """Sentences on prompts that are empty, or the name of a file."""
    sentences = [] if args.prompt.strip() else ["the prompt is empty, so what is drawn is by chance; say what to draw"]
    for text in (args.prompt, args.negative):
        if text.strip() and len(text) < 200 and os.path.isfile(text):
            sentences.append(f"{text} is a file, but its name is read as the prompt; give the words that are in it")
    return sentences


def _choose_outputs(args: argparse.Namespace) -> list[Path]:
    """The files of all pictures, none of which is there, unless it may be replaced."""
    out = args.out or Path("sample.png")
    if out.suffix.lower() not in FORMATS:
        raise AdapterError(f"{out}: a picture is written as {', '.join(FORMATS)}; give --out such an ending")
    check_output(out)
    for number in itertools.count(1):
        stem = out.stem if number == 1 else f"{out.stem}-{number}"
        stems = [stem] if args.count == 1 else [f"{stem}-{place:02d}" for place in range(args.count)]
        paths = [out.with_stem(each) for each in stems]
        if args.overwrite and (folders := [path for path in paths if path.is_dir()]):
            raise AdapterError(f"{folders[0]} is a folder, which no picture replaces; choose another --out")
        there = [] if args.overwrite else [path for path in paths if os.path.lexists(path)]
        if there and args.out is not None:
            refuse_existing(there[0])
        if not there:
            return paths
    raise AssertionError


def _write(path: Path, zoom: int, picture, overwrite: bool) -> Path:
    """The file; beside `path` where that has come to be another's since the command began."""
    from ..pictures import to_image
    from ..storage.atomic import Taken, replacing
    from ..storage.keeping import free_name

    image = to_image(picture)
    if zoom > 1:
        image = image.resize((image.width * zoom, image.height * zoom), 0)
    folder(path.parent)
    while True:
        try:
            with take_free_names(overwrite), replacing(path) as file:
                image.save(file, FORMATS[path.suffix.lower()])
            return path
        except Taken:
            note(f"{path} is there now and was not before; it stays as it is, and the picture is written beside it")
            path = free_name(path)


def _read_region(text: str, units: str, width: int, height: int):
    from ..regions.geometry import region_from

    box, colon, prompt = text.partition(":")
    try:
        numbers = tuple(_read_as_typed(number) for number in box.split(","))
    except ValueError:
        numbers = ()
    if not colon or len(numbers) != 4 or not prompt.strip():
        raise AdapterError(f"region {text!r} is not LEFT,TOP,RIGHT,BOTTOM:PROMPT, as in 0,0,0.5,1:a <tom> on the beach")
    return region_from(prompt.strip(), numbers, units == "pixels", None, 0.0, 1.0, "").placed(width, height)


def _read_as_typed(text: str) -> float:
    """A number that a message shows as it was typed: 2 and not 2.0."""
    number = read_number(text)
    return int(number) if number % 1 == 0 else number


def _warn_unknown(base, prompts: Sequence[str], triggers: Sequence[str]) -> None:
    unknown = sorted({word for prompt in prompts for word in base.unknown_words(prompt, triggers)})
    if unknown:
        note(f"the base does not know {listed(unknown, 10)}; these words change nothing")


def _read_count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not drawing.COUNT.allows(int(text)):
        most = drawing.COUNT.most
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number of at least 1 and at most {most}")
    return int(text)
