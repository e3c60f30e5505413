"""The picture sheet of `bench.merge_methods`: a row for each method, a few pictures of each concept in its column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from modular_concepts.pictures import to_image
from modular_concepts.storage.atomic import replacing
from modular_concepts.toy.report import FAINT, INK, PAPER

ZOOM, EACH = 2, 3  # screen pixels per toy pixel, pictures of a concept in a row
LABEL, GAP, TOP = 250, 4, 44


def merge_sheet(path: Path, references: Mapping[str, Tensor], rows: Mapping[str, Mapping[str, Tensor]]) -> None:
    """references: concept -> (N, 3, 32, 32); rows: method -> concept -> the same; same noise in a column.

    Rows of one way of training stand together: a line is left before those whose name ends in "each alone".
    """
    from PIL import Image, ImageDraw, ImageFont

    side = next(iter(references.values())).shape[-1] * ZOOM
    column = EACH * side + 14
    lines = [("training pictures", references), *rows.items()]
    places, y = [], TOP
    for name, _ in lines:
        y += 12 if name.endswith("each alone") else 0
        places.append(y)
        y += side + GAP
    image = Image.new("RGB", (LABEL + len(references) * column, y + 6), PAPER)
    draw = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(17), ImageFont.load_default(15)
    for number, name in enumerate(references):
        draw.text((LABEL + number * column + column / 2 - 7, 22), name, INK, large, anchor="mm")
    for (title, shown), y in zip(lines, places, strict=True):
        colour = FAINT if title == "training pictures" or title.endswith("each alone") else INK
        draw.text((12, y + side / 2), title, colour, small, anchor="lm")
        for number, name in enumerate(references):
            strip = to_image(torch.cat(list(shown[name][:EACH]), dim=-1))
            image.paste(strip.resize((EACH * side, side), 0), (LABEL + number * column, y))
    with replacing(path) as file:
        image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
