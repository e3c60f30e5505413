"""Concept Pictures in the host: sizes, repeats and edits of a folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from modular_concepts_pack.nodes.datasets import ConceptDataset
from PIL import Image

SIZES = {"square.png": (96, 96), "wide.png": (192, 96), "3_often/high.png": (96, 192)}


@pytest.fixture(scope="module")
def inputs(folder):
    """The host's input folder with a set of our own and two of other trainers."""
    own = folder / "input" / "set"
    (own / "3_often").mkdir(parents=True)
    for name, size in SIZES.items():
        path = own / name
        Image.new("RGB", size, (200, 30, 60)).save(path)
        Image.new("L", size, 255).save(path.with_name(f"{path.stem}.mask.png"))
        path.with_suffix(".txt").write_text("a photo of {concept}")
    for other in ("other", "tags"):
        for number in range(2):
            path = folder / "input" / other / f"p{number}.jfif"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (96, 96), (90 * number, 30, 60)).save(path, "JPEG")
    for number in range(2):
        path = folder / "input" / "other" / f"p{number}.png"
        Image.new("L", (96, 96), 255).save(path.with_name(f"p{number}-masklabel.png"))
        path.with_suffix(".caption").write_text("{concept} far away")
        (folder / "input" / "tags" / f"p{number}.json").write_text("{}")
    (folder / "input" / "other" / "p2.heic").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def read(inputs, replaced):
    """Runs the node on a folder or on pictures; what came out."""
    replaced.setattr(ConceptDataset, "hidden", SimpleNamespace(unique_id="1"))

    def run(**widgets) -> dict:
        defaults = {"captions": ["a photo of {concept}"], "width": [64], "height": [64], "folder": ["set"]}
        output = ConceptDataset.execute(**defaults | widgets)
        (dataset,) = output.args
        shown = [inputs / "temp" / image["subfolder"] / image["filename"] for image in output.ui["images"]]
        return {
            "sizes": [list(picture.shape[1:]) for picture in dataset.pictures],
            "masks": [list(mask.shape[1:]) for mask in dataset.masks],
            "repeats": dataset.repeats,
            "said": output.ui["text"][0].splitlines(),
            "shown": [path.is_file() for path in shown],
            "stamp": ConceptDataset.fingerprint_inputs(folder=["set"]),
        }

    return run


def test_pictures_are_cropped_to_one_size_unless_aspects_are_kept(read):
    cropped, kept = read(), read(keep_aspect=[True])
    assert cropped["sizes"] == [[64, 64]] * 3
    assert kept["sizes"] == kept["masks"] == [[64, 64], [40, 88], [88, 40]]
    assert "1 pictures of 88 x 40 pixels, with masks" in kept["said"]
    assert all(kept["shown"]) and len(kept["shown"]) == 3


def test_a_numbered_subfolder_repeats_its_pictures_and_an_edit_in_it_is_seen(read, inputs):
    cropped, kept = read(), read(keep_aspect=[True])
    assert kept["repeats"] == cropped["repeats"] == (1, 1, 3)
    assert "5 with repeats" in cropped["said"]
    (inputs / "input" / "set" / "3_often" / "high.txt").write_text("{concept}, close")
    assert cropped["stamp"] == kept["stamp"] != ConceptDataset.fingerprint_inputs(folder=["set"])


def test_what_is_given_and_not_used_is_said_on_the_node(read):
    assert "the captions on the node are not used: the folder has its own" in read(captions=["a man"])["said"]
    half = torch.rand(1, 96, 96, 4, generator=torch.Generator().manual_seed(0))
    said = "\n".join(read(images=[half, half], masks=[torch.ones(1, 96, 96)], folder=[""])["said"])
    assert "picture 2 is the same picture as picture 1" in said and "white masks leave the whole picture" in said
    assert "2 pictures have transparent parts" in said


def test_two_kinds_of_masks_are_refused(read):
    with pytest.raises(Exception, match="disconnect the masks"):
        read(masks=[torch.ones(1, 96, 96)])


def test_the_node_reads_and_names_the_files_of_other_trainers(read):
    other = read(folder=["other"])
    assert len(other["sizes"]) == len(other["masks"]) == 2 and "{concept} far away" in other["said"]
    assert any("left out: p2.heic" in line for line in other["said"])
    with pytest.raises(Exception, match=r"look like captions"):
        read(folder=["tags"])
