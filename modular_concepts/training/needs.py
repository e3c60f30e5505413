"""What options need of pictures, base and machine; asked before anything that takes long."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import AdapterError
from .gradient_checkpointing import known_blocks
from .optimizers import optimizer_class
from .settings import TrainSettings


def check_needs(settings: TrainSettings, *, masked: bool, attends: bool, networks: Iterable[nn.Module]) -> None:
    """Raise AdapterError for an option that cannot work.

    masked: whether the pictures have masks; in company the concept's half is one.
    attends: whether the base has a word that cross-attention reads.
    networks: those that are asked for a prediction.
    """
    optimizer_class(settings)
    if settings.gradient_checkpointing:
        known_blocks(networks)
    if settings.attention_regularisation and not (masked or settings.company):
        raise AdapterError(
            "attention_regularisation keeps the word's attention inside the masks, and these pictures have none; "
            "give a mask for each, or set it to 0"
        )
    if settings.attention_regularisation and not attends:
        raise AdapterError(
            "attention_regularisation needs a learned word and a base with cross-attention, which diffusion "
            "transformers lack; set it to 0"
        )
