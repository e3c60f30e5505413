"""Variables of the environment that libraries read when they are loaded, and cannot use."""

from __future__ import annotations

import io
import os
import sys

from ..errors import cut_in_the_middle

BAR = "TQDM_"
LIBRARIES = (BAR, "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_", "TORCH", "PYTORCH_", "USE_", "SAFETENSORS_")
LIBRARIES += ("TOKENIZERS_", "PILLOW_", "MPL", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "NVIDIA_")
SWITCHES = ("USE_TORCH", "USE_TF", "USE_FLAX", "USE_JAX")  # by which transformers goes without torch


def ignore_unusable_bars() -> list[str]:
    """Take variables of the progress bars away with which there is none; a sentence on them, if there are any."""
    there = [name for name in os.environ if name.startswith(BAR)]
    values = {name: os.environ.pop(name) for name in there}
    broken = [name for name, value in values.items() if not _can_draw(name, value)]
    os.environ.update({name: value for name, value in values.items() if name not in broken})
    if there:
        _forget_bars()
    return (
        [f"{_shown(broken, values)} of the environment is nothing that tqdm can use, and is ignored"] if broken else []
    )


def explain_variables(error: Exception) -> str:
    """A sentence on the variables for which a library failed, "" where none is to blame."""
    message = str(error)
    values = {name: value for name, value in os.environ.items() if name.startswith(LIBRARIES)}
    blamed = [
        name
        for name, value in values.items()
        if name in message or (not value.isdecimal() and value and repr(value) in message)
    ]
    if not blamed and isinstance(error, ImportError):
        blamed = [name for name in SWITCHES if name in values]
    if not blamed:
        return ""
    reason = cut_in_the_middle(" ".join(message.split()), 200)
    return (
        f"a library cannot use {_shown(blamed, values)} of the environment ({type(error).__name__}: {reason}); unset "
        "it, or give it a value that the library takes"
    )


def _shown(names: list[str], values: dict[str, str]) -> str:
    return " and ".join(f"{name}={cut_in_the_middle(values[name], 40)}" for name in names)


def _can_draw(name: str, value: str) -> bool:
    """Whether a bar can be drawn with this variable alone, which tqdm reads when it is loaded."""
    _forget_bars()
    os.environ[name] = value
    try:
        from tqdm import tqdm

        with tqdm(total=2, mininterval=0.0, dynamic_ncols=True, desc="trial", file=io.StringIO()) as bar:
            bar.update(1)
            bar.refresh()
        return name != f"{BAR}FILE"  # a text, where a stream is needed
    except Exception:  # whatever comes of a text that is anything
        return False
    finally:
        del os.environ[name]


def _forget_bars() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tqdm"]:
        del sys.modules[name]
