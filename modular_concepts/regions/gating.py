"""Gated regions: a concept's low-rank residual acts only where its region is.

For layers whose tokens are positions the mask goes between the factors, ((x downᵀ) * columns) upᵀ, with all concepts
side by side: any number of regions is one pair of small products more.  Where many concepts have few positions each,
their positions are gathered instead, so that the cost does not grow with the number of concepts.  For keys and values
of cross-attention the tokens are texts, and each text goes through its own concepts' residuals only.  Convolutions mask
the positions that they write.  What belongs to no position, the time embedding for instance, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..adapters.low_rank import ConvGeometry, LowRank, scatter_rows
from ..adapters.own_words import reads_text
from ..adapters.sites import Site
from ..families import network_of
from ..families.family import JOINT, NEITHER, TEXTS
from ..merging.sums import MergedLayer, MergedSum, merged_factors
from ..models.layers import tokens_of
from ..stack import Stack
from .moment import Moment, Now
from .shares import Part, Places

# Moving a row in and out costs about as much as this much more rank.
_GATHERING = 24
_MOST_COLUMNS = 512  # on a GPU, where each product more costs a launch


class Held:
    """Which of a layer's tokens each concept holds, and what follows from it for batches and factors; kept."""

    def __init__(self, weights: Tensor, like: Tensor):
        """weights: (concepts, T) float32 in 0..1; like: of the layer's device and dtype."""
        self.tokens, self._like = weights.shape[1], like.new_empty(0)
        self.parts = tuple(Part.of(weight, like) for weight in weights)
        self._weights = weights
        # How each layer adds to these tokens, found once: at every step 160 layers ask, and on a GPU their asking is
        # what costs.
        self.ways: dict[Gated, Callable[[Tensor, Tensor], Tensor]] = {}
        self._columns: dict[tuple, Tensor] = {}
        self._rows: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = {}

    def weights(self, owner: int) -> Tensor:
        """(T,): how much of each token is the concept's."""
        return self._weights[owner].to(self._like)

    def columns(self, owners: tuple[int, ...], ranks: tuple[int, ...]) -> Tensor:
        """(T, sum of ranks): for each column between the factors, where its concept acts."""
        if (owners, ranks) not in self._columns:
            each = [self.weights(owner)[:, None].expand(-1, rank) for owner, rank in zip(owners, ranks, strict=True)]
            self._columns[owners, ranks] = torch.cat(each, dim=1)
        return self._columns[owners, ranks]

    def rows(self, owner: int, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """A part's (index, share) in a batch whose tokens lie behind each other; index None is all of them."""
        if (owner, batch) not in self._rows:
            part = cast(Part, self.parts[owner])  # only concepts that hold some of them are asked for
            index, share = part.index, part.share
            if index is not None:
                index = (index + self.tokens * torch.arange(batch, device=index.device)[:, None]).flatten()
            self._rows[owner, batch] = index, share if share is None else share.repeat(batch, 1)
        return self._rows[owner, batch]

    def count(self, owner: int) -> int:
        part = self.parts[owner]
        return 0 if part is None else self.tokens if part.index is None else len(part.index)


@dataclass(frozen=True, eq=False)
class Gated:
    """One layer's residuals of all concepts that have one there; `owners` are the concepts' numbers.

    adapters, strengths: one for each owner.  Strengths and scales enter here, and nowhere else.
    """

    owners: tuple[int, ...]
    adapters: tuple[LowRank, ...]
    strengths: tuple[float, ...]
    conv: ConvGeometry | None = None
    _moved: dict = field(default_factory=dict)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(adapter.rank for adapter in self.adapters)

    def add(self, output: Tensor, x: Tensor, held: Held) -> Tensor:
        """output + what the concepts add to the tokens that they hold.

        x: (B, T, in), output: (B, T, out); of a convolution (B, C, H, W), and its tokens are the output's positions.
        May write into `output`, which is the layer's own; tokens that no concept holds keep theirs bit for bit.
        """
        if self not in held.ways:
            held.ways[self] = self._way(held, x)
        return held.ways[self](output, x)

    def _way(self, held: Held, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """What `add` does with an output and an x for tokens that are held so."""
        acting = [number for number, owner in enumerate(self.owners) if held.parts[owner] is not None]
        if not acting:
            return lambda output, _x: output
        parts = (held.parts[self.owners[number]] for number in acting)
        if all(part is not None and part.everything for part in parts):
            # The very steps of a merged layer, so that one full region is plain sampling to the last bit.
            merged = self._merged(tuple(acting))
            return lambda output, x: output + merged.residual(x, self.conv)
        conv = self.conv
        if conv is not None:
            return lambda output, x: self._add_to_map(output, x, held, acting, conv)
        if self._side_by_side(held, x):
            every, columns = tuple(range(len(self.owners))), held.columns(self.owners, self.ranks)
            return lambda output, x: self._add_side_by_side(output, x, every, columns)
        return lambda output, x: self._gathered(output.contiguous(), x.flatten(0, -2), held, acting)

    def _add_side_by_side(self, output: Tensor, x: Tensor, numbers: tuple[int, ...], columns: Tensor) -> Tensor:
        layer = self._joined(numbers, x)
        hidden = F.linear(x, layer.down) * columns
        output = output.contiguous()
        output.view(-1, output.shape[-1]).addmm_(hidden.flatten(0, -2), layer.up.mT)
        return output

    def _side_by_side(self, held: Held, x: Tensor) -> bool:
        """Whether all concepts in one pair of products cost less than each with its own tokens."""
        if any(adapter.kind == "full" for adapter in self.adapters):
            return False  # whole weights have no narrow middle
        if x.device.type != "cpu":
            return sum(self.ranks) <= _MOST_COLUMNS
        pairs = zip(self.owners, self.ranks, strict=True)
        return held.tokens * sum(self.ranks) <= sum(held.count(owner) * (rank + _GATHERING) for owner, rank in pairs)

    def _gathered(self, output: Tensor, x: Tensor, held: Held, acting: Sequence[int]) -> Tensor:
        into = output.view(-1, output.shape[-1])
        for number in acting:
            layer = self._joined((number,), x)
            index, share = held.rows(self.owners[number], len(output))
            hidden = x if index is None else x.index_select(0, index)
            hidden = hidden if self.adapters[number].kind == "full" else F.linear(hidden, layer.down)
            hidden = hidden if share is None else hidden * share
            if index is None:
                into.addmm_(hidden, layer.up.mT)
            else:
                into.index_add_(0, index, F.linear(hidden, layer.up))
        return output

    def _add_to_map(self, output: Tensor, x: Tensor, held: Held, acting: Sequence[int], conv: ConvGeometry) -> Tensor:
        size = output.shape[2:]
        if conv.groups == 1 and all(adapter.kind != "full" for adapter in self.adapters):
            layer = self._joined(tuple(range(len(self.owners))), x)
            down = layer.down if layer.down.dim() == 4 else layer.down[:, :, None, None]
            columns = rearrange(held.columns(self.owners, self.ranks), "(h w) r -> r h w", h=size[0])
            hidden = F.conv2d(x, down, None, conv.stride, conv.padding, conv.dilation) * columns
            return output + F.conv2d(hidden, layer.up[:, :, None, None])
        for number in acting:
            weights = rearrange(held.weights(self.owners[number]), "(h w) -> h w", h=size[0])
            output = output + self._joined((number,), x).residual(x, conv) * weights
        return output

    def _merged(self, numbers: tuple[int, ...]) -> MergedSum:
        """Some of the adapters as a merge has them."""
        if numbers not in self._moved:
            adapters = tuple(self.adapters[number] for number in numbers)
            self._moved[numbers] = MergedSum(adapters, tuple(self.strengths[number] for number in numbers))
        return self._moved[numbers]

    def _joined(self, numbers: tuple[int, ...], like: Tensor) -> MergedLayer:
        """Some of the adapters as one, on the device and in the dtype of `like`, with an `up` over all rows."""
        key = (numbers, like.device, like.dtype)
        if key not in self._moved:
            adapters = [self.adapters[number] for number in numbers]
            layer = merged_factors(adapters, [self.strengths[number] for number in numbers])
            up = scatter_rows(layer.up, layer.rows, layer.out_features, dim=0)
            self._moved[key] = MergedLayer(up, layer.down, None, layer.out_features).to(like.device, like.dtype)
        return self._moved[key]


class Gate:
    """All gated layers of one sampling.

    texts: for each text, the global one first, the numbers of the stack's concepts that act there.
    by_word: numbers of those that have their own words in layers that read text, which is not done here.
    """

    def __init__(
        self,
        stack: Stack,
        texts: Sequence[tuple[int, ...]],
        places: Places,
        layers: Mapping[str, nn.Module | Site],
        by_word: Collection[int] = (),
    ):
        self.places = places
        self.acts = torch.zeros(len(stack), len(texts))
        for text, concepts in enumerate(texts):
            self.acts[list(concepts), text] = 1.0
        self.gated = gated_layers(stack, layers, {number for concepts in texts for number in concepts}, by_word)
        self._known: dict[object, Held] = {}
        self._by_moment: dict[tuple, Held] = {}
        self.called: set[str] = set()  # names of the layers that were called since someone emptied it

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module | Site], now: Now) -> Generator[None]:
        """Within the block the layers add what their concepts do where they act; hooks, which end on leaving.

        now(): where the sampling is, asked in every layer.
        """
        with ExitStack() as stack:
            for name, gated in self.gated.items():
                hook, place = self._hook(name, gated, now), layers[name]
                module = place.module if isinstance(place, Site) else place
                hook = _on_rows(place, hook) if isinstance(place, Site) else hook
                stack.callback(module.register_forward_hook(self._noting(name, hook)).remove)
            yield

    def _hook(self, name: str, gated: Gated, now: Now) -> Callable[..., Tensor]:
        tokens, network = tokens_of(name), network_of(name)
        if tokens == JOINT and network is not None:
            return self._on_joint(gated, now, network.text_first)
        return self._on_texts(gated, now) if tokens == TEXTS else self._on_positions(gated, now)

    def _noting(self, name: str, hook: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*inputs) -> Tensor:
            self.called.add(name)
            return hook(*inputs)

        return noted

    def _on_positions(self, gated: Gated, now: Now):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tokens, moment = output.shape[-2] if gated.conv is None else output.shape[-2] * output.shape[-1], now()
            key = (tokens, moment.latent_size, moment.progress, output.dtype, output.device)
            held = self._by_moment.get(key)
            if held is None:
                division = self.places.division(tokens, moment, output)
                held = self._by_moment[key] = self._held(division, lambda: division.texts, output)
            return gated.add(output, args[0], held)

        return hook

    def _on_joint(self, gated: Gated, now: Now, text_first: bool):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            moment = now()
            lengths = self._lengths(output.shape[-2] - moment.positions, moment)
            key = (moment, text_first, *lengths, output.dtype, output.device)

            def shares() -> Tensor:
                parts = (_blocks(lengths), self.places.division(moment.positions, moment, output).texts)
                return torch.cat(parts if text_first else parts[::-1], dim=1)

            return gated.add(output, args[0], self._held(key, shares, output))

        return hook

    def _on_texts(self, gated: Gated, now: Now):
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            lengths = self._lengths(output.shape[-2], now())
            key = (*lengths, output.dtype, output.device)
            return gated.add(output, args[0], self._held(key, lambda: _blocks(lengths), output))

        return hook

    def _lengths(self, tokens: int, moment: Moment) -> list[int]:
        """How many of the tokens are each text's."""
        if moment.lengths is not None:
            return [tokens - sum(moment.lengths), *moment.lengths]
        return [tokens if text == moment.text else 0 for text in range(self.acts.shape[1])]

    def _held(self, key: object, texts: Callable[[], Tensor], like: Tensor) -> Held:
        """texts(): (1 + R, T) float32, how much of each token is each text's."""
        if key not in self._known:
            self._known[key] = Held((self.acts @ texts()).clamp(max=1), like)
        return self._known[key]


def _blocks(lengths: Sequence[int]) -> Tensor:
    return torch.block_diag(*(torch.ones(1, length) for length in lengths))


def gated_layers(
    stack: Stack, layers: Mapping[str, nn.Module | Site], used: set[int], by_word: Collection[int] = ()
) -> dict[str, Gated]:
    """Canonical name -> the residuals of the concepts of the stack that are used, for layers that have tokens."""
    by_layer: dict[str, list[tuple[int, LowRank, float]]] = {}
    for number, (concept, strength) in enumerate(stack):
        if number in used and strength != 0:
            for name, adapter in concept.layers.items():
                if tokens_of(name) != NEITHER and not (number in by_word and reads_text(name)):
                    by_layer.setdefault(name, []).append((number, adapter, strength))
    return {
        name: Gated(*zip(*entries, strict=True), conv=_geometry(layers[name])) for name, entries in by_layer.items()
    }


def _on_rows(site: Site, hook: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A hook for a site's own rows as one for the whole layer, whose other rows stay bit for bit."""

    def on_rows(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = hook(module, args, site.of(output).contiguous())
        return output.index_copy(-1, site.rows.to(output.device), changed)

    return on_rows


def _geometry(module: nn.Module | Site) -> ConvGeometry | None:
    return ConvGeometry.of(module) if isinstance(module, nn.Conv2d) else None
