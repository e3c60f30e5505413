"""Custom Diffusion's constrained merge of key and value layers: new words answered exactly, ordinary text moved least.

W = argmin |(W - W0) C_reg^T|^2  subject to  W c = W_i c for every text feature c of concept i.
With d = C (C_reg^T C_reg)^-1:  W = W0 + V (d C^T)^-1 d,  V = [delta_i C_i^T].  Source: Kumari et al. 2023, Eq. 4-6.

Text that is not among C_reg moves least only as far as C_reg is like it: directions in which those captions hardly vary
would be moved at any price, so C_reg^T C_reg is damped.  Held-out captions of the toy base, how far their keys and
values move as a share of a concept's own answer (`python -m bench.ordinary_text`): see docs/merging.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from ..errors import AdapterError
from ..models.layers import is_target
from .dense import MergedDense
from .method import TEXTS, LayerStack, Method
from .sums import MergedLayer, MergedSum, sum_layer

if TYPE_CHECKING:
    from jaxtyping import Float

RIDGE = 1e-2  # of C_reg^T C_reg, relative to its mean eigenvalue
ALIKE = 1e-6  # of d C^T, likewise: features of two prompts with one word can be almost alike


@torch.no_grad()
def constrained_factors(
    adapters: Sequence[LowRank],
    strengths: Sequence[float],
    features: Sequence[Float[Tensor, "_ inp"]],
    usual: Float[Tensor, "inp inp"],
) -> MergedLayer:
    """up down = V (d C^T)^-1 d with down's rows orthonormal: the rank is the number of text features.

    features: (rows_i, in) that each concept must answer as it was trained; rows that repeat are dropped.
    usual: (in, in) second moments of text features without any concept, C_reg^T C_reg.
    """
    device = adapters[0].lora_up.device
    pairs = [
        (strength * adapter.delta().flatten(1).double(), _drop_repeats(texts.to(device).double()))
        for adapter, strength, texts in zip(adapters, strengths, features, strict=True)
    ]
    rows = torch.cat([texts for _, texts in pairs])
    if len(rows) > rows.shape[1]:
        raise AdapterError(
            f"{len(rows)} text features are asked of a layer with {rows.shape[1]} inputs; merge fewer concepts this "
            "way, or merge by sum"
        )
    wanted = torch.cat([delta @ texts.mT for delta, texts in pairs], dim=1)
    usual = usual.to(device).double()
    damped = usual + RIDGE * usual.diagonal().mean() * torch.eye(len(usual)).to(usual)
    down = torch.linalg.solve(damped, rows.mT).mT
    between = down @ rows.mT
    between = between + ALIKE * between.diagonal().mean() * torch.eye(len(between)).to(between)
    up = torch.linalg.solve(between, wanted.mT).mT
    # Features that are almost alike make large factors that cancel, which half precision would not survive.
    basis, mixing = torch.linalg.qr(down.mT)
    up, down = up @ mixing.mT, basis.mT
    first = adapters[0]
    dtype = torch.promote_types(first.lora_up.dtype, torch.float32)
    return MergedLayer(up.to(dtype), down.to(dtype), None, first.out_features)


def _drop_repeats(rows: Tensor) -> Tensor:
    """Rows in order, without those that are there already to within rounding."""
    different: list[Tensor] = []
    for row in rows:
        if all((row - other).norm() > 1e-4 * row.norm() for other in different):
            different.append(row)
    return torch.stack(different)


def _merge_layer(stack: LayerStack) -> MergedLayer | MergedSum | MergedDense:
    """Layers that do not read text are sum_layer."""
    evidence = stack.evidence
    if evidence.usual is None or not is_target(stack.layer, "cross_attention_kv"):
        return sum_layer(stack)
    return constrained_factors(stack.adapters, stack.strengths, evidence.texts, evidence.usual)


CUSTOM_DIFFUSION = Method("custom_diffusion", _merge_layer, needs=TEXTS)
