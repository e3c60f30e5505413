"""What a person sees of a training in the host: the bar, words on the node, previews."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ...modular_concepts.pictures import to_image
from ...modular_concepts.sampling import SampleSettings
from ...modular_concepts.training.loop import Progress
from ..messages import show_text

PREVIEW = SampleSettings(steps=12, cfg=4.0)
PREVIEW_SIDE = 256  # screen pixels that a small preview is enlarged to
BETWEEN_TEXTS = 0.5  # seconds


@dataclass(frozen=True)
class Previews:
    """every: steps between them, 0 for none.  prompts: with the trigger filled in, one picture for each.

    seed: of the first picture; the next ones have the next seeds, the same at every step.  size: (height, width).
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    seed: int = 0
    size: tuple[int, int] = (512, 512)

    def due(self, at: Progress) -> bool:
        return bool(self.every) and (at.step % self.every == 0 or at.step == at.steps)

    def drawn(self, draw: Callable[..., Tensor], tokens: Mapping[str, Tensor]) -> Image.Image:
        """Side by side.  draw(prompts, seeds, tokens, settings) -> (N, 3, H, W) in 0..1."""
        height, width = self.size
        seeds = range(self.seed, self.seed + len(self.prompts))
        pictures = draw(list(self.prompts), seeds, tokens, replace(PREVIEW, height=height, width=width))
        row = torch.cat(list(pictures), dim=-1)
        image = to_image(row)
        larger = max(1, PREVIEW_SIDE // max(height, width))
        return image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)


class Watch:
    """Told of each step: moves the bar, says on the node how it goes, draws previews, sees an interrupt.

    notes: what stays to be read above it.
    """

    def __init__(self, steps: int, previews: Previews, draw: Callable[..., Tensor], notes: Sequence[str] = ()):
        self.previews, self.draw, self.notes = previews, draw, notes
        self.bar = comfy.utils.ProgressBar(steps)
        self.first: Progress | None = None
        self.said = 0.0

    def __call__(self, at: Progress) -> bool:
        self._say(at)
        try:
            preview = ("JPEG", self.previews.drawn(self.draw, at.tokens), 512) if self.previews.due(at) else None
            # The server raises an interrupt here too.
            self.bar.update_absolute(at.step, at.steps, preview)
        except comfy.model_management.InterruptProcessingException:
            return True
        return comfy.model_management.processing_interrupted()

    def _say(self, at: Progress) -> None:
        first, self.first = self.first or at, self.first or at
        if at.step < at.steps and time.monotonic() - self.said < BETWEEN_TEXTS:
            return
        self.said = time.monotonic()
        a_step = (at.seconds - first.seconds) / (at.step - first.step) if at.step > first.step else None
        show_text("\n".join([*self.notes, told(at, a_step)]))


def told(at: Progress, seconds_per_step: float | None) -> str:
    """A step in a person's words."""
    text = f"step {at.step} of {at.steps}, loss {at.smoothed_loss:.4f} (smoothed), learning rate {at.lr:.3g}"
    if seconds_per_step is None or at.step == at.steps:
        return text
    return f"{text}, about {duration(seconds_per_step * (at.steps - at.step))} left"


def duration(seconds: float) -> str:
    """12 s, 3 min, 1 h 5 min."""
    if seconds < 90:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
