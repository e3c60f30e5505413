"""A training that is cancelled, and one whose server is killed: what is lost, what is kept, how it goes on."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
from safetensors import safe_open
from served import HostServer
from test_bad_input import taught

from modular_concepts.files.concept import load_concept

STEPS, EVERY = 40, 4
SHOWN = 16  # steps between previews: the host tells of these steps however fast they are


def lesson(server: HostServer, name: str, **changes) -> dict:
    """Train `name` on four pictures with a checkpoint every EVERY steps, and save it."""
    prompt = taught(server, name=name, steps=STEPS, checkpoint_every=EVERY, preview_every=SHOWN, **changes)
    prompt["pictures"]["inputs"]["seed"] = 5
    prompt["save"] = {
        "class_type": "ConceptSave",
        "inputs": {"concept": ["train", 0], "filename": name, "format": "concept", "replace": False},
    }
    return prompt


def resumed(prompt: dict) -> dict:
    prompt = copy.deepcopy(prompt)
    prompt["train"]["inputs"]["resume"] = True
    return prompt


def steps_done(run) -> int:
    return max((value for value, _ in run.progress.get("train", [])), default=0)


def first_step(run) -> int:
    return min(value for value, _ in run.progress["train"])


def digests(*folders: Path) -> dict[Path, str]:
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_cancelled_training_leaves_a_usable_concept_and_goes_on_where_it_stopped(server):
    prompt = lesson(server, "cancelled")
    prompt_id = server.begin(prompt)
    server.wait(prompt_id, lambda run: steps_done(run) >= SHOWN or run.ending)
    server.interrupt()
    run = server.wait(prompt_id)
    assert run.ending == "execution_interrupted"
    told = steps_done(run)
    kept = sorted((server.models / "concepts").glob("cancelled-cancelled-step*.safetensors"))
    assert kept, "no concept file was kept"
    concept = load_concept(kept[-1])
    assert concept.recipe.training["finished"] is False
    done = concept.recipe.training["steps_done"]
    assert SHOWN <= told <= done < STEPS
    whole = server.run(resumed(prompt))
    assert first_step(whole) == done + 1
    assert steps_done(whole) == STEPS
    finished = load_concept(server.models / "concepts" / "cancelled.safetensors")
    assert finished.recipe.training["steps_done"] == STEPS


@pytest.fixture
def own_server(host, tmp_path):
    running = HostServer(host, tmp_path)
    yield running
    running.stop()


def test_a_killed_server_loses_no_more_than_the_steps_since_the_last_checkpoint(own_server):
    server = own_server
    short = lesson(server, "whole")
    short["train"]["inputs"] |= {"steps": 2}
    server.run(short)
    finished = digests(server.models / "concepts")
    assert len(finished) == 1
    prompt = lesson(server, "killed")
    prompt_id = server.begin(prompt)
    run = server.wait(prompt_id, lambda run: steps_done(run) >= 2 * EVERY + 2 or run.ending)
    assert not run.ending
    server.kill()
    done = steps_done(run)
    assert digests(server.models / "concepts") == finished
    for path in server.output.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.keys()
    server.start()
    again = server.run(resumed(prompt))
    assert first_step(again) > done - EVERY
    assert steps_done(again) == STEPS
    assert load_concept(server.models / "concepts" / "killed.safetensors").recipe.training["steps_done"] == STEPS
    untouched = digests(server.models / "concepts")
    assert {path: untouched[path] for path in finished} == finished
