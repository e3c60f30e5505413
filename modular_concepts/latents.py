"""Pictures to latents, once: all of a subject's, mirrored ones too, and kept on disk where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .base_model import Base
from .errors import AdapterError
from .files.safe import read_safetensors, write_safetensors

ALIKE = 1e-2
PROBE = "probe"


def encoded(base: Base, pictures: Tensor | Sequence[Tensor], cache: Path | None = None) -> Tensor | list[Tensor]:
    """Latents of pictures (N, 3, H, W), or of several sizes, on the base's device.

    The same bits whether they come from the cache or not.
    """

    def encode() -> list[Tensor]:
        if isinstance(pictures, Tensor):
            return list(base.encode(pictures))
        return [base.encode(picture[None])[0] for picture in pictures]

    latents = encode() if cache is None else kept(base, cache, _digest(pictures), encode)
    latents = [latent.to(base.device) for latent in latents]
    return torch.stack(latents) if isinstance(pictures, Tensor) else latents


def mirrored(pictures: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    return pictures.flip(-1) if isinstance(pictures, Tensor) else [picture.flip(-1) for picture in pictures]


def latent_masks(
    masks: Tensor | Sequence[Tensor] | None, latents: Tensor | Sequence[Tensor]
) -> Tensor | list[Tensor] | None:
    """Each latent's mask is the mean over the pixels that it stands for."""
    if masks is None:
        return None
    if isinstance(masks, Tensor) and isinstance(latents, Tensor):
        size = latents.shape[2:]
        return masks if masks.shape[2:] == size else F.interpolate(masks, size=size, mode="area")
    return [latent_masks(mask[None], latent[None])[0] for mask, latent in zip(masks, latents, strict=True)]


def kept(base: Base, cache: Path, key: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `make` gives, or what it gave before for the same key and base, from a file in `cache`.

    A small picture's latent lies beside them: where it comes out otherwise now, they are of another VAE and made anew.
    Raises AdapterError when the folder cannot be written.
    """
    path = cache / f"latents-{sha256(f'{base.hash} {key}'.encode()).hexdigest()[:32]}.safetensors"
    probe = base.encode(_probe(base.multiple))[0]
    found = _read(path)
    if found and PROBE in found and _alike(found.pop(PROBE), probe):
        return [found[f"{number:06d}"].to(probe.device) for number in range(len(found))]
    latents = make()
    tensors = {f"{number:06d}": latent for number, latent in enumerate(latents)} | {PROBE: probe}
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(
            f"the folder {cache} cannot be made ({error.strerror}); train without keeping latents"
        ) from error
    write_safetensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {})
    return latents


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_safetensors(path)[0] if path.is_file() else {}
    except AdapterError:
        return {}  # damaged: what was in it can be made again


def _alike(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape:
        return False
    return bool((before.to(now) - now).norm() <= ALIKE * now.norm())


def _probe(multiple: int) -> Tensor:
    """(1, 3, side, side) with something of every frequency in it."""
    side = multiple * -(-64 // multiple)
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def _digest(pictures: Tensor | Sequence[Tensor]) -> str:
    digest = sha256()
    for picture in pictures:
        digest.update(f"{picture.dtype}{tuple(picture.shape)}".encode())
        digest.update(picture.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
