"""Promise: disjoint slots do not meet, and the figures from factors are those of the whole deltas."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from laws import filled_adapter, relative_size, seeded

from modular_concepts.adapters.basis import slot_indices
from modular_concepts.adapters.low_rank import KINDS, new_frozen
from modular_concepts.crosstalk.measures import column_overlap, cosine, crosstalk, crosstalk_table, sign_conflicts

OUT, INP, RANK = 24, 64, 4


def flat(adapter):
    return adapter.to(dtype=torch.float64).delta().flatten(1)


def crossed(a, b):
    return ((flat(a) @ flat(b).mT).norm() / flat(a).norm() / flat(b).norm()).item()


@pytest.mark.parametrize("kernel", [None, (3, 3)])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_factors_give_the_figures_of_the_whole_deltas(first, second, kernel):
    a = filled_adapter(first, OUT, INP, RANK, 1, kernel)
    b = filled_adapter(second, OUT, INP, RANK + 1, 1, kernel).replace(alpha=-2.0)
    whole = (flat(a) * flat(b)).sum() / flat(a).norm() / flat(b).norm()
    moved = flat(a) * flat(b)
    opposed = (moved < 0).sum() / (moved != 0).sum()
    assert crosstalk(a, b) == pytest.approx(crossed(a, b), rel=1e-6)
    assert cosine(a, b) == pytest.approx(whole.item(), rel=1e-6, abs=1e-9)
    assert sign_conflicts(a, b) == pytest.approx(opposed.item(), abs=1e-6)
    assert crosstalk(a, b) > 1e-2 and sign_conflicts(a, b) > 0.2


@pytest.mark.parametrize("kernel", [None, (3, 3)])
@pytest.mark.parametrize("kind", ["orthogonal", "block_orthogonal"])
def test_disjoint_slots_have_no_crosstalk(kind, kernel):
    adapters = [filled_adapter(kind, OUT, INP, RANK, slot, kernel) for slot in range(4)]
    for a, b in itertools.combinations(adapters, 2):
        down = a.lora_down.flatten(1) @ b.lora_down.flatten(1).mT
        assert down.abs().max() <= 1e-6
        assert crosstalk(a, b) <= 1e-6
        assert abs(cosine(a, b)) <= 1e-6
    assert crosstalk(adapters[0], adapters[0]) > 0.1
    assert cosine(adapters[0], adapters[0]) == pytest.approx(1.0)


def test_a_slot_does_not_answer_what_another_slot_reads():
    a, b = (filled_adapter("orthogonal", OUT, INP, RANK, slot) for slot in (0, 1))
    x = torch.randn(5, INP, generator=seeded(0))
    assert relative_size(a, b, x) > 0.1
    assert relative_size(a, b, x @ a.lora_down.mT @ a.lora_down) <= 1e-6


def test_disjoint_blocks_never_move_the_same_weight():
    a, b = (filled_adapter("block", OUT, INP, RANK, slot) for slot in (0, 1))
    assert not set(a.rows.tolist()) & set(b.rows.tolist())
    assert cosine(a, b) == 0.0 and sign_conflicts(a, b) == 0.0
    assert crosstalk(a, b) > 1e-2  # rows do not stop b from answering what a reads
    plain = [filled_adapter("lora", OUT, INP, RANK, slot) for slot in (0, 1)]
    assert 0.3 < sign_conflicts(*plain) < 0.7


def test_the_gaussian_variant_has_more_crosstalk_than_disjoint_slots():
    ups = [torch.randn(OUT, RANK, generator=seeded(i)) for i in (1, 2)]
    gaussian = [
        new_frozen(OUT, torch.randn(RANK, INP, generator=seeded(i)) / INP**0.5, None).replace(lora_up=up)
        for i, up in enumerate(ups)
    ]
    assert crosstalk(*gaussian) > 1e-2


def test_columns_in_common_are_counted():
    assert column_overlap(slot_indices(320, 20, 3), slot_indices(320, 20, 4)) == 0
    assert column_overlap(slot_indices(320, 20, 3), slot_indices(320, 30, 2)) == 20
    generator = seeded(0)
    draws = [torch.randperm(320, generator=generator)[:20].tolist() for _ in range(400)]
    shared = sum(column_overlap(a, b) > 0 for a, b in zip(draws[::2], draws[1::2], strict=True)) / 200
    assert 0.64 < shared < 0.84  # random columns collide in 74 % of pairs at this width


def test_an_untrained_concept_has_no_crosstalk():
    trained = filled_adapter("lora", OUT, INP, RANK)
    fresh = trained.replace(lora_up=torch.zeros(OUT, RANK))
    assert crosstalk(trained, fresh) == cosine(fresh, trained) == sign_conflicts(fresh, trained) == 0.0


def concept(name, **layers):
    return SimpleNamespace(name=name, layers=layers)


def test_the_table_has_every_pair_and_common_layer():
    q, k, v = (filled_adapter("lora", OUT, INP, RANK, slot) for slot in range(3))
    table = crosstalk_table([concept("a", q=q, k=k), concept("b", q=v, k=q), concept("c", q=k)], signs=True)
    assert set(table["pairs"]) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert set(table["layers"]["q"]) == set(table["pairs"]) and set(table["layers"]["k"]) == {("a", "b")}
    assert table["layers"]["q"]["a", "b"]["crosstalk"] == crosstalk(q, v)
    pair = table["pairs"]["a", "b"]
    assert pair["crosstalk"] == pytest.approx((crosstalk(q, v) + crosstalk(k, q)) / 2)
    assert set(pair) == {"crosstalk", "cosine", "sign_conflicts"}
    assert table["mean"] == pytest.approx(sum(p["crosstalk"] for p in table["pairs"].values()) / 3)
    assert table["mean"] > 1e-2


def test_the_table_numbers_namesakes_and_bears_strangers():
    q = filled_adapter("lora", OUT, INP, RANK)
    assert set(crosstalk_table([concept("a", q=q), concept("a", q=q)])["pairs"]) == {("a (1)", "a (2)")}
    assert crosstalk_table([concept("a", q=q), concept("b", k=q)]) == {"pairs": {}, "layers": {}, "mean": 0.0}
    assert crosstalk_table([]) == {"pairs": {}, "layers": {}, "mean": 0.0}
