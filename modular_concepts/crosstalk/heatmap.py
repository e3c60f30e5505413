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
    sheet = _Sheet(names, table)
    sheet.text((EDGE, EDGE), "Crosstalk of concepts", 22)
    sheet.draw_pairs(EDGE, "crosstalk |A B'| / |A| |B|", "crosstalk")
    sheet.draw_pairs(EDGE + sheet.label + sheet.square + 2 * EDGE, "cosine <A, B> / |A| |B|", "cosine")
    sheet.draw_blocks()
    return as_batch(sheet.image)


class _Sheet:
    """The report's paper: where its parts lie, and how a cell and a heading are drawn."""

    def __init__(self, names: Sequence[str], table: Mapping):
        from PIL import Image, ImageDraw, ImageFont

        self.names, self.table, self.blocks = names, table, _by_block(table)
        self.fonts = {size: ImageFont.load_default(size) for size in (14, 15, 22)}
        self.columns = list(table["pairs"]) if len(table["pairs"]) <= MOST_PAIRS else []
        self.headings = [f"{a} x {b}" for a, b in self.columns] or ["mean", "most"]
        self.name_width, self.heading_width, block_width = (
            16 + max(int(self.fonts[15].getlength(text)) for text in texts)
            for texts in (names, self.headings, self.blocks)
        )
        self.label, self.square = max(self.name_width, block_width), len(names) * CELL
        self.below = EDGE + 44 + 34 + self.name_width + self.square + EDGE
        wide = EDGE * 2 + max(2 * (self.label + self.square) + 2 * EDGE, self.label + len(self.headings) * CELL, 640)
        high = self.below + 34 + self.heading_width + len(self.blocks) * (CELL // 2) + EDGE + 40
        self.image = Image.new("RGB", (wide, high), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self, place: tuple[float, float], text: str, size: int, ink: tuple = INK, anchor: str | None = None
    ) -> None:
        self._draw.text(place, text, ink, self.fonts[size], anchor=anchor)

    def cell(self, x: int, y: int, height: int, value: float | None, top: float) -> None:
        """A field in the colour of value / top, with the value in it; grey where there is none."""
        box = (x, y, x + CELL - GAP, y + height - GAP)
        self._draw.rectangle(box, NOTHING if value is None else _colour(abs(value) / top))
        if value is not None:
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            ink = PAPER if abs(value) / top > 0.5 else INK
            self.text(middle, f"{value:.3f}".replace("-0.000", "0.000"), 14, ink, "mm")

    def titles(self, x: int, y: int, texts: Sequence[str], length: int) -> None:
        """Column titles, turned by a quarter, that end at y."""
        from PIL import Image, ImageDraw

        for index, text in enumerate(texts):
            strip = Image.new("RGB", (length, 20), PAPER)
            ImageDraw.Draw(strip).text((4, 10), text, INK, self.fonts[15], anchor="lm")
            self.image.paste(strip.rotate(90, expand=True), (x + index * CELL + CELL // 2 - 11, y - length))

    def draw_pairs(self, x: int, title: str, key: str) -> None:
        """A square of all pairs."""
        pairs, y = self.table["pairs"], EDGE + 44
        top = _top(abs(figures[key]) for figures in pairs.values())
        self.text((x, y), f"{title}, colours 0 to {top:g}", 15, FAINT)
        y += 34 + self.name_width
        self.titles(x + self.label, y, self.names, self.name_width)
        for row, first in enumerate(self.names):
            self.text((x, y + row * CELL + (CELL - GAP) // 2), first, 15, anchor="lm")
            for column, second in enumerate(self.names):
                figures = pairs.get((first, second)) or pairs.get((second, first))
                value = figures[key] if figures and row != column else None
                self.cell(x + self.label + column * CELL, y + row * CELL, CELL, value, top)

    def draw_blocks(self) -> None:
        """A row for each part of the model, a column for each pair, or for the mean and the most of many."""
        rows = {
            block: [pairs.get(pair) for pair in self.columns] or [_mean(pairs.values()), max(pairs.values())]
            for block, pairs in self.blocks.items()
        }
        top = _top(value for row in rows.values() for value in row if value is not None)
        self.text((EDGE, self.below), f"crosstalk in each part of the model, colours 0 to {top:g}", 15, FAINT)
        start = self.below + 34 + self.heading_width
        self.titles(EDGE + self.label, start, self.headings, self.heading_width)
        for index, (block, row) in enumerate(rows.items()):
            y = start + index * (CELL // 2)
            self.text((EDGE, y + CELL // 4 - GAP // 2), block, 15, anchor="lm")
            for column, value in enumerate(row):
                self.cell(EDGE + self.label + column * CELL, y, CELL // 2, value, top)
        legend = (
            "crosstalk 0: neither reads what the other reads; cosine 0: their changes have nothing in common, 1 two"
        )
        self.text((EDGE, self.image.height - EDGE - 10), f"{legend} copies", 14, FAINT)


def _by_block(table: Mapping) -> dict[str, dict[Pair, float]]:
    """Block in words -> pair -> mean crosstalk of the block's layers."""
    blocks: dict[str, dict[Pair, list[float]]] = {}
    for layer, pairs in table["layers"].items():
        for pair, figures in pairs.items():
            blocks.setdefault(block_of(layer), {}).setdefault(pair, []).append(figures["crosstalk"])
    return {block: {pair: _mean(values) for pair, values in pairs.items()} for block, pairs in blocks.items()}


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
