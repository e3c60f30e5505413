"""What each method starts from: new adapters, every layer from its own generator, and new words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..adapters.basis import OrthogonalBasis, hashed_indices, slot_indices
from ..adapters.low_rank import LowRank, block_rows, new_block, new_block_orthogonal, new_full, new_lora, new_orthogonal
from ..adapters.own_words import METHOD as OWN_WORDS
from ..adapters.own_words import reads_text
from ..adapters.sites import Layer
from ..errors import AdapterError
from ..seeds import seeded
from ..text.words import new_token, random_and_class
from .settings import TrainSettings

NEED_SLOT = ("orthogonal", "block", "block_orthogonal")


def new_adapters(
    layers: Mapping[str, Layer], settings: TrainSettings, basis: OrthogonalBasis | None = None
) -> dict[str, LowRank]:
    """One fresh adapter per layer by `settings.method`, its trainable factors as parameters; none for "words".

    The random part of a layer depends on (seed, layer name) alone, whatever other layers there are.
    On the layer's device, float32, or float64 for a float64 layer.  basis None is the default basis.
    Raises AdapterError for a rank, slot or number of blocks that a layer cannot hold.
    """
    if settings.method == "words":
        return {}
    if settings.method == OWN_WORDS:
        _check_own_words(layers)
    by_name = settings.method == "orthogonal" and settings.name
    if settings.method in NEED_SLOT and settings.slot is None and not by_name:
        raise AdapterError(
            f"method {settings.method} needs a slot of the concept's own"
            + (", or a name to derive one from" if settings.method == "orthogonal" else "")
        )
    basis = OrthogonalBasis() if basis is None else basis
    chosen = {} if settings.method == "custom_diffusion" else layers
    largest = {name: _largest_rank(module, settings) for name, module in chosen.items()}
    for name, rank in largest.items():
        if settings.rank > rank:
            raise AdapterError(
                f"{name}: rank {settings.rank} is larger than this layer allows ({rank}); "
                f"the largest rank that fits all chosen layers is {min(largest.values())}"
            )
    return {name: _trainable(_new_adapter(name, module, settings, basis), module) for name, module in layers.items()}


def _check_own_words(layers: Mapping[str, Layer]) -> None:
    for name in layers:
        if not reads_text(name):
            raise AdapterError(
                f"{name}: at its own words a concept acts in layers that read the text alone, and this is none of "
                "them; let the keys and values of cross-attention learn (targets cross_attention_kv, without the text "
                "encoder)"
            )


def new_words(triggers: Mapping[str, Tensor], settings: TrainSettings, layers: int = 0) -> dict[str, nn.Parameter]:
    """Trigger word -> its fresh rows as a parameter, from the rows (k, width) that it starts from.

    layers: the base's cross-attention layers; (layers, vectors, width) with `settings.layerwise`.
    Raises AdapterError for layer-wise words on a base that has no such layers.
    """
    if settings.layerwise and not layers:
        raise AdapterError(
            "layer-wise words need a base whose cross-attention layers each read the text, such as Stable Diffusion "
            "1.x, 2.x or XL; this base has none, learn the word with layerwise off"
        )
    return {
        trigger: nn.Parameter(_new_word(trigger, start, settings, layers if settings.layerwise else None))
        for trigger, start in triggers.items()
    }


def _new_word(trigger: str, start: Tensor, settings: TrainSettings, layers: int | None) -> Tensor:
    generator = seeded(settings.seed, "token", trigger)
    if settings.token_start == "random + class":  # noqa: S105
        return random_and_class(start, max(settings.token_vectors, 1 + len(start)), generator, layers)
    noise = settings.token_noise if len(start) == 1 else 0.0
    return new_token(start, max(settings.token_vectors, len(start)), noise, generator, layers)


def _new_adapter(name: str, module: Layer, settings: TrainSettings, basis: OrthogonalBasis) -> LowRank:
    out, inp, kernel = _geometry(module)
    width, rank, alpha = inp * math.prod(kernel or (1,)), settings.rank, settings.alpha
    generator = seeded(settings.seed, "adapter", name)
    if settings.method == "custom_diffusion":
        return new_full(out, inp, kernel)
    if settings.method == "lora" or (settings.method == OWN_WORDS and settings.slot is None):
        return new_lora(out, inp, rank, alpha, generator, kernel)
    if settings.method == "block":
        return new_block(out, inp, rank, alpha, _rows(out, settings), generator, kernel)
    if settings.slot is not None:
        indices = slot_indices(width, rank, settings.slot)
    else:
        indices = hashed_indices(width, rank, settings.name, name)
    if settings.method in ("orthogonal", OWN_WORDS):
        return new_orthogonal(out, inp, rank, alpha, basis, indices, kernel)
    return new_block_orthogonal(out, inp, alpha, _rows(out, settings), basis, indices, kernel)


def _rows(out: int, settings: TrainSettings) -> torch.Tensor:
    slot = cast(int, settings.slot)  # no method of blocks goes on without one, see `new_adapters`
    return block_rows(out, settings.blocks, slot, settings.layout)


def _geometry(module: Layer) -> tuple[int, int, tuple[int, ...] | None]:
    """(out, inputs of one group, kernel or None) of a Linear or Conv2d."""
    out, inp, *kernel = module.weight.shape
    return out, inp, tuple(kernel) or None


def _largest_rank(module: Layer, settings: TrainSettings) -> int:
    out, inp, kernel = _geometry(module)
    rows = out if settings.method in ("lora", "orthogonal", OWN_WORDS) else len(_rows(out, settings))
    return min(rows, inp * math.prod(kernel or (1,)))


def _trainable(adapter: LowRank, module: Layer) -> LowRank:
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    moved = adapter.to(module.weight.device, dtype)
    return moved.replace(**{name: nn.Parameter(factor) for name, factor in moved.trainable().items()})
