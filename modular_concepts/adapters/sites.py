"""Sites: what an adapter is for, a layer or some output rows of a layer that computes several projections at once.

A fused layer, such as a `qkv`, has a site for each of its projections, called as the layer is with the projection
behind it: `unet.blocks.0.attn.qkv.q`.  Adapters of sites are as those of layers, whose weight is those rows.  Which
layers are fused, and where their projections lie, a family says (`families/family.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..families import network_of
from ..families.family import Fused
from .low_rank import LowRank

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


@dataclass(frozen=True, eq=False)
class Site:
    """Output rows [start, start + count) of a Linear, as if they were a layer."""

    module: nn.Linear
    start: int
    count: int

    @property
    def weight(self) -> Float[Tensor, "{self.count} inp"]:
        """(count, in), a view."""
        return self.module.weight[self.start : self.start + self.count]

    @property
    def rows(self) -> Int64[Tensor, " {self.count}"]:
        """(count,) int64: its rows' numbers in the layer."""
        return torch.arange(self.start, self.start + self.count)

    def of(self, output: Float[Tensor, "*before out"]) -> Float[Tensor, "*before {self.count}"]:
        """The site's part of the layer's output (..., out): (..., count), a view."""
        return output[..., self.start : self.start + self.count]

    def lifted(self, adapter: LowRank) -> LowRank:
        """An adapter of the site as one of the whole layer, zero in all other rows."""
        rows = self.rows if adapter.rows is None else adapter.rows + self.start
        return adapter.replace(rows=rows.to(adapter.lora_up.device), out_features=self.module.weight.shape[0])


Layer = nn.Linear | nn.Conv2d | Site  # what adapters go to


def rows_of_sites(name: str, inp: int) -> dict[str, tuple[int, int]]:
    """Name of each site of a layer with `inp` inputs -> its first output row and how many; none of a plain layer."""
    fused = _fused(name)
    return {} if fused is None else {f"{name}.{part}": place for part, place in fused.rows(inp).items()}


def layer_of(name: str) -> str:
    """The name of the layer that a site is of: the name itself where it is a whole layer's."""
    above = name.rpartition(".")[0]
    return above if _fused(above) is not None else name


def with_sites(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers that these are or are parts of, and behind each that is fused all its sites."""
    whole = {layer_of(name): place.module if isinstance(place, Site) else place for name, place in layers.items()}
    places: dict[str, Layer] = {}
    for name, module in whole.items():
        places[name] = module
        places |= _sites(name, module)
    return places


def apart(layers: Mapping[str, nn.Linear]) -> dict[str, Layer]:
    """Layers, with their sites in the place of those that are fused."""
    places: dict[str, Layer] = {}
    for name, module in layers.items():
        places |= _sites(name, module) or {name: module}
    return places


def aligned(stack: Sequence[Mapping[str, LowRank]]) -> list[dict[str, LowRank]]:
    """Adapters of several concepts, so that all say the same of the same rows.

    A layer that one of them has in parts is taken apart, exactly, where another has it whole.
    """
    divided = {layer_of(name) for layers in stack for name in layers if layer_of(name) != name}
    return [
        {
            site: part
            for name, adapter in layers.items()
            for site, part in (taken_apart(name, adapter) if name in divided else {name: adapter}).items()
        }
        for layers in stack
    ]


def taken_apart(name: str, adapter: LowRank) -> dict[str, LowRank]:
    """A fused layer's adapter as one for each of its sites, exactly; of a plain layer itself."""
    sites = rows_of_sites(name, adapter.lora_down.shape[1])
    up = adapter.full_up() if sites else adapter.lora_up
    return {
        site: LowRank(up[start : start + count], adapter.lora_down, adapter.alpha, _plain(adapter), None, count)
        for site, (start, count) in sites.items()
    } or {name: adapter}


def put_together(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Adapters by layer, those of sites joined, exactly; for programs that know no sites.

    Where all of them share one `lora_down` the rank stays, else ranks add up.
    """
    parts: dict[str, dict[str, LowRank]] = {}
    for name, adapter in layers.items():
        parts.setdefault(layer_of(name), {})[name] = adapter
    return {layer: sites[layer] if layer in sites else _joined(layer, sites) for layer, sites in parts.items()}


def _joined(layer: str, sites: Mapping[str, LowRank]) -> LowRank:
    adapters = list(sites.values())
    first = adapters[0]
    places = rows_of_sites(layer, first.lora_down.shape[1])
    out = max(start + count for start, count in places.values())
    ups = []
    for name, adapter in sites.items():
        start, count = places[name]
        up = adapter.lora_up.new_zeros(out, adapter.rank)
        up[start : start + count] = adapter.full_up() * adapter.scale
        ups.append(up)
    if all(torch.equal(adapter.lora_down, first.lora_down) for adapter in adapters):
        return LowRank(torch.stack(ups).sum(0), first.lora_down, float(first.rank), "lora", None, out)
    down = torch.cat([adapter.lora_down for adapter in adapters])
    return LowRank(torch.cat(ups, dim=1), down, float(len(down)), "lora", None, out)


def _plain(adapter: LowRank) -> str:
    """The kind of a part of an adapter: rows of a block are no block's any more."""
    return {"block": "lora", "block_orthogonal": "orthogonal"}.get(adapter.kind, adapter.kind)


def _fused(name: str) -> Fused | None:
    network = network_of(name)
    return None if network is None else network.fused_at(name.partition(".")[2])


def _sites(name: str, module: nn.Module) -> dict[str, Site]:
    if not isinstance(module, nn.Linear):
        return {}
    out, inp = module.weight.shape
    places = rows_of_sites(name, inp)
    # A layer of another height than its family's is one that nobody has described.
    fits = places and max(start + count for start, count in places.values()) == out
    return {site: Site(module, start, count) for site, (start, count) in places.items()} if fits else {}
