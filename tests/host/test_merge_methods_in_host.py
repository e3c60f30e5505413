"""Every merge method in the host: the engine's delta in the weights, the same as activations, the base untouched."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from laws import relative_error
from made_concepts import CONVOLUTIONS, made_concept, wide_concept
from merges_by_method import merged_by_method

from modular_concepts.files.concept import save_concept
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.moments import load_moments, moments_path
from modular_concepts.merging import METHOD_HELP as MERGES
from modular_concepts.merging import BlockStrengths, Evidence, MergeOptions, merge_concepts
from modular_concepts.merging.moments import Moment
from modular_concepts.merging.orthogonalize import orthogonal_concepts
from modular_concepts.recording import PROMPTS
from modular_concepts.seeds import seeded

EVERY = list(MERGES)
SUMS = ["sum", "mean", "average", "magnitude", "dare", "ties", "svd"]
STRENGTHS = {"tom": 0.7, "rex": 1.0, "wide": -0.5}
OPTIONS = {"density": 0.3, "rank": 4, "seed": 5}
RIDGE = 1e-3
BLOCKS = "mid=0, up=0.5, text=0.8"


@pytest.fixture(scope="module")
def concepts():
    return {"tom": made_concept("tom", "lora"), "rex": made_concept("rex", "lora", slot=1), "wide": wide_concept()}


@pytest.fixture(scope="module")
def exported(concepts):
    """Every method of merge, as one plain LoRA for other programs."""
    blocks = {
        name: made_concept(name, "block", blocks=5, slot=slot) for slot, name in enumerate(("tom", "rex", "wide"))
    }
    generator = seeded(2, "evidence")
    moments = [
        {
            layer: Moment(torch.randn(4, adapter.lora_down[0].numel(), generator=generator), 0.1)
            for layer, adapter in concept.layers.items()
        }
        for concept in concepts.values()
    ]
    texts = [torch.randn(3, 128, generator=generator) for _ in concepts]
    evidence = Evidence(moments, texts, torch.eye(128))
    merges = {how: wanted(blocks if how == "block" else concepts, how, evidence) for how in EVERY}
    return {
        how: replace(concepts["tom"], tokens={}, layers={name: one.as_low_rank() for name, one in merged.items()})
        for how, merged in merges.items()
    }


@pytest.fixture(scope="module")
def found(folder, warnings, concepts, exported):
    """(tensors, facts, plan, the host's folder)."""
    for name, concept in concepts.items():
        save_concept(concept, folder / "concepts" / f"{name}.safetensors")
    save_concept(made_concept("tom", "lora", slot=2), folder / "another_tom.safetensors")
    for how, merged in exported.items():
        export_kohya(merged, folder / "loras" / f"{how}.safetensors")
    wordless = replace(concepts["tom"], tokens={}, recipe=replace(concepts["tom"].recipe, triggers=()))
    export_kohya(wordless, folder / "concepts" / "plain.safetensors")
    layers = sorted(concepts["wide"].layers)
    plan = {
        "strengths": STRENGTHS,
        "methods": SUMS,
        "exported": list(exported),
        "options": OPTIONS,
        "layers": layers,
        "prompts": "\n".join(PROMPTS),
        "ridge": RIDGE,
        "blocks": BLOCKS,
        "square": next(name for name in sorted(concepts["tom"].layers) if name.endswith("attn1.to_q")),
    }
    found, facts = merged_by_method(plan, folder, warnings)
    return {key: value.float().clone() for key, value in found.items()}, facts, plan, folder


def wanted(concepts, how, evidence=None):
    options = MergeOptions(**OPTIONS, ridge=RIDGE)
    return merge_concepts(
        list(concepts.values()), list(STRENGTHS.values()), how, options=options, evidence=evidence or Evidence()
    )


def check_weights(tensors, layers, title, merged, tolerance=1e-6):
    moved = 0.0
    for layer in layers:
        base, now = tensors[f"base|{layer}"], tensors[f"{title}|{layer}"]
        if layer not in merged:
            assert torch.equal(now, base), layer
            continue
        assert relative_error(now, base + merged[layer].delta().reshape(base.shape)) < tolerance, layer
        moved = max(moved, relative_error(now, base))
    assert moved > 1e-2


@pytest.mark.parametrize("how", SUMS)
def test_weights_are_the_base_and_the_engines_delta(found, concepts, how):
    assert set(CONVOLUTIONS) <= set(found[2]["layers"])
    check_weights(found[0], found[2]["layers"], how, wanted(concepts, how))


@pytest.mark.parametrize("how", [*SUMS, "fusion"])
def test_bypass_computes_what_merged_weights_compute(found, how):
    tensors = found[0]
    assert relative_error(tensors[f"{how}|by_bypass"], tensors[f"{how}|by_weight"]) < 1e-5
    assert relative_error(tensors["base|by_weight"], tensors[f"{how}|by_weight"]) > 1e-2


@pytest.mark.parametrize("how", EVERY)
def test_a_merge_as_one_lora_is_the_same_in_the_stock_loader(found, exported, how):
    deltas = {layer: SimpleNamespace(delta=adapter.delta) for layer, adapter in exported[how].layers.items()}
    check_weights(found[0], found[2]["layers"], f"stock {how}", deltas)
    assert found[1]["stock warnings"] == []


def test_methods_differ(found, concepts):
    layer = next(iter(concepts["tom"].layers))
    everything = [found[0][f"{how}|{layer}"] for how in [*SUMS, "fusion"]]
    pairs = [relative_error(a, b) for i, a in enumerate(everything) for b in everything[:i]]
    assert min(pairs) > 1e-4


def test_fusion_is_the_engines_with_what_was_recorded_and_kept(found, concepts):
    tensors, facts, plan, folder = found
    moments = [load_moments(moments_path(folder / "concepts" / f"{name}.safetensors")) for name in concepts]
    assert all(set(known) == set(concept.layers) for known, concept in zip(moments, concepts.values(), strict=True))
    check_weights(tensors, plan["layers"], "fusion", wanted(concepts, "fusion", Evidence(moments)), 1e-5)
    assert facts["second"].splitlines() == [f"{name}: moments read from {name}.moments" for name in concepts]
    assert facts["anew"] == "tom: moments recorded from 2 pictures, kept in tom.moments"
    assert facts["changed"] == "tom: moments recorded from 2 pictures"


def test_moments_are_read_for_the_very_concept_and_base_that_they_are_of(found):
    facts, file = found[1], "tom.moments"
    anew = f"moments recorded from 2 pictures, since {file}"
    assert facts["other base"].startswith(f"tom: {anew} was recorded on another base model")
    assert f"moments read from {file} (recorded with other prompts" in facts["other prompts"]
    assert facts["back"].startswith(f"tom: {anew} was recorded on another base model")
    for title in ("replaced", "put back"):
        assert facts[title].startswith(f"tom: {anew} was recorded with other weights than those of tom now")


def test_the_report_reads_the_moments_that_fusion_left(found):
    pairs = found[1]["figures"]["pairs"]
    assert len(pairs) == 3
    assert all(answer > 0 for pair in pairs for answer in pair["answers"])
    assert all(0 < pair["sign_conflicts"] < 1 for pair in pairs)


def test_moments_are_no_concepts(found):
    assert found[1]["listed"] == found[1]["listed again"]
    assert "tom.safetensors" in found[1]["listed"]
    assert found[1]["listed at last"] == sorted([*found[1]["listed"], "minka.moments.safetensors"])


def test_what_a_cut_costs_is_said(found, concepts):
    whole = wanted(concepts, "sum")
    cut = wanted(concepts, "svd")
    kept, total = (sum(float(m.delta().double().square().sum()) for m in part.values()) for part in (cut, whole))
    assert found[1]["svd"] == f"rank 4 keeps {kept / total:.1%} of the sum's energy, {1 - kept / total:.1%} is lost"
    assert kept / total < 0.99


def test_concepts_are_made_orthogonal_and_what_they_keep_is_said(found, concepts):
    new, kept = orthogonal_concepts(list(concepts.values()))
    check_weights(found[0], found[2]["layers"], "orthogonal", merge_concepts(new, list(STRENGTHS.values())), 1e-5)
    assert found[1]["kept"].splitlines() == [
        f"{name} keeps {share:.1%} of its energy" for name, share in zip(concepts, kept, strict=True)
    ]


def test_parts_of_a_concept_act_as_strongly_as_was_typed(found, concepts):
    tom = concepts["tom"]
    parts = replace(tom, layers=BlockStrengths.parse(BLOCKS).on(tom.layers))
    assert 0 < len(parts.layers) < len(tom.layers)
    check_weights(found[0], found[2]["layers"], "blocks", merge_concepts([parts], [0.7]))


def test_part_of_a_weight_a_function_and_a_smaller_dtype(found, concepts):
    tensors, _, plan, _ = found
    base = tensors[f"base|{plan['square']}"]
    delta = wanted(concepts, "sum")[plan["square"]].delta()
    third = tensors["asked|third"]
    assert torch.equal(third[: len(base)], base) and torch.equal(third[2 * len(base) :], base)
    assert relative_error(third[len(base) : 2 * len(base)], base + delta) < 1e-6
    assert relative_error(tensors["asked|function"], base + delta) < 1e-6
    assert relative_error(tensors["asked|strength"], base - 0.4 * delta) < 1e-6
    assert relative_error(tensors["asked|prefetched"], base + delta) < 1e-6
    assert relative_error(tensors["asked|half"], base + delta) < 2e-3
    assert relative_error(delta + base, base) > 1e-2


def test_hooks_scale_a_merge_while_sampling(found, concepts):
    tensors, _, plan, _ = found
    base, delta = tensors[f"base|{plan['square']}"], wanted(concepts, "sum")[plan["square"]].delta()
    assert relative_error(tensors["hook"], base + 0.4 * delta) < 1e-6
    assert relative_error(tensors["hook later"], base + 1.5 * delta) < 1e-6


def test_the_loaded_base_is_untouched_after_everything(found):
    assert len(found[1]["untouched"]) > 2 * len(SUMS)
    assert all(found[1]["untouched"])


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("no prompt", "there is no prompt to draw the concepts with"),
        ("unknown part", "'middle=2' is not like mid=0.5"),
        ("no trigger", "has no trigger word"),
    ],
)
def test_what_cannot_be_done_is_refused_in_plain_words(found, title, words):
    said = found[1]["refused"][title]
    assert said.startswith("AdapterError: ") and words in said
