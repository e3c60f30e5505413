"""Latents that are kept on disk are those of the very pictures, or are made again; never another picture's."""

import pytest
import torch
from mutations import run, toy_base
from safetensors.torch import load_file, save_file

from modular_concepts.data.latents import _content, encoded, kept
from modular_concepts.storage.safetensors import read_header

FIRST, SECOND = ([torch.full((3, 4, 4), value), torch.full((3, 4, 8), value)] for value in (0.25, 0.5))


def made(latents, calls):
    calls.append(1)
    return latents


EDITS = {
    "a key missing": lambda t: {name: tensor for name, tensor in t.items() if name != "000000"},
    "a key renamed": lambda t: {name.replace("000001", "000007"): tensor for name, tensor in t.items()},
    "a key too many": lambda t: t | {"000002": torch.ones(3, 4, 4)},
    "the pictures changed over": lambda t: t | {"000000": t["000001"], "000001": t["000000"]},
    "other numbers": lambda t: t | {"000000": t["000000"] + 1},
    "another shape": lambda t: t | {"000000": torch.ones(3, 4, 5)},
    "another type": lambda t: t | {"000000": t["000000"].double()},
    "no picture": lambda t: {"probe": t["probe"]},
    "no small picture": lambda t: {name: tensor for name, tensor in t.items() if name != "probe"},
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_cache_that_is_not_as_it_was_written_is_made_again(tmp_path, edit):
    calls = []
    kept(toy_base(), tmp_path, "pictures", lambda: made(FIRST, calls))
    (path,) = tmp_path.iterdir()
    save_file(EDITS[edit](load_file(path)), path, dict(read_header(path).metadata))
    again = kept(toy_base(), tmp_path, "pictures", lambda: made(FIRST, calls))
    assert len(calls) == 2 and all(map(torch.equal, again, FIRST))
    assert all(map(torch.equal, kept(toy_base(), tmp_path, "pictures", lambda: made(FIRST, calls)), FIRST))
    assert len(calls) == 2


def test_a_cache_of_other_pictures_under_this_name_is_made_again(tmp_path):
    kept(toy_base(), tmp_path, "first", lambda: FIRST)
    (first,) = tmp_path.iterdir()
    kept(toy_base(), tmp_path, "second", lambda: SECOND)
    (second,) = set(tmp_path.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert all(map(torch.equal, kept(toy_base(), tmp_path, "second", lambda: SECOND), SECOND))


FORGED = {
    "fewer pictures": lambda t: {name: tensor for name, tensor in t.items() if name != "000002"},
    "a part of each": lambda t: {n: x[..., :3].contiguous() if n != "probe" else x for n, x in t.items()},
    "fewer channels": lambda t: {n: x[:3].contiguous() if n != "probe" else x for n, x in t.items()},
    "another type": lambda t: {n: x.double() if n != "probe" else x for n, x in t.items()},
    "numbers that no picture has": lambda t: {n: x * 0 + 3e38 if n != "probe" else x for n, x in t.items()},
}


@pytest.mark.parametrize("edit", FORGED)
def test_a_cache_that_says_it_is_whole_and_cannot_be_of_these_pictures_is_made_again(tmp_path, edit):
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    first = encoded(toy_base(), pictures, tmp_path)
    (path,) = tmp_path.iterdir()
    tensors = FORGED[edit](load_file(path))
    save_file(tensors, path, dict(read_header(path).metadata) | {"data": _content(tensors)})
    again = encoded(toy_base(), pictures, tmp_path)
    assert again.dtype == first.dtype and torch.equal(again, first) and first.any()


def test_changed_caches_give_the_pictures_all_the_same(tmp_path):
    (outcome,) = run(120, 0, tmp_path / "x", ["latents"])
    assert not outcome.faults and outcome.accepted == 120
    assert outcome.slowest < 1 and outcome.growth < 64 * 2**20
