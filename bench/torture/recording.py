"""A pytest plugin that writes down what each test compared: how near a law came to its bound, and whether it held.

    pytest -p bench.torture.recording -o enable_assertion_pass_hook=true --recording OUT.jsonl

One JSON object a test: {"test": nodeid, "outcome": passed | failed | skipped, "seconds": ..., "text": of a failure,
"compared": {bound: [how many, largest value below it]}}; bounds beyond LARGEST are no tolerances and are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

LARGEST = 1e-2
BELOW = re.compile(r"^(-?[\d.]+(?:e[+-]?\d+)?) <=? ([\d.]+(?:e[+-]?\d+)?)\b")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--recording", type=Path, required=True)
    parser.addoption("--one-in", type=int, default=1, help="run only every so-manyth test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    step = config.getoption("--one-in")
    config.hook.pytest_deselected(items=[item for index, item in enumerate(items) if index % step])
    items[:] = items[::step]


class Recording:
    """What the running test has compared so far, and the file that gets it."""

    def __init__(self, path: Path):
        self.path = path
        self.compared: dict[str, list] = {}

    def pytest_assertion_pass(self, expl: str) -> None:
        seen = BELOW.match(expl)
        if seen and 0 < float(seen[2]) <= LARGEST:
            count, largest = self.compared.get(seen[2], (0, 0.0))
            self.compared[seen[2]] = [count + 1, max(largest, abs(float(seen[1])))]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            entry["text"] = str(report.longrepr)[-2000:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"compared": self.compared}) + "\n")
        self.compared = {}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recording(config.getoption("--recording")))
    # A passed comparison is told of with its operands, and big tensors take longer to print than to compare.
    torch.Tensor.__repr__ = lambda self, **_: f"tensor{tuple(self.shape)}" if self.dim() else repr(self.item())
