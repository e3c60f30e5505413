"""Modular Concepts: orthogonal low-rank concepts, trained apart and summed together.  Knows no host.

    import modular_concepts as mc

    base = mc.load_base("path/to/a-diffusers-folder")
    tom, tim = mc.load_concept("tom.safetensors"), mc.load_concept("tim.safetensors")
    with mc.customised(base, [tom, tim], [1.0, 0.8]) as words:
        pictures = mc.sample(base, ["a <tom> on the beach"], [0], words)

Nothing heavy is loaded before it is used.  `docs/api.md` shows each of these names at work.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that it is of.
_HOMES = {
    "AdapterError": "errors",
    "Concept": "concept",
    "Dataset": "data.dataset",
    "Keeping": "training.loop",
    "Listeners": "training.loop",
    "MergeOptions": "merging.options",
    "OrthogonalBasis": "adapters.basis",
    "Recipe": "concept",
    "Region": "regions.geometry",
    "SampleSettings": "sampling",
    "Stack": "stack",
    "Subject": "training.teach",
    "Targets": "models.targets",
    "TrainSettings": "training.settings",
    "crosstalk_report": "crosstalk.report",
    "customised": "sampling",
    "export_diffusers": "files.diffusers",
    "export_kohya": "files.kohya",
    "load_base": "load",
    "load_concept": "files.lora",
    "load_folder": "data.dataset",
    "merge": "merging.as_concept",
    "sample": "sampling",
    "save_concept": "files.concept",
    "train_concept": "training.teach",
}
# Public name -> what its module calls it, where that is another.
_CALLED = {"crosstalk_report": "explained", "load_concept": "concept_of_file", "merge": "merged_stack"}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), _CALLED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
