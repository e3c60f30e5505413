"""Each part of a base tried once, on the smallest picture, so that no training and no drawing meets a broken one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError
from ..text.contexts import Context, text_of
from .base import BaseModel
from .diffusers_configs import why

WORDS = "a photo"
MAX_MULTIPLE = 512  # pixels; Stable Diffusion's is 64


@torch.no_grad()
def check_draws(folder: Path, base: BaseModel, read: Callable[[Path], Context]) -> None:
    """Text, network, picture and back; read: the folder -> `WORDS` as context, trying its text encoders one by one.

    Raises AdapterError that names the part which fails, or gives other shapes than it must or numbers that are not
    finite.  Nothing is drawn at random from the global generator.
    """
    if base.multiple > MAX_MULTIPLE:
        raise AdapterError(
            f"{folder}: U-Net and VAE halve pictures so often that their sides must be multiples of {base.multiple}; "
            f"{MAX_MULTIPLE} is the most for a base"
        )
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, base.multiple, base.multiple, generator=generator)
    cells = base.multiple // base.downscale
    noisy = torch.randn(1, base.latent_channels, cells, cells, generator=generator)
    context = read(folder)
    last = torch.tensor([len(base.schedule) - 1])
    with part(folder, "unet"):
        whole("the prediction", base.predict(noisy, last, context), noisy.shape)
    with part(folder, "vae"):
        whole("the decoded picture", base.decode(noisy), picture.shape)
        whole("the encoded picture", base.encode(picture), noisy.shape)


def read_words(base: BaseModel) -> Callable[[Path], Context]:
    """For a base with one text encoder."""

    def read(folder: Path) -> Context:
        ids = checked_ids(folder, "tokenizer", base.tokenize, base.embedding.num_embeddings)
        with part(folder, "text_encoder"):
            return whole("the text", text_of(base.context([WORDS], {})), (*ids.shape, base.embedding.embedding_dim))

    return read


def checked_ids(folder: Path, name: str, tokenize: Callable[..., Tensor], rows: int) -> Tensor:
    """Ids of `WORDS`, all of them within a text encoder's `rows`."""
    with part(folder, name):
        ids = tokenize([WORDS], {})
    if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise AdapterError(
            f"{folder / name}: a token has the number {int(ids.max())}, and the text encoder has {rows}; the two do "
            "not belong together"
        )
    return ids


@contextmanager
def part(folder: Path, name: str) -> Generator[None]:
    """Whatever goes wrong inside is one sentence that names this part of the folder."""
    try:
        yield
    except Exception as error:  # a config that is wrong in a way of its own meets any line of the networks
        raise AdapterError(
            f"{folder / name}: it fails on the smallest picture ({why(error)}); its config.json or another file in it "
            "is damaged"
        ) from error


def whole(what: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor, of this shape and finite; raises AdapterError otherwise."""
    if tuple(tensor.shape) != tuple(shape):
        raise AdapterError(f"{what} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{what} holds NaN or infinity")
    return tensor
