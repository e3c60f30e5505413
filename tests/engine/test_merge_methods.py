"""Promise: every merge method is its formula, whatever the layer's size and kind, and says what it costs."""

from types import SimpleNamespace

import pytest
import torch
from laws import EFFECT, filled_adapter, relative_error, seeded

from bench.descent import fused_by_descent
from modular_concepts.adapters.low_rank import KINDS, ConvGeometry
from modular_concepts.concept import Concept, Recipe, check_concept
from modular_concepts.crosstalk.measures import crosstalk
from modular_concepts.errors import AdapterError
from modular_concepts.merging import METHOD_HELP, Evidence, MergeOptions, add_concepts, merge_concepts, merged_factors
from modular_concepts.merging.dense import MergedDense
from modular_concepts.merging.fusion import EXACT, RIDGE, fused_factors
from modular_concepts.merging.method import LayerStack, Method
from modular_concepts.merging.methods import METHODS
from modular_concepts.merging.moments import Moment
from modular_concepts.merging.orthogonalize import orthogonal_concepts, orthogonalised
from modular_concepts.merging.sparse import trimmed
from modular_concepts.merging.truncation import share_kept, truncated

OUT, INP, RANK = 24, 64, 3
STRENGTHS = [0.6, 1.0, -0.5]
SHAPES = [(OUT, INP, None), (OUT, INP, (1, 1)), (OUT, 8, (3, 3)), (64, 24, None)]
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def trio(kind="lora", out=OUT, inp=INP, kernel=None, layer=LAYER):
    adapters = [filled_adapter(kind, out, inp, RANK, slot, kernel) for slot in range(3)]
    return [SimpleNamespace(name=name, layers={layer: adapter}) for name, adapter in zip("abc", adapters, strict=True)]


def deltas(concepts):
    return [next(iter(concept.layers.values())).delta().double() for concept in concepts]


def moment(width, seed, rows=400):
    """Inputs that vary more in some directions than in others, and their second moments."""
    generator = seeded(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    inputs = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing
    return inputs, inputs.mT @ inputs / rows


def by_hand(how, concepts, options, evidence):
    """Each method as plain float64 arithmetic on whole deltas, written without our helpers."""
    found = [s * d for s, d in zip(STRENGTHS, deltas(concepts), strict=True)]
    flat = torch.stack(found).flatten(2) if found[0].dim() > 2 else torch.stack(found)
    if how in ("sum", "block"):
        return flat.sum(0)
    if how == "mean":
        return flat.sum(0) / 3
    if how == "average":
        return flat.sum(0) / sum(STRENGTHS)
    if how == "fusion":
        grams = [known[LAYER] for known in evidence.moments]
        damped = [g + options.ridge * g.diagonal().mean() * torch.eye(len(g), dtype=torch.float64) for g in grams]
        return sum(d.flatten(1) @ g for d, g in zip(flat, damped, strict=True)) @ torch.linalg.inv(sum(damped))
    if how == "svd":
        u, values, v = torch.linalg.svd(flat.sum(0))
        return (u[:, : options.rank] * values[: options.rank]) @ v[: options.rank]
    if how not in ("magnitude", "ties"):
        raise NotImplementedError(f"write the formula of {how} here, in float64")
    kept = []
    for delta in flat:
        count = round(options.density * delta.numel())
        smallest = delta.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(delta * (delta.abs() >= smallest))
    kept = torch.stack(kept)
    if how == "magnitude":
        return kept.sum(0)
    sign = kept.sum(0).sign()
    agreeing = kept.sign() == sign
    return (kept * agreeing).sum(0) / (agreeing & (kept != 0)).sum(0).clamp(min=1)


@pytest.mark.parametrize(("out", "inp", "kernel"), SHAPES)
@pytest.mark.parametrize("how", [name for name in METHOD_HELP if name not in ("dare", "custom_diffusion")])
def test_a_method_is_its_formula(how, out, inp, kernel):
    concepts = trio("block" if how == "block" else "lora", out, inp, kernel)
    width = inp * (kernel[0] * kernel[1] if kernel else 1)
    options = MergeOptions(density=0.3, rank=4)
    evidence = Evidence([{LAYER: moment(width, seed)[1]} for seed in range(3)])
    merged = merge_concepts(concepts, STRENGTHS, how, options=options, evidence=evidence)[LAYER]
    wanted = by_hand(how, concepts, options, evidence)
    assert merged.delta().shape == deltas(concepts)[0].shape
    assert relative_error(merged.delta().flatten(1), wanted) < 1e-5
    assert relative_error(merged.as_low_rank().delta().flatten(1), wanted) < 1e-5
    x = torch.randn((2, inp, 5, 5) if kernel else (2, 7, inp), generator=seeded(9), dtype=torch.float64)
    geometry = ConvGeometry(padding=(1, 1)) if kernel else None
    weight = wanted.reshape(merged.delta().shape)
    plain = torch.nn.functional.conv2d(x, weight, None, 1, 1) if kernel else x @ weight.mT
    assert relative_error(merged.residual(x, geometry), plain) < 1e-5
    assert plain.norm() > EFFECT
    if how not in ("sum", "block"):
        plain_sum = merge_concepts(concepts, STRENGTHS, "block" if how == "block" else "sum")[LAYER].delta()
        assert relative_error(merged.delta(), plain_sum) > EFFECT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "inp", "kernel"), SHAPES)
@pytest.mark.parametrize("how", ["sum", "block", "ties", "svd"])
def test_adding_to_a_weight_in_place_is_adding_the_delta(how, out, inp, kernel, dtype):
    merged = merge_concepts(trio("block" if how == "block" else "lora", out, inp, kernel), STRENGTHS, how)[LAYER]
    base = torch.randn(merged.delta().shape, generator=seeded(4)).to(dtype)
    for strength in (1.0, -0.4):
        weight = base.clone()
        wanted = base.double() + strength * merged.delta().double()
        assert merged.add_to(weight, strength) is weight
        assert relative_error(weight, wanted) < {torch.bfloat16: 1e-2}.get(dtype, 1e-6)
        assert relative_error(weight, base) > EFFECT
        turned = base.transpose(0, 1).contiguous().transpose(0, 1)
        assert not turned.is_contiguous()
        assert relative_error(merged.add_to(turned, strength), weight) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("rows", [[3, 4, 5], [1, 5, 9], [7], [9, 2, 4], [0, 1, 3], [5, 4, 3]])
def test_only_a_blocks_own_rows_are_touched_in_whatever_order_they_are(rows):
    adapter = filled_adapter("block", OUT, INP, RANK).replace(lora_up=torch.randn(len(rows), RANK, generator=seeded(1)))
    adapter = adapter.replace(rows=torch.tensor(rows))
    base = torch.randn(OUT, INP, generator=seeded(2))
    found = merged_factors([adapter], [0.7]).add_to(base.clone())
    assert relative_error(found, base + 0.7 * adapter.delta()) < 1e-6
    others = [row for row in range(OUT) if row not in rows]
    assert torch.equal(found[others], base[others]) and not torch.isclose(found[rows], base[rows]).all(1).any()


def test_concepts_are_added_to_weights_that_are_ours_to_change():
    concepts = trio()
    weights = {LAYER: torch.randn(OUT, INP, generator=seeded(2)), "other": torch.zeros(1)}
    base, place = weights[LAYER].clone(), weights[LAYER].data_ptr()
    add_concepts(weights, concepts, STRENGTHS)
    assert relative_error(weights[LAYER], base + merge_concepts(concepts, STRENGTHS)[LAYER].delta()) < 1e-6
    assert weights[LAYER].data_ptr() == place and not weights["other"].any()


def test_concepts_of_strength_zero_leave_a_weight_bit_for_bit():
    base = torch.randn(OUT, INP, generator=seeded(2))
    for how in ("sum", "mean", "magnitude", "dare", "ties", "svd"):
        merged = merge_concepts(trio(), [0.0] * 3, how)[LAYER]
        assert torch.equal(merged.add_to(base.clone()), base), how


def test_dare_keeps_the_mean_follows_its_seed_and_leaves_the_global_generator_alone():
    (concept,) = trio()[:1]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    drawn = [
        merge_concepts([concept], [1.0], "dare", options=MergeOptions(density=0.4, seed=seed))[LAYER].delta()
        for seed in range(300)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    again = merge_concepts([concept], [1.0], "dare", options=MergeOptions(density=0.4, seed=7))[LAYER].delta()
    assert torch.equal(again, drawn[7]) and not torch.equal(drawn[7], drawn[8])
    (whole,) = deltas([concept])
    kept = (drawn[0] != 0).float().mean().item()
    assert 0.33 < kept < 0.47
    assert torch.allclose(drawn[0][drawn[0] != 0].double(), whole[drawn[0] != 0] / 0.4)
    assert relative_error(torch.stack(drawn).mean(0), whole) < 0.1


@pytest.mark.parametrize("how", ["magnitude", "ties", "dare"])
def test_density_one_drops_nothing(how):
    (concept,) = trio()[:1]
    merged = merge_concepts([concept], [0.7], how, options=MergeOptions(density=1.0))[LAYER]
    assert relative_error(merged.delta(), 0.7 * deltas([concept])[0]) < 1e-6


def test_trimming_keeps_the_largest():
    values = torch.arange(1.0, 11.0) * torch.tensor([1.0, -1.0]).repeat(5)
    assert trimmed(values, 0.3).nonzero().flatten().tolist() == [7, 8, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_fusion_is_what_the_papers_descent_arrives_at(kind):
    concepts = trio(kind)
    inputs, grams = zip(*(moment(INP, seed) for seed in range(3)), strict=True)
    adapters = [concept.layers[LAYER] for concept in concepts]
    fused = fused_factors(adapters, STRENGTHS, grams, ridge=1e-9).delta()
    targets = [s * d for s, d in zip(STRENGTHS, deltas(concepts), strict=True)]
    descended = fused_by_descent(targets, inputs)
    assert relative_error(descended, fused) < 1e-3

    def residual(delta):
        return sum(((x @ (delta.double() - t).mT) ** 2).sum() for x, t in zip(inputs, targets, strict=True))

    assert residual(fused) <= residual(descended) * 1.0001
    assert residual(fused) < 0.9 * residual(merged_factors(adapters, STRENGTHS).delta())


@pytest.mark.parametrize("directions", [6, 30])
def test_fusion_by_directions_is_fusion_by_whole_moments(directions):
    """6 directions of 3 concepts are fewer than the 64 inputs, 30 are more: two ways of solving."""
    kept = [Moment.of(moment(INP, seed)[1], directions) for seed in range(3)]
    adapters = [next(iter(concept.layers.values())) for concept in trio()]
    found = fused_factors(adapters, STRENGTHS, kept).delta()
    whole = fused_factors(adapters, STRENGTHS, [m.matrix() for m in kept]).delta()
    assert relative_error(found, whole) < 1e-5
    assert relative_error(found, merged_factors(adapters, STRENGTHS).delta()) > EFFECT


def objective(delta, adapters, grams):
    """sum_i |(D - delta_i) X_i|^2, float64."""
    off = [(delta.double() - adapter.delta().double(), gram) for adapter, gram in zip(adapters, grams, strict=True)]
    return float(sum(((wrong @ gram) * wrong).sum() for wrong, gram in off))


def wide_inputs(kind, width=256, rows=900):
    """Second moments of three concepts' inputs that have half of their energy in common.  kind: of the spectrum."""
    slope = {"flat": 0.0, "falling": 2.0, "steep": 5.0}[kind]
    found = []
    for seed in range(4):
        turn = torch.linalg.qr(torch.randn(width, width, generator=seeded(seed), dtype=torch.float64))[0]
        size = torch.logspace(0, -slope / 2, width, dtype=torch.float64)
        x = torch.randn(rows, width, generator=seeded(40 + seed), dtype=torch.float64) * size @ turn
        found.append(x.mT @ x / rows)
    return [0.5 * (found[0] + own) for own in found[1:]]


@pytest.mark.parametrize("ridge", [RIDGE, 1.0, EXACT])
@pytest.mark.parametrize("few", [False, True])
def test_one_concept_fused_alone_is_itself(few, ridge):
    """Among others too, where only it has the layer; and almost, where the others are answered with nothing."""
    for kind in ("flat", "steep"):
        gram = wide_inputs(kind)[0]
        adapter, silent = (filled_adapter("lora", OUT, 256, RANK, slot) for slot in range(2))
        gram = Moment.of(gram, 20) if few else gram
        alone = fused_factors([adapter], [0.7], [gram], ridge).delta()
        assert relative_error(alone, 0.7 * adapter.delta()) < 1e-6
        twice = fused_factors([adapter, adapter], [0.7, 0.7], [gram, gram], ridge).delta()
        assert relative_error(twice, 0.7 * adapter.delta()) < 1e-6
        unread = Moment(torch.zeros(1, 256), 1e-9) if few else 1e-9 * torch.eye(256, dtype=torch.float64)
        beside = fused_factors([adapter, silent], [1.0, 0.0], [gram, unread], ridge).delta()
        assert relative_error(beside, adapter.delta()) < 0.02


@pytest.mark.parametrize("kind", ["flat", "falling", "steep"])
def test_fusion_is_near_the_optimum_whatever_the_spectrum_and_exact_where_asked(kind):
    grams = wide_inputs(kind)
    adapters = [filled_adapter("lora", OUT, 256, RANK, slot) for slot in range(3)]
    ones = [1.0] * 3
    least = sum(a.delta().double() @ g for a, g in zip(adapters, grams, strict=True)) @ torch.linalg.pinv(sum(grams))
    best = objective(least, adapters, grams)
    whole = sum(objective(torch.zeros(OUT, 256), [a], [g]) for a, g in zip(adapters, grams, strict=True))
    usual, exact = (objective(fused_factors(adapters, ones, grams, r).delta(), adapters, grams) for r in (RIDGE, EXACT))
    assert exact == pytest.approx(best, rel=1e-4)
    assert best < usual * (1 + 1e-6) and usual - best < RIDGE / 4 * whole
    assert usual / best - 1 < {"flat": 0.002, "falling": 0.01, "steep": 0.05}[kind]
    summed = merged_factors(adapters, ones).delta()
    assert usual < 0.6 * objective(summed, adapters, grams)


@pytest.mark.parametrize("kind", ["flat", "falling", "steep"])
def test_as_many_directions_are_kept_as_a_spectrum_asks(kind):
    grams = wide_inputs(kind, width=512, rows=300)
    kept = [Moment.of(gram) for gram in grams]
    adapters = [filled_adapter("lora", OUT, 512, RANK, slot) for slot in range(3)]
    ones = [1.0] * 3
    whole, own, few = (
        fused_factors(adapters, ones, each).delta() for each in (grams, kept, [Moment.of(g, 128) for g in grams])
    )
    assert relative_error(own, whole) < 0.05
    assert relative_error(few, whole) > 2 * relative_error(own, whole)
    assert all(128 < len(moment.factor) < 512 for moment in kept)


def test_fusion_of_concepts_that_read_different_inputs_keeps_each_whole():
    adapters = [concept.layers[LAYER] for concept in trio()[:2]]
    halves = [torch.zeros(INP, dtype=torch.float64), torch.zeros(INP, dtype=torch.float64)]
    halves[0][: INP // 2], halves[1][INP // 2 :] = 1.0, 1.0
    fused = fused_factors(adapters, [1.0, 1.0], [torch.diag(half) for half in halves], ridge=1e-9).delta().double()
    for adapter, half in zip(adapters, halves, strict=True):
        assert relative_error(fused * half, adapter.delta().double() * half) < 1e-6


def test_custom_diffusion_answers_its_words_exactly_and_others_least():
    concepts = trio()
    generator = seeded(4)
    usual, gram = moment(INP, 8)
    texts = [torch.randn(4, INP, generator=generator, dtype=torch.float64) for _ in concepts]
    texts[1] = torch.cat([texts[1], texts[1][:1]])  # a prompt that repeats itself
    evidence = Evidence(texts=texts, usual=gram)
    merged = merge_concepts(concepts, STRENGTHS, "custom_diffusion", evidence=evidence)[LAYER].delta().double()
    plain = merge_concepts(concepts, STRENGTHS)[LAYER].delta().double()
    for delta, strength, own in zip(deltas(concepts), STRENGTHS, texts, strict=True):
        assert relative_error(own @ merged.mT, own @ (strength * delta).mT) < 1e-3
        assert relative_error(own @ plain.mT, own @ (strength * delta).mT) > EFFECT
    # Any other weight that answers the words as well moves ordinary text more.
    rows = torch.cat(texts)
    free = torch.eye(INP, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows
    for seed in range(5):
        other = merged + 0.1 * torch.randn(OUT, INP, generator=seeded(seed), dtype=torch.float64) @ free
        assert (usual @ other.mT).norm() > (usual @ merged.mT).norm()
    elsewhere = trio(layer="unet.conv_in")
    summed = merge_concepts(elsewhere, STRENGTHS, "custom_diffusion", evidence=evidence)["unet.conv_in"].delta()
    assert relative_error(summed, plain) < 1e-6


def with_ups(adapters, seed, alike=False):
    """The adapters with other lora_up's; alike: of equal length, at right angles to each other."""
    ups = torch.randn(OUT, RANK * len(adapters), generator=seeded(seed))
    ups = torch.linalg.qr(ups)[0] if alike else ups
    return [own.replace(lora_up=up.contiguous()) for own, up in zip(adapters, ups.split(RANK, dim=1), strict=True)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["orthogonal", "lora"])
def test_svd_says_what_it_loses(kind, seed):
    whole = merged_factors(with_ups([concept.layers[LAYER] for concept in trio(kind)], seed), [1.0] * 3)
    cut, share = truncated(whole, RANK)
    assert cut.rank == RANK
    lost = (whole.delta() - cut.delta()).norm().square() / whole.delta().norm().square()
    assert lost > EFFECT and share == pytest.approx(1 - lost.item(), abs=1e-5)
    energy = torch.linalg.svdvals(whole.delta().double()).square()
    assert share == pytest.approx((energy[:RANK].sum() / energy.sum()).item(), rel=1e-5)
    assert truncated(whole, 100)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(6))
def test_svd_keeps_no_more_of_an_orthogonal_sum_than_the_loudest_directions(seed):
    """In columns of their own nothing adds up: a cut keeps one of k alike, and all where they share columns."""
    adapters = [concept.layers[LAYER] for concept in trio("orthogonal")]
    spread = truncated(merged_factors(with_ups(adapters, seed), [1.0] * 3), RANK)[1]
    assert 1 / 3 < spread < 1 - EFFECT
    alike = with_ups(adapters, seed, alike=True)
    assert truncated(merged_factors(alike, [1.0] * 3), RANK)[1] == pytest.approx(1 / 3, rel=1e-5)
    shared = [own.replace(lora_down=alike[0].lora_down) for own in alike]
    assert truncated(merged_factors(shared, [1.0] * 3), RANK)[1] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("way", ["symmetric", "sequential"])
@pytest.mark.parametrize("kind", ["lora", "block"])
def test_orthogonalising_makes_crosstalk_vanish_and_says_what_it_costs(way, kind):
    concepts = trio(kind)
    before = [concept.layers[LAYER] for concept in concepts]
    result = orthogonalised([concept.layers for concept in concepts], way)
    after = [layers[LAYER] for layers in result.layers]
    for first in range(3):
        for second in range(first):
            assert crosstalk(after[first], after[second]) < 1e-6
            assert crosstalk(before[first], before[second]) > EFFECT
    for old, new, kept in zip(before, after, result.shares, strict=True):
        share = (new.delta().norm() / old.delta().norm()).square().item()
        assert kept == pytest.approx(share, rel=1e-4)
        assert 0.5 < kept <= 1.0 + 1e-6
        # A projection: what is left is the old delta on fewer directions, nothing new.
        rows = torch.linalg.qr(new.lora_down.double().mT)[0].mT
        assert relative_error(new.delta(), old.delta().double() @ rows.mT @ rows) < 1e-5
    if way == "sequential":
        assert relative_error(after[0].delta(), before[0].delta()) < 1e-5
    assert result.shares[2] < 1 - 1e-4


def test_orthogonal_concepts_pass_through_orthogonalising_unchanged():
    concepts = trio("orthogonal")
    result = orthogonalised([concept.layers for concept in concepts])
    for concept, layers, kept in zip(concepts, result.layers, result.shares, strict=True):
        assert kept == pytest.approx(1.0)
        assert relative_error(layers[LAYER].delta(), concept.layers[LAYER].delta()) < 1e-5


def test_a_concept_made_orthogonal_no_longer_names_its_basis():
    recipe = Recipe("orthogonal", RANK, 1.0, basis="b", basis_kind="qr", basis_seed=1, slot=2, slot_policy="slot")
    given = [Concept(c.name, c.layers, {}, recipe) for c in trio()]
    concepts, kept = orthogonal_concepts(given)
    assert kept == orthogonalised([c.layers for c in given]).shares and 0 < min(kept) < 1
    for old, new in zip(given, concepts, strict=True):
        assert (new.name, new.recipe.method, new.recipe.basis, new.recipe.slot) == (old.name, "lora", None, None)
        check_concept(new)


@pytest.mark.parametrize("kind", ["orthogonal", "full"])
def test_what_a_cut_keeps_is_its_share_of_the_whole(kind):
    concepts = trio(kind)
    whole = merge_concepts(concepts, STRENGTHS)
    cut = merge_concepts(concepts, STRENGTHS, "svd", options=MergeOptions(rank=4))
    energies = [merged[LAYER].delta().double().square().sum() for merged in (cut, whole)]
    assert share_kept(cut, whole) == pytest.approx(float(energies[0] / energies[1]), rel=1e-5)
    assert 0 < share_kept(cut, whole) < 1
    if kind != "full":
        assert share_kept(cut, whole) == pytest.approx(truncated(whole[LAYER], 4)[1], rel=1e-5)


def test_too_many_directions_are_refused():
    many = [SimpleNamespace(layers={LAYER: filled_adapter("lora", OUT, 8, 3, slot)}) for slot in range(3)]
    with pytest.raises(AdapterError, match="read 9 directions of a layer that has 8"):
        orthogonalised([concept.layers for concept in many])


def test_two_concepts_with_the_very_same_directions_share_them_fairly():
    adapter = filled_adapter("lora", OUT, INP, RANK)
    other = adapter.replace(lora_up=torch.randn(adapter.lora_up.shape, generator=seeded(3)))
    result = orthogonalised([{LAYER: adapter}, {LAYER: other}])
    assert crosstalk(result.layers[0][LAYER], result.layers[1][LAYER]) < 1e-6
    assert all(0.2 < kept < 0.8 for kept in result.shares)


@pytest.mark.parametrize(
    ("how", "evidence", "words"),
    [
        ("fusion", Evidence(), "needs the moments of every concept"),
        ("fusion", Evidence([{}, {}, {}]), "a: its moments say nothing of unet.mid_block"),
        ("custom_diffusion", Evidence(), "needs text features of every concept"),
        ("loudest", Evidence(), "choose one of sum, mean, average, block"),
    ],
)
def test_what_is_missing_is_said(how, evidence, words):
    with pytest.raises(AdapterError, match=words):
        merge_concepts(trio(), STRENGTHS, how, evidence=evidence)


@pytest.mark.parametrize("wrong", [{"density": 0.0}, {"density": 1.5}, {"rank": 0}, {"ridge": 0.0}])
def test_options_that_cannot_work_are_refused(wrong):
    with pytest.raises(AdapterError, match=next(iter(wrong))):
        MergeOptions(**wrong)


def test_a_dense_merge_of_a_convolution_asks_for_its_geometry():
    with pytest.raises(AdapterError, match="without the convolution's geometry"):
        MergedDense(torch.ones(4, 3, 3, 3)).residual(torch.ones(1, 3, 8, 8))


def test_a_made_up_method_is_a_file_a_name_and_a_sentence(monkeypatch):
    def loudest(stack: LayerStack) -> MergedDense:
        """Each weight of the concept that moves it most."""
        deltas = torch.stack(
            [a.delta() * strength for a, strength in zip(stack.adapters, stack.strengths, strict=True)]
        )
        return MergedDense(deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0])

    monkeypatch.setitem(METHODS, "loudest", Method("loudest", loudest))
    monkeypatch.setitem(METHOD_HELP, "loudest", "each weight of the concept that moves it most")
    adapters = [filled_adapter("lora", 6, 5, 2, slot) for slot in range(2)]
    concepts = [SimpleNamespace(name=name, layers={"layer": a}) for name, a in zip("ab", adapters, strict=True)]
    merged = merge_concepts(concepts, [1.0, 0.5], "loudest")["layer"].delta()
    first, second = adapters[0].delta(), 0.5 * adapters[1].delta()
    assert torch.equal(merged, torch.where(first.abs() >= second.abs(), first, second))


def test_every_method_has_a_sentence_and_every_sentence_a_method():
    assert set(METHODS) == set(METHOD_HELP)
    assert all(name == method.name for name, method in METHODS.items())
