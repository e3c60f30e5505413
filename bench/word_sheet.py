"""The picture sheet of `bench.words`: each concept out of all merged, and two in one picture, a line for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from modular_concepts.pictures import to_image
from modular_concepts.storage.atomic import replacing
from modular_concepts.toy.report import INK, PAPER
from modular_concepts.toy.standard import BY_NAME, pictures_of
from modular_concepts.toy.vocabulary import SCENES

ZOOM, LABEL, GAP, TOP = 2, 170, 6, 36
SINGLES = ("tom", "tim", "ada", "ida", "minka", "rex", "candy", "riso")
EACH = 2  # pictures of a pair


def word_sheet(path: Path, out: Path, rows: Sequence[str], pairs: Sequence[tuple[str, str]]) -> None:
    """rows: those whose pictures lie in OUT/ROW.pictures.safetensors; the first line is of the training pictures."""
    from PIL import Image, ImageDraw, ImageFont

    shown = {row: load_file(out / f"{row}.pictures.safetensors") for row in rows}
    first = next(iter(shown.values()))
    singles = [name for name in SINGLES if f"all {name}" in first]
    chosen = [pair for pair in pairs if f"pair {' '.join(pair)}" in first]
    lines: dict[str, Mapping[str, Tensor]] = {"their pictures": _as_taught(singles, chosen)}
    lines |= shown
    side = 32 * ZOOM
    width = LABEL + len(singles) * (side + GAP) + len(chosen) * (EACH * 2 * side + 2 * GAP)
    image = Image.new("RGB", (width, TOP + len(lines) * (side + GAP)), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for number, (title, pictures) in enumerate(lines.items()):
        y = TOP + number * (side + GAP)
        draw.text((8, y + side / 2), title, INK, font, anchor="lm")
        x = LABEL
        for name in singles:
            _paste(image, pictures[f"all {name}"][:1], x, y)
            x += side + GAP
        for pair in chosen:
            x += GAP
            _paste(image, pictures[f"pair {' '.join(pair)}"][:EACH], x, y)
            x += EACH * 2 * side + GAP
    _write_heads(draw, font, singles, chosen)
    with replacing(path) as file:
        image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


def _write_heads(draw, font, singles: Sequence[str], pairs: Sequence[tuple[str, str]]) -> None:
    side, x = 32 * ZOOM, LABEL
    for name in singles:
        draw.text((x + side / 2, TOP / 2), name, INK, font, anchor="mm")
        x += side + GAP
    for pair in pairs:
        draw.text((x + GAP + EACH * side, TOP / 2), " and ".join(pair), INK, font, anchor="mm")
        x += EACH * 2 * side + 2 * GAP


def _as_taught(singles: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """What the rows should look like: pictures that the concepts were taught with."""
    each = {name: pictures_of(BY_NAME[name])[0] for name in {*singles, *(name for pair in pairs for name in pair)}}
    wide = {f"pair {left} {right}": torch.cat([each[left][:EACH], each[right][:EACH]], 3) for left, right in pairs}
    return {**{f"all {name}": each[name] for name in singles}, **wide}


def _paste(image, pictures: Tensor, x: int, y: int) -> None:
    strip = to_image(torch.cat(list(pictures), dim=-1))
    image.paste(strip.resize((strip.width * ZOOM, strip.height * ZOOM), 0), (x, y))


def first_picture(path: Path, pictures: Mapping[str, Tensor], prompts: Mapping[str, str]) -> None:
    """The README's: every concept out of one model that holds all of them, and below pairs in one picture each.

    pictures: as `bench.words` keeps them of a row.  prompts: a pair, "tom tim" -> what was asked for; four of them.
    """
    from PIL import Image, ImageDraw, ImageFont

    names = [name for name in BY_NAME if f"all {name}" in pictures]
    side, wide, margin = 64, 128, 12
    width = margin * 2 + max(len(names) * (side + GAP), len(prompts) * (2 * wide + GAP)) - GAP
    image = Image.new("RGB", (width, 262), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    step = (width - 2 * margin + GAP) / len(names)
    for number, name in enumerate(names):
        x = round(margin + number * step)
        draw.text((x + side / 2, 14), f"<{name}>", INK, font, anchor="mm")
        _paste(image, pictures[f"all {name}"][:1], x, 26)
    step = (width - 2 * margin + GAP) / len(prompts)
    for number, (pair, prompt) in enumerate(prompts.items()):
        x = round(margin + number * step)
        strip = to_image(pictures[f"pair {pair}"][number % len(SCENES)])
        image.paste(strip.resize((2 * wide, wide), 0), (x, 104))
        draw.text((x + wide, 246), prompt, INK, font, anchor="mm")
    with replacing(path) as file:
        image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
