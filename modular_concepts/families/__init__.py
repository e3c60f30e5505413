"""The model families that concepts are for.  A new one is a record beside these (`family.Family`) and a line here."""

from __future__ import annotations

from ..errors import AdapterError
from .family import Family, Network
from .sd3 import SD3
from .stable_diffusion import SD2, SD15, SDXL
from .toy import TOY

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known to all of the engine.  Raises AdapterError for a name that another has."""
    if _FAMILIES.setdefault(family.name, family) is not family:
        raise AdapterError(f"the model family {family.name} is registered twice; give one of them another name")
    return family


def forget(family: Family) -> None:
    """Undo `register`, for families that are made for a moment."""
    _FAMILIES.pop(family.name, None)


def families() -> tuple[Family, ...]:
    return tuple(_FAMILIES.values())


def find_family(name: str) -> Family | None:
    """The family that concept files call by this name, or None: an older or newer version may know others."""
    return _FAMILIES.get(name)


def networks(part: str) -> tuple[Network, ...]:
    """All different networks whose layers' names begin with `part`, in order of their families."""
    named = (family.network(part) for family in _FAMILIES.values())
    return tuple(dict.fromkeys(network for network in named if network is not None))


def network_of(name: str) -> Network | None:
    """The network that a layer belongs to by its name, or None for a layer of no family that there is."""
    part, _, path = name.partition(".")
    return next((network for network in networks(part) if network.has(path)), None)


def encoder_names() -> tuple[str, ...]:
    """What files and hosts call text encoders that learn words, in the order of a learned row's columns."""
    encoders = (encoder for family in _FAMILIES.values() for encoder in family.text_encoders)
    return tuple(dict.fromkeys(encoder.name for encoder in encoders))


def reader_names() -> tuple[str, ...]:
    """What files and hosts call text encoders that learn none, and read the class word instead."""
    return tuple(dict.fromkeys(name for family in _FAMILIES.values() for name in family.readers))


def block_kinds() -> dict[str, bool]:
    """What blocks are called in a person's words -> whether they are counted: down (down 0, down 1, ...), mid."""
    words = [words for network in networks("unet") for _, words in network.blocks]
    words += [
        f"{prefix}{words}" for prefix in ("", "second ") for net in networks("text_encoder") for _, words in net.blocks
    ]
    return {word.removesuffix(" {}"): word.endswith(" {}") for word in words} | {"other": False}


def block_classes() -> frozenset[str]:
    """Classes of the blocks that are computed again in backward, as diffusers and hosts call them."""
    return frozenset(name for network in networks("unet") for name in network.checkpointed)


def titles() -> str:
    """The families in a sentence, as errors list them."""
    *most, last = (family.title for family in _FAMILIES.values())
    return f"{', '.join(most)} and {last}"


for _family in (SD15, SD2, SDXL, SD3, TOY):
    register(_family)
