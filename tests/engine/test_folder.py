"""What lies in a folder of pictures is read or named; what was meant as a caption or a mask is never passed over."""

import unicodedata

import numpy as np
import pytest
from test_cli import run
from untrained_toy import write_untrained

from modular_concepts.data.dataset import load_folder
from modular_concepts.errors import AdapterError
from modular_concepts.toy import model

Image = pytest.importorskip("PIL.Image")
SIZE = (32, 32)


def picture(path, seed=0, mode="RGB", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).convert(mode).save(path, **more)


def mask(path, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (64, 64))
    image.paste(255, (16, 16, 48, 48))
    image.convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two pictures, p0.png and p1.png, in a folder of their own."""
    for number in range(2):
        picture(tmp_path / "set" / f"p{number}.png", number)
    return tmp_path / "set"


def load(folder):
    return load_folder(folder, SIZE, ("<tom>",), template="a {concept}")


# --- captions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".Txt", ".caption", ".CAPTION", ".png.txt", ".PNG.TXT"])
def test_captions_of_other_trainers_are_read(folder, ending):
    for number in range(2):
        (folder / f"p{number}{ending}").write_text(f"a {{concept}} in coat {number}")
    data = load(folder)
    assert data.captions == tuple(f"a {{concept}} in coat {number}" for number in range(2))
    assert data.report.summary() == "2 pictures, 2 captions, no masks" and not data.report.remarks()


def test_names_of_letters_that_are_put_together_otherwise_are_the_same(tmp_path):
    composed, apart = (unicodedata.normalize(form, "émile") for form in ("NFC", "NFD"))
    picture(tmp_path / f"{composed}.png", 1)
    (tmp_path / f"{apart}.txt").write_text("a {concept} outside")
    mask(tmp_path / f"{apart}.mask.png")
    data = load(tmp_path)
    assert data.captions == ("a {concept} outside",) and data.masks is not None


def test_of_two_captions_one_is_used_and_the_other_named(folder):
    for number in range(2):
        (folder / f"p{number}.txt").write_text("by hand")
        (folder / f"p{number}.caption").write_text("by machine")
    data = load(folder)
    assert data.captions == ("by hand",) * 2
    assert data.report.remarks() == ["left out: p0.caption, p1.caption (another caption of that picture is used)"]


MEANT = {
    "one name more": ["p0_caption.txt", "p1_caption.txt"],
    "a word behind": ["p0.caption.txt", "p1.caption.txt"],
    "JSON": ["p0.json", "p1.json"],
    "tags": ["p0.tags", "p1.tags"],
    "one file for all": ["metadata.jsonl"],
    "one table for all": ["captions.txt"],
    "another folder": ["captions/p0.txt", "captions/p1.txt"],
    "other names": ["first.txt", "second.txt"],
}


@pytest.mark.parametrize("kind", MEANT)
def test_a_training_never_runs_without_captions_that_lie_beside_the_pictures(folder, kind):
    for name in MEANT[kind]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("a {concept} in a coat")
    with pytest.raises(AdapterError, match="look like captions") as caught:
        load(folder)
    assert all(name in str(caught.value) for name in MEANT[kind]) and "\n" not in str(caught.value)


# --- pictures -----------------------------------------------------------------------------------------------


def test_pictures_are_read_or_named(folder):
    for number, (ending, kind) in enumerate({".jpg": "JPEG", ".jfif": "JPEG", ".JPE": "JPEG"}.items(), 2):
        picture(folder / f"p{number}{ending}", number, format=kind)
    for name in ("p5.tif", "p6.gif", "p7.heic", "p8.avif", "p9.mov", "notes.md", "p0.npz", ".DS_Store", "p1.png~"):
        (folder / name).write_bytes(b"x")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    data = load(folder)
    assert data.names == ("p0.png", "p1.png", "p2.jpg", "p3.jfif", "p4.JPE")
    said = "\n".join(data.report.lines())
    assert "5 pictures, no captions, no masks; each is called 'a <tom>'" in said
    for name in ("p5.tif", "p6.gif", "p7.heic", "p8.avif", "p9.mov", "notes.md", "p0.npz", ".DS_Store", "p1.png~"):
        assert name in said
    assert "gone.png (a link to nothing" in said and "save it as PNG or JPEG" in said


def test_a_year_is_no_number_of_repeats(folder):
    picture(folder / "10_tom/a.png", 5)
    for name in ("2024_summer/b.png", "20240613_beach/c.png", "holiday/d.png", "10_tom/more/e.png", ".old/f.png"):
        picture(folder / name, 6)
    data = load(folder)
    assert data.names == ("p0.png", "p1.png", "10_tom/a.png") and data.repeats == (1, 1, 10)
    said = "\n".join(data.report.lines())
    assert "10_tom: 1 picture, counted 10 times each" in said
    assert "20240613_beach/ with 1 picture, 2024_summer/ with 1 picture (the number is above 1000" in said
    assert "holiday/ with 1 picture" in said and "10_tom/more/ with 1 picture" in said and ".old/" in said


def test_a_folder_with_nothing_to_read_says_what_is_there(tmp_path):
    picture(tmp_path / "2024_summer/a.png")
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(AdapterError, match=r"no picture in this folder.*2024_summer/ with 1 picture.*a\.heic"):
        load(tmp_path)
    picture(tmp_path / "0_tom/a.png")
    with pytest.raises(AdapterError, match="asks for each picture 0 times"):
        load(tmp_path)


def test_copies_transparency_and_moving_pictures_are_told(folder):
    picture(folder / "q.png", 0)
    image = Image.open(folder / "p0.png").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((64, 64)))
    image.save(folder / "half.png")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moves.webp", save_all=True, append_images=frames[1:])
    picture(folder / "opaque.png", 7, "RGBA")
    notes = load(folder).report.notes
    assert "transparent parts are white in training: half.png" in notes
    assert "of a moving picture the first frame is learned: moves.webp" in notes
    assert "q.png is the same picture as p0.png; each is learned from again" in notes


# --- masks --------------------------------------------------------------------------------------------------

CONVENTIONS = [
    *("p{}.mask.png", "p{}.MASK.PNG", "p{}-masklabel.png", "p{}_mask.png", "p{}-mask.png", "p{}.mask.jpg"),
    *("mask_p{}.png", "P{}_Mask.jpg", "p{}.png_mask.png", "p{}.png.mask.webp", "p{}_matte.png", "masks/p{}.png"),
    *("mask/p{}.jpg", "masks/p{}_mask.png", "Masks/p{}-masklabel.png"),
]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_masks_of_other_trainers_are_masks(folder, convention):
    for number in range(2):
        mask(folder / convention.format(number))
    data = load(folder)
    assert data.names == ("p0.png", "p1.png") and data.report.masks == 2
    assert data.masks.shape == (2, 1, *SIZE) and data.masks[..., 12:20, 12:20].min() == 1 > data.masks.max(1)[0].min()


@pytest.mark.parametrize(
    "name", ["p0_seg.png", "p0-alpha.png", "seg_p0.png", "p0 (mask).png", "mask.png", "x_mask.png"]
)
def test_what_only_looks_like_a_mask_is_refused_and_never_learned(folder, name):
    mask(folder / name)
    with pytest.raises(AdapterError, match="black and white") as caught:
        load(folder)
    assert name in str(caught.value) and ".mask.png" in str(caught.value)


def test_a_picture_in_colour_is_a_picture_whatever_it_is_called(folder):
    for name in ("p0_mask.png", "p1_b.png", "mask_p1.png"):
        picture(folder / name, 3 + len(name))
    assert len(load(folder).names) == 5


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["p0-masklabel.png"], "a mask, but not p1.png"),
        (["z-masklabel.png"], "z-masklabel.png belongs to no picture"),
        (["masks/z.png"], "z.png belongs to no picture"),
        (["p0.mask.png", "p1.mask.png", "p1_mask.png"], "are masks of one picture"),
    ],
)
def test_doubtful_masks_are_one_sentence(folder, names, words):
    for name in names:
        mask(folder / name)
    with pytest.raises(AdapterError, match=words):
        load(folder)


def test_a_mask_with_transparent_parts_is_refused_and_a_white_one_told(folder):
    for number in range(2):
        Image.new("L", (64, 64), 255).save(folder / f"p{number}.mask.png")
    assert "white masks leave the whole picture to be learned: p0.png, p1.png" in load(folder).report.notes
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save(folder / "p1.mask.png")
    with pytest.raises(AdapterError, match="p1.mask.png: the mask has transparent parts"):
        load(folder)


# --- the shell ----------------------------------------------------------------------------------------------


def test_the_shell_says_before_the_first_step_what_is_read(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(model, "WEIGHTS", write_untrained(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    (folder / "p5.heic").write_bytes(b"x")
    train = ["train", folder, "--name", "tom", "--class-word", "man", "--steps", "1", "--batch", "1", "--rank", "1"]
    code, out, err = run(capsys, *train, "--prior", "0", "--size", "32x32")
    assert code == 0, err
    assert out.startswith("2 pictures, no captions, no masks; each is called 'a <tom>'\n")
    assert "note: left out: p5.heic (a kind of file that is not read" in err


def test_masks_that_say_less_than_they_look_are_told(folder):
    """One grey all over, a photograph, and a moving picture: each is used, and one sentence says how."""
    rows = np.zeros((64, 64), np.uint8)
    rows[:32] = 255
    frames = [Image.fromarray(rows), Image.fromarray(255 - rows)]
    Image.new("L", (64, 64), 7).save(folder / "p0.mask.png")
    frames[0].save(folder / "p1.mask.png", save_all=True, append_images=frames[1:])
    notes = load(folder).report.notes
    assert "masks of one grey all over leave the whole picture to be learned: p0.png" in notes
    assert "of a moving mask the first frame is used: p1.png" in notes
    picture(folder / "p0.mask.png", 5)
    frames[0].convert("RGB").save(folder / "p1.mask.png")  # grey in three channels is no colour
    assert "a mask in colour is read by its brightness: p0.png" in load(folder).report.notes


def test_a_crop_that_leaves_less_than_half_is_told(folder):
    picture(folder / "p0.png")
    for name, size in {
        "wide.png": (900, 64),
        "high.png": (64, 200),
        "photo.png": (96, 64),
        "two.png": (128, 64),
    }.items():
        Image.open(folder / "p0.png").resize(size).save(folder / name)
    told = "the crop leaves less than half of the picture: high.png, wide.png"
    assert told in load(folder).report.notes
    buckets = load_folder(folder, SIZE, ("<tom>",), buckets=True, multiple=8).report.notes
    assert "the crop leaves less than half of the picture: wide.png" in buckets


def test_captions_are_looked_for_once_each_and_not_for_each_picture(tmp_path, monkeypatch):
    from modular_concepts.data import folder as module

    for number in range(40):
        picture(tmp_path / f"photo-{number:02d}.png")
        (tmp_path / f"caption-{number:02d}.txt").write_text("a <tom>")
    real, asked_of = module._beginnings, []
    monkeypatch.setattr(module, "_beginnings", lambda name: asked_of.append(name) or real(name))
    with pytest.raises(AdapterError, match="look like captions"):
        load(tmp_path)
    assert len(asked_of) == len(set(asked_of)) <= 50
