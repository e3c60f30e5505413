"""Modular Concepts: orthogonal low-rank concepts, trained apart and summed together.  Knows no host."""

__version__ = "0.1.0"
