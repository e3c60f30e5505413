"""What is said of a set of concepts is true of their weights, and says the way out where they do not fit."""

import json
from dataclasses import replace

import pytest
import torch
from laws import filled_adapter, relative_size, seeded
from untrained_toy import filled_concept

from modular_concepts.adapters.basis import OrthogonalBasis, slot_indices
from modular_concepts.adapters.low_rank import new_orthogonal
from modular_concepts.concept import Concept, Recipe
from modular_concepts.crosstalk.measures import crosstalk_table
from modular_concepts.crosstalk.report import explained, shared_columns
from modular_concepts.errors import AdapterError
from modular_concepts.merging.moments import Moment

LAYER, OTHER = "unet.mid_block.attentions.0.proj_in", "unet.up_blocks.1.attentions.0.proj_in"
OUT, INP, RANK = 24, 320, 20


def concept(name, adapter, recipe=None, layers=(LAYER, OTHER)):
    return Concept(name, dict.fromkeys(layers, adapter), {}, recipe or Recipe(rank=RANK))


def on_columns(columns, seed):
    adapter = new_orthogonal(OUT, INP, len(columns), None, OrthogonalBasis(), columns)
    return adapter.replace(lora_up=torch.randn(OUT, len(columns), generator=seeded(seed)))


def test_every_pair_is_told_of_the_loudest_first():
    some = [filled_concept(f"c{index}", index) for index in range(4)]
    found, table = explained(some), crosstalk_table(some)
    assert {(pair.first, pair.second): pair.crosstalk for pair in found.pairs} == {
        pair: figures["crosstalk"] for pair, figures in table["pairs"].items()
    }
    assert [pair.crosstalk for pair in found.pairs] == sorted((pair.crosstalk for pair in found.pairs), reverse=True)
    for pair in found.pairs:
        assert f"{pair.first} and {pair.second}: crosstalk {pair.crosstalk:.4f}" in found.text()
        assert pair.crosstalk > 1e-3 and pair.blocks


def test_shared_columns_are_counted_and_named():
    cat, dog = on_columns(list(range(20)), 1), on_columns(list(range(17, 37)), 2)
    assert shared_columns(cat, dog) == 3
    found = explained([concept("cat", cat), concept("dog", dog)])
    assert found.pairs[0].columns == {INP: (3, RANK)}
    assert "they share 3 of 20 columns in 320-wide layers" in found.text() and "bleed" in found.text()
    apart = explained([concept("cat", cat), concept("dog", on_columns(slot_indices(INP, RANK, 3), 2))])
    assert apart.pairs[0].columns == {} and "kept apart exactly" in apart.text()


def test_rows_of_blocks_are_compared():
    first, same, other = (filled_adapter("block", OUT, INP, 3, slot) for slot in (0, 0, 1))
    assert explained([concept("a", first), concept("b", same)]).pairs[0].rows == pytest.approx(0.25)
    assert explained([concept("a", first), concept("b", other)]).pairs[0].rows == 0
    plain = filled_adapter("lora", OUT, INP, 3)
    assert explained([concept("a", plain), concept("b", plain)]).pairs[0].rows == 1


def test_activations_from_moments_are_those_of_the_inputs_themselves():
    first, second = filled_adapter("lora", OUT, INP, 3, 0), filled_adapter("lora", OUT, INP, 3, 1)
    x = torch.randn(600, INP, generator=seeded(4), dtype=torch.float64) * torch.logspace(0, -2, INP)
    moment = Moment.of(x.mT @ x / len(x), INP)
    pair = [concept("a", first, layers=(LAYER,)), concept("b", second, layers=(LAYER,))]
    found = explained(pair, [{LAYER: moment}, None])
    assert found.pairs[0].answers[0] == pytest.approx(relative_size(first, second, x), rel=1e-4)
    assert found.pairs[0].answers[1] is None
    assert "on what is meant for a, b answers" in found.text()


RECIPE = Recipe(rank=RANK, architecture="sd15", base_hash="a" * 16, basis="f" * 16, slot=3)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"slot": 3}, "in the same slot, 3; retrain one in slot 0"),
        ({"basis": "e" * 16, "slot": 4}, "different orthogonal bases"),
        ({"base_hash": "b" * 16, "slot": 4}, "different models of one family"),
        ({"architecture": "sdxl", "slot": 4}, "tom is for sd15, tim for sdxl: they cannot be merged"),
    ],
)
def test_what_does_not_belong_together_is_said(other, words):
    adapters = on_columns(slot_indices(INP, RANK, 3), 1), on_columns(slot_indices(INP, RANK, 4), 2)
    pair = [concept("tom", adapters[0], RECIPE), concept("tim", adapters[1], replace(RECIPE, **other))]
    assert words in explained(pair).text()
    fitting = [pair[0], concept("tim", adapters[1], replace(RECIPE, slot=4))]
    assert explained(fitting).warnings == ()


def test_partitions_that_differ_are_said():
    recipes = [Recipe(method="block", blocks=count, layout="contiguous", slot=0) for count in (4, 8)]
    pair = [
        concept(name, filled_adapter("block", OUT, INP, 3), recipe) for name, recipe in zip("ab", recipes, strict=True)
    ]
    assert "a was trained in 4 contiguous blocks, b in 8" in explained(pair).text()


def test_json_says_the_same():
    some = [filled_concept(f"c{index}", index) for index in range(3)]
    found = explained(some, signs=True)
    told = json.loads(found.to_json())
    assert told["mean"] == found.table["mean"] and len(told["pairs"]) == 3
    assert told["pairs"][0]["crosstalk"] == found.pairs[0].crosstalk
    assert 0.3 < told["pairs"][0]["sign_conflicts"] < 0.7
    layer = next(iter(some[0].layers))
    assert told["layers"][layer]["c0 x c1"]["crosstalk"] == found.table["layers"][layer]["c0", "c1"]["crosstalk"]


def test_nothing_to_compare_is_said():
    some = [filled_concept(f"c{index}", index) for index in range(2)]
    with pytest.raises(AdapterError, match="connect at least two"):
        explained(some[:1])
    with pytest.raises(AdapterError, match="no two of these concepts have a layer in common"):
        explained([replace(one, layers={}) for one in some])
