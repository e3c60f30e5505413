"""A small file that promises a large picture is one sentence, before room is made for it; honest ones are read."""

import struct
import zlib

import pytest
import torch
from mutations import peak_memory
from PIL import Image

from modular_concepts.data.dataset import load_folder, load_picture
from modular_concepts.errors import AdapterError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"\0" * 99) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def promising(form: str, width: int, height: int) -> bytes:
    """A small sound file whose header says another size."""
    from io import BytesIO

    Image.new("RGB", (32, 32), "red").save(file := BytesIO(), form)
    data = bytearray(file.getvalue())
    if form == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    if form == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    if form == "WEBP":
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", width, height)
    return bytes(data)


LIES = {
    "x.png": png(9400, 9400),
    "grey.png": png(9400, 9400, 16, 0),
    "clear.png": png(9400, 9400, 8, 6),
    "indexed.png": png(9400, 9400, 8, 3),
    "x.jpg": promising("JPEG", 9400, 9400),
    "x.bmp": promising("BMP", 9400, 9400),
    "x.webp": promising("WEBP", 9400, 9400),
}


@pytest.mark.parametrize("name", LIES)
def test_a_small_file_that_promises_much_makes_no_room_for_it(tmp_path, name):
    (tmp_path / name).write_bytes(LIES[name])
    with pytest.raises(AdapterError):
        load_picture(tmp_path / name)
    before = peak_memory(reset=True)
    with pytest.raises(AdapterError, match="bytes are too few for the 9400×9400 pixels that it promises"):
        load_picture(tmp_path / name)
    assert peak_memory() - before < 16 * 2**20


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_large_picture_of_one_colour_is_read(tmp_path, form, mode):
    Image.new(mode, (1800, 1500), 200 if mode == "L" else (9, 200, 30)).save(tmp_path / f"x.{form.lower()}")
    assert load_picture(tmp_path / f"x.{form.lower()}").shape == (1500, 1800, 3)


def test_a_mask_of_one_bit_is_read(tmp_path):
    Image.radial_gradient("L").resize((2000, 2000)).convert("RGB").save(tmp_path / "a.png")
    mask = Image.new("1", (2000, 2000))
    mask.paste(1, (500, 500, 1500, 1500))
    mask.save(tmp_path / "a.mask.png")
    assert (tmp_path / "a.mask.png").stat().st_size < 2000
    assert load_folder(tmp_path, (64, 64), ("<x>",)).masks.mean().item() == pytest.approx(0.25, abs=0.02)


def test_a_thumbnail_of_a_large_picture_takes_the_memory_of_the_picture_and_not_of_its_numbers(tmp_path):
    """This one has 90 kB, 48 million pixels and, as numbers in single precision, half a gigabyte twice over."""
    Image.new("RGB", (12_000, 4_000), (9, 200, 30)).save(tmp_path / "x.png")
    whole = 3 * 12_000 * 4_000
    before = peak_memory(reset=True)
    small = load_picture(tmp_path / "x.png", 1024)
    assert peak_memory() - before < 5 * whole
    assert small.shape == (341, 1024, 3) and torch.allclose(small[0, 0] * 255, torch.tensor([9.0, 200.0, 30.0]))
