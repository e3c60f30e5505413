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
