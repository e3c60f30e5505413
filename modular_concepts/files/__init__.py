"""Concept files and other programs' files; `safe` is the only door for bytes that we did not write."""

from .concept import load_concept, save_concept
from .safe import write_atomically

__all__ = ["load_concept", "save_concept", "write_atomically"]
