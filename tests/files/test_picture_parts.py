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
from modular_concepts.data.dataset import DAMAGED_PART, FIRST_FRAME, PROFILE, load_folder, load_picture
from modular_concepts.data.picture_size import JUNK, MOST_BYTES, MOST_PARTS, MOST_SCANS, check_parts
from modular_concepts.errors import AdapterError

MIB = 2**20


def encoded(form: str, **options) -> bytes:
    Image.effect_noise((64, 48), 60).convert(options.pop("mode", "RGB")).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def with_chunk(kind: bytes, data: bytes, harm: int = 0, sound: bytes = b"") -> bytes:
    """A PNG with one more part, behind its header; harm: what its sum is wrong by."""
    sound = sound or encoded("PNG")
    part = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ harm)
    return sound[:33] + part + sound[33:]


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


@pytest.mark.parametrize("tail", [1000, 2**16 + 1, 100 * MIB])
def test_a_webp_is_read_without_what_lies_behind_it(tmp_path, tail):
    path = tmp_path / "x.webp"
    path.write_bytes(encoded("WEBP", lossless=True))
    alone = load_picture(path)
    os.truncate(path, path.stat().st_size + tail)
    memory = peak_memory()
    assert load_picture(path).equal(alone)
    assert peak_memory() - memory < 64 * MIB


def test_what_lies_behind_a_webp_makes_no_room_for_what_it_promises(tmp_path):
    sound = bytearray(encoded("WEBP"))
    at = sound.index(b"\x9d\x01\x2a") + 3
    sound[at : at + 4] = struct.pack("<HH", 9000, 9000)
    (tmp_path / "x.webp").write_bytes(sound + bytes(10 * MIB))
    refused(tmp_path / "x.webp", "too few")


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
        "hdr.png": with_chunk(b"cICP", bytes([9, 16, 0, 1])),
        "p3.png": with_chunk(b"cICP", bytes([12, 13, 0, 1])),
        "coded.png": with_chunk(b"cICP", bytes([1, 13, 0, 1])),
        "overruled.png": with_chunk(
            b"cICP", bytes([1, 13, 0, 1]), sound=with_chunk(b"gAMA", struct.pack(">I", 100_000))
        ),
        "short.png": with_chunk(b"cICP", bytes([9])),
        "brought.bmp": bmp_of_version_5(b"MBED"),
        "named.bmp": bmp_of_version_5(b"LINK"),
        "plain.bmp": encoded("BMP"),
        "srgb.bmp": bmp_of_version_5(b"sRGB"),
        "phone.jpg": encoded("JPEG", exif=usual),
    }
    told = set()
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
        load_picture(tmp_path / name, tell=lambda oddity, name=name: told.add((name, oddity)))
    assert told == {
        (name, PROFILE)
        for name in ("linear.png", "primaries.png", "camera.jpg", "hdr.png", "p3.png", "brought.bmp", "named.bmp")
    }


def bmp_of_version_5(space: bytes) -> bytes:
    sound = encoded("BMP")
    head = struct.pack("<I", 124) + sound[18:54] + bytes(16) + space[::-1] + bytes(64)
    return sound[:2] + struct.pack("<IHHI", len(sound) + 84, 0, 0, 54 + 84) + head + sound[54:]


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


def with_broken(name: bytes, data: bytes, sound: bytes = b"") -> bytes:
    return with_chunk(name, data, harm=1, sound=sound)


BROKEN_PARTS = {
    "text": with_broken(b"tEXt", b"prompt\0a cat"),
    "unknown": with_broken(b"prVt", b"whatever"),
    "gamma": with_broken(b"gAMA", struct.pack(">I", 100_000)),
    "camera": with_broken(b"eXIf", b"II*\0\x08\0\0\0\0\0"),
    "time": with_broken(b"tIME", bytes(7)),
    "behind": (lambda png: png[:-12] + b"\0\0\0\x04teXtabcd\0\0\0\0" + png[-12:])(encoded("PNG", compress_level=0)),
    "two": with_broken(b"tEXt", b"a\0b", with_broken(b"prVt", b"whatever")),
    "packed text": with_chunk(b"zTXt", b"prompt\0\x07what is this"),
    "short primaries": with_chunk(b"cHRM", b"123"),
    "short size": with_chunk(b"pHYs", b"1"),
    "short animation": with_chunk(b"acTL", b"1"),
}


@pytest.mark.parametrize("kind", BROKEN_PARTS)
def test_a_png_with_a_damaged_part_beside_its_pixels_is_read_and_that_is_told(tmp_path, kind):
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    sound = load_picture(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(BROKEN_PARTS[kind])
    notes = load_folder(tmp_path, (32, 32)).report.notes
    (told,) = [note for note in notes if note.startswith(DAMAGED_PART)]
    assert "x.png" in told and "y.png" not in told and not any(note.startswith(PROFILE) for note in notes)
    assert load_picture(tmp_path / "x.png").shape == sound.shape


@pytest.mark.parametrize(("mode", "length"), [("P", 257), ("P", 5000), ("RGB", 0), ("RGB", 5), ("L", 1)])
def test_transparency_that_is_of_no_such_picture_is_left_out_and_told(tmp_path, mode, length):
    sound = encoded("PNG", mode=mode)
    at = sound.index(b"IDAT") - 4
    part = with_chunk(b"tRNS", b"\0" * length)[33 : 33 + 12 + length]
    (tmp_path / "x.png").write_bytes(sound[:at] + part + sound[at:])
    (tmp_path / "y.png").write_bytes(sound)
    told = []
    assert load_picture(tmp_path / "x.png", tell=told.append).equal(load_picture(tmp_path / "y.png"))
    assert told == [DAMAGED_PART]


@pytest.mark.parametrize("length", [1, 256])
def test_transparency_of_a_palette_is_read(tmp_path, length):
    sound = encoded("PNG", mode="P")
    at = sound.index(b"IDAT") - 4
    part = with_chunk(b"tRNS", b"\0" * length)[33 : 33 + 12 + length]
    (tmp_path / "x.png").write_bytes(sound[:at] + part + sound[at:])
    told = []
    assert (load_picture(tmp_path / "x.png", tell=told.append).min() == 1) == (length == 256)
    assert DAMAGED_PART not in told


def test_a_profile_that_cannot_be_unpacked_is_told(tmp_path):
    sound = encoded("JPEG", icc_profile=b"x" * 300)
    at = sound.index(b"ICC_PROFILE\0") + 13
    pictures = {
        "x.png": with_chunk(b"iCCP", b"icc\0\0no deflate"),
        "x.jpg": sound[:at] + b"\2" + sound[at + 1 :],  # the first of two parts, the second is not there
    }
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
        told = []
        assert load_picture(tmp_path / name, tell=told.append).shape == (48, 64, 3)
        assert told == [DAMAGED_PART], name


def test_a_cameras_words_that_cannot_be_read_cost_a_webp_nothing(tmp_path):
    (tmp_path / "x.webp").write_bytes(encoded("WEBP", exif=b"Exif\0\0junk"))
    told = []
    assert load_picture(tmp_path / "x.webp", tell=told.append).shape == (48, 64, 3) and told == [DAMAGED_PART]


def test_damage_to_a_text_leaves_the_pixels_and_their_transparency(tmp_path):
    seen_through = encoded("PNG", mode="RGBA")
    (tmp_path / "x.png").write_bytes(with_broken(b"tEXt", b"a\0b", seen_through))
    (tmp_path / "y.png").write_bytes(seen_through)
    told = []
    assert load_picture(tmp_path / "x.png", tell=told.append).equal(load_picture(tmp_path / "y.png"))
    assert told == [DAMAGED_PART]


@pytest.mark.parametrize("part", [b"IHDR", b"PLTE", b"IDAT", b"IEND"])
@pytest.mark.parametrize("small_letter", [False, True])
def test_a_png_whose_pixels_are_damaged_stays_refused(tmp_path, part, small_letter):
    """Also where damage made a part's name that of one that could be left out."""
    broken = bytearray(encoded("PNG", mode="P"))
    at = broken.index(part)
    if small_letter:
        broken[at] ^= 0x20
    else:
        broken[at + 4 + int.from_bytes(broken[at - 4 : at], "big")] ^= 1
    (tmp_path / "x.png").write_bytes(broken)
    if (part, small_letter) == (b"IEND", False):  # behind the last pixel, where its sum says nothing
        assert load_picture(tmp_path / "x.png").shape == (48, 64, 3)
    else:
        refused(tmp_path / "x.png", "damaged")
