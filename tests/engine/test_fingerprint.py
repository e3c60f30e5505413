"""A few numbers tell one checkpoint from another, in whatever precision each was loaded."""

from __future__ import annotations

import pytest
import torch

from modular_concepts.crosstalk.report import warnings_on_base
from modular_concepts.models.fingerprint import same_weights, weights_sample


def table(seed: int = 0, count: int = 200) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"layer{number}.weight": torch.randn(7, 11, generator=generator) for number in range(count)}
    return made | {"norm.weight": torch.ones(7)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_does_not_matter(dtype, other):
    one, two = ({name: value.to(to) for name, value in table().items()} for to in (dtype, other))
    # Two roundings of one number need not agree, but a checkpoint that was rounded once does.
    if {dtype, other} == {torch.float16, torch.bfloat16}:
        two = {name: value.to(other) for name, value in one.items()}
    assert same_weights(weights_sample(one), weights_sample(two)) is True


def test_another_checkpoint_is_another():
    tuned = {name: value + 0.01 * torch.sign(value) for name, value in table().items()}
    assert same_weights(weights_sample(table()), weights_sample(tuned)) is False
    assert same_weights(weights_sample(table()), weights_sample(table(1))) is False
    few = {"a.weight": torch.randn(3, 3)}
    assert same_weights(weights_sample(few), weights_sample(dict(few))) is True


@pytest.mark.parametrize("text", ["", None, 3, "!!!!", "AAAA", "A" * 10_000])
def test_what_is_no_sample_says_nothing(text):
    assert same_weights(text, weights_sample(table())) is None


def test_quantised_weights_have_no_sample():
    few = {"a.weight": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    assert weights_sample(few) == weights_sample({}) == weights_sample({"norm.weight": torch.ones(3)}) == ""


def test_a_hash_decides_where_there_is_no_sample(made_recipe):
    concept = made_recipe(base_hash="a" * 16)
    assert warnings_on_base([concept], "a" * 16) == []
    assert warnings_on_base([concept], "") == []
    assert len(warnings_on_base([concept], "b" * 16)) == 1
    sampled = made_recipe(base_hash="a" * 16, origin={"base_sample": weights_sample(table())})
    assert warnings_on_base([sampled], "b" * 16, weights_sample(table())) == []
    assert "another checkpoint" in warnings_on_base([sampled], "b" * 16, weights_sample(table(1)))[0]
    assert warnings_on_base([made_recipe()], "b" * 16, weights_sample(table())) == []


@pytest.fixture
def made_recipe():
    from modular_concepts.concept import Concept, Recipe

    return lambda **fields: Concept("tom", {}, {"<tom>": torch.ones(1, 4)}, Recipe(**fields))
