"""ControlNets and T2I-Adapters by region: what they add to the network is multiplied with a weight of each place."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from ...modular_concepts.regions.moment import Moment
from ...modular_concepts.regions.shares import Places


def weighted(
    control: Mapping[str, list[Tensor | None]] | None, places: Places, moment: Moment
) -> Mapping[str, list[Tensor | None]] | None:
    """The host's control of one call, inside each region times its `control`, as it was outside.

    control: part of the network -> (B, C, H, W) of each of its blocks, or (B, T, C) in a diffusion transformer.
    """
    if control is None or all(region.control == 1 for region in places.regions):
        return control
    factors = torch.tensor([1.0, *(region.control for region in places.regions)])

    def at(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        size = tensor.shape[2:] if tensor.dim() == 4 else tensor.shape[1:2]
        division = places.division(math.prod(size), moment, tensor)
        weights = (factors @ division.texts).to(tensor)
        return tensor * (rearrange(weights, "(h w) -> h w", h=size[0]) if tensor.dim() == 4 else weights[:, None])

    return {part: [at(tensor) for tensor in tensors] for part, tensors in control.items()}
