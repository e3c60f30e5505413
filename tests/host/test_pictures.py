"""Concept Pictures in the host: sizes, repeats and edits of a folder."""

from __future__ import annotations

import json

import pytest

Image = pytest.importorskip("PIL.Image")
SIZES = {"square.png": (96, 96), "wide.png": (192, 96), "3_often/high.png": (96, 192)}


@pytest.fixture(scope="module")
def facts(host, tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    folder = place / "input" / "set"
    (folder / "3_often").mkdir(parents=True)
    for name, size in SIZES.items():
        path = folder / name
        Image.new("RGB", size, (200, 30, 60)).save(path)
        Image.new("L", size, 255).save(path.with_name(f"{path.stem}.mask.png"))
        path.with_suffix(".txt").write_text("a photo of {concept}")
    for other in ("other", "tags"):
        for number in range(2):
            path = place / "input" / other / f"p{number}.jfif"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (96, 96), (90 * number, 30, 60)).save(path, "JPEG")
    for number in range(2):
        path = place / "input" / "other" / f"p{number}.png"
        Image.new("L", (96, 96), 255).save(path.with_name(f"p{number}-masklabel.png"))
        path.with_suffix(".caption").write_text("{concept} far away")
        (place / "input" / "tags" / f"p{number}.json").write_text("{}")
    (place / "input" / "other" / "p2.heic").write_bytes(b"x")
    host.run("pictures.py", place)
    return json.loads((place / "facts.json").read_text())


def test_pictures_are_cropped_to_one_size_unless_aspects_are_kept(facts):
    assert facts["cropped"]["sizes"] == [[64, 64]] * 3
    assert facts["kept"]["sizes"] == facts["kept"]["masks"] == [[64, 64], [40, 88], [88, 40]]
    assert "1 pictures of 88 x 40 pixels, with masks" in facts["kept"]["said"]
    assert all(facts["kept"]["shown"]) and len(facts["kept"]["shown"]) == 3


def test_a_numbered_subfolder_repeats_its_pictures_and_an_edit_in_it_is_seen(facts):
    assert facts["kept"]["repeats"] == facts["cropped"]["repeats"] == [1, 1, 3]
    assert "5 with repeats" in facts["cropped"]["said"]
    assert facts["cropped"]["stamp"] == facts["kept"]["stamp"] != facts["stamp"]


def test_what_is_given_and_not_used_is_said_on_the_node(facts):
    assert "the captions on the node are not used: the folder has its own" in facts["own captions"]
    assert "disconnect the masks" in facts["two kinds of masks"]
    said = "\n".join(facts["copies"])
    assert "picture 2 is the same picture as picture 1" in said and "white masks leave the whole picture" in said
    assert "2 pictures have transparent parts" in said


def test_the_node_reads_and_names_the_files_of_other_trainers(facts):
    other = facts["other trainer"]
    assert len(other["sizes"]) == len(other["masks"]) == 2 and "{concept} far away" in other["said"]
    assert any("left out: p2.heic" in line for line in other["said"])
    assert "p0.json" in facts["look like captions"] and "look like captions" in facts["look like captions"]
