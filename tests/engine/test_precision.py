"""Half precision: the loss is scaled so that small gradients live, and overflow costs a repetition, not a step."""

import importlib
from dataclasses import replace

import pytest
import torch
from laws import EFFECT, TOLERANCE, filled_adapter, relative_error, seeded
from safetensors.torch import load_file
from test_training import planted_problem
from tiny_problem import RESUME_SETTINGS, learned, tiny_basis, tiny_problem
from tiny_sd import write_tiny_sd
from untrained_toy import QUICK, filled_concept, write_untrained

from bench.given_base import with_base
from modular_concepts.concept import Concept, Recipe
from modular_concepts.errors import AdapterError
from modular_concepts.merging import MergeOptions, merge_concepts
from modular_concepts.models.diffusers_folder import load_diffusers_base
from modular_concepts.models.targets import Targets
from modular_concepts.regions.geometry import Region
from modular_concepts.sampling import customised, sample
from modular_concepts.toy.base import load_toy_base
from modular_concepts.training.checkpoint import newest_checkpoint
from modular_concepts.training.loop import Diverged, Keeping, Listeners, train
from modular_concepts.training.precision import LossScale
from modular_concepts.training.run import Run
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.step import on_base
from modular_concepts.training.teach import Subject, train_concept

HALF = (torch.float16, torch.bfloat16)
SETTINGS = TrainSettings(rank=2, slot=1, steps=8, batch=3, adapter_lr=1e-2, token_lr=1e-2)


def run(settings, problem=None, callback=None, **options):
    return train(problem or tiny_problem(), settings, Listeners(callback), Keeping(**options), tiny_basis())


def gradients(precision):
    problem = tiny_problem()
    state = Run(problem, replace(SETTINGS, precision=precision, clip_norm=0.0), tiny_basis())
    with on_base(problem, state) as step:
        step.gradients()
    return {name: parameter.grad for name, parameter in state.parameters().items()}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_gradients_are_near_those_of_float32(precision):
    exact, rounded = gradients("fp32"), gradients(precision)
    for name, gradient in exact.items():
        if gradient.abs().max() > 0:
            error = relative_error(rounded[name], gradient)
            assert 0 < error < (0.01 if precision == "fp16" else 0.1), name


def test_an_overflow_repeats_the_step_with_a_smaller_scale():
    problem = tiny_problem()
    seen, states = [], []

    class Loud(torch.autograd.Function):
        """Its gradient is beyond float16 while the loss is scaled by more than 2^12."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient.abs().max().item())
            return gradient * (float("inf") if seen[-1] > states[0] else 1.0)

    def predict(*given):
        return Loud.apply(problem.base.predict(*given))

    def gradient_at(scale):
        """The largest gradient that the prediction gets in the first step with this scale."""
        states[:] = [float("inf")]
        state = Run(problem, replace(SETTINGS, precision="fp16"), tiny_basis())
        state.loss_scale.value = scale
        loud = with_base(problem, predict=predict)
        with on_base(loud, state) as step:
            step.gradients()
        return seen.pop()

    limit = 1.5 * gradient_at(2.0**12)
    calm = run(replace(SETTINGS, precision="fp16", steps=1))
    states[:], seen[:] = [limit], []
    result = run(replace(SETTINGS, precision="fp16", steps=1), with_base(problem, predict=predict))
    assert len(seen) == 5, "65536 halves to 4096 in four more tries"
    assert result.step == 1 and result.losses == calm.losses
    assert all(torch.allclose(own, learned(result)[name], rtol=2e-2, atol=1e-4) for name, own in learned(calm).items())


def test_a_gradient_that_stays_infinite_is_a_divergence_that_names_the_precision():
    base = tiny_problem()

    def predict(*given):
        prediction = base.base.predict(*given)
        prediction.register_hook(lambda gradient: gradient * float("inf"))
        return prediction

    with pytest.raises(Diverged, match="or in bf16 or fp32 precision"):
        run(replace(SETTINGS, precision="fp16"), with_base(base, predict=predict))


def test_the_scale_doubles_after_many_good_steps_and_is_in_the_checkpoint(tmp_path):
    scale = LossScale(patience=3)
    for _ in range(3):
        scale.grow()
    assert scale.state().tolist() == [2.0**17, 0] and scale.shrink() and scale.value == 2.0**16
    other = LossScale()
    scale.grow()
    other.set_state(scale.state())
    assert other.state().tolist() == [2.0**16, 1]
    settings = replace(RESUME_SETTINGS, precision="fp16")
    straight = run(settings, checkpoints=tmp_path / "straight")
    run(settings, callback=lambda at: at.step == 9, checkpoints=tmp_path / "half")
    resumed = run(settings, checkpoints=tmp_path / "half", resume=tmp_path / "half")
    assert all(torch.equal(own, learned(resumed)[name]) for name, own in learned(straight).items())
    kept = [load_file(newest_checkpoint(tmp_path / name))["loss_scale"] for name in ("straight", "half")]
    assert torch.equal(*kept) and kept[0][1] == 20


# --- eight-bit optimizer ---


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(AdapterError, match="adamw8bit needs the package bitsandbytes.* or choose adamw"):
        run(replace(SETTINGS, optimizer="adamw8bit"))


def test_eight_bit_moments_are_resumed_exactly(tmp_path):
    pytest.importorskip("bitsandbytes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = torch.nn.Linear(8, 8192)
    base = tiny_problem()
    # Wide enough for eight-bit moments, and with a part in the prediction.
    layers = base.layers | {"unet.wide": wide.requires_grad_(False)}

    def predict(noisy, timesteps, context):
        return base.base.predict(noisy, timesteps, context + 0.1 * wide(context).unflatten(-1, (8, -1)).mean(-1))

    problem = with_base(base, predict=predict, layers=layers)
    settings = replace(RESUME_SETTINGS, optimizer="adamw8bit")
    straight = run(settings, problem, checkpoints=tmp_path / "straight")
    run(settings, problem, lambda at: at.step == 9, checkpoints=tmp_path / "half")
    resumed = run(settings, problem, checkpoints=tmp_path / "half", resume=tmp_path / "half")
    assert all(torch.equal(own, learned(resumed)[name]) for name, own in learned(straight).items())
    kept = load_file(newest_checkpoint(tmp_path / "half"))
    other = load_file(newest_checkpoint(tmp_path / "straight"))
    assert kept["optimizer.adapters.unet.wide.lora_up.state1"].dtype == torch.uint8
    assert kept.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in kept.items())
    plain = run(replace(settings, optimizer="adamw"), problem)
    assert not torch.equal(plain.layers["unet.wide"].lora_up, straight.layers["unet.wide"].lora_up)
    assert straight.losses[-1] == pytest.approx(plain.losses[-1], rel=0.1)


# --- weights in half precision, concepts in float32 ---


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("how", ["sum", "mean", "block", "svd", "magnitude", "dare", "ties"])
@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_a_merge_into_weights_in_half_precision_is_rounded_once(dtype, how, strength):
    kind = "block" if how == "block" else "lora"
    for kernel in (None, (3, 3)):
        adapters = [filled_adapter(kind, 24, 16, 4, slot, kernel) for slot in range(3)]
        concepts = [Concept(f"c{number}", {"layer": own}, {}, Recipe()) for number, own in enumerate(adapters)]
        merged = merge_concepts(concepts, [strength] * 3, how, options=MergeOptions(rank=8, density=0.5))["layer"]
        weight = torch.randn(adapters[0].weight_shape, generator=seeded(1)).to(dtype)
        exact = weight.double() + merged.delta().double()
        found = merged.add_to(weight.clone())
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max() <= 1.01 * (exact.to(dtype).double() - exact).abs().max()
        assert relative_error(found, exact.to(dtype)) < 1e-2 * TOLERANCE[dtype]
        assert torch.equal(found, weight) if strength == 0 else relative_error(found, weight) > EFFECT


@pytest.mark.parametrize("dtype", HALF)
def test_many_concepts_that_each_move_less_than_a_weight_can_show_move_it_together(dtype):
    step = torch.finfo(dtype).eps / 8
    one = filled_adapter("lora", 8, 8, 1)
    one = one.replace(lora_up=torch.full((8, 1), step), lora_down=torch.ones(1, 8), alpha=1.0)
    merged = merge_concepts([Concept(f"c{n}", {"layer": one}, {}, Recipe()) for n in range(16)], [1.0] * 16)["layer"]
    weight = torch.ones(8, 8, dtype=dtype)
    assert torch.equal(weight + one.delta().to(dtype), weight)
    assert torch.equal(merged.add_to(weight.clone()), torch.full((8, 8), 1 + 16 * step, dtype=dtype))


@pytest.mark.parametrize("stored", [torch.float32, *HALF])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["orthogonal", "lora", "block"])
def test_a_planted_target_is_learned_in_half_precision(method, precision, stored):
    if precision == "fp32" and stored == torch.float32:
        return  # test_training.py has it
    problem, settings, planted = planted_problem(method, 0)
    for module in problem.base.modules:
        module.to(stored)
    target = torch.eye(len(planted)) - problem.base.modules[0].weight.detach().float()
    problem = with_base(problem, lean=stored != torch.float32)
    result = run(replace(settings, precision=precision), problem)
    adapter = result.layers["layer"]
    assert adapter.lora_up.dtype == adapter.lora_down.dtype == torch.float32
    assert max(result.losses[-5:]) <= 1e-3 * result.losses[0]
    assert relative_error(adapter.delta(), target) < 0.03


@pytest.mark.parametrize("stored", HALF)
def test_small_steps_are_not_eaten_by_the_weights_precision(stored):
    problem = tiny_problem()
    for module in problem.base.modules:
        module.to(stored)
    encode, rows = problem.base.context, {"<x>": problem.triggers["<x>"].to(stored)}
    problem = with_base(problem, lean=True, triggers=rows, context=lambda *given: encode(*given).float())
    settings = replace(SETTINGS, method="lora", steps=4, adapter_lr=1e-4, token_lr=1e-4, weight_decay=0.0)
    before = Run(problem, settings, tiny_basis())
    after = run(settings, problem)
    for name, own in before.adapters.items():
        start, now = own.lora_down.detach(), after.layers[name].lora_down
        assert now.dtype == torch.float32 and 0 < (now - start).abs().max() < 1e-3, name
    rows = before.tokens["<x>"].detach()
    assert after.tokens["<x>"].dtype == torch.float32 and 0 < (after.tokens["<x>"] - rows).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", HALF)
def test_a_base_in_half_precision_draws_and_learns_near_one_in_float32(dtype, tmp_path):
    region = [Region("a <tom> at night", (0.0, 0.0, 0.5, 1.0))]
    found = {}
    for stored in (torch.float32, dtype):
        base = load_toy_base(write_untrained(tmp_path))
        for network in base.modules:
            network.to(stored)
        concept = filled_concept("tom", 1)
        with customised(base, [concept], [0.7]) as tokens:
            merged = sample(base, ["a <tom> man"], [0], tokens, QUICK)
        gated = sample(base, ["a man"], [0], None, QUICK, region, mode="gated", stack=[(concept, 0.7)])
        plain = sample(base, ["a man"], [0], None, QUICK)
        pictures = torch.rand(2, 3, *base.size, generator=seeded(3))
        settings = TrainSettings("lora", 2, steps=2, batch=2)
        learned_now, result = train_concept(
            base, Subject("x", pictures, ["a <x>"] * 2, "man"), settings, Targets(("attention",))
        )
        assert all(own.lora_up.dtype == torch.float32 for own in learned_now.layers.values())
        found[stored] = merged, gated, plain, torch.tensor(result.losses)
    for half, whole in zip(found[dtype], found[torch.float32], strict=True):
        assert half.dtype == torch.float32 and relative_error(half, whole) < 5 * TOLERANCE[dtype]
    assert relative_error(found[dtype][0], found[dtype][2]) > EFFECT


@pytest.mark.parametrize("dtype", HALF)
def test_a_folder_s_networks_may_be_in_half_precision(dtype, tmp_path):
    base = load_diffusers_base(write_tiny_sd(tmp_path / "sd"))
    whole = sample(base, ["a photo of a dog"], [0], None, QUICK)
    for network in base.modules:
        network.to(dtype)
    assert relative_error(sample(base, ["a photo of a dog"], [0], None, QUICK), whole) < 5 * TOLERANCE[dtype]
