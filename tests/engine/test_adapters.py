"""Promise: merged = bypass = float64 formula, for every kind of adapter and layer."""

import pytest
import torch
import torch.nn.functional as F
from laws import BLOCKS, EFFECT, TOLERANCE, filled_adapter, relative_error, seeded
from torch import nn

from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.adapters.low_rank import (
    KINDS,
    LAYOUTS,
    ConvGeometry,
    block_rows,
    check_adapter,
    erasure_mask,
    new_block,
    new_lora,
    new_orthogonal,
)
from modular_concepts.errors import AdapterError

OUT, INP, RANK = 24, 16, 3
STRENGTHS = (-1.0, 0.3, 1.0, 2.0)
CONVS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": "same"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(4,), (2, 4), (2, 3, 4)])
def test_linear_merged_equals_bypass_equals_formula(dtype, kind, leading):
    generator = seeded(0)
    weight = torch.randn(OUT, INP, generator=generator).to(dtype)
    x = torch.randn(*leading, INP, generator=generator).to(dtype)
    adapter = filled_adapter(kind, OUT, INP, RANK, slot=1).to(dtype=dtype)
    formula = adapter.scale * adapter.full_up().double() @ adapter.lora_down.double()
    for strength in STRENGTHS:
        exact = x.double() @ (weight.double() + strength * formula).mT
        merged = F.linear(x, (weight.float() + strength * adapter.delta()).to(dtype))
        bypass = F.linear(x, weight) + strength * adapter.residual(x)
        assert bypass.dtype == dtype
        assert relative_error(merged, exact) < TOLERANCE[dtype]
        assert relative_error(bypass, exact) < TOLERANCE[dtype]
        assert relative_error(bypass, F.linear(x, weight)) > EFFECT


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", CONVS)
def test_conv_merged_equals_bypass_equals_formula(dtype, kind, conv):
    generator, layer = seeded(0), nn.Conv2d(INP, OUT, bias=False, **CONVS[conv])
    weight = torch.randn(layer.weight.shape, generator=generator).to(dtype)
    x = torch.randn(2, INP, 6, 8, generator=generator).to(dtype)
    kernel, inp = layer.kernel_size, INP // layer.groups
    adapter = filled_adapter(kind, OUT, inp, RANK, slot=1, kernel=kernel).to(dtype=dtype)
    geometry = ConvGeometry.of(layer)

    def convolved(x, weight):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    formula = torch.einsum("or,rihw->oihw", adapter.full_up().double(), adapter.lora_down.double())
    for strength in STRENGTHS:
        exact = convolved(x.double(), weight.double() + strength * adapter.scale * formula)
        merged = convolved(x, (weight.float() + strength * adapter.delta()).to(dtype))
        bypass = convolved(x, weight) + strength * adapter.residual(x, geometry)
        assert relative_error(merged, exact) < TOLERANCE[dtype]
        assert relative_error(bypass, exact) < TOLERANCE[dtype]
        assert relative_error(bypass, convolved(x, weight)) > EFFECT


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_and_a_new_adapter_leave_the_base_alone(kind):
    x, base = torch.randn(2, 5, INP, generator=seeded(1)), torch.randn(2, 5, OUT, generator=seeded(2))
    adapter = filled_adapter(kind, OUT, INP, RANK)
    fresh = adapter.replace(lora_up=torch.zeros_like(adapter.lora_up))
    assert torch.equal(base + 0 * adapter.residual(x), base)
    assert torch.equal(base + fresh.residual(x), base)
    assert not torch.equal(base + adapter.residual(x), base)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_what_is_trainable_and_nothing_else(kind):
    adapter = filled_adapter(kind, OUT, INP, RANK)
    frozen = kind in ("orthogonal", "block_orthogonal", "full")
    assert set(adapter.trainable()) == ({"lora_up"} if frozen else {"lora_up", "lora_down"})
    learned = adapter.replace(**{name: nn.Parameter(t.clone()) for name, t in adapter.trainable().items()})
    x = torch.randn(8, INP, generator=seeded(3))
    learned.residual(x).square().sum().backward()
    with torch.no_grad():
        for factor in (factor for factor in (learned.lora_up, learned.lora_down) if factor.grad is not None):
            factor.sub_(0.1 * factor.grad)
    assert torch.equal(learned.lora_down, adapter.lora_down) == frozen
    assert not torch.equal(learned.lora_up, adapter.lora_up)
    if adapter.rows is not None:
        outside = torch.ones(OUT, dtype=torch.bool)
        outside[adapter.rows] = False
        assert not learned.delta()[outside].any()
        assert learned.delta()[~outside].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [None, (3, 3)])
def test_gradients_are_those_of_the_formula(kind, kernel):
    adapter = filled_adapter(kind, 8, 3, 2, kernel=kernel).to(dtype=torch.float64)
    geometry = ConvGeometry(padding=(1, 1)) if kernel else None
    x = torch.randn((2, 3, 4, 4) if kernel else (2, 4, 3), dtype=torch.float64, generator=seeded(0))

    def residual(x, **factors):
        return adapter.replace(**factors).residual(x, geometry)

    names = list(adapter.trainable())
    inputs = [t.clone().requires_grad_() for t in (x, *adapter.trainable().values())]
    assert torch.autograd.gradcheck(lambda x, *f: residual(x, **dict(zip(names, f, strict=True))), inputs)


@pytest.mark.parametrize("kernel", [None, (3, 3)])
def test_erased_rows_are_silent_and_the_others_as_before(kernel):
    adapter = filled_adapter("block", OUT, INP, RANK, slot=2, kernel=kernel)
    geometry = ConvGeometry(padding=(1, 1)) if kernel else None
    x = torch.randn((2, INP, 4, 4) if kernel else (2, 5, INP), generator=seeded(0))
    mask = torch.tensor([1.0, 0, 1, 0, 1, 1])
    dim = 1 if kernel else -1
    erased = adapter.residual(x, geometry, mask).index_select(dim, adapter.rows).movedim(dim, 0)
    whole = adapter.residual(x, geometry).index_select(dim, adapter.rows).movedim(dim, 0)
    assert torch.equal(erased[mask == 1], whole[mask == 1])
    assert not erased[mask == 0].any()
    assert whole[mask == 0].any()


def test_erasure_keeps_each_row_with_probability_one_minus_lambda():
    mask = erasure_mask(20_000, 0.2, seeded(0))
    assert set(mask.tolist()) == {0.0, 1.0}
    assert abs(mask.mean().item() - 0.8) < 0.01
    assert torch.equal(mask, erasure_mask(20_000, 0.2, seeded(0)))
    assert erasure_mask(100, 0.0, seeded(0)).all()
    for probability in (1.0, -0.1, float("nan")):
        with pytest.raises(AdapterError, match="erasure probability"):
            erasure_mask(4, probability, seeded(0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("out", "blocks"), [(320, 15), (16, 16), (7, 3), (5, 1)])
def test_blocks_are_disjoint_and_cover_every_row(out, blocks, layout):
    rows = [block_rows(out, blocks, slot, layout) for slot in range(blocks)]
    assert sorted(torch.cat(rows).tolist()) == list(range(out))
    assert {len(r) for r in rows} <= {out // blocks, -(-out // blocks)}


def test_blocks_that_do_not_exist_are_refused():
    with pytest.raises(AdapterError, match="slots 0 to 14"):
        block_rows(320, 15, 15)
    with pytest.raises(AdapterError, match="between 1 and 8 blocks"):
        block_rows(8, 9, 0)
    with pytest.raises(AdapterError, match="contiguous, strided"):
        block_rows(8, 2, 0, "diagonal")


@pytest.mark.parametrize("kind", KINDS)
def test_default_alpha_is_the_rank(kind):
    adapter = new_lora(OUT, INP, RANK, None, seeded(0))
    assert adapter.scale == 1.0 and filled_adapter(kind, OUT, INP, RANK).scale == 2.0
    assert adapter.lora_down.abs().max() <= INP**-0.5 and adapter.lora_down.std() > 0.4 * INP**-0.5


def test_what_cannot_be_built_is_refused():
    with pytest.raises(AdapterError, match="rank is 0"):
        new_lora(OUT, INP, 0, None, seeded(0))
    with pytest.raises(AdapterError, match="2 basis columns"):
        new_orthogonal(OUT, INP, RANK, None, OrthogonalBasis(), [0, 1])
    with pytest.raises(AdapterError, match="zero padding"):
        ConvGeometry.of(nn.Conv2d(4, 4, 3, padding_mode="reflect"))
    with pytest.raises(AdapterError, match="geometry"):
        filled_adapter("lora", OUT, INP, RANK, kernel=(3, 3)).residual(torch.zeros(1, INP, 4, 4))


BLOCK = new_block(OUT, INP, RANK, None, block_rows(OUT, BLOCKS, 0), seeded(0))
PLAIN = new_lora(OUT, INP, RANK, None, seeded(0))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (PLAIN.replace(kind="loha"), "unknown"),
        (PLAIN.replace(lora_up=torch.zeros(OUT, 4)), "lora_up has rank 4 but lora_down has rank 3"),
        (PLAIN.replace(lora_up=torch.zeros(OUT)), "1 and lora_down 2 dimensions"),
        (PLAIN.replace(lora_down=torch.zeros(RANK, 0)), "empty"),
        (PLAIN.replace(alpha=float("inf")), "finite"),
        (PLAIN.replace(out_features=9), "expected 9"),
        (PLAIN.replace(kind="block"), "lacks block rows"),
        (BLOCK.replace(kind="lora"), "has block rows"),
        (BLOCK.replace(rows=torch.tensor([0, 1, 2, 3, 4, 24])), "outside"),
        (BLOCK.replace(rows=torch.tensor([0, 1, 2, 3, 4, 4])), "twice"),
        (BLOCK.replace(rows=torch.zeros(6)), "whole numbers"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(adapter, message):
    with pytest.raises(AdapterError, match=f"to_q: .*{message}"):
        check_adapter("to_q", adapter)


def test_a_sound_adapter_passes_and_must_fit_the_model():
    check_adapter("to_q", BLOCK, (OUT, INP))
    with pytest.raises(AdapterError, match=r"\(24, 16\), the model has \(24, 17\)"):
        check_adapter("to_q", PLAIN, (OUT, 17))
