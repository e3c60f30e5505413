"""Whether a picture's file can hold the pixels that its header promises, asked before a decoder makes room for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterError
from ..storage.safetensors import check_fits

if TYPE_CHECKING:
    from PIL.Image import Image

WORKING = 12  # bytes for each pixel while a picture is decoded, turned and laid on white
# The most pixels that a byte of a file can stand for.  JPEG: a bit for each block of 8 x 8.  GIF: a code of 12 bits for
# 4096 pixels.  BMP: two bytes for a run of 255.
PIXELS_A_BYTE = {"JPEG": 512, "MPO": 512, "GIF": 4096, "BMP": 128, "WEBP": 1000, "TIFF": 8256}
DEFLATE = 1032  # bytes that one byte of a PNG can stand for
ROOM = {"WEBP": 2**24}  # one colour all over needs no bytes at all there
SPARE = 2**16
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types


def check_promise(path: Path, image: Image) -> None:
    """image: opened and not yet decoded.  Raises AdapterError for a small file that promises a large picture."""
    size, pixels = os.path.getsize(path), image.width * image.height
    if image.format == "PNG":
        holds = _png_bytes(path, image.width, image.height) <= DEFLATE * size + SPARE
    else:
        most = PIXELS_A_BYTE.get(image.format, DEFLATE) * size
        holds = pixels <= most + ROOM.get(image.format, SPARE)
    if not holds:
        raise AdapterError(
            f"{path}: {size} bytes are too few for the {image.width}×{image.height} pixels that it promises; the file "
            "is damaged, so save the picture again"
        )
    check_fits(path, WORKING * pixels)


def _png_bytes(path: Path, width: int, height: int) -> int:
    """What the rows of a PNG take, each with a byte that says how it was filtered."""
    with open(path, "rb") as file:
        header = file.read(26)
    depth, channels = header[24], _CHANNELS.get(header[25], 1)
    return height * (1 + -(-width * channels * depth // 8))
