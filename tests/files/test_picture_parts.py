"""What a picture's file holds beside its pixels: a decoder is not sent through it, and what is lost of it is said."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from mutations import peak_memory
from PIL import Image, PngImagePlugin

from modular_concepts.data import picture_size
from modular_concepts.data.dataset import FIRST_FRAME, PROFILE, load_folder, load_picture
from modular_concepts.data.picture_size import JUNK, MOST_BYTES, MOST_PARTS, MOST_SCANS, check_parts
from modular_concepts.errors import AdapterError

MIB = 2**20


def encoded(form: str, **options) -> bytes:
    Image.effect_noise((64, 48), 60).convert(options.pop("mode", "RGB")).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def refused(path, *words: str) -> None:
    memory = peak_memory()
    with pytest.raises(AdapterError) as caught:
        load_picture(path)
    said = str(caught.value)
    assert path.name in said and "\n" not in said and all(word in said for word in words), said
    assert peak_memory() - memory < 64 * MIB


@pytest.mark.parametrize("head", [b"\xff\xd8\xff", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe0\0\x10", b"\xff\xd8"])
@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"a"])
def test_a_jpeg_without_its_parts_is_refused_at_once(tmp_path, head, filling):
    (tmp_path / "x.jpg").write_bytes(head + filling * (8 * MIB))
    with pytest.raises(AdapterError, match="damaged"):
        check_parts(tmp_path / "x.jpg")
    refused(tmp_path / "x.jpg")


@pytest.mark.parametrize("filling", [b"", b"\0" * 100, b"\xff" * 100, b"\0" * (JUNK - 10)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"x" * 60_000}, {"quality": 100}])
def test_a_jpeg_with_something_between_its_parts_is_read(tmp_path, filling, options):
    sound = encoded("JPEG", **options)
    (tmp_path / "x.jpg").write_bytes(sound[:2] + filling + sound[2:])
    check_parts(tmp_path / "x.jpg")
    if not filling:
        assert load_picture(tmp_path / "x.jpg").shape == (48, 64, 3)


def test_a_jpeg_of_many_scans_is_refused_and_one_of_some_is_read(tmp_path):
    sound = encoded("JPEG", progressive=True, mode="L")
    last = sound.rindex(b"\xff\xda")
    for scans in (20, 2 * MOST_SCANS):
        (tmp_path / "x.jpg").write_bytes(sound[:-2] + sound[last:-2] * scans + b"\xff\xd9")
        if scans > MOST_SCANS:
            refused(tmp_path / "x.jpg", "scans")
        else:
            check_parts(tmp_path / "x.jpg")


def test_marks_within_a_part_of_a_jpeg_are_none_of_its_own(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded("JPEG", comment=b"\xff\xda" * 2 * MOST_SCANS))
    assert load_picture(tmp_path / "x.jpg").shape == (48, 64, 3)


def test_a_part_of_a_png_that_is_no_pixels_is_bounded(tmp_path):
    sound = encoded("PNG")
    for length in (1000, 100 * MIB):
        with open(tmp_path / "x.png", "wb") as file:
            file.write(sound[:33] + struct.pack(">I", length) + b"teSt")
            file.seek(length, os.SEEK_CUR)
            file.write(struct.pack(">I", zlib.crc32(b"teSt" + bytes(length))) + sound[33:])
        if length > 1000:
            refused(tmp_path / "x.png", "no pixels")
        else:
            assert load_picture(tmp_path / "x.png").shape == (48, 64, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_file_larger_than_any_picture_is_refused_unread(tmp_path, form):
    path = tmp_path / f"x.{form.lower()}"
    path.write_bytes(encoded(form))
    os.truncate(path, MOST_BYTES + 1)
    refused(path, "more than a picture takes")


def test_a_webp_with_much_behind_it_is_refused_and_with_little_read(tmp_path):
    path = tmp_path / "x.webp"
    path.write_bytes(encoded("WEBP") + bytes(1000))
    assert load_picture(path).shape == (48, 64, 3)
    os.truncate(path, 100 * MIB)
    refused(path, "behind the picture")


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_text_in_a_png_that_is_too_long_is_not_called_damage(tmp_path, kind):
    info = PngImagePlugin.PngInfo()
    add = info.add_text if kind == "zTXt" else info.add_itxt
    add("prompt", "a" * 2_000_000, zip=True)
    (tmp_path / "x.png").write_bytes(encoded("PNG", pnginfo=info))
    refused(tmp_path / "x.png", "too long", "save it without metadata")


def test_plain_text_in_a_png_of_the_same_length_is_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "a" * 2_000_000)
    (tmp_path / "x.png").write_bytes(encoded("PNG", pnginfo=info))
    assert load_picture(tmp_path / "x.png").shape == (48, 64, 3)


def test_colours_that_are_not_read_as_they_are_meant_are_told(tmp_path):
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    pictures = {
        "plain.png": encoded("PNG"),
        "srgb.png": encoded("PNG", icc_profile=srgb),
        "other.png": encoded("PNG", icc_profile=other),
        "other.jpg": encoded("JPEG", icc_profile=other),
        "print.jpg": encoded("JPEG", mode="CMYK"),
    }
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    notes = load_folder(tmp_path, (32, 32)).report.notes
    (told,) = [note for note in notes if note.startswith(PROFILE)]
    assert all(name in told for name in ("other.png", "other.jpg", "print.jpg"))
    assert "plain.png" not in told and "srgb.png" not in told
    assert not any(note.startswith(FIRST_FRAME) for note in notes)


def test_a_file_in_very_many_parts_is_refused(tmp_path):
    jpeg, png = encoded("JPEG"), encoded("PNG")
    comment, chunk = b"\xff\xfe\0\2", struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    for count in (50, MOST_PARTS + 1):
        (tmp_path / "x.jpg").write_bytes(jpeg[:2] + comment * count + jpeg[2:])
        (tmp_path / "x.png").write_bytes(png[:33] + chunk * count + png[33:])
        for path in (tmp_path / "x.jpg", tmp_path / "x.png"):
            if count > MOST_PARTS:
                refused(path, "parts")
            else:
                assert load_picture(path).shape == (48, 64, 3)


def test_a_film_behind_a_jpeg_is_no_part_of_it(tmp_path):
    """As phones write moving photos; two bytes in 65,536 look like the mark of a scan."""
    film = np.random.default_rng(0).bytes(16 * MIB)
    assert film.count(b"\xff\xda") > MOST_SCANS
    for options in ({}, {"progressive": True}):
        (tmp_path / "x.jpg").write_bytes(encoded("JPEG", **options) + film)
        assert load_picture(tmp_path / "x.jpg").shape == (48, 64, 3)


def test_a_png_of_very_many_small_parts_of_pixels_is_read(tmp_path, monkeypatch):
    """libpng writes 8,192 bytes at a time; how many parts there may be follows from the file's size."""
    monkeypatch.setattr(picture_size, "MOST_PARTS", 5)
    pixels = Image.effect_noise((400, 400), 60)
    pixels.save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    parts = whole.count(b"IDAT")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.asarray(pixels)))
    for size, sound in ((8192, True), (16, False)):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        chunks = b"".join(
            struct.pack(">I", len(piece)) + b"IDAT" + piece + struct.pack(">I", zlib.crc32(b"IDAT" + piece))
            for piece in pieces
        )
        (tmp_path / "y.png").write_bytes(whole[:33] + chunks + whole[-12:])
        assert len(pieces) > 5 >= parts
        if sound:
            assert load_picture(tmp_path / "y.png").shape == (400, 400, 3)
        else:
            refused(tmp_path / "y.png", "parts")


def test_colours_that_are_meant_otherwise_without_a_profile_are_told(tmp_path):
    def with_chunk(kind: bytes, data: bytes) -> bytes:
        sound = encoded("PNG")
        part = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        return sound[:33] + part + sound[33:]

    uncalibrated = Image.Exif()
    uncalibrated.get_ifd(0x8769)[0xA001] = 0xFFFF
    usual = Image.Exif()
    usual.get_ifd(0x8769)[0xA001] = 1
    srgb = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    pictures = {
        "linear.png": with_chunk(b"gAMA", struct.pack(">I", 100_000)),
        "primaries.png": with_chunk(b"cHRM", struct.pack(">8I", *srgb[:4], *srgb[4:][::-1])),
        "camera.jpg": encoded("JPEG", exif=uncalibrated),
        "usual.png": with_chunk(b"gAMA", struct.pack(">I", 45_455)),
        "srgb.png": with_chunk(b"cHRM", struct.pack(">8I", *srgb)),
        "phone.jpg": encoded("JPEG", exif=usual),
    }
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    (told,) = [note for note in load_folder(tmp_path, (32, 32)).report.notes if note.startswith(PROFILE)]
    assert {name for name in pictures if name in told} == {"linear.png", "primaries.png", "camera.jpg"}


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\xff\xff\xff\x7f\0\0\0\0"]
)
def test_what_a_camera_says_and_nobody_can_read_costs_no_picture(tmp_path, exif):
    (tmp_path / "x.jpg").write_bytes(encoded("JPEG", exif=exif))
    assert load_picture(tmp_path / "x.jpg").shape == (48, 64, 3)


def test_a_reader_that_fails_on_a_cameras_words_costs_no_picture(tmp_path, monkeypatch):
    def fails(*_args):
        raise KeyError("an entry of a kind that there is not")

    (tmp_path / "x.jpg").write_bytes(encoded("JPEG"))
    monkeypatch.setattr(Image.Exif, "get_ifd", fails)
    assert load_picture(tmp_path / "x.jpg").shape == (48, 64, 3)
