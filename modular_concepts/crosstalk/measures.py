"""How much concepts step on each other, from their factors alone: no out x out matrix is formed.

With delta = s U D:  |delta|^2 = s^2 <U^T U, D D^T>,  <delta_a, delta_b> = s_a s_b <U_a^T U_b, D_a D_b^T>,
|delta_a delta_b^T|^2 = s_a^2 s_b^2 <U_a^T U_a G, G U_b^T U_b> with G = D_a D_b^T: rank x rank products only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank, narrowed, scatter_rows, together
from ..adapters.sites import aligned
from ..concept import Concept
from ..merging.compatibility import trained_for_words
from ..merging.own_words import words_of

Pair = tuple[str, str]

_CHUNK = 256


class CrosstalkTable(TypedDict):
    """Figures of pairs of concepts, see `crosstalk_table`."""

    pairs: dict[Pair, dict[str, float]]
    layers: dict[str, dict[Pair, dict[str, float]]]
    mean: float


class Layered(Protocol):
    """What crosstalk reads of a concept."""

    @property
    def name(self) -> str: ...

    @property
    def layers(self) -> Mapping[str, LowRank]: ...


def crosstalk(a: LowRank, b: LowRank) -> float:
    """|delta_a delta_b^T|_F / (|delta_a| |delta_b|), 0..1: 0 where the inputs that they read are orthogonal.

    0 if either is zero.  Source: Po et al. 2024, section 3.3 ("norm of the product", normalised layer-wise).
    """
    (up_a, down_a), (up_b, down_b) = map(_factors, together((a, b)))
    gram = down_a @ down_b.mT
    squared = ((up_a.mT @ up_a @ gram) * (gram @ (up_b.mT @ up_b))).sum().clamp(min=0)
    return _ratio(abs(a.scale * b.scale) * squared.sqrt().item(), a, b)


def cosine(a: LowRank, b: LowRank) -> float:
    """<delta_a, delta_b> / (|delta_a| |delta_b|), -1..1.  0 if either is zero."""
    a, b = together((a, b))
    apart = a.rows is not None or b.rows is not None
    (up_a, down_a), (up_b, down_b) = map(_whole_factors if apart else _factors, (a, b))
    inner = ((up_a.mT @ up_b) * (down_a @ down_b.mT)).sum().item()
    return _ratio(a.scale * b.scale * inner, a, b)


@torch.no_grad()
def sign_conflicts(a: LowRank, b: LowRank) -> float:
    """Share of the weights that both move and move in opposite directions, 0..1; 0 when they share none.

    Looks at single weights, so it costs a delta each, 256 rows at a time.
    """
    a, b = together((a, b))
    (up_a, down_a), (up_b, down_b) = map(_whole_factors, (a, b))
    both = opposed = 0
    for start in range(0, a.out_features, _CHUNK):
        rows = slice(start, start + _CHUNK)
        product = (up_a[rows] @ down_a).sign() * (up_b[rows] @ down_b).sign()
        both += product.count_nonzero().item()
        opposed += (product * a.scale * b.scale < 0).sum().item()
    return opposed / both if both else 0.0


def column_overlap(first: Sequence[int], second: Sequence[int]) -> int:
    """How many basis columns two adapters of one layer share; 0 means no crosstalk at all."""
    return len(set(map(int, first)) & set(map(int, second)))


def crosstalk_table(concepts: Sequence[Layered], signs: bool = False) -> CrosstalkTable:
    """Crosstalk and cosine (and, if asked, sign conflicts) of every pair of concepts.

    Returns {"pairs": {(name, name): {"crosstalk": mean over their common layers, "cosine": ...}},
    "layers": {layer: {(name, name): {...}}}, "mean": mean crosstalk over pairs that share a layer, else 0.0}.
    A name that comes twice is numbered.  Of two concepts that act at their own words alone every figure is 0.
    """
    names = distinct_names(concepts)
    named = list(zip(names, aligned([concept.layers for concept in concepts]), strict=True))
    apart = {
        (first, second): share_no_text(a, b)
        for (first, a), (second, b) in itertools.combinations(zip(names, concepts, strict=True), 2)
    }
    layers: dict[str, dict[Pair, dict[str, float]]] = {}
    pairs: dict[Pair, dict[str, float]] = {}
    for (first, a), (second, b) in itertools.combinations(named, 2):
        shared = {}
        for layer in shared_layers(a, b):
            shared[layer] = _figures(a[layer], b[layer], signs, apart[first, second])
            layers.setdefault(layer, {})[first, second] = shared[layer]
        if shared:
            measures = next(iter(shared.values()))
            pairs[first, second] = {m: sum(f[m] for f in shared.values()) / len(shared) for m in measures}
    mean = sum(figures["crosstalk"] for figures in pairs.values()) / len(pairs) if pairs else 0.0
    return {"pairs": pairs, "layers": layers, "mean": mean}


def shared_layers(a: Mapping[str, LowRank], b: Mapping[str, LowRank]) -> list[str]:
    """Layers that both change, of one shape: what two bases call alike is not always the same."""
    return [layer for layer, adapter in a.items() if layer in b and adapter.weight_shape == b[layer].weight_shape]


def share_no_text(a: Layered, b: Layered) -> bool:
    """Whether both act at their own words alone, and no word is both's: what one reads the other never does."""
    both = [concept for concept in (a, b) if isinstance(concept, Concept) and trained_for_words(concept)]
    return len(both) == 2 and not set.intersection(*({word.lower() for word in words_of(each)} for each in both))


def _figures(a: LowRank, b: LowRank, signs: bool, apart: bool) -> dict[str, float]:
    if apart:
        return {"crosstalk": 0.0, "cosine": 0.0} | ({"sign_conflicts": 0.0} if signs else {})
    figures = {"crosstalk": crosstalk(a, b), "cosine": cosine(a, b)}
    return figures | ({"sign_conflicts": sign_conflicts(a, b)} if signs else {})


def _factors(adapter: LowRank) -> tuple[Tensor, Tensor]:
    """(rows, k) and (k, in * kh * kw), float64, k at most the rank."""
    return narrowed(adapter.lora_up, adapter.lora_down)


def _whole_factors(adapter: LowRank) -> tuple[Tensor, Tensor]:
    """`_factors` over all output rows."""
    up, down = _factors(adapter)
    return scatter_rows(up, adapter.rows, adapter.out_features, dim=0), down


def _ratio(value: float, a: LowRank, b: LowRank) -> float:
    size = delta_norm(a) * delta_norm(b)
    return value / size if size else 0.0


def delta_norm(adapter: LowRank) -> float:
    """|delta|_F, without the delta."""
    up, down = _factors(adapter)
    squared = ((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0)
    return abs(adapter.scale) * squared.sqrt().item()


def distinct_names(concepts: Sequence[Layered]) -> list[str]:
    """Names as the table has them: those that come twice are numbered."""
    names = [concept.name for concept in concepts]
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    counted: dict[str, int] = {}
    out = []
    for name in names:
        counted[name] = counted.get(name, 0) + 1
        out.append(f"{name} ({counted[name]})" if seen[name] > 1 else name)
    return out
