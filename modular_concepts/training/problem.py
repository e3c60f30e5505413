"""What training needs to know about a base and the pictures, whatever library they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapters.sites import Layer
from ..errors import AdapterError
from ..models.base import Base
from ..models.schedules import append_dims
from .company import Company
from .needs import check_needs
from .settings import TrainSettings


@dataclass(frozen=True, eq=False)
class Examples:
    """Latents (N, C, H, W), or N of (C, H, W) in several sizes; one caption each, masks (N, 1, H, W) in 0..1 or None.

    fingerprint: the data set's own (pictures and captions); without one, that of the latents is used.
    mirrored: the latents of the mirrored pictures, which mirrored latents are not.
    repeats: how often each comes in an epoch; None is once.
    """

    latents: Tensor | Sequence[Tensor]
    captions: Sequence[str]
    masks: Tensor | Sequence[Tensor] | None = None
    fingerprint: str = ""
    mirrored: Tensor | Sequence[Tensor] | None = None
    repeats: Sequence[int] | None = None

    def __post_init__(self):
        if len(self.latents) == 0:
            raise AdapterError("there is no picture to train on; give at least one")
        if len(self.latents) != len(self.captions):
            raise AdapterError(
                f"{len(self.latents)} pictures but {len(self.captions)} captions; each picture needs one"
            )
        wanted = [(1, *latent.shape[1:]) for latent in self.latents]
        if self.masks is not None and [tuple(mask.shape) for mask in self.masks] != wanted:
            raise AdapterError(
                f"masks have shape {_shape(self.masks)}, latents {_shape(self.latents)}; "
                "we need one mask of one channel per picture, in the latents' size"
            )
        if self.repeats is not None and (len(self.repeats) != len(self) or min(self.repeats) < 1):
            raise AdapterError(f"repeats are {list(self.repeats)} for {len(self)} pictures; give 1 or more for each")

    def __len__(self) -> int:
        return len(self.latents)

    def entries(self) -> Tensor:
        """Each picture's number, as often as it comes in an epoch."""
        numbers = torch.arange(len(self))
        return numbers if self.repeats is None else numbers.repeat_interleave(torch.tensor(list(self.repeats)))

    def groups(self) -> list[int]:
        """A number for each picture, the same for pictures of one size."""
        sizes = [tuple(latent.shape) for latent in self.latents]
        return [sizes.index(size) for size in sizes]

    def at(self, indices: Tensor, mirrored: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Latents and masks of some pictures of one size, those where `mirrored` (B,) is true turned round."""
        latents = _picked(self.latents, indices)
        masks = None if self.masks is None else _picked(self.masks, indices)
        if mirrored is None or self.mirrored is None or not mirrored.any():
            return latents, masks
        turned = append_dims(mirrored.to(latents.device), latents)
        latents = torch.where(turned, _picked(self.mirrored, indices), latents)
        if masks is not None:
            masks = torch.where(turned.to(masks.device), masks.flip(-1), masks)
        return latents, masks

    def identity(self) -> str:
        """The fingerprint that a resumed training must find again."""
        if self.fingerprint:
            return self.fingerprint
        digest = hashlib.sha256("\0".join(self.captions).encode())
        for tensors in (self.latents, self.masks):
            for tensor in () if tensors is None else [tensors] if isinstance(tensors, Tensor) else tensors:
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if self.repeats is not None:
            digest.update(str(list(self.repeats)).encode())
        return digest.hexdigest()[:16]


def _picked(values: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values[indices.to(values.device)]
    return torch.stack([values[index] for index in indices.tolist()])


def _shape(values: Tensor | Sequence[Tensor]) -> tuple:
    return tuple(values.shape) if isinstance(values, Tensor) else tuple(tuple(value.shape) for value in values)


def predicting(base: Base) -> Sequence[nn.Module]:
    """The networks that a base's `predict` runs: all of them where it does not say."""
    return base.modules if base.denoiser is None else [base.denoiser]


@dataclass(frozen=True, eq=False)
class Problem:
    """A base model and a concept's pictures.

    layers: canonical layer name -> Linear, Conv2d or `Site` inside the base's modules.
    triggers: trigger word -> rows (k, width) of the text model's table that its learned rows start from, all of them.
    prior: pictures of the class as the base draws it, for prior preservation.
    company: pictures of others as the base draws them, for the other half of wide canvases.
    """

    base: Base
    layers: Mapping[str, Layer]
    examples: Examples
    triggers: Mapping[str, Tensor] = field(default_factory=dict)
    prior: Examples | None = None
    company: Company | None = None

    def __post_init__(self):
        channels = self.examples.latents[0].shape[0]
        if self.prior is not None and self.prior.latents[0].shape[0] != channels:
            raise AdapterError(
                f"class pictures have latents of {self.prior.latents[0].shape[0]} channels, the concept's {channels}; "
                "draw them with the base that is trained"
            )
        if self.company is not None:
            self.company.check(self.examples.latents, self.examples.captions)

    def dataset_identity(self) -> str:
        return self.examples.identity() + (f"+{self.prior.identity()}" if self.prior else "")

    def check(self, settings: TrainSettings) -> None:
        """Raise AdapterError for an option that these pictures or this base do not have what it takes for."""
        if settings.flip and self.examples.mirrored is None:
            raise AdapterError("flip needs the mirrored pictures' latents, which this data set lacks; turn flip off")
        if settings.company and self.company is None:
            raise AdapterError("company needs pictures of others that the base drew, and there are none; set it to 0")
        attends = bool(self.triggers and self.base.cross_attentions())
        check_needs(settings, masked=self.examples.masks is not None, attends=attends, networks=self.networks)

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Those that the base's `predict` runs."""
        return predicting(self.base)
