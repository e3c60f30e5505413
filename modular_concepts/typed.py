"""Numbers as a person types them: Python's, but without underscores, for 0_8 is 8 to Python and to nobody else."""

from __future__ import annotations


def read_number(text: str) -> float:
    """Raises ValueError for what is no number."""
    return float(_without_underscore(text))


def read_whole(text: str) -> int:
    """Raises ValueError for what is no whole number."""
    return int(_without_underscore(text))


def _without_underscore(text: str) -> str:
    if "_" in text:
        raise ValueError(text)
    return text
