"""Marks the tests of files that take long as slow, so that `make check` is a loop of seconds; checks shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import shapes

shapes.install("modular_concepts")

SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").split())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
