"""Promise 2: every golden file is read and written the same for ever, and so is any concept that is saved."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import torch

from bench.torture.laws import ROOT, tested
from modular_concepts.adapters.low_rank import KINDS
from modular_concepts.concept import Concept
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GOLDEN = ("files/test_concept_file.py",)


def tried(count: int, one_in: int = 1) -> dict:
    """The golden files' own tests, then `count` concepts drawn from seeds: saved, loaded and saved again."""
    records = tested(GOLDEN, ["--one-in", str(one_in)])
    seen = Counter()
    with tempfile.TemporaryDirectory() as folder:
        differing = [found for number in range(count) if (found := saved_twice(number, Path(folder), seen))]
    return {
        "golden": sum(record["outcome"] == "passed" for record in records),
        "failed": [record["test"] for record in records if record["outcome"] == "failed"],
        "saved": count,
        "kinds": dict(seen),
        "differing": differing[:20],
    }


def saved_twice(number: int, folder: Path, seen: Counter) -> str:
    """What differs, in words, or nothing.  A kind that cannot be left out of a compact file is saved whole."""
    rng = Random(number)  # noqa: S311
    concept = concept_like(rng)
    kind, compact = concept.recipe.method, rng.random() < 0.4
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    try:
        save_concept(concept, first, compact)
    except AdapterError:
        compact = False
        save_concept(concept, first, compact)
    seen[f"{kind}{', compact' * compact}"] += 1
    loaded = load_concept(first)
    save_concept(loaded, second, compact)
    where = f"concept {number} ({kind}, compact={compact})"
    if first.read_bytes() != second.read_bytes():
        return f"{where}: other bytes"
    for name, adapter in concept.layers.items():
        twin = loaded.layers[name]
        if not (torch.equal(adapter.lora_up, twin.lora_up) and torch.equal(adapter.lora_down, twin.lora_down)):
            return f"{where}: {name} is not what was saved"
    return ""


def concept_like(rng: Random) -> Concept:
    """The golden concept's layers with other numbers, another precision, other words and another name."""
    kind, dtype = rng.choice(KINDS), rng.choice(DTYPES)
    concept = builder().build_concept(kind)
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    layers = {}
    for name, adapter in rng.sample(list(concept.layers.items()), rng.randint(1, len(concept.layers))):
        up = torch.randn(adapter.lora_up.shape, generator=generator)
        layers[name] = adapter.replace(lora_up=up, alpha=rng.uniform(0.1, 64)).to(dtype=dtype)
    words = {
        f"<w{index}>": torch.randn((rng.randint(1, 3), 24), generator=generator) for index in range(rng.randint(0, 3))
    }
    recipe = dataclasses.replace(concept.recipe, triggers=tuple(words))
    return Concept("".join(rng.choice("aé東 -_.b") for _ in range(9)) + "x", layers, words, recipe)


def builder():
    """The file tests' conftest, which builds a concept of every kind."""
    spec = importlib.util.spec_from_file_location("files_conftest", ROOT / "tests" / "files" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
