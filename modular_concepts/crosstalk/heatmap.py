"""Crosstalk as a picture, drawn by Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..models.layers import block_of
from ..pictures import as_batch

Pair = tuple[str, str]

CELL, GAP, EDGE = 64, 3, 28
PAPER, INK, FAINT, NOTHING = (250, 248, 244), (32, 28, 36), (120, 112, 124), (236, 232, 226)
COLOURS = ((253, 244, 226), (252, 190, 120), (236, 104, 84), (148, 44, 128), (46, 16, 88))  # low to high
TOPS = (0.05, 0.1, 0.2, 0.5, 1.0)
MOST_PAIRS = 15


def draw_report(names: Sequence[str], table: Mapping) -> Tensor:
    """(1, H, W, 3) in 0..1: crosstalk and cosine of each pair, and under them the crosstalk in each part of the model.

    table: of `crosstalk_table`; names: of `distinct_names`.
    """
    from PIL import Image, ImageDraw, ImageFont

    fonts = {size: ImageFont.load_default(size) for size in (14, 15, 22)}
    blocks = _by_block(table)
    columns = list(table["pairs"]) if len(table["pairs"]) <= MOST_PAIRS else []
    headings = [f"{a} x {b}" for a, b in columns] or ["mean", "most"]
    name_width, heading_width, block_width = (
        16 + max(int(fonts[15].getlength(text)) for text in texts) for texts in (names, headings, blocks)
    )
    label = max(name_width, block_width)
    square = len(names) * CELL
    wide = EDGE * 2 + max(2 * (label + square) + 2 * EDGE, label + len(headings) * CELL, 640)
    below = EDGE + 44 + 34 + name_width + square + EDGE
    image = Image.new("RGB", (wide, below + 34 + heading_width + len(blocks) * (CELL // 2) + EDGE + 40), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((EDGE, EDGE), "Crosstalk of concepts", INK, fonts[22])

    def cell(x: int, y: int, height: int, value: float | None, top: float) -> None:
        box = (x, y, x + CELL - GAP, y + height - GAP)
        draw.rectangle(box, NOTHING if value is None else _colour(abs(value) / top))
        if value is not None:
            ink = PAPER if abs(value) / top > 0.5 else INK
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            draw.text(middle, f"{value:.3f}".replace("-0.000", "0.000"), ink, fonts[14], anchor="mm")

    def across(x: int, y: int, texts: Sequence[str], length: int) -> None:
        """Column titles, turned by a quarter, that end at y."""
        for index, text in enumerate(texts):
            strip = Image.new("RGB", (length, 20), PAPER)
            ImageDraw.Draw(strip).text((4, 10), text, INK, fonts[15], anchor="lm")
            image.paste(strip.rotate(90, expand=True), (x + index * CELL + CELL // 2 - 11, y - length))

    def grid(x: int, y: int, title: str, key: str) -> None:
        top = _top(abs(figures[key]) for figures in table["pairs"].values())
        draw.text((x, y), f"{title}, colours 0 to {top:g}", FAINT, fonts[15])
        y += 34 + name_width
        across(x + label, y, names, name_width)
        for row, first in enumerate(names):
            draw.text((x, y + row * CELL + (CELL - GAP) // 2), first, INK, fonts[15], anchor="lm")
            for column, second in enumerate(names):
                figures = table["pairs"].get((first, second)) or table["pairs"].get((second, first))
                value = figures[key] if figures else None
                cell(x + label + column * CELL, y + row * CELL, CELL, value if row != column else None, top)

    grid(EDGE, EDGE + 44, "crosstalk |A B'| / |A| |B|", "crosstalk")
    grid(EDGE + label + square + 2 * EDGE, EDGE + 44, "cosine <A, B> / |A| |B|", "cosine")
    rows = {
        block: [pairs.get(pair) for pair in columns] or [_mean(pairs.values()), max(pairs.values())]
        for block, pairs in blocks.items()
    }
    top = _top(value for row in rows.values() for value in row if value is not None)
    draw.text((EDGE, below), f"crosstalk in each part of the model, colours 0 to {top:g}", FAINT, fonts[15])
    across(EDGE + label, below + 34 + heading_width, headings, heading_width)
    for index, (block, row) in enumerate(rows.items()):
        y = below + 34 + heading_width + index * (CELL // 2)
        draw.text((EDGE, y + CELL // 4 - GAP // 2), block, INK, fonts[15], anchor="lm")
        for column, value in enumerate(row):
            cell(EDGE + label + column * CELL, y, CELL // 2, value, top)
    draw.text(
        (EDGE, image.height - EDGE - 10),
        "crosstalk 0: neither reads what the other reads; cosine 0: their changes have nothing in common, 1 two copies",
        FAINT,
        fonts[14],
    )
    return as_batch(image)


def _by_block(table: Mapping) -> dict[str, dict[Pair, float]]:
    """Block in words -> pair -> mean crosstalk of the block's layers."""
    found: dict[str, dict[Pair, list[float]]] = {}
    for layer, pairs in table["layers"].items():
        for pair, figures in pairs.items():
            found.setdefault(block_of(layer), {}).setdefault(pair, []).append(figures["crosstalk"])
    return {block: {pair: _mean(values) for pair, values in pairs.items()} for block, pairs in found.items()}


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _top(values) -> float:
    """End of the colour scale: a round number, and never so small that rounding errors look like much."""
    most = max(values, default=0.0)
    return next((top for top in TOPS if most <= top), 1.0)


def _colour(share: float) -> tuple[int, ...]:
    position = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(position), len(COLOURS) - 2)
    mix = position - low
    return tuple(round(a + (b - a) * mix) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True))
