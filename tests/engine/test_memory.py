"""When memory runs out a sentence names what helps, nothing learned is lost, and what a step needs is told before."""

from dataclasses import replace

import pytest
import torch
from tiny_problem import (
    EVERYTHING,
    hook_count,
    learned,
    problem_with_everything,
    tiny_basis,
    tiny_problem,
    weights_hash,
)
from tiny_sd import write_tiny_sd
from untrained_toy import untrained_base

from bench.given_base import with_base
from modular_concepts.errors import AdapterError
from modular_concepts.models.diffusers_folder import load_diffusers_base
from modular_concepts.models.targets import Targets
from modular_concepts.training.estimate import Estimate, LiveMemory, rehearse
from modular_concepts.training.loop import Keeping, Listeners, OutOfMemory, train
from modular_concepts.training.memory import memory_advice, ran_out_of_memory
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, problem_for

SETTINGS = TrainSettings(rank=2, slot=1, steps=8, batch=3, adapter_lr=1e-2, token_lr=1e-2)


def too_much(*_):
    """More than any machine has: the allocator's own error."""
    return torch.empty(1 << 56, dtype=torch.uint8)


def accelerator_full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fault", [too_much, accelerator_full])
def test_memory_that_runs_out_is_a_sentence_and_loses_nothing(tmp_path, fault):
    base, calls = problem_with_everything(), []

    def predict(*given):
        calls.append(given)
        return fault() if len(calls) == 9 else base.base.predict(*given)

    settings = replace(EVERYTHING, gradient_checkpointing=False, precision="fp32")
    before, state = weights_hash(base), torch.get_rng_state()
    with pytest.raises(OutOfMemory) as caught:
        train(with_base(base, predict=predict), settings, keeping=Keeping(tmp_path), basis=tiny_basis())
    said = str(caught.value)
    assert (
        "memory ran out at step 5; lower batch (now 3), train on smaller pictures or turn gradient_checkpointing on"
        in said
    )
    assert "What was learned up to step 4 is kept" in said and caught.value.result.step == 4
    assert weights_hash(base) == before and hook_count(base) == 0 and torch.equal(torch.get_rng_state(), state)
    straight = learned(train(base, settings, basis=tiny_basis()))
    lean = replace(settings, gradient_checkpointing=True)
    resumed = learned(train(base, lean, keeping=Keeping(resume=tmp_path), basis=tiny_basis()))
    assert all(torch.equal(own, resumed[name]) for name, own in straight.items())


def test_memory_that_is_too_small_from_the_start_keeps_no_file(tmp_path):
    with pytest.raises(AdapterError, match="memory ran out at step 1;.*lower batch"):
        train(with_base(tiny_problem(), predict=too_much), SETTINGS, keeping=Keeping(tmp_path), basis=tiny_basis())
    assert not list(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="too small for 1 of 3 pictures at once; train on smaller pictures"):
        rehearse(with_base(tiny_problem(), predict=too_much), SETTINGS, tiny_basis())


def test_the_advice_names_only_what_is_left_to_do():
    assert memory_advice(TrainSettings(batch=4)).startswith("lower batch (now 4), train on smaller pictures or")
    lean = TrainSettings(batch=1, gradient_checkpointing=True, precision="bf16", rank=8)
    assert memory_advice(lean) == "train on smaller pictures, train fewer layers or lower rank (now 8)"
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# --- the rehearsal ---


def toy_problem(size=None, base=None):
    base = base or untrained_base()
    pictures = torch.rand(4, 3, *(size or base.size), generator=torch.Generator().manual_seed(3))
    return problem_for(base, Subject("x", pictures, ["a <x> on the beach"] * 4, "man"), Targets(("all_linear",)))


def test_a_rehearsal_moves_nothing_of_the_training():
    problem, told = problem_with_everything(), []
    state = torch.get_rng_state()
    plain = learned(train(problem, EVERYTHING, basis=tiny_basis()))
    rehearsed = learned(train(problem, EVERYTHING, Listeners(estimate=told.append), basis=tiny_basis()))
    assert all(torch.equal(own, rehearsed[name]) for name, own in plain.items())
    assert len(told) == 1 and told[0].seconds_per_step > 0 and told[0].memory_bytes > 0
    assert torch.equal(torch.get_rng_state(), state) and hook_count(problem) == 0


WORDS, WHOLE = {"method": "words"}, {"method": "custom_diffusion"}
NARROW, BF16, LEAN = {"batch": 1, "rank": 16}, {"precision": "bf16"}, {"gradient_checkpointing": True}
LAYOUTS = [{}, LEAN, WHOLE | {"batch": 1}, WORDS, WORDS | {"layerwise": True, "batch": 1}, BF16, BF16 | NARROW | LEAN]
LAYOUTS += [
    NARROW,
    NARROW | {"rank": 64},
    NARROW | {"method": "orthogonal", "slot": 0},
    {"method": "block", "blocks": 4},
]
LAYOUTS += [NARROW | BF16 | {"method": "block_orthogonal", "blocks": 4, "slot": 0}]


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return load_diffusers_base(write_tiny_sd(tmp_path_factory.mktemp("memory") / "sd"))


TOY, SD = ("toy", 3), ("sd", 3)  # steps: the third is the first that has all there is
CASES = [(*SD, changed) for changed in LAYOUTS]
CASES += [(*TOY, changed) for changed in LAYOUTS if "precision" not in changed]  # bf16 is slow on a processor
CASES += [("sd", steps, changed) for steps in (1, 2) for changed in (NARROW, WHOLE | NARROW, WORDS)]


@pytest.mark.parametrize(("kind", "steps", "changed"), CASES, ids=str)
def test_the_estimate_is_within_15_percent_of_what_a_training_takes(kind, steps, changed, tiny_sd):
    """All that a training makes, its adapters and their copies too, measured while it runs."""
    if kind == "sd" and "rank" in changed:
        changed = changed | {"rank": 4}  # as many as its narrowest layers have in a block
    settings = replace(SETTINGS, **{"method": "lora", "batch": 2, "steps": steps, **changed})
    problem = toy_problem() if kind == "toy" else toy_problem(base=tiny_sd)
    estimate = rehearse(problem, settings)
    with LiveMemory() as live:
        train(problem, settings)
    assert 0.85 * live.peak < estimate.memory_bytes < 1.15 * live.peak


def test_the_estimate_grows_with_batch_and_pictures_and_shrinks_with_checkpointing():
    settings = replace(SETTINGS, method="lora", batch=2)
    one = rehearse(toy_problem(), settings).memory_bytes
    assert rehearse(toy_problem(), replace(settings, batch=4)).memory_bytes > 1.5 * one
    assert rehearse(toy_problem((64, 64)), settings).memory_bytes > 2 * one
    assert rehearse(toy_problem(), replace(settings, gradient_checkpointing=True)).memory_bytes < 0.9 * one


def test_it_is_told_in_plain_words():
    assert str(Estimate(12.3, 3 << 30, 500)) == (
        "about 12 s a step, 1 h 42 min for 500 steps; about 3 GiB of memory beside the model"
    )
    assert "0.042 s a step, 4.2 s for 100 steps" in str(Estimate(0.042, 1 << 20, 100))
