"""Pictures to latents, once: all of a subject's, mirrored ones too, and kept on disk where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError
from ..models.base import Base
from ..storage.names import nameable
from ..storage.safetensors import read_safetensors, tensor_bytes, write_safetensors
from .buckets import sizes_of

ALIKE = 1e-2
MOST = 1e4  # times the probe's largest number: no picture's latent comes near it
PROBE = "probe"


def encoded(base: Base, pictures: Tensor | Sequence[Tensor], cache: Path | None = None) -> Tensor | list[Tensor]:
    """Latents of pictures (N, 3, H, W), or of several sizes, on the base's device.

    The same bits whether they come from the cache or not.
    """

    def encode() -> list[Tensor]:
        if isinstance(pictures, Tensor):
            return list(base.encode(pictures))
        return [base.encode(picture[None])[0] for picture in pictures]

    latents = encode() if cache is None else kept(base, cache, _digest(pictures), encode, sizes_of(pictures))
    latents = [latent.to(base.device) for latent in latents]
    return torch.stack(latents) if isinstance(pictures, Tensor) else latents


def mirrored(pictures: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    return pictures.flip(-1) if isinstance(pictures, Tensor) else [picture.flip(-1) for picture in pictures]


def latent_masks(
    masks: Tensor | Sequence[Tensor] | None, latents: Tensor | Sequence[Tensor]
) -> Tensor | list[Tensor] | None:
    """Each latent's mask is the mean over the pixels that it stands for."""
    return None if masks is None else _shrunk(masks, latents)


def _shrunk(masks: Tensor | Sequence[Tensor], latents: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(masks, Tensor) and isinstance(latents, Tensor):
        size, between = latents.shape[-2:], latents.shape[2:-2]  # frames, where there are any: each has the mask
        masks = masks if masks.shape[2:] == size else F.interpolate(masks, size=size, mode="area")
        return masks.unflatten(1, (1, *[1] * len(between))).expand(-1, -1, *between, -1, -1)
    return [_shrunk(mask[None], latent[None])[0] for mask, latent in zip(masks, latents, strict=True)]


def kept(
    base: Base, cache: Path, key: str, make: Callable[[], list[Tensor]], sizes: Sequence[tuple[int, int]] | None = None
) -> list[Tensor]:
    """What `make` gives, or what it gave before for the same key and base, from a file in `cache`.

    A small picture's latent lies beside them: where it comes out otherwise now, they are of another VAE and made anew,
    as they are where the file says that it is of other pictures, is not as it was written, or holds what no pictures
    become, of these sizes, (height, width) each, where they are known.
    Raises AdapterError when the folder cannot be written.
    """
    of = sha256(f"{base.hash} {key}".encode()).hexdigest()
    path = nameable(cache) / f"latents-{of[:32]}.safetensors"
    probe = base.encode(_probe(base.multiple))[0]
    stored = _read(path, of)
    if PROBE in stored and _alike(stored.pop(PROBE), probe):
        latents = [stored[name].to(probe.device) for name in sorted(stored)]
        if _could_be(latents, probe, _side(base.multiple), sizes):
            return latents
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(
            f"the folder {cache} cannot be made ({error.strerror}); train without keeping latents"
        ) from error
    latents = make()
    tensors = {f"{number:06d}": latent for number, latent in enumerate(latents)} | {PROBE: probe}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_safetensors(path, tensors, {"of": of, "data": _content(tensors)})
    return latents


def _read(path: Path, of: str) -> dict[str, Tensor]:
    """What was written for these very pictures, bit for bit, or nothing: it can be made again."""
    try:
        tensors, metadata = read_safetensors(path) if path.is_file() else ({}, {})
        names = {f"{number:06d}" for number in range(len(tensors) - 1)} | {PROBE}
        whole = metadata.get("of") == of and set(tensors) == names and metadata.get("data") == _content(tensors)
    except AdapterError:
        return {}
    return tensors if whole else {}


def _content(tensors: dict[str, Tensor]) -> str:
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor_bytes(tensor))
    return digest.hexdigest()


def _alike(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape:
        return False
    return bool((before.to(now) - now).norm() <= ALIKE * now.norm())


def _could_be(latents: Sequence[Tensor], probe: Tensor, side: int, sizes: Sequence[tuple[int, int]] | None) -> bool:
    """Whether pictures of these sizes become latents of these shapes and numbers, where a square of `side` is `probe`.

    A file can say that it is whole and be another's all the same.
    """
    if sizes is not None:
        shapes = [(*probe.shape[:-2], *(size * probe.shape[-1] // side for size in both)) for both in sizes]
        if [tuple(latent.shape) for latent in latents] != shapes:
            return False
    most = MOST * probe.abs().max()
    return all(latent.dtype == probe.dtype and latent.abs().max() <= most for latent in latents)


def _side(multiple: int) -> int:
    return multiple * -(-64 // multiple)


def _probe(multiple: int) -> Tensor:
    """(1, 3, side, side) with something of every frequency in it."""
    side = _side(multiple)
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def _digest(pictures: Tensor | Sequence[Tensor]) -> str:
    digest = sha256()
    for picture in pictures:
        digest.update(f"{picture.dtype}{tuple(picture.shape)}".encode())
        digest.update(picture.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
