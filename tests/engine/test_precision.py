"""Half precision: the loss is scaled so that small gradients live, and overflow costs a repetition, not a step."""

import importlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_problem import RESUME_SETTINGS, learned, tiny_basis, tiny_problem

from modular_concepts.errors import AdapterError
from modular_concepts.training import Diverged, TrainSettings, newest_checkpoint, train
from modular_concepts.training.precision import LossScale
from modular_concepts.training.run import Run
from modular_concepts.training.step import on_base

SETTINGS = TrainSettings(rank=2, slot=1, steps=8, batch=3, adapter_lr=1e-2, token_lr=1e-2)


def run(settings, problem=None, callback=None, **options):
    return train(problem or tiny_problem(), settings, callback, basis=tiny_basis(), **options)


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
            error = (rounded[name] - gradient).norm() / gradient.norm()
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
        return Loud.apply(problem.predict(*given))

    def gradient_at(scale):
        """The largest gradient that the prediction gets in the first step with this scale."""
        states[:] = [float("inf")]
        state = Run(problem, replace(SETTINGS, precision="fp16"), tiny_basis())
        state.loss_scale.value = scale
        loud = replace(problem, predict=predict)
        with on_base(loud, state) as step:
            step.gradients()
        return seen.pop()

    limit = 1.5 * gradient_at(2.0**12)
    calm = run(replace(SETTINGS, precision="fp16", steps=1))
    states[:], seen[:] = [limit], []
    result = run(replace(SETTINGS, precision="fp16", steps=1), replace(problem, predict=predict))
    assert len(seen) == 5, "65536 halves to 4096 in four more tries"
    assert result.step == 1 and result.losses == calm.losses
    assert all(torch.allclose(own, learned(result)[name], rtol=2e-2, atol=1e-4) for name, own in learned(calm).items())


def test_a_gradient_that_stays_infinite_is_a_divergence_that_names_the_precision():
    base = tiny_problem()

    def predict(*given):
        prediction = base.predict(*given)
        prediction.register_hook(lambda gradient: gradient * float("inf"))
        return prediction

    with pytest.raises(Diverged, match="or in bf16 or fp32 precision"):
        run(replace(SETTINGS, precision="fp16"), replace(base, predict=predict))


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
        return base.predict(noisy, timesteps, context + 0.1 * wide(context).unflatten(-1, (8, -1)).mean(-1))

    problem = replace(base, predict=predict, layers=layers)
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
