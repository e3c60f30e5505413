"""Concept files and other programs' files; `safe` is the only door for bytes that we did not write."""
