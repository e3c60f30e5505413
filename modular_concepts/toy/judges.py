"""The three judges of toy pictures: what is in them, who is in them, and how alike two pictures are.

`Reader` names class, scene, style and attributes of a tile; `Recogniser` embeds the identity of its subject.
Both are small convolutional networks trained on drawn pictures (train_judges.py); their own accuracy on drawn
pictures that they never saw is kept beside their weights and belongs next to every result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .vocabulary import CLASSES, COLOUR_NAMES, PATTERNS, SCENES, STYLES

NOTHING = len(CLASSES)  # the reader's answer for a tile with no subject
HEADS = {
    "class": len(CLASSES) + 1,
    "scene": len(SCENES),
    "style": len(STYLES),
    "pattern": len(PATTERNS),
    "primary": len(COLOUR_NAMES),
    "secondary": len(COLOUR_NAMES),
    "accessory": 3,
    "accent": len(COLOUR_NAMES),
}
EMBEDDING = 64
WIDTHS = (48, 96, 160)


def _trunk() -> nn.Sequential:
    layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
    channels = 12
    for stage, width in enumerate(WIDTHS):
        for stride, source in ((2 if stage else 1, channels), (1, width)):
            layers += [nn.Conv2d(source, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTHS[-1] * 16, 256), nn.ReLU())


class Reader(nn.Module):
    """Tiles (N, 3, 32, 32) in 0..1 -> logits by head name."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk()
        self.heads = nn.ModuleDict({name: nn.Linear(256, size) for name, size in HEADS.items()})

    def forward(self, tiles: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(tiles * 2 - 1)
        return {name: head(hidden) for name, head in self.heads.items()}


class Recogniser(nn.Module):
    """Tiles (N, 3, 32, 32) in 0..1 -> unit vectors (N, 64): the same identity points the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk()
        self.head = nn.Linear(256, EMBEDDING)

    def forward(self, tiles: Tensor) -> Tensor:
        return F.normalize(self.head(self.trunk(tiles * 2 - 1)), dim=-1)


@dataclass(frozen=True)
class Judges:
    """The trained judges.  `threshold` is a cosine; `accuracy` is theirs on drawn pictures."""

    reader: Reader
    recogniser: Recogniser
    threshold: float
    accuracy: dict

    @torch.no_grad()
    def read(self, tiles: Tensor) -> dict[str, Tensor]:
        """Most likely answer of each head, (N,) each."""
        return {name: logits.argmax(1) for name, logits in self.reader(tiles).items()}

    @torch.no_grad()
    def similarity(self, tiles: Tensor, references: Tensor) -> Tensor:
        """(N,) cosine between each tile and the mean identity of the reference tiles; no subject gives -1."""
        template = F.normalize(self.recogniser(references).mean(0), dim=0)
        empty = self.read(tiles)["class"] == NOTHING
        return (self.recogniser(tiles) @ template).masked_fill(empty, -1.0)

    def identity(self, tiles: Tensor, references: Tensor) -> float:
        """Share of tiles accepted as the references' identity, the toy counterpart of an ArcFace rate."""
        return (self.similarity(tiles, references) > self.threshold).float().mean().item()

    @torch.no_grad()
    def image_alignment(self, tiles: Tensor, references: Tensor) -> float:
        """Mean cosine over all (reference, tile) pairs."""
        return (self.recogniser(tiles) @ self.recogniser(references).mT).mean().item()

    def text_alignment(self, tiles: Tensor, class_word: str, scenes: Sequence[str | None]) -> float:
        """Share of the asked words (one class for all, a scene each or None) that the reader finds."""
        answer = self.read(tiles)
        heard = (answer["class"] == CLASSES.index(class_word)).tolist()
        for row, scene in enumerate(scenes):
            if scene is not None:
                heard.append(bool(answer["scene"][row] == SCENES.index(scene)))
        return sum(heard) / len(heard)


@cache
def load_judges(folder: Path | None = None) -> Judges:
    folder = folder or Path(__file__).parent / "weights"
    reader, recogniser = Reader(), Recogniser()
    for network, name in ((reader, "reader"), (recogniser, "recogniser")):
        network.load_state_dict(load_file(folder / f"{name}.safetensors"))
        network.requires_grad_(False).eval()
    report = json.loads((folder / "judges.json").read_text(encoding="utf-8"))
    return Judges(reader, recogniser, report["threshold"], report["accuracy"])
