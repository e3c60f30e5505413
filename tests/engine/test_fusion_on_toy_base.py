"""Fusion in closed form answers what the toy base's layers read as well as the papers' descent does, or better."""

from dataclasses import replace

import pytest
import torch
from laws import relative_error, seeded

from bench.descent import fused_by_descent
from modular_concepts.adapters.low_rank import new_lora
from modular_concepts.merging.fusion import RIDGE, fused_factors
from modular_concepts.merging.moments import inputs_of
from modular_concepts.merging.sums import merged_factors
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.sampling import SampleSettings, sample
from modular_concepts.toy import model
from modular_concepts.toy.base import load_toy_base

BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
LAYERS = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.0.proj")
BRIEF = SampleSettings(steps=4, cfg=1.0)
SUBJECTS = ("man", "cat")
KEEP = 7  # every so many rows of what a layer reads

pytestmark = pytest.mark.skipif(
    not (model.WEIGHTS / "unet.safetensors").is_file(), reason="the toy base is not trained"
)


@pytest.fixture(scope="module")
def read():
    """Subject -> layer -> rows that the layer reads while the base draws it; the same for places not seen before."""
    base, found = load_toy_base(), {}
    layers = concept_layers(base, Targets(("all_linear",)))
    for place in ("on the beach", "in the forest"):
        for seed, word in enumerate(SUBJECTS):
            rows = {name: [] for name in LAYERS}
            hooks = [
                layers[name].register_forward_pre_hook(
                    lambda module, args, own=rows[name]: own.append(inputs_of(module, args[0])[::KEEP].clone())
                )
                for name in LAYERS
            ]
            sample(base, [f"a {word} {place}"] * 2, (seed, 10 + seed), {}, BRIEF)
            for hook in hooks:
                hook.remove()
            found[word, place] = {name: torch.cat(own) for name, own in rows.items()}
    return found


def deltas_for(layer, read):
    """Two LoRAs of this layer's shape, as strong on what it reads as trained ones are."""
    inp = read[SUBJECTS[0], "on the beach"][layer].shape[1]
    made = [new_lora(64, inp, 4, None, seeded(slot)) for slot in range(2)]
    return [replace(a, lora_up=torch.randn(64, 4, generator=seeded(9 + slot))) for slot, a in enumerate(made)]


def residual(delta, adapters, inputs):
    """Share of what the concepts alone answer that the merged delta misses."""
    pairs = [(x.double(), a.delta().double()) for x, a in zip(inputs, adapters, strict=True)]
    missed = sum((x @ (delta.double() - own).mT).square().sum() for x, own in pairs)
    return float(missed / sum((x @ own.mT).square().sum() for x, own in pairs))


@pytest.mark.parametrize("layer", LAYERS)
def test_closed_form_and_descent_leave_the_same_residual(read, layer):
    """With the default damping, for descent more rows that ask for the concept itself; without it descent lags."""
    inputs = [read[word, "on the beach"][layer] for word in SUBJECTS]
    adapters = deltas_for(layer, read)
    deltas, moments = [a.delta() for a in adapters], [x.double().mT @ x.double() / len(x) for x in inputs]
    sizes = [(len(x) * RIDGE * float(gram.diagonal().mean())) ** 0.5 for x, gram in zip(inputs, moments, strict=True)]
    rows = [torch.cat([x, size * torch.eye(x.shape[1])]) for x, size in zip(inputs, sizes, strict=True)]
    damped = fused_by_descent(deltas, rows, iterations=100)
    closed = fused_factors(adapters, [1.0, 1.0], moments).delta()
    assert relative_error(closed, damped) < 1e-2
    assert residual(closed, adapters, inputs) == pytest.approx(residual(damped, adapters, inputs), rel=1e-2)

    exact = fused_factors(adapters, [1.0, 1.0], moments, ridge=1e-9).delta()
    descended = fused_by_descent(deltas, inputs, iterations=100)
    summed = merged_factors(adapters, [1.0, 1.0]).delta()
    ours, theirs, plain = (residual(delta, adapters, inputs) for delta in (exact, descended, summed))
    assert ours < theirs < 0.2 * plain


@pytest.mark.parametrize("layer", LAYERS)
def test_the_default_damping_answers_new_places_better_than_hardly_any(read, layer):
    seen, new = ([read[word, place][layer] for word in SUBJECTS] for place in ("on the beach", "in the forest"))
    adapters = deltas_for(layer, read)
    moments = [x.double().mT @ x.double() / len(x) for x in seen]
    missed = {}
    for ridge in (1e-6, RIDGE):
        missed[ridge] = residual(fused_factors(adapters, [1.0, 1.0], moments, ridge=ridge).delta(), adapters, new)
    total, answers = sum(moments), sum(a.delta().double() @ c for a, c in zip(adapters, moments, strict=True))
    for ridge in (0.3, 100.0):  # towards the base's weight, as fusion was damped before, and nearly all the way there
        damped = total + ridge * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)
        missed[f"base, {ridge}"] = residual(answers @ torch.linalg.inv(damped), adapters, new)
    assert missed[RIDGE] < 0.5 * missed[1e-6]
    assert missed[RIDGE] < 0.97 * missed["base, 0.3"] < missed["base, 100.0"]
