"""The parts of a PNG, and the file without those that are damaged and no pixels.

Readers of PNG may go without what is called in small letters first: text, a camera's words, colours.  What is called as
the pixels are, but for that letter, is a damaged name, and stays for the decoder to refuse.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

_BLOCK = 2**20  # bytes that are looked at together
_COLOUR_TYPE = 25  # where a PNG says of what its colours are: grey, three of them, or a palette
_TRANSPARENCY = {b"\0": (2, _BLOCK), b"\2": (6, _BLOCK), b"\3": (0, 256)}  # bytes that what is seen through takes there
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


class Chunk(NamedTuple):
    """One part: its name, where it begins, and how many bytes of its own it has, beside twelve around them."""

    name: bytes
    place: int
    length: int

    @property
    def beside_pixels(self) -> bool:
        """Whether the pixels are the same without it."""
        return self.name.isalpha() and self.name[:1].islower() and self.name.upper() not in _PIXELS


def chunks(file: BinaryIO) -> Iterator[Chunk]:
    """Up to the picture's end, or the file's; a part that the file ends within is none."""
    size = file.seek(0, io.SEEK_END)
    place = 8
    while place + 12 <= size:
        file.seek(place)
        head = file.read(8)
        chunk = Chunk(head[4:], place, int.from_bytes(head[:4], "big"))
        if place + 12 + chunk.length > size:
            return
        yield chunk
        if chunk.name == b"IEND":
            return
        place += 12 + chunk.length


def contents(path: Path, name: bytes) -> bytes | None:
    """What the first sound part of this name says, None where there is none; for parts that are small."""
    with open(path, "rb") as file:
        for chunk in chunks(file):
            if chunk.name == name and chunk.length < _BLOCK and _is_sound(file, chunk):
                file.seek(chunk.place + 8)
                return file.read(chunk.length)
    return None


def damaged_chunks(path: Path) -> list[Chunk]:
    """Parts beside the pixels whose sums are not those that the file says, and transparency of no such picture."""
    with open(path, "rb") as file:
        beside = [chunk for chunk in chunks(file) if chunk.beside_pixels]
        file.seek(_COLOUR_TYPE)
        shortest, longest = _TRANSPARENCY.get(file.read(1), (0, _BLOCK))
        return [
            chunk
            for chunk in beside
            if (chunk.name == b"tRNS" and not shortest <= chunk.length <= longest) or not _is_sound(file, chunk)
        ]


def without(path: Path, leave_out: Callable[[Chunk], bool]) -> io.BytesIO:
    """The file without some of its parts."""
    with open(path, "rb") as file:
        gone = [chunk for chunk in chunks(file) if leave_out(chunk)]
        rest, place = io.BytesIO(), 0
        for chunk in gone:
            file.seek(place)
            rest.write(file.read(chunk.place - place))
            place = chunk.place + 12 + chunk.length
        file.seek(place)
        rest.write(file.read())
    rest.seek(0)
    return rest


def _is_sound(file: BinaryIO, chunk: Chunk) -> bool:
    file.seek(chunk.place + 4)
    summed, left = 0, 4 + chunk.length
    while left:
        block = file.read(min(left, _BLOCK))
        summed, left = zlib.crc32(block, summed), left - len(block)
    return summed == int.from_bytes(file.read(4), "big")
