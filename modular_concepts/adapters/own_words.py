"""Residuals that act at a concept's own words alone: h_p = W x_p + sum_i g_i(p) scale_i U_i D_i x_p.

g_i(p) is 1 where token p of a text is one of concept i's trigger words, and 0 elsewhere, on layers that read the text
alone (keys and values of cross-attention).  So no concept reads another's words or an ordinary one, and a sum of any
number is each alone, to the bit: every concept has a product of its own, over its own tokens.
After TARA (arXiv 2508.08812), which gates LoRAs by token too; here in training as well.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families import network_of
from ..families.family import TEXTS
from .low_rank import LowRank, scatter_rows
from .sites import Layer, Site

METHOD = "own_words"  # of concepts that were trained so

# The text (B, T, D) that a layer reads just now -> number of each residual that has a word there -> its places among
# the B * T tokens, (n,) int64 where the text is.
Where = Callable[[Tensor], Mapping[int, Tensor]]


def reads_text(name: str) -> bool:
    """Whether a layer reads the text and nothing else, so that a residual on it can be one word's.

    In a joint attention the text's tokens have heard the picture, and each other through it.
    """
    part, _, path = name.partition(".")
    network = network_of(name)
    return part == "unet" and network is not None and not network.joint and network.tokens_of(path) == TEXTS


@dataclass(frozen=True, eq=False)
class WordResidual:
    """What one concept adds at its own words.

    triggers: the words that call it.  layers: canonical name -> adapter, of layers that read text alone.
    owner: the concept's number in its stack.
    """

    name: str
    triggers: tuple[str, ...]
    layers: Mapping[str, LowRank]
    strength: float = 1.0
    owner: int = 0
    _ready: dict = field(default_factory=dict, repr=False)

    def places(self, said: Mapping[str, Sequence[int]], by_case: bool = False) -> list[int]:
        """said: trigger word -> where it stands in a text, as `Base.word_places` gives it.

        by_case: whether it tells words apart that differ in capitals alone, as headless bases do.
        """
        mine = set(self.triggers) if by_case else {trigger.lower() for trigger in self.triggers}
        return sorted(
            place for word, places in said.items() if (word if by_case else word.lower()) in mine for place in places
        )

    def factors(self, layer: str, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """(down, up) of a layer on the device and in the dtype of `like`, strength and scale in `up`; kept.

        down is None for whole weights, which have no narrow middle.  Factors that are trained are read anew each time.
        """
        adapter = self.layers[layer]
        if adapter.lora_up.requires_grad or adapter.lora_down.requires_grad:
            return self._make_factors(adapter, like)
        key = (layer, like.device, like.dtype)
        if key not in self._ready:
            self._ready[key] = self._make_factors(adapter, like)
        return self._ready[key]

    def _make_factors(self, adapter: LowRank, like: Tensor) -> tuple[Tensor | None, Tensor]:
        up = scatter_rows(adapter.lora_up, adapter.rows, adapter.out_features, dim=0)
        up = (up * (self.strength * adapter.scale)).to(like)
        return (None if adapter.kind == "full" else adapter.lora_down.to(like)), up


@contextmanager
def at_own_words(layers: Mapping[str, Layer], residuals: Sequence[WordResidual], where: Where) -> Generator[None]:
    """Within the block the layers add each residual where its words are; hooks, which end on leaving.

    layers: canonical name -> module or site, at least those that any residual has.  where: asked at each call.
    With gradients, or on a site, outputs are made anew; else a layer's own is written into.  Tokens that no residual
    has keep theirs bit for bit.
    """
    by_layer: dict[str, dict[int, WordResidual]] = {}
    for number, residual in enumerate(residuals):
        for name in residual.layers if residual.strength != 0 else ():
            by_layer.setdefault(name, {})[number] = residual
    with ExitStack() as stack:
        for name, entries in by_layer.items():
            place = layers[name]
            module = place.module if isinstance(place, Site) else place
            stack.callback(module.register_forward_hook(_hook(name, place, entries, where)).remove)
        yield


def _hook(name: str, place: Layer, residuals: Mapping[int, WordResidual], where: Where):
    site = place if isinstance(place, Site) else None
    # What was added to the text that was read last: a sampling reads one text in every step.
    last: tuple[Tensor, int, Mapping[int, Tensor], list[tuple[Tensor, Tensor]]] | None = None

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal last
        x, places = args[0], where(args[0])
        if not places:
            return output
        keeps = not (torch.is_grad_enabled() or x.is_inference())
        if not (keeps and last is not None and last[0] is x and last[1] == x._version and last[2] is places):
            added = [
                (index, _product(x, index, residuals[number].factors(name, x)).to(output.dtype))
                for number, index in places.items()
                if number in residuals
            ]
            last = (x, x._version, places, added) if keeps else None
        else:
            added = last[3]
        for index, rows in added:
            output = _with_rows(output, index, rows, site)
        return output

    return add


def _product(x: Tensor, index: Tensor, factors: tuple[Tensor | None, Tensor]) -> Tensor:
    """(n, out) that a residual adds at some of the tokens of x (B, T, in)."""
    down, up = factors
    hidden = x.flatten(0, -2).index_select(0, index)
    return F.linear(hidden if down is None else F.linear(hidden, down), up)


def _with_rows(output: Tensor, index: Tensor, added: Tensor, site: Site | None) -> Tensor:
    """output with `added` (n, out) at rows `index` of its tokens, within the columns of a site."""
    if site is not None:
        wide = added.new_zeros(len(added), output.shape[-1])
        wide[:, site.start : site.start + site.count] = added
        added = wide
    output = output.contiguous()
    flat = output.view(-1, output.shape[-1])
    if torch.is_grad_enabled() or site is not None:
        return flat.index_add(0, index, added).view(output.shape)
    flat.index_add_(0, index, added)
    return output


class Said:
    """Where a batch of texts says the words of each residual; what follows for a layer is kept."""

    def __init__(self, places: Mapping[int, Sequence[Sequence[int]]]):
        """places: number of a residual -> for each row of the batch, where in it the residual's words stand."""
        self._places = {number: rows for number, rows in places.items() if any(rows)}
        self._numbers: dict[tuple[int, torch.device], dict[int, Tensor]] = {}

    def __call__(self, text: Tensor) -> Mapping[int, Tensor]:
        """`Where` of a text (B, T, D) whose rows are the batch's."""
        key = (text.shape[1], text.device)
        if key not in self._numbers:
            self._numbers[key] = {
                number: number_places(rows, text.shape[1]).to(text.device) for number, rows in self._places.items()
            }
        return self._numbers[key]


NOTHING_SAID = Said({})


def number_places(rows: Sequence[Sequence[int]], tokens: int) -> Tensor:
    """Places within each row of a batch -> their numbers among all rows' tokens, (n,) int64."""
    return torch.tensor([row * tokens + place for row, places in enumerate(rows) for place in places])


class Spoken(dict[str, Tensor]):
    """Trigger word -> its learned rows, as prompts are read; and what the concepts add at their own words."""

    def __init__(self, rows: Mapping[str, Tensor], by_word: Sequence[WordResidual] = ()):
        super().__init__(rows)
        self.by_word = tuple(by_word)


def residuals_in(tokens: Mapping[str, Tensor]) -> tuple[WordResidual, ...]:
    return tokens.by_word if isinstance(tokens, Spoken) else ()
