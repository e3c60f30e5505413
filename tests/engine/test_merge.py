"""Promise: merge algebra.  Sums are exact in any order and number; strength acts once; 0 is nothing."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from laws import BLOCKS, EFFECT, TOLERANCE, filled_adapter, relative_error, seeded

from modular_concepts.adapters.low_rank import KINDS, ConvGeometry, block_rows, new_block
from modular_concepts.errors import AdapterError
from modular_concepts.merging import MergedSum, merge_concepts, merged_delta, merged_factors

OUT, INP, RANK = 24, 64, 3
STRENGTHS = [0.6, 1.0, -0.5, 2.0]


def concept(name, adapter, layer="to_q", **more):
    return SimpleNamespace(name=name, layers={layer: adapter}, **more)


def trio(kind="block", kernel=None):
    adapters = [filled_adapter(kind, OUT, INP, RANK, slot, kernel) for slot in range(3)]
    return [concept(name, adapter) for name, adapter in zip("abc", adapters, strict=True)]


def mixed(kernel=None):
    """One adapter of each low-rank kind, ranks 1 to 4."""
    return [filled_adapter(kind, OUT, INP, i + 1, i, kernel) for i, kind in enumerate(KINDS[:4])]


def with_full(kernel=None):
    """Two whole weights among the others."""
    return [*mixed(kernel)[:2], *(filled_adapter("full", OUT, INP, 1, slot, kernel) for slot in (1, 2))]


def formula(adapters, strengths):
    deltas = [s * a.to(dtype=torch.float64).delta() for a, s in zip(adapters, strengths, strict=True)]
    return sum(deltas)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [None, (1, 1), (3, 3)])
@pytest.mark.parametrize("kinds", [mixed, with_full])
def test_the_sum_is_the_sum_of_deltas_merged_and_bypassed(dtype, kernel, kinds):
    adapters = [adapter.to(dtype=dtype) for adapter in kinds(kernel)]
    merged, exact = merged_factors(adapters, STRENGTHS), formula(adapters, STRENGTHS)
    assert merged.rank == (1 + 2 + 3 + 4 if kinds is mixed else 1 + 2 + 2 * exact[0].numel())
    assert relative_error(merged.delta(), exact) < 1e-6
    x = torch.randn((2, INP, 5, 5) if kernel else (2, 7, INP), generator=seeded(0)).to(dtype)
    geometry = ConvGeometry(stride=(2, 2), padding=(1, 1)) if kernel else None
    want = F.conv2d(x.double(), exact, None, 2, 1) if kernel else x.double() @ exact.mT
    assert merged.residual(x, geometry).dtype == dtype
    assert relative_error(merged.residual(x, geometry), want) < TOLERANCE[dtype]
    assert relative_error(merged.residual(x, geometry), torch.ones(1)) > EFFECT


@pytest.mark.parametrize("kinds", [mixed, with_full])
def test_the_order_of_summands_does_not_matter(kinds):
    pairs = list(zip(kinds(), STRENGTHS, strict=True))
    first = merged_delta(*zip(*pairs, strict=True))
    for shuffled in itertools.permutations(pairs):
        assert relative_error(merged_delta(*zip(*shuffled, strict=True)), first) < 1e-6
    assert relative_error(merged_delta(*zip(*pairs[1:], strict=True)), first) > EFFECT


@pytest.mark.parametrize("kinds", [mixed, with_full])
def test_a_merge_can_be_merged_again(kinds):
    adapters = kinds()
    half = merged_factors(adapters[:2], STRENGTHS[:2]).as_low_rank()
    again = merged_delta([half, *adapters[2:]], [1.0, *STRENGTHS[2:]])
    assert relative_error(again, merged_delta(adapters, STRENGTHS)) < 1e-6


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_whole_weights_are_summed_in_the_room_of_one(how):
    adapters = with_full()
    concepts = [concept(name, adapter) for name, adapter in zip("abcd", adapters, strict=True)]
    merged = merge_concepts(concepts, STRENGTHS, how)["to_q"]
    exact = formula(adapters, STRENGTHS) / (1 if how == "sum" else 4)
    x = torch.randn(2, 7, INP, generator=seeded(0))
    assert merged.rank == min(OUT, INP)
    assert relative_error(merged.residual(x), x.double() @ exact.mT) < 1e-5
    assert relative_error(merged.as_low_rank().residual(x), x.double() @ exact.mT) < 1e-5
    assert relative_error(merged.delta(), torch.ones(1)) > EFFECT


@pytest.mark.parametrize("count", [1, 2, 10, 100])
def test_any_number_of_concepts_sums_exactly(count):
    adapters = [
        filled_adapter("lora", OUT, INP, RANK, 1).replace(
            lora_up=torch.randn(OUT, RANK, generator=seeded(i)),
            lora_down=torch.randn(RANK, INP, generator=seeded(i + 1000)),
        )
        for i in range(count)
    ]
    strengths = torch.rand(count, generator=seeded(0)).tolist()
    concepts = [concept(f"c{i}", adapter) for i, adapter in enumerate(adapters)]
    merged = merge_concepts(concepts, strengths)["to_q"]
    assert relative_error(merged.delta(), formula(adapters, strengths)) < 1e-6
    assert relative_error(merged.delta(), formula(adapters, [s + 0.1 for s in strengths])) > EFFECT


@pytest.mark.parametrize("how", ["sum", "mean", "block"])
@pytest.mark.parametrize("kernel", [None, (3, 3)])
def test_strength_0_is_nothing_and_1_alone_is_the_concept(how, kernel):
    concepts = trio("block", kernel)
    x = torch.randn((2, INP, 5, 5) if kernel else (2, 7, INP), generator=seeded(0))
    base = torch.randn((2, OUT, 5, 5) if kernel else (2, 7, OUT), generator=seeded(1))
    geometry = ConvGeometry(padding=(1, 1)) if kernel else None
    silent = merge_concepts(concepts, [0.0, 0.0, 0.0], how)["to_q"]
    assert torch.equal(base + silent.residual(x, geometry), base)
    assert not silent.delta().any() and silent.delta().shape == concepts[0].layers["to_q"].weight_shape
    alone = merge_concepts(concepts, [0.0, 3.0 if how == "mean" else 1.0, 0.0], how)["to_q"]
    assert relative_error(alone.delta(), concepts[1].layers["to_q"].delta()) < 1e-6
    own = concepts[1].layers["to_q"].residual(x, geometry)
    assert relative_error(alone.residual(x, geometry), own) < 1e-6
    assert not torch.equal(base + own, base)


def test_the_mean_divides_by_the_number_of_concepts():
    concepts = trio("lora") + [concept("d", filled_adapter("lora", OUT, INP, RANK, 3), layer="to_k")]
    total, mean = (merge_concepts(concepts, [1.0, 0.5, 1.0, 1.0], how) for how in ("sum", "mean"))
    for layer in ("to_q", "to_k"):
        assert relative_error(4 * mean[layer].delta(), total[layer].delta()) < 1e-6
        assert relative_error(mean[layer].delta(), total[layer].delta()) > EFFECT


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("kernel", [None, (3, 3)])
def test_blocks_stand_side_by_side_untouched(layout, kernel):
    rows = [block_rows(OUT, BLOCKS, slot, layout) for slot in range(3)]
    adapters = [new_block(OUT, INP, RANK, None, r, seeded(i), kernel) for i, r in enumerate(rows)]
    adapters = [a.replace(lora_up=torch.randn(a.lora_up.shape, generator=seeded(9))) for a in adapters]
    merged = merge_concepts([concept(str(i), a) for i, a in enumerate(adapters)], [1.0] * 3, "block")["to_q"]
    for adapter in adapters:
        assert relative_error(merged.delta()[adapter.rows], adapter.delta()[adapter.rows]) < 1e-6
    assert relative_error(merged.delta(), formula(adapters, [1.0] * 3)) < 1e-6
    x = torch.randn((2, INP, 5, 5) if kernel else (2, 7, INP), generator=seeded(0))
    geometry = ConvGeometry() if kernel else None
    assert relative_error(merged.residual(x, geometry), merged.as_low_rank().residual(x, geometry)) < 1e-5
    assert relative_error(merged.residual(x, geometry), adapters[0].residual(x, geometry)) > EFFECT


def test_literal_strengths_add_up_to_one():
    concepts = trio()
    literal = merge_concepts(concepts, [1.0, 1.0, 2.0], "block", literal=True)["to_q"]
    assert relative_error(4 * literal.delta(), formula([c.layers["to_q"] for c in concepts], [1, 1, 2])) < 1e-6
    assert not merge_concepts(concepts, [0.0] * 3, "block", literal=True)["to_q"].delta().any()
    with pytest.raises(AdapterError, match="above 0"):
        merge_concepts(concepts, [1.0, -1.0, 0.0], "block", literal=True)
    with pytest.raises(AdapterError, match="literal"):
        merge_concepts(concepts, [1.0] * 3, "sum", literal=True)


def test_moving_a_merge_keeps_it():
    for how in ("sum", "block"):
        merged = merge_concepts(trio(), [1.0] * 3, how)["to_q"]
        moved = merged.to("cpu", torch.float64)
        assert moved.delta().dtype == torch.float64
        assert relative_error(moved.delta(), merged.delta()) < 1e-6


def test_merging_leaves_the_concepts_as_they_were():
    concepts = trio("lora")
    concepts[0].layers["to_q"] = (
        concepts[0].layers["to_q"].replace(lora_up=torch.nn.Parameter(concepts[0].layers["to_q"].lora_up))
    )
    before = [c.layers["to_q"].lora_up.detach().clone() for c in concepts]
    merged = merge_concepts(concepts, [0.5] * 3)["to_q"]
    assert not merged.up.requires_grad
    merged.up.add_(1.0)
    assert all(torch.equal(c.layers["to_q"].lora_up, b) for c, b in zip(concepts, before, strict=True))


def block_concept(name, blocks, slot, **more):
    rows = block_rows(OUT, blocks, slot)
    return concept(name, new_block(OUT, INP, 2, None, rows, seeded(0)), **more)


def recipe(blocks, layout=None):
    return SimpleNamespace(blocks=blocks, layout=layout)


@pytest.mark.parametrize(
    ("concepts", "strengths", "how", "message"),
    [
        ([], [], "sum", "nothing to merge"),
        (trio(), [1.0], "sum", "1 strengths for 3 concepts"),
        (trio(), [1.0, float("nan"), 1.0], "sum", "b: strength is nan"),
        (trio(), [1.0] * 3, "median", "choose one of sum, mean, average, block"),
        (trio("lora"), [1.0] * 3, "block", "^a is not a block adapter"),
        ([block_concept("a", 4, 1), block_concept("b", 4, 1)], [1, 1], "block", "^a and b .*same block slot.*to_q"),
        ([block_concept("a", 4, 1), block_concept("b", 3, 1)], [1, 1], "block", "^a and b both write 4"),
        (
            [block_concept("a", 4, 0, recipe=recipe(4)), block_concept("b", 8, 7, recipe=recipe(8))],
            [1, 1],
            "block",
            "a was trained with 4 contiguous blocks but b was trained with 8",
        ),
        (
            [trio("lora")[0], concept("big", filled_adapter("lora", OUT, INP + 1, RANK))],
            [1, 1],
            "sum",
            r"to_q: a is for a weight of shape \(24, 64\), big for \(24, 65\)",
        ),
        (
            [concept("a", filled_adapter("lora", OUT, INP, RANK).replace(lora_up=torch.zeros(OUT, 7)))],
            [1],
            "sum",
            "a, to_q: lora_up has rank 7",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_in_words(concepts, strengths, how, message):
    with pytest.raises(AdapterError, match=message):
        merge_concepts(concepts, strengths, how)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("kind", ["lora", "block"])
def test_a_changed_strength_shares_the_factors_and_moves_a_small_diagonal(kind, kernel):
    adapters = [filled_adapter(kind, 12, 8, 3, slot, kernel=kernel).to(dtype=torch.float64) for slot in range(2)]
    quiet, loud = (MergedSum(tuple(adapters), strengths) for strengths in ((0.7, -0.3), (0.7, 2.0)))
    conv = ConvGeometry(padding=(1, 1)) if kernel else None
    x = torch.randn(2, 8, 5, 5, generator=seeded(1)) if kernel else torch.randn(2, 5, 8, generator=seeded(1))
    for merged in (quiet, loud):
        for dtype in (torch.float64, torch.float32):
            wanted = merged.joined.residual(x.to(dtype), conv)
            assert relative_error(merged.residual(x.to(dtype), conv), wanted) < (
                1e-13 if dtype is torch.float64 else 1e-5
            )
    assert quiet.shared is loud.shared
    assert MergedSum(tuple(adapters[:1]), (1.0,)).shared is not quiet.shared
    assert relative_error(quiet.residual(x.double(), conv), loud.residual(x.double(), conv)) > EFFECT
    silent = MergedSum(tuple(adapters), (0.0, 0.0)).residual(x.double(), conv)
    assert torch.equal(silent, torch.zeros_like(silent))
