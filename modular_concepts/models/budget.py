"""How much memory pictures take, and whether this machine has it; asked before anything is drawn or trained.

Estimates from above, of what grows with the pictures: they refuse what would bring the system down, and no more.
"""

from __future__ import annotations

from ..errors import AdapterError
from ..storage.room import machine_memory
from .base import BaseModel

MAX_SIDE = 8192  # pixels
# Tensors of the network's first width that live at once: while it draws, and while it keeps them for a gradient.
ALIVE, KEPT = 20, 60
VAE = 3072  # bytes for each pixel while a VAE decodes: three tensors of 256 channels
READY = 24  # bytes for each pixel of a picture that is held: three channels, float32, twice


def picture_memory(base: BaseModel, width: int, height: int, batch: int, *, training: bool = False) -> int:
    """Bytes, from above, for a batch of pictures of this size beside the base."""
    config = getattr(base.unet, "config", None)
    channels = getattr(config, "block_out_channels", (320,))[0]
    cells = (width // base.downscale) * (height // base.downscale)
    network = 4 * channels * cells * batch * (KEPT if training else 2 * ALIVE)
    return max(network, VAE * width * height if base.downscale == 8 else 0) + READY * width * height * batch


def check_pictures(base: BaseModel, width: int, height: int, batch: int, *, training: bool = False) -> None:
    """Raise AdapterError for pictures that are too large for any base, or for the memory of this machine."""
    if max(width, height) > MAX_SIDE:
        raise AdapterError(f"pictures of {width} x {height} pixels are too large; choose at most {MAX_SIDE} a side")
    room, needed = machine_memory(), picture_memory(base, width, height, batch, training=training)
    if room is not None and needed > room:
        several = f"{batch} pictures" if batch > 1 else "a picture"
        raise AdapterError(
            f"{several} of {width} x {height} pixels would take about {needed / 2**30:.3g} GiB of memory at once, and "
            f"this machine has {room / 2**30:.3g} GiB; choose a smaller size{', or fewer at once' if batch > 1 else ''}"
        )


def check_zoom(width: int, height: int, zoom: int) -> None:
    """Raise AdapterError for a file that is enlarged beyond what programs open."""
    if max(width, height) * zoom > MAX_SIDE:
        most = max(1, MAX_SIDE // max(width, height))
        raise AdapterError(
            f"zoom is {zoom}, which makes {width * zoom} x {height * zoom} pixels; at most {MAX_SIDE} a side are "
            f"written, so choose at most {most}"
        )
