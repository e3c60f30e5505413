"""What the prompts of one batch of pictures say to a headless base, and which concepts act on it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..adapters.attach import attached
from ..adapters.own_words import NOTHING_SAID, Said, at_own_words, residuals_in
from ..adapters.sites import with_sites
from ..merging.compatibility import fit, fitting_concepts, learned_words
from ..merging.own_words import EVERYWHERE, split_gated, spoken
from ..models.base import BaseModel
from ..stack import Stack
from ..text.contexts import Context, joined, text_of
from .attention import regional_attention
from .gating import Gate
from .moment import Clock, Moment
from .shares import Places


class Speaking:
    """The global prompt and the regions' own, on a base that is not changed.

    tokens: learned words beside those of the stack, and what acts at them.  acts: which concepts act where, as
    `acting` has it.  act_on: which of the stack's have their own words alone in layers that read text.
    Raises AdapterError for concepts that do not fit the base.
    """

    def __init__(
        self,
        base: BaseModel,
        places: Places,
        tokens: Mapping[str, Tensor],
        stack: Stack,
        acts: Sequence[tuple[int, ...]],
        act_on: str = EVERYWHERE,
    ):
        self.base, self.places = base, places
        merged = residuals_in(tokens)
        self.layers = with_sites(base.layers(("all_linear",), ("all_linear",))) if stack or merged else {}
        self.acts = acts
        stack = Stack.of(stack)
        concepts, strengths = stack.concepts, stack.strengths
        self.shapes = {name: module.weight.shape for name, module in self.layers.items()}
        fitting = fitting_concepts(base.architecture, self.shapes, concepts)
        self.stack = Stack(zip(fitting, strengths, strict=True))
        gated = split_gated(self.stack, act_on)
        self.by_word = {residual.owner for residual in gated}
        self.residuals = [*merged, *gated]
        # Numbers of the residuals that act in each text: those of the gated concepts where these do.
        self.active = [
            [*range(len(merged)), *(n for n, one in enumerate(gated, len(merged)) if one.owner in numbers)]
            for numbers in acts
        ]
        words = learned_words(self.stack, base.word_rows)
        self.tokens = {**tokens, **spoken(words, gated, base.word_rows)}
        self.gate = Gate(self.stack, self.acts, places, self.layers, self.by_word) if stack else None
        self.said: dict[int, Said] = {}

    def contexts(self, prompts: Sequence[str], negative: str | None) -> tuple[Context, list[Tensor]]:
        """(the pictures' context, each region's text), rows of the negative first where there is one."""
        count = len(prompts)
        whole = self._read(0, prompts, None if negative is None else [negative] * count)
        regional = []
        for number, region in enumerate(self.places.regions, start=1):
            instead = negative if region.negative is None else region.negative
            negatives = None if negative is None or instead is None else [instead] * count
            regional.append(text_of(self._read(number, [region.prompt] * count, negatives)))
        return whole, regional

    def _read(self, text: int, prompts: Sequence[str], negatives: Sequence[str] | None) -> Context:
        """One text of all pictures, rows of the negatives first; where it says what is kept for its layers."""
        parts = [list(prompts)] if negatives is None else [list(negatives), list(prompts)]
        self.said[text] = self._find_words(text, [prompt for part in parts for prompt in part])
        contexts = [self._context(text, part) for part in parts]
        return contexts[0] if len(contexts) == 1 else joined(contexts)

    def _find_words(self, text: int, rows: Sequence[str]) -> Said:
        if not self.active[text]:
            return NOTHING_SAID
        places = {prompt: self.base.word_places(prompt, self.tokens) for prompt in dict.fromkeys(rows)}
        return Said(
            {number: [self.residuals[number].places(places[row], True) for row in rows] for number in self.active[text]}
        )

    def _context(self, text: int, prompts: Sequence[str]) -> Context:
        """Prompts as the text encoder reads them with the concepts of one text."""
        pairs = [self.stack[number] for number in self.acts[text] if number not in self.by_word]
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
            at_own_words(self.layers, self.residuals, lambda x: self.said[clock().text](x)),
            self.gate.attached(self.layers, clock) if self.gate is not None else nullcontext(),
        ):
            yield clock.at
