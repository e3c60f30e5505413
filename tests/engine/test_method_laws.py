"""Promises 3, 5, 6 and 7 for every merge method: the formula, merged and bypassed, on layers of every kind and size."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from laws import EFFECT, TOLERANCE, relative_error, seeded

from modular_concepts.adapters.basis import OrthogonalBasis, slot_indices
from modular_concepts.adapters.low_rank import (
    KINDS,
    ConvGeometry,
    block_rows,
    new_block,
    new_block_orthogonal,
    new_full,
    new_lora,
    new_orthogonal,
)
from modular_concepts.concept import Concept, Recipe
from modular_concepts.crosstalk.measures import sign_conflicts
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.lora import import_lora
from modular_concepts.merging import METHOD_HELP, Evidence, MergeOptions, merge_concepts
from modular_concepts.merging.custom_diffusion import RIDGE
from modular_concepts.seeds import seeded as seeded_by

STRENGTHS = [-1.0, 0.3, 1.0, 2.0]
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
OPTIONS = MergeOptions(density=0.4, rank=5, seed=3, ridge=0.05)
BASIS = OrthogonalBasis(seed=5)
BLOCK_KINDS = ("block", "block_orthogonal")
# Drawn from a seed, so that they are like nothing in particular: (out, in, kernel).
SHAPES = [
    (*torch.randint(8, 14 if kernel else 72, (2,), generator=seeded(7 + n)).tolist(), kernel)
    for n, kernel in enumerate((None, (1, 1), (3, 3)))
]
SHAPES += [(8, 130, None), (130, 9, None)]


def adapter(kind, out, inp, rank, slot, count=4, kernel=None):
    """One of `count` concepts' adapters as training leaves it: ranks may differ, rows and columns do not meet."""
    generator, width = seeded(slot), inp * (kernel[0] * kernel[1] if kernel else 1)
    rows = block_rows(out, count, slot) if kind in BLOCK_KINDS else None
    columns = slot_indices(width, rank, slot) if "orthogonal" in kind else None
    made = {
        "lora": lambda: new_lora(out, inp, rank, 2.0 * rank, generator, kernel),
        "orthogonal": lambda: new_orthogonal(out, inp, rank, 2.0 * rank, BASIS, columns, kernel),
        "block": lambda: new_block(out, inp, rank, 2.0 * rank, rows, generator, kernel),
        "block_orthogonal": lambda: new_block_orthogonal(out, inp, 2.0 * rank, rows, BASIS, columns, kernel),
        "full": lambda: new_full(out, inp, kernel),
    }[kind]()
    return made.replace(lora_up=torch.randn(made.lora_up.shape, generator=generator))


def concepts_of(kind, shape, count=4, layer=LAYER):
    out, inp, kernel = shape
    rank = 2 if "orthogonal" in kind else 3
    return [
        SimpleNamespace(name=f"c{slot}", layers={layer: adapter(kind, out, inp, rank, slot, count, kernel)})
        for slot in range(count)
    ]


def evidence_for(concepts, rows=2, layer=LAYER):
    """Moments of inputs that vary unevenly, text features of every concept, and ordinary text."""
    width = concepts[0].layers[layer].lora_down[0].numel()
    moments, texts = [], []
    for number in range(len(concepts) + 1):
        mixing = torch.randn(width, width, generator=seeded(50 + number), dtype=torch.float64) / width**0.5
        inputs = torch.randn(3 * width, width, generator=seeded(90 + number), dtype=torch.float64) @ mixing
        moments.append(inputs.mT @ inputs / len(inputs))
        texts.append(torch.randn(rows, width, generator=seeded(70 + number), dtype=torch.float64))
    return Evidence([{layer: gram} for gram in moments[1:]], texts[1:], moments[0])


def damped(gram, ridge):
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def by_hand(how, concepts, strengths, evidence, options=OPTIONS):
    """The method as float64 arithmetic on whole deltas, (out, n), written without our helpers."""
    found = [next(iter(concept.layers.values())).to(dtype=torch.float64).delta().flatten(1) for concept in concepts]
    scaled = [s * d for s, d in zip(strengths, found, strict=True)]
    if how in ("sum", "block"):
        return sum(scaled)
    if how == "mean":
        return sum(scaled) / len(scaled)
    if how == "average":
        return sum(scaled) / sum(strengths)
    if how == "fusion":
        grams = [next(iter(known.values())) for known in evidence.moments]
        grams = [damped(gram, options.ridge) for gram in grams]
        return sum(d @ gram for d, gram in zip(scaled, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    if how == "custom_diffusion":
        rows, gram = torch.cat(list(evidence.texts)), damped(evidence.usual, RIDGE)
        wanted = torch.cat([own @ d.mT for d, own in zip(scaled, evidence.texts, strict=True)])
        read = rows @ torch.linalg.inv(gram)
        return wanted.mT @ torch.linalg.inv(damped(read @ rows.mT, 1e-6)) @ read
    if how == "svd":
        u, values, v = torch.linalg.svd(sum(scaled), full_matrices=False)
        return (u[:, : options.rank] * values[: options.rank]) @ v[: options.rank]
    if how == "dare":
        draws = [torch.rand(d.shape, generator=seeded_by(options.seed, "dare", c.name, LAYER)) for c, d in
                 zip(concepts, found, strict=True)]  # fmt: skip
        return sum(d * (draw < options.density) for d, draw in zip(scaled, draws, strict=True)) / options.density
    if how not in ("magnitude", "ties"):
        raise NotImplementedError(f"write the formula of {how} here, in float64")
    kept = []
    for delta, strength in zip(found, strengths, strict=True):
        smallest = (
            delta.abs().flatten().sort(descending=True).values[max(1, round(options.density * delta.numel())) - 1]
        )
        kept.append(strength * delta * (delta.abs() >= smallest))
    if how == "magnitude":
        return sum(kept)
    kept = torch.stack(kept)
    agreeing = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    return (kept * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


CASES = [
    (how, kind, shape)
    for how in METHOD_HELP
    for kind in (BLOCK_KINDS if how == "block" else KINDS)
    for shape in SHAPES
    # Custom Diffusion's own formula is for layers that read text, which are linear; others are summed.
    if not (how == "custom_diffusion" and (shape[2] or shape[1] < 8))
]


@pytest.mark.parametrize(("how", "kind", "shape"), CASES)
def test_merged_and_bypassed_are_the_formula_in_float64(how, kind, shape):
    concepts = concepts_of(kind, shape)
    evidence, (_, inp, kernel) = evidence_for(concepts), shape
    merged = merge_concepts(concepts, STRENGTHS, how, options=OPTIONS, evidence=evidence)[LAYER]
    wanted = by_hand(how, concepts, STRENGTHS, evidence)
    assert relative_error(merged.delta().flatten(1), wanted) < 1e-5
    base = torch.randn(merged.delta().shape, generator=seeded(1))
    weight, geometry = base.double() + wanted.reshape(base.shape), ConvGeometry(padding=(1, 1)) if kernel else None
    for dims, (dtype, tolerance) in enumerate(TOLERANCE.items()):
        x = torch.randn((2, inp, 6, 6) if kernel else (2, 3, 4)[: dims + 1] + (inp,), generator=seeded(2)).to(dtype)
        apply = (lambda w, x=x: F.conv2d(x.double(), w, None, 1, 1)) if kernel else (lambda w, x=x: x.double() @ w.mT)
        plain = apply(base.double())
        assert relative_error(plain + merged.residual(x, geometry).double(), apply(weight)) < tolerance
        assert relative_error(plain, apply(weight)) > EFFECT


@pytest.mark.parametrize("how", METHOD_HELP)
def test_the_order_of_concepts_does_not_matter(how):
    concepts, pairs = concepts_of("block" if how == "block" else "lora", (24, 40, None)), range(4)
    evidence = evidence_for(concepts)
    first = merge_concepts(concepts, STRENGTHS, how, options=OPTIONS, evidence=evidence)[LAYER].delta()
    for order in (pairs[::-1], [1, 3, 0, 2]):
        again = merge_concepts(
            [concepts[i] for i in order],
            [STRENGTHS[i] for i in order],
            how,
            options=OPTIONS,
            evidence=Evidence([evidence.moments[i] for i in order], [evidence.texts[i] for i in order], evidence.usual),
        )[LAYER]
        assert relative_error(again.delta(), first) < 1e-6
    others = merge_concepts(concepts, STRENGTHS[::-1], how, options=OPTIONS, evidence=evidence)[LAYER]
    assert relative_error(others.delta(), first) > EFFECT


@pytest.mark.parametrize("how", METHOD_HELP)
@pytest.mark.parametrize("kernel", [None, (3, 3)])
def test_strength_0_leaves_weights_bit_for_bit_and_1_alone_is_the_concept(how, kernel):
    """Methods that drop or cut are asked to drop nothing; Custom Diffusion promises it for the concept's words."""
    layer = "unet.conv_in" if kernel else LAYER
    concepts = concepts_of("block" if how == "block" else "lora", (24, 16, kernel), layer=layer)[:1]
    options = MergeOptions(density=1.0, rank=1000, ridge=1e-12)
    own, evidence = concepts[0].layers[layer].delta(), evidence_for(concepts, layer=layer)
    silent = merge_concepts(concepts, [0.0], how, options=options, evidence=evidence)[layer]
    base = torch.randn(own.shape, generator=seeded(3))
    assert torch.equal(silent.add_to(base.clone()), base)
    alone = merge_concepts(concepts, [1.0], how, options=options, evidence=evidence)[layer].delta()
    assert relative_error(base + own, base) > EFFECT
    if how == "custom_diffusion" and not kernel:
        words = evidence.texts[0].float()
        assert relative_error(words @ alone.mT, words @ own.mT) < 1e-4
    else:
        assert relative_error(alone, own) < 1e-5


@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize("how", METHOD_HELP)
def test_any_number_of_concepts(how, count):
    concepts = concepts_of("block" if how == "block" else "lora", (104, 112, None), count)
    strengths = (torch.rand(count, generator=seeded(0)) + 0.5).tolist()
    evidence = evidence_for(concepts, rows=1)
    merged = merge_concepts(concepts, strengths, how, options=OPTIONS, evidence=evidence)[LAYER].delta()
    assert relative_error(merged, by_hand(how, concepts, strengths, evidence)) < 1e-5


@pytest.mark.parametrize("how", METHOD_HELP)
@pytest.mark.parametrize("kernel", [None, (3, 3)])
def test_an_exported_merge_is_the_merge(how, kernel, tmp_path):
    """As one plain LoRA: merged again, and read back from files for other programs."""
    layer = "unet.mid_block.resnets.0.conv1" if kernel else LAYER
    concepts = concepts_of("block" if how == "block" else "lora", (24, 16, kernel), layer=layer)
    evidence = evidence_for(concepts, layer=layer)
    merged = merge_concepts(concepts, STRENGTHS, how, options=OPTIONS, evidence=evidence)[layer]
    one = Concept("one", {layer: merged.as_low_rank()}, {}, Recipe("lora", merged.rank, float(merged.rank)))
    again = merge_concepts([one], [1.0])[layer]
    assert relative_error(again.delta(), merged.delta()) < 1e-6
    for export in (export_kohya, export_diffusers):
        back, unmatched = import_lora(export(one, tmp_path / "pytorch_lora_weights.safetensors"))
        assert unmatched == [] and list(back.layers) == [layer]
        assert relative_error(back.layers[layer].delta(), merged.delta()) < 1e-6


@pytest.mark.parametrize("shape", [(24, 40, None), (24, 8, (3, 3))])
@pytest.mark.parametrize(("how", "shares"), [("sum", 1.0), ("mean", 0.25), ("average", 1 / 2.3)])
def test_sums_have_each_orthogonal_concept_in_its_own_directions_untouched(how, shares, shape):
    concepts = concepts_of("orthogonal", shape)
    whole = merge_concepts(concepts, STRENGTHS, how)[LAYER].delta().double().flatten(1)
    for concept, strength in zip(concepts, STRENGTHS, strict=True):
        own = concept.layers[LAYER]
        rows = own.lora_down.double().flatten(1)
        wanted = shares * strength * own.delta().double().flatten(1)
        assert relative_error(whole @ rows.mT @ rows, wanted) < 1e-6
    assert relative_error(whole, shares * concepts[0].layers[LAYER].delta().double().flatten(1)) > EFFECT


@pytest.mark.parametrize("how", ["magnitude", "dare", "ties", "svd"])
def test_methods_that_say_so_do_destroy_orthogonality(how):
    assert "orthogonal" in METHOD_HELP[how]
    concepts = concepts_of("orthogonal", (48, 64, None))
    whole = merge_concepts(concepts, [1.0] * 4, how, options=replace(OPTIONS, rank=2))[LAYER].delta().double()
    off = []
    for concept in concepts:
        own = concept.layers[LAYER]
        rows = own.lora_down.double()
        off.append(relative_error(whole @ rows.mT @ rows, own.delta()))
    assert min(off) > 0.05


@pytest.mark.parametrize("kernel", [None, (3, 3)])
def test_blocks_have_each_concept_in_its_own_rows_untouched(kernel):
    for kind in BLOCK_KINDS:
        concepts = concepts_of(kind, (26, 16, kernel))
        whole = merge_concepts(concepts, STRENGTHS, "block")[LAYER].delta()
        for number, (concept, strength) in enumerate(zip(concepts, STRENGTHS, strict=True)):
            own = concept.layers[LAYER]
            assert relative_error(whole[own.rows], strength * own.delta()[own.rows]) < 1e-6
            assert all(sign_conflicts(own, other.layers[LAYER]) == 0 for other in concepts[:number])
