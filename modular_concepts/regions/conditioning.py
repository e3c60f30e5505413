"""What the prompts of one batch of pictures say to a headless base, and which concepts act on it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..adapters.attach import attached
from ..adapters.sites import with_sites
from ..merging.compatibility import faded_words, fit, fitting_concepts
from ..models.base import BaseModel
from ..stack import Stack
from ..text.contexts import Context, joined, text_of
from .attention import regional_attention
from .gating import Gate
from .moment import Clock, Moment
from .shares import Places


class Speaking:
    """The global prompt and the regions' own, on a base that is not changed.

    tokens: learned words beside those of the stack.  acts: which concepts act where, as `acting` has it.
    Raises AdapterError for concepts that do not fit the base.
    """

    def __init__(
        self,
        base: BaseModel,
        places: Places,
        tokens: Mapping[str, Tensor],
        stack: Stack,
        acts: Sequence[tuple[int, ...]],
    ):
        self.base, self.places = base, places
        self.layers = with_sites(base.layers(("all_linear",), ("all_linear",))) if stack else {}
        self.acts = acts
        stack = Stack.of(stack)
        concepts, strengths = stack.concepts, stack.strengths
        self.shapes = {name: module.weight.shape for name, module in self.layers.items()}
        fitting = fitting_concepts(base.architecture, self.shapes, concepts)
        self.stack = Stack(zip(fitting, strengths, strict=True))
        self.tokens = {**tokens, **faded_words(concepts, strengths, base.word_rows)}
        self.gate = Gate(self.stack, self.acts, places, self.layers) if stack else None

    def contexts(self, prompts: Sequence[str], negative: str | None) -> tuple[Context, list[Tensor]]:
        """(the pictures' context, each region's text), rows of the negative first where there is one."""
        count = len(prompts)
        whole = self._context(0, prompts)
        if negative is not None:
            whole = joined([self._context(0, [negative] * count), whole])
        regional = []
        for number, region in enumerate(self.places.regions, start=1):
            context = self._context(number, [region.prompt] * count)
            if negative is not None:
                instead = negative if region.negative is None else region.negative
                context = joined([self._context(number, [instead] * count), context])
            regional.append(text_of(context))
        return whole, regional

    def _context(self, text: int, prompts: Sequence[str]) -> Context:
        """Prompts as the text encoder reads them with the concepts of one text."""
        pairs = [self.stack[number] for number in self.acts[text]]
        adapters = {}
        if pairs:
            merged, _ = fit(self.base.architecture, self.shapes, pairs)
            adapters = {name: layer for name, layer in merged.items() if not name.startswith("unet.")}
        with attached(self.layers, adapters):
            return self.base.context(prompts, self.tokens)

    @contextmanager
    def acting(self, texts: Sequence[Tensor], latent_size: tuple[int, int]) -> Generator[Callable[[float], None]]:
        """Within the block the base draws by region; yields what to tell how far the sampling is, 0..1.

        texts: each region's, from `contexts`; latent_size: (height, width) of the latents.
        """
        clock = Clock(Moment(latent_size))
        regional = torch.stack(list(texts)) if texts else None
        with (
            regional_attention(self.base.unet, self.places, regional, clock),
            self.gate.attached(self.layers, clock) if self.gate is not None else nullcontext(),
        ):
            yield clock.at
