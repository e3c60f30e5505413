"""A folder of checkpoints belongs to one training: nobody else removes, takes or writes anything there."""

import json
import os
import re
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
from tiny_problem import RESUME_SETTINGS, learned, tiny_basis
from tiny_problem import tiny_problem as make_problem

from modular_concepts.errors import AdapterError
from modular_concepts.training.checkpoint import newest_checkpoint
from modular_concepts.training.loop import Keeping, Listeners, train
from modular_concepts.training.ownership import Occupied, check_folder, claimed, owner_of

ROOT = Path(tiny_problem.__file__).parents[2]
SETTINGS = replace(RESUME_SETTINGS, steps=6, name="ann")
OTHER = replace(SETTINGS, name="bob", steps=4)


def run(folder=None, resume=None, stop=0, settings=SETTINGS, **options):
    callback = (lambda progress: progress.step == stop) if stop else None
    return train(make_problem(), settings, Listeners(callback), Keeping(folder, resume, **options), tiny_basis())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(folder: Path, *options: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, tiny_problem.__file__, str(folder), *options], env=environment, stderr=subprocess.PIPE
    )


@pytest.fixture
def anns(tmp_path) -> Path:
    """A folder in which ann was stopped at step 3 of 6."""
    run(tmp_path / "steps", stop=3)
    return tmp_path / "steps"


@pytest.mark.parametrize("settings", [OTHER, SETTINGS, replace(SETTINGS, seed=1)], ids=["other", "same", "seed"])
def test_a_second_training_in_a_folder_is_refused_before_its_first_step(anns, settings):
    before, steps = files(anns), []
    with pytest.raises(Occupied, match=r"holds the checkpoints of another training \('ann', step 3 of 6\)") as caught:
        train(make_problem(), settings, Listeners(steps.append), Keeping(anns), basis=tiny_basis())
    assert "resume that one, or choose another folder" in str(caught.value) and "\n" not in str(caught.value)
    assert not steps and files(anns) == before


def test_pruning_leaves_what_is_another_trainings(anns, tmp_path):
    """However it came there: here a person copied it in while the training went on."""
    run(tmp_path / "bob", stop=2, settings=OTHER)
    foreign = newest_checkpoint(tmp_path / "bob")

    def copy_in(progress):
        if progress.step == 4:
            (anns / foreign.name).write_bytes(foreign.read_bytes())
            (anns / "step-00000001.safetensors").write_bytes(b"not to be read")

    train(make_problem(), SETTINGS, Listeners(copy_in), Keeping(anns, resume=anns), basis=tiny_basis())
    assert sorted(path.name for path in anns.iterdir()) == [f"step-{step:08d}.safetensors" for step in (1, 2, 5, 6)]
    assert (anns / foreign.name).read_bytes() == foreign.read_bytes()


def test_a_folder_with_two_trainings_is_not_resumed_by_chance(anns, tmp_path):
    run(tmp_path / "bob", settings=OTHER)
    for path in (tmp_path / "bob").iterdir():
        (anns / path.name).write_bytes(path.read_bytes())
    with pytest.raises(AdapterError, match="checkpoints of 2 trainings: .*'ann', step 2 of 6.*'bob', step 4 of 4"):
        run(resume=anns)
    assert run(resume=anns / "step-00000002.safetensors").finished


def test_a_resumed_training_goes_on_in_its_own_folder_and_in_a_free_one(anns, tmp_path):
    straight = learned(run())
    run(tmp_path / "elsewhere", resume=anns, stop=5)
    ended = run(anns, resume=anns)
    assert all(torch.equal(straight[name], tensor) for name, tensor in learned(ended).items())
    owners = {owner_of(path).run for folder in (anns, tmp_path / "elsewhere") for path in folder.iterdir()}
    assert len(owners) == 1


def test_an_older_checkpoint_is_not_gone_on_from_beneath_the_later_ones(anns):
    """They would outlive what it does, and be found in its place."""
    older = anns / "step-00000002.safetensors"
    with pytest.raises(
        Occupied, match=r"later checkpoints of this training \('ann', step 3 of 6\); go on from the newest"
    ):
        run(anns, resume=older)
    assert run(anns, resume=older, set_aside=True, stop=3).step == 3
    assert [path.name for path in (anns / "before").iterdir()] == ["step-00000003.safetensors"]


def test_what_is_set_aside_is_kept_as_long_as_it_is_not_finished(anns):
    first = files(anns)
    run(anns, settings=OTHER, set_aside=True)
    second = {name: data for name, data in files(anns).items() if "/" not in name}
    run(anns, set_aside=True, stop=1)
    assert {name: data for name, data in files(anns / "before").items()} == first
    assert files(anns / "before-2") == second
    third = {name: data for name, data in files(anns).items() if "/" not in name}
    run(anns, settings=OTHER, set_aside=True)  # bob's came to their end, so ann's third start may have their place
    assert files(anns / "before") == first and files(anns / "before-2") == third


def test_a_damaged_checkpoint_is_nobodys_and_stays(anns):
    (anns / "step-00000009.safetensors").write_bytes(b"\x10")
    with pytest.raises(Occupied, match="holds step-00000009.safetensors, which cannot be read; move it away"):
        run(anns, resume=anns / "step-00000003.safetensors")
    run(anns, resume=anns / "step-00000003.safetensors", set_aside=True)
    assert (anns / "before/step-00000009.safetensors").read_bytes() == b"\x10"


def test_checkpoints_of_a_version_that_named_no_run_are_told_apart_by_what_they_are_of(anns, tmp_path):
    def aged(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        del metadata["run"]
        save_file(load_file(path), path, metadata)

    for path in anns.iterdir():
        aged(path)
    with pytest.raises(Occupied, match="another training .'ann'"):
        run(anns, settings=OTHER)
    assert run(anns, resume=anns).finished
    assert len(list(anns.iterdir())) == 2


def test_two_processes_that_start_in_one_folder(tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()
    first = child(folder, "--sleep", "30")
    deadline = time.monotonic() + 60
    while not list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    for set_aside in (False, True):
        with pytest.raises(Occupied, match="another training is writing its checkpoints to .* just now") as caught:
            run(folder, set_aside=set_aside)
        assert not caught.value.movable
    with pytest.raises(Occupied, match="just now"):
        check_folder(folder)
    first.kill()
    assert first.wait(10) == -signal.SIGKILL
    with pytest.raises(Occupied, match="another training"):
        check_folder(folder)
    first.stderr.close()
    check_folder(folder, resume=folder)
    assert run(folder, settings=OTHER, set_aside=True).finished


def test_a_folder_is_free_again_after_an_end_a_fault_and_a_refusal(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path):
        raise ZeroDivisionError
    with claimed(tmp_path), pytest.raises(Occupied), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_half_written_is_cleared_by_the_next_start_and_no_other_file(tmp_path):
    torn, others = tmp_path / ".step-00000003.safetensors.part", (".mine.part", "step-3.safetensors", "notes.txt")
    for name in (torn.name, *others):
        (tmp_path / name).write_bytes(b"half")
    run(tmp_path, stop=1)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "step-00000001.safetensors"])


def test_a_checkpoint_names_its_run_and_a_new_training_is_a_new_one(tmp_path):
    run(tmp_path / "a", stop=1)
    run(tmp_path / "b", stop=1)
    names = []
    for folder in ("a", "b"):
        with safe_open(newest_checkpoint(tmp_path / folder), framework="pt") as file:
            names.append(file.metadata()["run"])
            assert json.loads(file.metadata()["identity"])["settings"]["name"] == "ann"
    assert names[0] != names[1] and all(re.fullmatch(r"[0-9a-f]{32}", name) for name in names)


def cannot(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_an_old_checkpoint_that_cannot_be_removed_stays_and_the_training_goes_on(tmp_path, monkeypatch):
    """As on Windows, where another program has it open."""
    monkeypatch.setattr(Path, "unlink", cannot)
    assert run(tmp_path, settings=replace(SETTINGS, keep_checkpoints=1), stop=3).step == 3
    assert len(list(tmp_path.glob("step-*"))) == 3
    monkeypatch.undo()
    run(tmp_path, settings=replace(SETTINGS, keep_checkpoints=1), resume=tmp_path, stop=4)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000004.safetensors"]


def test_checkpoints_that_cannot_be_put_aside_are_one_sentence(anns, monkeypatch):
    before = sorted(path.name for path in anns.glob("step-*"))
    monkeypatch.setattr(Path, "replace", cannot)
    with pytest.raises(AdapterError, match="put aside into before .Permission denied.; choose another folder"):
        run(anns, settings=OTHER, set_aside=True)
    assert sorted(path.name for path in anns.glob("step-*")) == before


def test_a_link_in_the_place_of_what_is_set_aside_is_left_alone(anns, tmp_path):
    elsewhere = tmp_path / "archive"
    run(elsewhere, settings=OTHER)
    (anns / "before").symlink_to(elsewhere)
    archived, first = files(elsewhere), files(anns)
    run(anns, settings=OTHER, set_aside=True)
    assert files(elsewhere) == archived and (anns / "before").is_symlink()
    assert files(anns / "before-2") == {name: data for name, data in first.items() if "/" not in name}


def test_fewer_steps_than_a_checkpoint_has_behind_it_are_refused(anns):
    with pytest.raises(AdapterError, match="has 3 steps behind it, and steps is 2; ask for more steps"):
        run(anns, settings=replace(SETTINGS, steps=2), resume=anns, accept_changes=True)


def test_another_word_to_start_from_is_another_training(anns):
    problem = make_problem()
    other = replace(problem, triggers={word: rows + 1 for word, rows in problem.triggers.items()})
    with pytest.raises(AdapterError, match="the class word, the description or the trigger word is another one"):
        train(other, SETTINGS, Listeners(), Keeping(anns, anns), tiny_basis())


def test_a_checkpoint_that_says_nothing_of_words_goes_on(anns):
    """As those of versions that did not note them."""
    path = newest_checkpoint(anns)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    identity = json.loads(metadata["identity"])
    del identity["words"]
    save_file(load_file(path), path, metadata | {"identity": json.dumps(identity)})
    assert run(anns, resume=anns).step == SETTINGS.steps
