"""A folder becomes tensors, the same every time; what cannot be used is named in one sentence."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from modular_concepts.data.dataset import filled_in, load_folder, of_pictures
from modular_concepts.errors import AdapterError

Image = pytest.importorskip("PIL.Image")

SIZE = (16, 24)


def picture(path, width=48, height=32, mode="RGB"):
    """Left half red, right half blue, with a green top row."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    image.paste((0, 255, 0), (0, 0, width, 1))
    image.convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three pictures of three kinds, no captions."""
    for name in ("b.jpg", "a.png", "c.webp"):
        picture(tmp_path / name)
    return tmp_path


def test_pictures_come_sorted_in_0_to_1(folder):
    (folder / "notes.md").write_text("not a picture")
    (folder / ".hidden.png").write_text("not a picture")
    (folder / "sub").mkdir()
    data = load_folder(folder, SIZE, ("<kodo>",), "dog")
    assert data.names == ("a.png", "b.jpg", "c.webp")
    assert data.pictures.shape == (3, 3, *SIZE) and data.pictures.dtype == torch.float32
    assert 0 <= data.pictures.min() < 0.05 and 0.95 < data.pictures.max() <= 1
    assert data.pictures[0, 0, 8, 2] > 0.9 > 0.1 > data.pictures[0, 0, 8, 20]
    assert data.captions == ("a photo of <kodo> dog",) * 3 and data.masks is None


def test_picture_of_the_right_size_is_untouched(tmp_path):
    pixels = torch.arange(16 * 24 * 3, dtype=torch.uint8).reshape(16, 24, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    data = load_folder(tmp_path, SIZE)
    assert torch.equal((data.pictures[0] * 255).round().to(torch.uint8), pixels.permute(2, 0, 1))


def test_crop_is_at_the_centre(tmp_path):
    image = Image.new("RGB", (96, 16), (255, 255, 255))
    image.paste((0, 0, 0), (36, 0, 60, 16))
    image.save(tmp_path / "a.png")
    assert load_folder(tmp_path, SIZE).pictures.max() == 0


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (24, 16), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (24, 16), (0, 0, 0, 255)).save(tmp_path / "b.png")
    pictures = load_folder(tmp_path, SIZE).pictures
    assert pictures[0].min() == 1 and pictures[1].max() == 0


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 48), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 32, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = load_folder(tmp_path, SIZE).pictures[0]
    assert pixels[0, 8, 2] > 0.9 and pixels[2, 8, 21] > 0.9


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16"])
def test_every_common_mode_becomes_rgb(tmp_path, mode):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    if mode == "I;16":
        Image.new("I;16", (24, 16), 32896).save(tmp_path / name)
    else:
        Image.new("L", (24, 16), 128).convert(mode).save(tmp_path / name)
    mean = load_folder(tmp_path, SIZE).pictures.mean()
    assert 0.45 < mean < 0.55


def test_captions_and_masks_are_read_beside_their_pictures(folder):
    for stem in "abc":
        (folder / f"{stem}.txt").write_text(f"\ufeffa photo of\n<kodo>  {stem}\n", encoding="utf-8")
        mask = Image.new("L", (48, 32), 0)
        mask.paste(255, (0, 0, 24, 32))
        mask.save(folder / f"{stem}.mask.png")
    data = load_folder(folder, SIZE)
    assert data.captions == tuple(f"a photo of <kodo> {stem}" for stem in "abc")
    assert data.masks.shape == (3, 1, *SIZE) and len(data.names) == 3
    assert data.masks[..., :10].min() == 1 and data.masks[..., 14:].max() == 0


def test_fingerprint_changes_with_pixels_names_captions_and_masks(folder):
    seen = {load_folder(folder, SIZE).fingerprint}
    assert load_folder(folder, SIZE).fingerprint in seen
    (folder / "a.png").rename(folder / "d.png")
    seen.add(load_folder(folder, SIZE).fingerprint)
    picture(folder / "d.png", width=40)
    seen.add(load_folder(folder, SIZE).fingerprint)
    seen.add(load_folder(folder, SIZE, class_word="dog").fingerprint)
    for stem in "bcd":
        Image.new("L", (40 if stem == "d" else 48, 32), 255).save(folder / f"{stem}.mask.png")
    seen.add(load_folder(folder, SIZE).fingerprint)
    assert len(seen) == 5


def spoil(name):
    def change(folder):
        (folder / name).write_text("this is text")

    return change


BAD = {
    "text named .png": (spoil("a.png"), r"a\.png: this is not a picture"),
    "tiny picture": (lambda f: picture(f / "a.png", 1, 1), r"a\.png: 1×1 pixels are too few"),
    "truncated picture": (
        lambda f: (f / "b.jpg").write_bytes((f / "b.jpg").read_bytes()[:300]),
        r"b\.jpg: this is not",
    ),
    "empty file": (lambda f: (f / "c.webp").write_bytes(b""), r"c\.webp: this is not"),
    "one caption missing": (
        lambda f: [(f / f"{s}.txt").write_text("x") for s in "ab"],
        r"a caption, but not c\.webp",
    ),
    "empty caption": (
        lambda f: [(f / f"{s}.txt").write_text(" ") for s in "abc"],
        r"a\.txt: this caption is empty",
    ),
    "binary caption": (
        lambda f: [(f / f"{s}.txt").write_bytes(b"\xff\xfe\0") for s in "abc"],
        r"a\.txt: .*UTF-8",
    ),
    "one mask missing": (lambda f: picture(f / "a.mask.png"), r"a mask, but not b\.jpg, c\.webp"),
    "mask of no picture": (lambda f: picture(f / "z.mask.png"), r"z\.mask\.png belongs to no picture"),
    "mask of another size": (
        lambda f: [picture(f / f"{s}.mask.png", 30, 30) for s in "abc"],
        "the mask is 30×30",
    ),
    "black mask": (
        lambda f: [Image.new("L", (48, 32)).save(f / f"{s}.mask.png") for s in "abc"],
        "black all over",
    ),
    "text named mask": (lambda f: [spoil(f"{s}.mask.png")(f) for s in "abc"], r"a\.mask\.png: this is not"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_named_in_one_sentence(folder, fault):
    change, words = BAD[fault]
    load_folder(folder, SIZE)
    change(folder)
    with pytest.raises(AdapterError, match=words) as caught:
        load_folder(folder, SIZE)
    assert "\n" not in str(caught.value)


def test_empty_missing_and_impossible_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="no picture in this folder"):
        load_folder(tmp_path, SIZE)
    with pytest.raises(AdapterError, match="no such folder"):
        load_folder(tmp_path / "absent", SIZE)
    with pytest.raises(AdapterError, match="training size"):
        load_folder(tmp_path, (0, 16))


def test_too_large_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("modular_concepts.data.dataset.MAX_PIXELS", 1000)
    picture(tmp_path / "a.png")
    with pytest.raises(AdapterError, match="too many"):
        load_folder(tmp_path, SIZE)


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.webp"])
def test_mutated_pictures_end_in_a_value_or_an_adapter_error(folder, name):
    sound, refused = (folder / name).read_bytes(), 0
    for other in {"a.png", "b.jpg", "c.webp"} - {name}:
        (folder / other).unlink()
    for case in range(60):
        rng = random.Random(f"{name} {case}")  # noqa: S311 - a sample, no secret
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / name).write_bytes(data[: rng.choice([None, rng.randrange(len(data))])])
        try:
            assert load_folder(folder, SIZE).pictures.isfinite().all()
        except AdapterError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > 10


def loaded(folder, name="a.png", mode="RGB"):
    """A picture or mask as a host hands it over: (3, H, W) or (H, W) in 0..1."""
    with Image.open(folder / name) as image:
        pixels = torch.from_numpy(np.array(image.convert(mode))).float() / 255
    return pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels


def test_loaded_pictures_become_what_their_files_become(tmp_path):
    picture(tmp_path / "a.png")
    cover = Image.new("L", (48, 32), 0)
    cover.paste(255, (8, 8, 30, 30))
    cover.save(tmp_path / "a.mask.png")
    from_files = load_folder(tmp_path, SIZE, ("<kodo>",))
    given = [loaded(tmp_path)], ["a photo of {concept}"], [loaded(tmp_path, "a.mask.png", "L")]
    data = filled_in(of_pictures(*given, SIZE), ("<kodo>",), "")
    assert torch.equal(data.pictures, from_files.pictures) and torch.equal(data.masks, from_files.masks)
    assert data.captions == from_files.captions == ("a photo of <kodo>",)


def test_loaded_pictures_of_the_right_size_are_untouched_and_one_caption_serves_all():
    pictures = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    data = of_pictures(list(pictures), ["a dog\n"], None, SIZE)
    assert torch.equal(data.pictures, pictures)
    assert data.captions == ("a dog",) * 3 and data.masks is None


def test_the_place_for_the_concept_is_filled_in_and_changes_the_fingerprint():
    data = of_pictures([torch.ones(3, *SIZE)] * 3, ["a {concept}, {concept}", "a dog", "a <TOK>"], None, SIZE)
    named = filled_in(data, ("<kodo>",), "big  dog")
    assert named.captions == ("a <kodo> big dog, <kodo> big dog", "a dog", "a <kodo> big dog")
    assert named.fingerprint != data.fingerprint
    assert filled_in(named, ("<other>",), "cat") is named


@pytest.mark.parametrize(
    ("pictures", "captions", "masks", "words"),
    [
        ([], ["a"], None, "there is no picture"),
        ([torch.ones(3, 16, 24)] * 3, ["a", "b"], None, "2 captions for 3 pictures"),
        ([torch.ones(3, 16, 24)], [" "], None, "this caption is empty"),
        ([torch.full((3, 16, 24), float("nan"))], ["a"], None, "picture 1: .* NaN"),
        ([torch.ones(3, 3, 3)], ["a"], None, "picture 1: 3×3 pixels are too few"),
        ([torch.ones(3, 16, 24)], ["a"], [torch.ones(8, 8)], "picture 1: the mask is 8×8"),
        ([torch.ones(3, 16, 24)], ["a"], [torch.zeros(16, 24)], "picture 1: the mask is black"),
    ],
)
def test_loaded_pictures_that_cannot_be_used_are_named(pictures, captions, masks, words):
    with pytest.raises(AdapterError, match=words):
        of_pictures(pictures, captions, masks, SIZE)
