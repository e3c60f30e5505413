"""Generators that follow from a seed and a purpose, so that no draw depends on the order of others."""

from __future__ import annotations

import hashlib

import torch


def seeded(seed: int, *purpose: str) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that no two draws depend on each other's order."""
    digest = hashlib.sha256("\0".join((str(seed), *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
