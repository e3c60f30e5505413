"""Whether a picture's colours are meant in another colour space than sRGB, as which they are read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from .png_chunks import contents

if TYPE_CHECKING:
    from PIL.Image import Image

_SRGB = (b"sRGB", "sRGB".encode("utf-16-be"), b"IEC 61966", "IEC 61966".encode("utf-16-be"))
_GAMMA, _PRIMARIES = 1 / 2.2, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # sRGB's, as a PNG says them
_CODED = (1, 13)  # sRGB's primaries and curve, as the code points of H.273 in a PNG have them
_BMP_HEAD, _BMP_SPACE = 70, (b"LINK"[::-1], b"MBED"[::-1])  # where a BMP says that it has a profile, and how
_EXIF, _COLOUR_SPACE, _UNCALIBRATED = 0x8769, 0xA001, 0xFFFF  # how cameras say that it is another


def has_other_colours(path: Path, image: Image) -> bool:
    """image: what Pillow opened of `path`."""
    if image.mode == "CMYK":
        return True
    if image.format == "PNG" and len(coded := contents(path, b"cICP") or b"") == 4:  # comes before all else there is
        return (coded[0], coded[1]) != _CODED
    if profile := image.info.get("icc_profile"):
        return not any(name in profile for name in _SRGB)
    if "srgb" in image.info:
        return False
    gamma, primaries = image.info.get("gamma", _GAMMA), image.info.get("chromaticity", _PRIMARIES)
    there = (gamma, *primaries), (_GAMMA, *_PRIMARIES)
    other = any(abs(value - usual) > 0.01 for value, usual in zip(*there, strict=True))
    return other or _camera_says(image) == _UNCALIBRATED or (image.format == "BMP" and _has_profile(path))


def _camera_says(image: Image) -> object:
    """Of the colour space; None where it says nothing, or nothing that can be read, which costs no picture."""
    try:
        return image.getexif().get_ifd(_EXIF).get(_COLOUR_SPACE)
    except Exception:  # Pillow reads what cameras wrote, and raises whatever it meets there
        return None


def _has_profile(path: Path) -> bool:
    """Whether a BMP of the fifth version brings or names a colour profile."""
    with open(path, "rb") as file:
        head = file.read(_BMP_HEAD + 4)
    return len(head) == _BMP_HEAD + 4 and struct.unpack_from("<I", head, 14)[0] >= 124 and head[70:] in _BMP_SPACE
