"""What docs/trust.md is made of: every promise has tests, a fault breaks its row, and a row without news stays."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.torture.evidence import Trial, carried_out, gathered
from bench.torture.laws import HOST_LAWS, LAWS, ROOT, counted
from bench.torture.page import written
from bench.torture.rows import PROMISES
from bench.torture.versions import NEWER

SNEAKY = {"held": 3, "failed": [], "python": 2, "scripts": 1, "ruff": True, "excused": []}
QUEUE = {"version": "9.9.9", "queued": 20, "bad": 2, "finished": 18, "named": 2, "wrong": [], "left": 0}
QUEUE["memory"] = {"looks": 9, "early": 100.0, "late": 101.0, "peak": 102.0}


def row(page: Path, number: int) -> str:
    return next(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {number} |"))


def page_of(folder: Path, **trials) -> Path:
    for name, facts in trials.items():
        carried_out(Trial(name.replace("_", "-"), (11,), lambda facts=facts: facts), folder / "seen")
    written(folder / "trust.md", gathered(folder / "seen"))
    return folder / "trust.md"


@pytest.mark.parametrize("laws", [LAWS, HOST_LAWS], ids=["engine", "host"])
def test_every_pattern_of_the_laws_names_a_test_that_there_is(laws):
    for patterns in laws.values():
        for path, pattern in patterns.items():
            tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
            tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            for part in pattern.split("|"):
                assert any(name.startswith("test_") and part in name for name in tests), f"{path}: {part}"


def test_a_page_has_twelve_rows_and_says_what_was_seen(tmp_path):
    page = page_of(tmp_path, sneaky=SNEAKY, queue_new=QUEUE)
    for number, name in PROMISES.items():
        assert name in row(page, number)
    assert "kept. 3 checks hold" in row(page, 12)
    assert "18 of 18 good ones finished, 2 of 2 bad ones named their node" in row(page, 11)
    assert "not yet" in row(page, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"finished": 17}, "1 good prompts did not finish"),
        ({"named": 1}, "1 bad prompts did not name their node"),
        ({"left": 4}, "4 prompts stayed in the queue"),
        ({"wrong": ["a good prompt: execution_error"]}, "a good prompt: execution_error"),
        ({"memory": QUEUE["memory"] | {"late": 300.0}}, "memory grew by 200 MiB"),
    ],
)
def test_what_went_wrong_breaks_the_promise(tmp_path, change, said):
    page = page_of(tmp_path, queue_new=QUEUE | change)
    assert f"**BROKEN**: {said}" in row(page, 11)


def test_a_trial_that_fails_breaks_its_promise_and_the_others_go_on(tmp_path):
    def fails():
        raise RuntimeError("the server did not start")

    carried_out(Trial("queue-new", (11,), fails), tmp_path / "seen")
    page = page_of(tmp_path, sneaky=SNEAKY)
    assert "**BROKEN**: queue-new: RuntimeError: the server did not start" in row(page, 11)
    assert "kept" in row(page, 12)


def test_a_row_without_new_evidence_stays(tmp_path):
    page = page_of(tmp_path, sneaky=SNEAKY)
    before = row(page, 12)
    (tmp_path / "seen" / "sneaky.json").unlink()
    page = page_of(tmp_path, queue_new=QUEUE)
    assert row(page, 12) == before and "18 of 18" in row(page, 11)


def test_tests_are_counted_by_promise_and_those_that_prove_nothing_apart():
    law = "engine/test_merge.py::test_the_order_of_summands_does_not_matter"
    records = [
        {"test": law, "outcome": "passed", "compared": {"1e-06": [4, 2e-7]}},
        {"test": law + "[b]", "outcome": "failed", "text": "E   assert 0.007 > 0.01\n", "compared": {}},
        {"test": law + "[c]", "outcome": "failed", "text": "E   assert 2e-05 < 1e-06\n", "compared": {}},
        {"test": "engine/test_merge.py::test_something_else", "outcome": "failed", "text": "", "compared": {}},
    ]
    tally = counted(records, LAWS)["6"]
    assert tally["held"] == 1 and len(tally["weak"]) == 1 and tally["compared"] == {"1e-06": [4, 2e-7]}
    assert tally["failed"] == [f"{law}[c]: assert 2e-05 < 1e-06"]


def test_comparisons_are_recorded_with_their_bounds(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "def test_it():\n    assert 0.25 < 0.5\n    assert 0.001 < 0.002\n    assert 1e-7 <= 1e-5\n"
        "    assert 3 < 4\n    assert 0.5 > 0.25\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.torture.recording", "--recording", "out.jsonl"]
    command += ["-o", "enable_assertion_pass_hook=true", "-p", "no:cacheprovider", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)  # noqa: S603 - our own command
    (record,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert record["outcome"] == "passed" and record["compared"] == {"0.002": [1, 0.001], "1e-05": [1, 1e-07]}


@pytest.mark.parametrize(
    "source",
    [
        "import tomllib",
        "from enum import StrEnum",
        "raise ExceptionGroup('', [])",
        "from typing import Any, Self",
        "datetime.UTC",
        "itertools.batched(x, 2)",
    ],
)
def test_what_python_310_has_not_is_seen(source):
    assert NEWER.search(source)


def test_the_page_that_is_published_is_whole():
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == list(range(1, 13))
    assert not re.search(r"(?<![\w.])/(root|tmp|work|home)/", text)
