"""Shared orthogonal bases that lie in models/ortho_bases, by name."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...modular_concepts.adapters.basis import OrthogonalBasis, load_basis
from ...modular_concepts.errors import AdapterError
from .folders import KINDS

BASES = "ortho_bases"


def basis_names() -> list[str]:
    """What models/ortho_bases holds: files of matrices, and folders of .npy files."""
    names = set()
    for root in _basis_roots():
        if root.is_dir():
            names |= {
                entry.name
                for entry in root.iterdir()
                if not entry.name.startswith(".")
                and (any(entry.glob("*.npy")) if entry.is_dir() else entry.suffix in KINDS[BASES])
            }
    return sorted(names)


def load_basis_named(name: str) -> OrthogonalBasis:
    """Raises AdapterError for a name that is not in models/ortho_bases, or a file that holds no basis."""
    return load_basis(_basis_path(name))


def basis_changed(name: str) -> str:
    """Another text whenever the file does: the host runs a node again when this changes."""
    path = _basis_path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return " ".join(f"{file.name} {state.st_mtime_ns} {state.st_size}" for file in files for state in [file.lstat()])


def _basis_path(name: str) -> Path:
    if name not in basis_names():
        raise AdapterError(f"there is no basis {name!r} in models/{BASES}; put the file there, or choose generated")
    return next(root / name for root in _basis_roots() if (root / name).exists())


def _basis_roots() -> list[Path]:
    registered = folder_paths.folder_names_and_paths.get(BASES)
    return [Path(root) for root in registered[0]] if registered else []
