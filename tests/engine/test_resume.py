"""Resume is determinism: a training that was interrupted ends bit for bit where it would have ended."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_problem
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_problem import EVERYTHING, RESUME_SETTINGS, assert_same, learned, problem_with_everything, tiny_basis
from tiny_problem import tiny_problem as make_problem

from bench.given_base import with_base
from modular_concepts.errors import AdapterError
from modular_concepts.training.checkpoint import newest_checkpoint
from modular_concepts.training.loop import Cancelled, Keeping, Listeners, train
from modular_concepts.training.problem import Examples

ROOT = Path(tiny_problem.__file__).parents[2]


def run(folder=None, resume=None, callback=None, settings=RESUME_SETTINGS, problem=None, **options):
    problem = problem or make_problem()
    return train(problem, settings, Listeners(callback), Keeping(folder, resume, **options), basis=tiny_basis())


def problem_with_all_layers():
    """`problem_with_everything` with the layers of `make_problem`."""
    problem = problem_with_everything()
    return replace(problem, layers=problem.layers | {"text_encoder.mix": problem.base.modules[1].mix})


def child(folder, *options):
    """A training in a process of its own, on as many threads as this one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, tiny_problem.__file__, str(folder), *options]
    return subprocess.Popen(command, env=environment)  # noqa: S603 - our own command


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """20 steps without a break: what was learned, and the last checkpoint with optimizer and generators."""
    folder = tmp_path_factory.mktemp("straight")
    return learned(run(folder)), load_file(newest_checkpoint(folder))


def test_ten_steps_and_ten_more_in_a_new_process_are_twenty(tmp_path, straight):
    half = run(tmp_path, callback=lambda progress: progress.step == 10)
    assert half.step == 10 and not half.finished
    assert child(tmp_path).wait(60) == 0
    assert_same(load_file(tmp_path / "final.safetensors"), straight[0])
    assert_same(load_file(newest_checkpoint(tmp_path)), straight[1])


def train_everything(folder=None, resume=None, callback=None, **changed):
    settings = replace(EVERYTHING, **changed)
    return run(folder, resume, callback, settings, problem_with_everything())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    return learned(train_everything(folder)), load_file(newest_checkpoint(folder))


@pytest.mark.parametrize("step", [1, 7, 13, 19])
def test_with_every_option_on_a_resumed_training_ends_the_same(tmp_path, everything, step):
    """Buckets, repeats, mirrored pictures, varied captions, class pictures of another size, fp16, checkpointing."""
    half = train_everything(tmp_path, callback=lambda progress: progress.step == step)
    assert half.step == step and not half.finished
    assert_same(learned(train_everything(tmp_path, tmp_path)), everything[0])
    assert_same(load_file(newest_checkpoint(tmp_path)), everything[1])


def test_with_every_option_on_a_new_process_ends_the_same(tmp_path, everything):
    train_everything(tmp_path, callback=lambda progress: progress.step == 10)
    assert child(tmp_path, "--everything").wait(120) == 0
    assert_same(load_file(tmp_path / "final.safetensors"), everything[0])
    assert_same(load_file(newest_checkpoint(tmp_path)), everything[1])


@pytest.mark.parametrize(
    "changed",
    [
        {"flip": False},
        {"caption_dropout": 0.0},
        {"shuffle_tags": False},
        {"attention_regularisation": 0.0},
        {"precision": "fp32"},
    ],
)
def test_every_option_takes_part_in_that(everything, changed):
    assert not torch.equal(learned(train_everything(**changed))["losses"], everything[0]["losses"])


def test_gradient_checkpointing_changes_nothing_so_it_may_be_turned_on_to_resume(tmp_path, everything):
    train_everything(tmp_path, callback=lambda progress: progress.step == 10, gradient_checkpointing=False)
    assert_same(learned(train_everything(tmp_path, tmp_path)), everything[0])


def test_options_that_were_off_may_be_turned_on_when_changes_are_accepted(tmp_path):
    run(tmp_path, callback=lambda progress: progress.step == 2)
    result = run(resume=tmp_path, settings=EVERYTHING, problem=problem_with_all_layers(), accept_changes=True)
    assert result.finished


def test_a_killed_training_is_resumed_to_the_same_end(tmp_path, straight):
    slow = child(tmp_path, "--sleep", "0.05")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    slow.kill()
    assert slow.wait(10) == -signal.SIGKILL
    assert child(tmp_path, "--die-in-save", "3").wait(60) == -signal.SIGKILL
    assert list(tmp_path.glob(".step-*.part")), "killed between writing and renaming"
    assert not (tmp_path / "final.safetensors").exists()
    result = run(tmp_path, resume=tmp_path)
    assert_same(learned(result), straight[0])
    assert_same(load_file(newest_checkpoint(tmp_path)), straight[1])


@pytest.mark.parametrize("step", [1, 7, 19])
def test_a_cancel_inside_a_step_loses_nothing(tmp_path, straight, step):
    problem, calls = make_problem(), []

    def predict(*inputs):
        calls.append(inputs)
        if len(calls) == step:
            raise Cancelled
        return problem.base.predict(*inputs)

    cancelled = run(tmp_path, problem=with_base(problem, predict=predict))
    assert cancelled.step == step - 1 and not cancelled.finished
    assert_same(learned(run(resume=tmp_path)), straight[0])


def test_only_the_newest_checkpoints_stay(tmp_path):
    run(tmp_path, settings=replace(RESUME_SETTINGS, keep_checkpoints=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}.safetensors" for step in (18, 19, 20)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run(folder, callback=lambda progress: progress.step == 2)
    return newest_checkpoint(folder)


def test_changed_settings_are_named(checkpoint):
    settings = replace(RESUME_SETTINGS, adapter_lr=0.5, checkpoint_every=7)
    with pytest.raises(AdapterError, match="adapter_lr was 0.01, is now 0.5") as caught:
        run(resume=checkpoint, settings=settings)
    assert "checkpoint_every" not in str(caught.value)
    assert run(resume=checkpoint, settings=settings, accept_changes=True).finished


def test_a_checkpoint_of_a_version_with_fewer_settings_counts_them_as_off(checkpoint, tmp_path):
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    identity = json.loads(metadata["identity"])
    for later in ("flip", "shuffle_tags", "caption_dropout"):
        del identity["settings"][later]
    older = tmp_path / checkpoint.name
    save_file(load_file(checkpoint), older, metadata | {"identity": json.dumps(identity)})
    assert run(resume=older).finished
    with pytest.raises(AdapterError, match="shuffle_tags was False, is now True"):
        run(resume=older, settings=replace(RESUME_SETTINGS, shuffle_tags=True))


def test_changed_pictures_captions_and_base_are_refused(checkpoint):
    examples = make_problem().examples
    recaptioned = Examples(examples.latents, ("a <x> man",) * 5, examples.masks)
    repainted = Examples(examples.latents + 1, examples.captions, examples.masks)
    for changed in (recaptioned, repainted):
        with pytest.raises(AdapterError, match="pictures, captions or masks"):
            run(resume=checkpoint, problem=make_problem(examples=changed))
    fewer = Examples(examples.latents[:2], examples.captions[:2])
    assert run(resume=checkpoint, problem=make_problem(examples=fewer), accept_changes=True).finished
    with pytest.raises(AdapterError, match="base model"):
        run(resume=checkpoint, problem=make_problem(hash="other"))


def test_another_rank_is_refused_whatever_is_accepted(checkpoint):
    with pytest.raises(AdapterError, match="rank"):
        run(resume=checkpoint, settings=replace(RESUME_SETTINGS, rank=1), accept_changes=True)


def test_unreadable_and_missing_checkpoints_say_so(checkpoint, tmp_path):
    with pytest.raises(AdapterError, match="holds no checkpoint"):
        run(resume=tmp_path)
    cut = tmp_path / "step-00000002.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(AdapterError, match="cannot be read"):
        run(resume=cut)
    with pytest.raises(AdapterError, match="no such checkpoint or folder"):
        run(resume=tmp_path / "nothing.safetensors")


def test_a_full_disk_is_one_sentence_and_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, callback=lambda progress: progress.step == 2)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match="could not be written .No space left"):
        run(tmp_path, resume=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
