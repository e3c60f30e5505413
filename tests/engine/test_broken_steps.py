"""A step that breaks off anywhere loses nothing: the state of the last finished one is written, bit for bit."""

import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_problem import EVERYTHING, RESUME_SETTINGS, assert_same, learned, problem_with_everything, tiny_basis
from tiny_problem import tiny_problem as make_problem

from modular_concepts.errors import AdapterError
from modular_concepts.training.checkpoint import newest_checkpoint
from modular_concepts.training.loop import Broken, Keeping, Listeners, OutOfMemory, train
from modular_concepts.training.optimizers import limit_gradients
from modular_concepts.training.run import Run

ONCE = replace(RESUME_SETTINGS, checkpoint_every=0)
STEP = 7  # is the one that breaks off


class Foreign(BaseException):
    """As a host's own interrupt may be."""


FAULTS = {
    "keyboard": (KeyboardInterrupt, KeyboardInterrupt),
    "memory": (MemoryError, OutOfMemory),
    "accelerator": (lambda: torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
    "runtime": (lambda: RuntimeError("the machine stumbled"), RuntimeError),
    "foreign": (Foreign, Foreign),
    "leaving": (lambda: SystemExit(3), SystemExit),
    "ours": (lambda: AdapterError("this cannot be."), Broken),
}


@contextmanager
def breaking(monkeypatch, place: str, fault):
    """Within the block step STEP raises in the forward pass, before or after the update, or as the step is recorded."""
    calls = []

    def at(moment: str, function):
        def wrapped(*inputs, **options):
            if place == f"{moment} before":
                calls.append(moment)
                if len(calls) == STEP:
                    raise fault()
            result = function(*inputs, **options)
            if place == f"{moment} after":
                calls.append(moment)
                if len(calls) == STEP:
                    raise fault()
            return result

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", at("update", torch.optim.AdamW.step))
        patch.setattr(Run, "record", at("record", Run.record))
        patch.setattr("modular_concepts.training.step.limit_gradients", at("backward", limit_gradients))
        yield


PLACES = [f"{moment} {side}" for moment in ("backward", "update", "record") for side in ("before", "after")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    result = train(make_problem(), ONCE, keeping=Keeping(folder), basis=tiny_basis())
    return learned(result), load_file(newest_checkpoint(folder))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", FAULTS)
def test_any_fault_anywhere_in_a_step_keeps_all_steps_before_it(tmp_path, monkeypatch, straight, kind, place):
    fault, raised = FAULTS[kind]
    told = []
    with breaking(monkeypatch, place, fault), pytest.raises(raised) as caught:
        train(make_problem(), ONCE, Listeners(fault=told.append), Keeping(tmp_path), basis=tiny_basis())
    assert os.listdir(tmp_path) == [f"step-{STEP - 1:08d}.safetensors"]
    kept = told[0] if told else getattr(caught.value, "result", None)
    assert (kept is None) == (kind == "keyboard")  # who stops at once wants no file, and has the checkpoint
    assert kept is None or (kept.step == len(kept.losses) == STEP - 1 and not kept.finished)
    if raised in (OutOfMemory, Broken):
        assert f"What was learned up to step {STEP - 1} is kept" in str(caught.value)
    assert_same(
        learned(train(make_problem(), ONCE, keeping=Keeping(tmp_path, resume=tmp_path), basis=tiny_basis())),
        straight[0],
    )
    assert_same(load_file(newest_checkpoint(tmp_path)), straight[1])


@pytest.mark.parametrize("place", ["backward after", "update before", "update after", "record after"])
def test_with_every_option_on_too(tmp_path, monkeypatch, place):
    """fp16's loss scale, mirrored pictures, varied captions, learned words of a bounded length."""
    settings = replace(EVERYTHING, checkpoint_every=0, steps=10)
    whole = learned(train(problem_with_everything(), settings, basis=tiny_basis()))
    with breaking(monkeypatch, place, lambda: RuntimeError("stumbled")), pytest.raises(RuntimeError):
        train(problem_with_everything(), settings, keeping=Keeping(tmp_path), basis=tiny_basis())
    resumed = train(problem_with_everything(), settings, keeping=Keeping(resume=tmp_path), basis=tiny_basis())
    assert 0 < newest_step(tmp_path) < 10
    assert_same(learned(resumed), whole)


def newest_step(folder) -> int:
    return int(newest_checkpoint(folder).stem.removeprefix("step-"))


def test_a_fault_in_a_callback_keeps_the_step_that_it_was_told_of(tmp_path, straight):
    def callback(progress):
        if progress.step == STEP:
            raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        train(make_problem(), ONCE, Listeners(callback), Keeping(tmp_path), basis=tiny_basis())
    assert newest_step(tmp_path) == STEP
    assert_same(learned(train(make_problem(), ONCE, keeping=Keeping(resume=tmp_path), basis=tiny_basis())), straight[0])


def test_half_an_update_is_undone(tmp_path, monkeypatch, straight):
    """The first half of the tensors has taken the step, the second has not."""
    real, calls = torch.optim.AdamW.step, []

    def half(optimizer, *inputs):
        calls.append(optimizer)
        if len(calls) < STEP:
            return real(optimizer, *inputs)
        gradients = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in gradients[len(gradients) // 2 :]:
            parameter.grad = None
        real(optimizer, *inputs)
        raise RuntimeError("stumbled")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", half)
        with pytest.raises(RuntimeError):
            train(make_problem(), ONCE, keeping=Keeping(tmp_path), basis=tiny_basis())
    assert newest_step(tmp_path) == STEP - 1
    assert_same(learned(train(make_problem(), ONCE, keeping=Keeping(resume=tmp_path), basis=tiny_basis())), straight[0])


def test_a_fault_in_the_first_step_is_raised_as_it_is_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("stumbled")))
    told = []
    with pytest.raises(RuntimeError, match="^stumbled$"):
        train(make_problem(), ONCE, Listeners(fault=told.append), Keeping(tmp_path), basis=tiny_basis())
    assert told == [] and os.listdir(tmp_path) == []


def test_a_full_disk_after_a_fault_takes_nothing_from_what_the_fault_says(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with breaking(monkeypatch, "backward before", MemoryError), pytest.raises(OutOfMemory) as caught:
        monkeypatch.setattr(os, "fsync", full)
        train(make_problem(), ONCE, keeping=Keeping(tmp_path), basis=tiny_basis())
    said = str(caught.value)
    assert "memory ran out at step 7" in said and "No space left on device" in said and caught.value.result.step == 6


def test_a_second_ctrl_c_in_the_last_checkpoint_has_it_written_all_the_same(tmp_path, monkeypatch, straight):
    real, synced = os.fsync, []

    def interrupted(descriptor):
        synced.append(descriptor)
        if len(synced) == 1:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(make_problem(), ONCE, keeping=Keeping(tmp_path), basis=tiny_basis())
    assert newest_step(tmp_path) == ONCE.steps
    assert_same(load_file(newest_checkpoint(tmp_path)), straight[1])
