"""A base by its name: the toy base, or a folder of a diffusers model."""

from __future__ import annotations

from pathlib import Path

from .errors import AdapterError
from .families.toy import TOY
from .models.base import BaseModel
from .storage.names import nameable


def load_base(name: str | Path) -> BaseModel:
    """The toy base, or the Stable Diffusion 1.x, 2.x or XL model in a diffusers folder; frozen, float32, on the CPU.

    Raises AdapterError for what is neither, and for a folder that cannot be used.
    """
    if str(name) == TOY.name:
        from .toy.base import load_toy_base

        return load_toy_base()
    path = nameable(Path(name).expanduser())
    if not str(name).strip() or not path.is_dir():
        raise AdapterError(f"there is no base {str(name)!r}; give {TOY.name}, or the folder of a diffusers model")
    from .models.diffusers_folder import load_diffusers_base

    return load_diffusers_base(path)
