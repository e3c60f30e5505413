"""What training needs to know about a base and the pictures, whatever library they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .losses import Schedule


@dataclass(frozen=True, eq=False)
class Examples:
    """Latents (N, C, H, W), one caption each, masks (N, 1, H, W) in 0..1 or None.

    fingerprint: the data set's own (pictures and captions); without one, that of the latents is used.
    """

    latents: Tensor
    captions: Sequence[str]
    masks: Tensor | None = None
    fingerprint: str = ""

    def __post_init__(self):
        if len(self.latents) == 0:
            raise AdapterError("there is no picture to train on; give at least one")
        if len(self.latents) != len(self.captions):
            raise AdapterError(
                f"{len(self.latents)} pictures but {len(self.captions)} captions; each picture needs one"
            )
        if self.masks is not None and self.masks.shape != (len(self), 1, *self.latents.shape[2:]):
            raise AdapterError(
                f"masks have shape {tuple(self.masks.shape)}, latents {tuple(self.latents.shape)}; "
                "we need one mask of one channel per picture, in the latents' size"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def identity(self) -> str:
        """The fingerprint that a resumed training must find again."""
        if self.fingerprint:
            return self.fingerprint
        digest = hashlib.sha256("\0".join(self.captions).encode())
        for tensor in (self.latents, self.masks):
            if tensor is not None:
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Problem:
    """A base model and a concept's pictures.

    predict(noisy, timesteps, context) -> (B, C, H, W); encode(captions, tokens) -> context, where tokens maps
    trigger words to learned rows that gradients flow to; the context is only passed on to predict.
    layers: canonical layer name -> Linear or Conv2d inside `modules`.
    modules: whole networks, frozen and in eval mode while training lasts.
    triggers: trigger word -> rows (k, width) of the text model's table that its learned rows start from, all of them.
    prior: pictures of the class as the base draws it, for prior preservation.
    base_hash: identity of the base's weights; a resumed training refuses another one.
    """

    predict: Callable[[Tensor, Tensor, Any], Tensor]
    encode: Callable[[list[str], Mapping[str, Tensor]], Any]
    schedule: Schedule
    layers: Mapping[str, nn.Module]
    examples: Examples
    modules: Sequence[nn.Module] = ()
    triggers: Mapping[str, Tensor] = field(default_factory=dict)
    prior: Examples | None = None
    base_hash: str = ""

    def __post_init__(self):
        if self.prior is not None and self.prior.latents.shape[1:] != self.examples.latents.shape[1:]:
            raise AdapterError(
                f"class pictures have latents {tuple(self.prior.latents.shape[1:])}, the concept's "
                f"{tuple(self.examples.latents.shape[1:])}; draw them in one size"
            )

    def dataset_identity(self) -> str:
        return self.examples.identity() + (f"+{self.prior.identity()}" if self.prior else "")
