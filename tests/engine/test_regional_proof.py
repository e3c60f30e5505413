"""The proof of regions judges as it says: right people in their places, swapped ones as bleed, no one as missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.proof_regions import (
    ALIKE,
    MIXED,
    Group,
    alone_right,
    asked,
    by_place,
    figures,
    groups,
    interval,
    judged,
    parsed,
    truth,
)
from modular_concepts.toy.judges import load_judges

PAIR = Group(("tom", "tim"), "beach", tuple(range(8)))
TRIO = Group(("minka", "ada", "tom"), "snow", (3, 4))


def mean(group: Group, pictures: torch.Tensor, figure: str) -> float:
    rows = judged(load_judges(), group, pictures)
    assert len(rows) == len(group.seeds) * len(group.names)
    return sum(row[figure] for row in rows) / len(rows)


def test_people_whom_the_world_drew_are_themselves():
    for group in (PAIR, TRIO):
        pictures = truth(group)
        assert pictures.shape == (len(group.seeds), 3, 32, 32 * len(group.names))
        assert mean(group, pictures, "identity") > 0.8 and mean(group, pictures, "text") > 0.9
        assert mean(group, pictures, "bleed") == mean(group, pictures, "missing") == 0


def test_two_who_changed_places_are_bleed():
    swapped = torch.cat(truth(PAIR).chunk(2, dim=3)[::-1], dim=3)
    assert mean(PAIR, swapped, "bleed") > 0.8 and mean(PAIR, swapped, "nearer") > 0.8
    assert mean(PAIR, swapped, "identity") < 0.2 and mean(PAIR, swapped, "missing") == 0


def test_a_place_without_anyone_is_missing():
    empty = truth(TRIO)
    empty[..., :64] = empty[:, :, :4, :1].mean((2, 3), keepdim=True)
    assert mean(TRIO, empty, "missing") == pytest.approx(2 / 3)
    assert mean(TRIO, empty, "bleed") == 0


@pytest.mark.parametrize("each", [5, 100])
def test_as_many_pictures_as_asked_half_of_look_alikes_all_different(each):
    found = groups(each)
    for size in (2, 3):
        own = [group for group in found if len(group.names) == size]
        assert sum(len(group.seeds) for group in own) == each
        alike = sum(len(group.seeds) for group in own if group.alike)
        assert each * 0.45 <= alike <= each * 0.65
    assert len({group.key for group in found}) == len(found)
    if each == 100:
        orders = {group.names for group in found}
        assert len(orders) == sum(len(cast) for cast in (*ALIKE, *MIXED))  # everyone stood everywhere
        assert len({group.scene for group in found}) == 6


def test_a_prompt_names_its_own_and_what_else_is_there():
    assert TRIO.prompt == "a cat and a woman and a man in the snow"
    assert TRIO.prompts[1] == "a cat and a woman <ada> and a man in the snow"
    assert replace(TRIO, bare=True).prompts[1] == "a cat and a <ada> and a man in the snow"
    assert TRIO.boxes[0] == (0, 0, 1 / 3, 1) and TRIO.boxes[2][2] == 1
    assert not TRIO.alike and PAIR.alike


def test_figures_come_with_their_intervals():
    low, high = interval(0.0, 100)
    assert low == 0 and 0.03 < high < 0.04
    low, high = interval(0.5, 100)
    assert low + high == pytest.approx(1) and 0.19 < high - low < 0.2
    found = figures(judged(load_judges(), PAIR, truth(PAIR)))
    assert found["all"] == found["look-alikes"] == found["two"] and "three" not in found
    assert found["all"]["regions"] == 16 and found["all"]["missing"][0] == 0


def test_identity_is_told_by_place_and_against_another_way():
    found = judged(load_judges(), PAIR, truth(PAIR))
    assert by_place(found) == {f"{name}, {place} of 2": 1.0 for place, name in enumerate(PAIR.names, 1)}
    lost = [{**row, "identity": 0.0} if row["place"] == 1 else row for row in found]
    assert by_place(lost)[f"{PAIR.names[1]}, 2 of 2"] == 0.0
    assert alone_right(found, lost) == [len(found) // 2, 0] and alone_right(lost, found) == [0, len(found) // 2]


def test_somebody_alone_is_nobodys_neighbour():
    (group,) = groups(2, [("tom",)])
    found = figures(judged(load_judges(), group, truth(group)))["all"]
    assert found["regions"] == 2 and found["identity"][0] == 1 and found["bleed"][0] == found["nearer"][0] == 0


@pytest.mark.parametrize("flags", [[], ["--bare"]])
def test_the_command_line_says_what_is_asked(tmp_path, flags):
    """And other prompts are kept in other files, so that no picture is taken for one of them."""
    line = [str(tmp_path), "--casts", "tom-tim", "ada", "--each", "4", "--only", "in words, no concept", *flags]
    found = asked(parsed(line))
    assert [group.names for group in found] == [("ada",), ("tom", "tim")]
    assert ["a man <tom>" in group.called for group in found] == [False, not flags]
    assert [group.key.endswith("bare") for group in found] == [bool(flags)] * 2
