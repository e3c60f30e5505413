"""Promise 1: whatever is done to a file, reading it ends in a value or one AdapterError, soon and small.

1,000 seeded mutations by default; MODULAR_CONCEPTS_FUZZ_CASES=5000 for the full count.
"""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
from mutations import mutated, peak_memory

from modular_concepts.concept import Concept
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.files.embeddings import import_embedding
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.lora import import_lora
from modular_concepts.files.moments import load_moments, save_moments
from modular_concepts.merging.moments import Moment
from modular_concepts.storage.safetensors import write_safetensors

CASES = int(os.environ.get("MODULAR_CONCEPTS_FUZZ_CASES", "1000"))
KINDS = {
    "concept": (save_concept, load_concept),
    "compact": (lambda concept, path: save_concept(concept, path, compact=True), load_concept),
    "kohya": (export_kohya, import_lora),
    "diffusers": (export_diffusers, import_lora),
    "locon": (
        lambda concept, path: write_safetensors(
            path,
            {
                f"lora_unet_mid_block_resnets_0_conv1.lora_{part}.weight": torch.ones(shape)
                for part, shape in {"up": (4, 3, 1, 1), "mid": (3, 3, 3, 3), "down": (3, 5, 1, 1)}.items()
            },
            {"modelspec.trigger_phrase": "a, b", "modelspec.thumbnail": "data:image/jpeg;base64,/9j/"},
        ),
        import_lora,
    ),
    "embedding": (
        lambda concept, path: write_safetensors(path, {"word": torch.ones(2, 8)}, {}),
        import_embedding,
    ),
    "moments": (
        lambda concept, path: save_moments({name: Moment.of(torch.eye(6)) for name in concept.layers}, path),
        load_moments,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_file_ends_in_a_value_or_an_adapter_error(make_concept, tmp_path, kind):
    write, read = KINDS[kind]
    path = tmp_path / "x.safetensors"
    write(make_concept("block_orthogonal"), path)
    sound = path.read_bytes()
    read(path)
    before, refused, slowest = peak_memory(reset=True), 0, 0.0
    for case in range(CASES // len(KINDS)):
        path.write_bytes(mutated(sound, random.Random(f"{kind} {case}")))  # noqa: S311 - a sample, no secret
        start = time.perf_counter()
        try:
            result = read(path)
        except AdapterError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message and 10 < len(message) < 700 and message.startswith("x.safetensors: ")
            message.encode()
        else:
            assert finite(result)
        slowest = max(slowest, time.perf_counter() - start)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert slowest < 1.0
    assert peak_memory() - before <= 64 * 2**20
    assert refused > 0.5 * (CASES // len(KINDS))


def finite(result: object) -> bool:
    if isinstance(result, dict):
        return all(bool(torch.isfinite(moment.matrix()).all()) for moment in result.values())
    concept = result if isinstance(result, Concept) else result[0]
    if isinstance(concept, str):
        return bool(torch.isfinite(result[1]).all())
    tensors = [*concept.tokens.values()]
    for adapter in concept.layers.values():
        tensors += [adapter.lora_up, adapter.lora_down]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
