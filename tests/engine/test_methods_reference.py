"""Loss and gradients of every method against one plain float64 reference: matrices and sums, written out by hand.

And what trains is what should: a planted word is found in every layer, and the vocabulary does not move.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from laws import seeded
from tiny_layers import CAPTIONS, LENGTH, ORDER, tiny_base, tiny_problem
from torch import nn

from bench.given_base import GivenBase
from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.models.schedules import NoiseSchedule
from modular_concepts.seeds import seeded as seeded_by
from modular_concepts.training.loop import Keeping, Listeners, train
from modular_concepts.training.problem import Examples, Problem
from modular_concepts.training.run import Run
from modular_concepts.training.settings import METHODS, TrainSettings
from modular_concepts.training.step import on_base

SETTINGS = {
    "rank": 1,
    "alpha": 3.0,
    "slot": 1,
    "blocks": 2,
    "batch": 3,
    "steps": 4,
    "clip_norm": 0.0,
    "token_vectors": 2,
    "token_noise": 0.7,
    "noise_offset": 0.1,
    "adapter_lr": 1e-2,
    "token_lr": 1e-2,
}
# Those that act wherever a text is read; what acts at its own words alone has references in test_own_words.py.
EVERYWHERE = tuple(method for method in METHODS if method != "own_words")
# What the three captions are as ids; 6 and 7 are the two vectors of <x>.
IDS = {"a <x> man": [1, 6, 7, 2], "the beach": [4, 5], "on the <x>": [3, 4, 6, 7]}


def settings_of(method, **changed) -> TrainSettings:
    return TrainSettings(method=method, **(SETTINGS | changed))


def filled_run(problem, settings) -> Run:
    """A run in the middle of its way: no factor is zero, and a layer-wise word differs from layer to layer."""
    run = Run(problem, settings, OrthogonalBasis(seed=7))
    generator = seeded(2)
    with torch.no_grad():
        for adapter in run.adapters.values():
            adapter.lora_up.copy_(0.5 * torch.randn(adapter.lora_up.shape, generator=generator))
        for rows in run.tokens.values():
            rows.add_(0.5 * torch.randn(rows.shape, generator=generator))
    return run


def reference_loss(base, problem, settings, adapters, rows, erasure):
    """The loss of the first batch.  adapters: name -> (up, down, rows or None, scale); rows: (L, 2, 4) or (2, 4)."""
    weights = {f"unet.{name}": value for name, value in base.unet.state_dict().items()}
    weights |= {f"text_encoder.{name}": value for name, value in base.text_encoder.state_dict().items()}
    for name, (up, down, at, scale) in adapters.items():
        if name in erasure:
            up = up * erasure[name][:, None]
        delta = scale * up @ down.reshape(len(down), -1)
        whole = weights[f"{name}.weight"]
        placed = torch.zeros(len(whole), delta.shape[1], dtype=delta.dtype)
        placed[torch.arange(len(whole)) if at is None else at] = delta
        weights[f"{name}.weight"] = whole + placed.reshape(whole.shape)

    order = torch.randperm(3, generator=seeded_by(settings.seed, "order"))[: settings.batch].tolist()
    latents = problem.examples.latents[order]
    draw = seeded_by(settings.seed, "noise")
    noise = torch.randn(latents.shape, generator=draw) + 0.1 * torch.randn(len(order), 2, 1, 1, generator=draw)
    noise = noise.double()
    times = torch.randint(1000, (len(order),), generator=draw)
    signal = torch.linspace(0.99, 0.05, 1000, dtype=torch.float64)[times].sqrt()[:, None, None, None]
    sigma = (1 - signal.square()).sqrt()
    noisy, wanted = signal * latents + sigma * noise, signal * noise - sigma * latents

    ids = torch.tensor([IDS[CAPTIONS[index]] + [0] * (LENGTH - len(IDS[CAPTIONS[index]])) for index in order])
    hidden = F.conv2d(noisy, weights["unet.conv_in.weight"], weights["unet.conv_in.bias"], padding=1)
    hidden = (hidden + times.double()[:, None, None, None] / 1000).flatten(2).mT
    for layer, block in enumerate(ORDER):
        vocabulary = weights["text_encoder.token_embedding.weight"]
        words = torch.cat([vocabulary, rows[layer] if rows.dim() == 3 else rows])[ids]
        mixed = words + words.mean(1, keepdim=True)
        text = torch.tanh(mixed @ weights["text_encoder.mix.weight"].mT + weights["text_encoder.mix.bias"])
        q, k, v = (
            source @ weights[f"unet.{block}.{part}.weight"].mT + weights[f"unet.{block}.{part}.bias"]
            for part, source in (("to_q", hidden), ("to_k", text), ("to_v", text))
        )
        hidden = hidden + torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v
    out = hidden @ weights["unet.conv_out.weight"].mT + weights["unet.conv_out.bias"]
    error = (out.mT.reshape(latents.shape) - wanted).square()
    masks = problem.examples.masks[order]
    return ((error * masks).sum((1, 2, 3)) / (2 * masks.sum((1, 2, 3)))).mean()


@pytest.mark.parametrize("erasure", [0.0, 0.4])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("method", EVERYWHERE)
def test_loss_and_gradients_are_the_references(method, layerwise, erasure):
    if method == "words" and erasure:
        return
    base, settings = tiny_base(), settings_of(method, layerwise=layerwise, erasure=erasure)
    problem = tiny_problem(base)
    run = filled_run(problem, settings)
    with on_base(problem, run) as step:
        loss, norm = step.gradients()
    learned = run.parameters()

    leaves = {name: value.detach().clone().requires_grad_() for name, value in learned.items()}
    adapters = {
        name: (
            leaves[f"adapters.{name}.lora_up"],
            leaves.get(f"adapters.{name}.lora_down", adapter.lora_down),
            adapter.rows,
            adapter.scale,
        )
        for name, adapter in run.adapters.items()
    }
    heights = [len(adapter.lora_up) for adapter in run.adapters.values()]
    kept = torch.rand(sum(heights), generator=seeded_by(settings.seed, "erasure")) >= erasure
    masks = dict(zip(run.adapters, kept.double().split(heights), strict=True)) if erasure else {}

    def reference():
        return reference_loss(base, problem, settings, adapters, leaves["tokens.<x>"], masks)

    wanted = reference()
    assert loss == pytest.approx(wanted.item(), rel=1e-12)
    assert set(learned) == {
        *(f"adapters.{name}.lora_up" for name in run.adapters),
        *(f"adapters.{name}.lora_down" for name in run.adapters if method in ("lora", "block")),
        "tokens.<x>",
    }
    assert bool(run.adapters) == (method != "words")
    gradients = torch.autograd.grad(wanted, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.allclose(learned[name].grad, gradient, rtol=1e-9, atol=1e-13), name
        assert erasure or gradient.abs().max() > 1e-6, name
    assert norm == pytest.approx(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    # The reference's own gradient is the slope of its loss.
    direction = {
        name: torch.randn(value.shape, generator=seeded_by(5, name)).double() for name, value in leaves.items()
    }
    slope = sum((gradient * direction[name]).sum() for name, gradient in zip(leaves, gradients, strict=True)).item()
    with torch.no_grad():
        sides = []
        for way in (1e-5, -2e-5):
            for name, value in leaves.items():
                value.add_(way * direction[name])
            sides.append(reference().item())
    assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("method", EVERYWHERE)
def test_the_vocabulary_and_the_base_stay_as_they_are(method, layerwise):
    base = tiny_base(torch.float32)
    before = [value.clone() for network in base.modules for value in network.state_dict().values()]
    result = train(tiny_problem(base), settings_of(method, layerwise=layerwise), basis=OrthogonalBasis(seed=7))
    after = [value for network in base.modules for value in network.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(value.grad is None for network in base.modules for value in network.parameters())
    start = Run(tiny_problem(base), settings_of(method, layerwise=layerwise), OrthogonalBasis(seed=7)).tokens["<x>"]
    assert result.tokens["<x>"].shape == start.shape == ((3, 2, 4) if layerwise else (2, 4))
    assert (result.tokens["<x>"] - start).abs().min() > 1e-5
    assert bool(result.layers) == (method != "words")


@pytest.mark.parametrize("method", ["lora", "custom_diffusion"])
def test_the_text_encoder_may_learn_at_a_rate_of_its_own(method):
    problem, first = tiny_problem(tiny_base()), {}
    for rate in (None, 1e-2, 1e-5):
        first[rate] = train(problem, settings_of(method, steps=1, text_encoder_lr=rate)).layers
    for name, adapter in first[None].items():
        assert torch.equal(first[1e-2][name].lora_up, adapter.lora_up)
        slower = adapter.lora_up.abs().max() / first[1e-5][name].lora_up.abs().max()
        assert slower == pytest.approx(1000.0 if name.startswith("text_encoder") else 1.0, rel=1e-2)


@pytest.mark.parametrize("start", ["words", "random + class"])
def test_a_layer_wise_word_starts_the_same_in_every_layer(start):
    base = tiny_base()
    settings = settings_of("words", layerwise=True, token_start=start, token_vectors=3)
    rows = Run(tiny_problem(base), settings).tokens["<x>"]
    assert rows.shape == (3, 3, 4) and torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    again = Run(tiny_problem(base), settings_of("words", token_start=start, token_vectors=3)).tokens["<x>"]
    assert torch.equal(rows[0], again)
    word = base.embedding.weight[2]
    if start == "words":
        assert not torch.equal(rows[0, 1], word)
    else:
        assert torch.equal(rows[0, 1], word) and torch.equal(rows[0, 2], word)
        assert 0 < rows[0, 0].norm() < 0.013 * 6


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_word_is_found_in_every_layer(seed, layerwise):
    """The base's prediction is exact with the planted rows, and off by the difference with any others."""
    layers, width = 3, 4
    planted = torch.randn(layers, width, generator=seeded(seed))
    planted = planted if layerwise else planted[:1]
    alphas = torch.linspace(0.9, 0.1, 1000)

    def predict(noisy, timesteps, context):
        noise = noisy / (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        off = context.expand(layers, width) - planted
        return noise + off.flatten()[None, :, None, None]

    base = GivenBase(
        predict,
        lambda captions, tokens: tokens["<x>"].flatten(-2),
        NoiseSchedule(alphas),
        cross_attention_layers=layers,
    )
    examples = Examples(torch.zeros(3, layers * width, 2, 2), ("<x>",) * 3)
    problem = Problem(base, {}, examples, {"<x>": torch.zeros(1, width)})
    settings = TrainSettings(
        method="words",
        layerwise=layerwise,
        token_vectors=1,
        steps=200,
        token_lr=0.1,
        schedule="cosine",
        clip_norm=0.0,
        seed=seed,
    )
    result = train(problem, settings)
    assert max(result.losses[-5:]) <= 1e-4 * result.losses[0]
    assert (result.tokens["<x>"].flatten(-2) - planted).norm() <= 0.02 * planted.norm()


@pytest.mark.parametrize("layers", [None, 3])
def test_gradients_of_words_are_the_slopes(layers):
    base = tiny_base()
    shape = (2, 4) if layers is None else (layers, 2, 4)
    rows = torch.randn(shape, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    noisy = torch.randn(3, 2, 3, 2, dtype=torch.float64, generator=seeded(1))

    def predicted(rows):
        return base.predict(noisy, torch.tensor([1, 500, 900]), base.context(CAPTIONS, {"<x>": rows}))

    assert torch.autograd.gradcheck(predicted, (rows,))
    assert not any(isinstance(value, nn.Parameter) and value.requires_grad for value in base.unet.parameters())


@pytest.mark.parametrize("method", ["custom_diffusion", "words", "block_orthogonal"])
def test_two_steps_and_two_more_are_four(tmp_path, method):
    problem, settings = tiny_problem(tiny_base(torch.float32)), settings_of(method, layerwise=True)
    basis = OrthogonalBasis(seed=7)
    straight = train(problem, settings, basis=basis)
    half = train(problem, settings, Listeners(lambda at: at.step == 2), Keeping(tmp_path), basis=basis)
    assert half.step == 2 and not torch.equal(half.tokens["<x>"], straight.tokens["<x>"])
    resumed = train(problem, settings, keeping=Keeping(resume=tmp_path), basis=basis)
    assert torch.equal(resumed.tokens["<x>"], straight.tokens["<x>"]) and resumed.losses == straight.losses
    for name, adapter in straight.layers.items():
        assert torch.equal(resumed.layers[name].lora_up, adapter.lora_up)
