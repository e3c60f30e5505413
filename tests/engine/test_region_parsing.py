"""Regions from outside: what JSON, bounding boxes and masks may say, and in which words the rest is refused."""

from __future__ import annotations

import json

import pytest
import torch

from modular_concepts.errors import AdapterError
from modular_concepts.regions.geometry import Region
from modular_concepts.regions.parsing import (
    FIELDS,
    json_problem,
    names_from,
    one_mask,
    region_box,
    regions_from_json,
    unnamed_masks,
)

DOG = {"prompt": "a dog", "box": [0, 0, 0.5, 1]}
EVERYTHING = DOG | {
    "negative": "a cat",
    "units": "pixels",
    "box": [8, 0, 40.5, 32],
    "concepts": ["rex", "hat"],
    "feather": 3,
    "strength": 0.5,
    "start": 0.25,
    "end": 0.75,
    "priority": -2,
}


def parsed(*entries: object, masks: torch.Tensor | None = None) -> list[Region]:
    return regions_from_json(json.dumps(entries), masks)


def test_everything_that_a_region_can_say_arrives():
    (region,) = parsed(EVERYTHING)
    assert region == Region(
        "a dog",
        (8.0, 0.0, 40.5, 32.0),
        negative="a cat",
        feather=3.0,
        strength=0.5,
        pixels=True,
        concepts=("rex", "hat"),
        start=0.25,
        end=0.75,
        priority=-2,
    )
    assert set(EVERYTHING) | {"mask"} == set(FIELDS)


def test_what_is_left_out_is_as_a_region_has_it():
    assert parsed(DOG) == [Region("a dog", (0.0, 0.0, 0.5, 1.0))]
    assert parsed(DOG | {"negative": "  "})[0].negative is None
    assert parsed(DOG | {"concepts": []})[0].concepts == ()


def test_a_list_may_stand_alone_or_under_its_name_and_be_empty():
    assert regions_from_json(json.dumps({"regions": [DOG, DOG]})) == parsed(DOG, DOG)
    assert regions_from_json("[]") == []


def test_a_place_may_be_left_to_the_sampler():
    (region,) = parsed(DOG | {"box": "automatic", "concepts": ["rex"]})
    assert region.unplaced and region.concepts == ("rex",)
    assert not parsed(DOG)[0].unplaced


def test_masks_are_named_by_their_number():
    masks = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    first, second = parsed({"prompt": "a", "mask": 2}, {"prompt": "b", "mask": 0}, masks=masks)
    assert torch.equal(first.mask, masks[2]) and torch.equal(second.mask, masks[0]) and first.box is None
    assert torch.equal(one_mask("this", masks[1]), masks[1]) and torch.equal(one_mask("this", masks[1:2]), masks[1])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("a dog", "region 2 must be a JSON object; got 'a dog'"),
        ({"box": [0, 0, 1, 1]}, "region 2 has no prompt; say what is there"),
        ({"prompt": "a"}, "region 2 has neither box nor mask; the whole picture is the box [0, 0, 1, 1], and"),
        (DOG | {"promt": "a"}, "region 2 has the unknown entry 'promt'; there are prompt, negative, box"),
        (DOG | {"prompt": 3}, "region 2: prompt must be text; got 3"),
        (DOG | {"prompt": "\ud800"}, "region 2: prompt holds half a character"),
        (DOG | {"negative": None}, "region 2: negative must be text; got None"),
        (DOG | {"box": [0, 0, 1]}, "region 2: box must be four numbers (left, top, right, bottom); got [0, 0, 1]"),
        (DOG | {"box": "0 0 1 1"}, "region 2: box must be four numbers"),
        (DOG | {"box": [0, 0, "1", 1]}, "region 2: box must be a finite number; got '1'"),
        (DOG | {"box": [0, 0, True, 1]}, "region 2: box must be a finite number; got True"),
        (DOG | {"box": [0, 0, 10**400, 1]}, "region 2: box must be a finite number"),
        (DOG | {"box": [0, 0, 64, 1]}, 'as fractions all four are at most 1; correct them, or add "units": "pixels"'),
        (DOG | {"box": [0.5, 0, 0.5, 1]}, "0 <= left < right"),
        (DOG | {"box": [-0.5, 0, 0.5, 1]}, "0 <= left < right"),
        (DOG | {"units": "cm"}, "region 2: units is 'cm'; write fractions or pixels"),
        (DOG | {"concepts": "rex"}, "region 2: concepts must be a list of names; got 'rex'"),
        (DOG | {"concepts": [3]}, "region 2: concepts must be text; got 3"),
        (DOG | {"strength": 2}, "region 2: region 'a dog' has strength 2"),
        (DOG | {"strength": "1"}, "region 2: strength must be a finite number; got '1'"),
        (DOG | {"feather": -1}, "region 2: region 'a dog' has a feather of -1"),
        (DOG | {"priority": 1.5}, "region 2: priority must be a whole number; got 1.5"),
        (DOG | {"mask": 0}, "region 2 has a box and a mask; give one of them"),
        ({"prompt": "a", "mask": 0}, "region 2 asks for mask 0, but no masks are connected"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_number(entry, words):
    with pytest.raises(AdapterError) as refused:
        parsed(DOG, entry)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the regions are no JSON: Expecting value in line 1, column 1; write [{"),
        ("[{'prompt': 1}]", "the regions are no JSON: Expecting property name"),
        ("3", "the regions must be a JSON list of objects; got 3"),
        ('{"prompt": "a dog"}', "the regions must be a JSON list of objects"),
        ('[{"prompt": "a", "prompt": "b"}]', "the entry 'prompt' twice in one object; keep one"),
        ('[{"prompt": "a", "feather": NaN}]', "the regions' JSON holds NaN; numbers must be finite"),
        ("[" * 100_000, "nested too deeply"),
        (f"[{'9' * 5000}]", "a number that is too long"),
        (json.dumps([DOG] * 65), "there are 65 regions; at most 64"),
        (" " * 1_000_001, "1000001 characters of JSON"),
    ],
)
def test_what_is_no_list_of_regions_is_refused(text, words):
    with pytest.raises(AdapterError) as refused:
        regions_from_json(text)
    assert words in str(refused.value)


@pytest.mark.parametrize("index", [3, -1])
def test_a_mask_that_is_not_there_is_refused(index):
    with pytest.raises(AdapterError, match=f"asks for mask {index}, but there are 3, counted from 0"):
        parsed({"prompt": "a", "mask": index}, masks=torch.ones(3, 4, 4))


def test_several_masks_need_a_number():
    with pytest.raises(AdapterError, match="region 'x' has 2 masks; give one"):
        one_mask("region 'x'", torch.ones(2, 4, 4))


def test_the_hosts_bounding_boxes_are_pixels():
    box = {"x": 8, "y": 4, "width": 20, "height": 10}
    for given in (box, [box], [[box]], [{**box, "metadata": {}, "score": 0.9}]):
        assert region_box(given) == (8, 4, 28, 14)
    region = Region("a dog", region_box(box), pixels=True).placed(64, 32)
    assert region.box == (8 / 64, 4 / 32, 28 / 64, 14 / 32)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([], "there are 0 bounding boxes; give one"),
        ([{"x": 0, "y": 0, "width": 2, "height": 2}] * 2, "there are 2 bounding boxes; give one, a region for each"),
        ({"x": 0, "y": 0, "width": 2}, "a bounding box has x, y, width and height; got"),
        ("0,0,2,2", "a bounding box has x, y, width and height; got '0,0,2,2'"),
        ({"x": 0, "y": 0, "width": "2", "height": 2}, "the bounding box's width must be a finite number; got '2'"),
        ({"x": 0, "y": 0, "width": 0, "height": 2}, "0 <= left < right"),
    ],
)
def test_a_wrong_bounding_box_is_refused(box, words):
    with pytest.raises(AdapterError) as refused:
        Region("a dog", region_box(box), pixels=True)
    assert words in str(refused.value)


def test_names_from_a_widget():
    assert names_from("tom, a hat ,") == ("tom", "a hat")
    assert names_from("  ") is None
    assert names_from("-") == () and names_from("None") == ()
    assert names_from("none, tom") == ("none", "tom")


def test_a_problem_is_told_before_any_mask_is_there():
    assert json_problem(json.dumps([DOG, {"prompt": "a", "mask": 70_000}])) == ""
    assert json_problem("[{}]") == "region 1 has no prompt; say what is there"


def test_a_mark_of_the_encoding_before_the_regions_is_no_part_of_them():
    assert regions_from_json("\ufeff" + json.dumps([DOG])) == parsed(DOG)


def test_masks_that_nobody_names_are_found_in_all_that_is_read_as_regions():
    entries = [{"prompt": "a", "mask": 1}, DOG]
    for text in (json.dumps(entries), json.dumps({"regions": entries})):
        for mark in ("", "\ufeff"):
            assert unnamed_masks(mark + text, torch.ones(3, 4, 4)) == [0, 2]
            assert unnamed_masks(mark + text, torch.ones(4, 4)) == [0]
