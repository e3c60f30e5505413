"""Promise 1: whatever is done to a file, reading it ends in a value or one AdapterError, soon and small.

1,000 seeded mutations by default; MODULAR_CONCEPTS_FUZZ_CASES=5000 for the full count.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch

from modular_concepts.concept import Concept
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.diffusers import export_diffusers, import_diffusers
from modular_concepts.files.embeddings import import_embedding
from modular_concepts.files.kohya import export_kohya, import_kohya
from modular_concepts.files.lora import import_lora
from modular_concepts.files.moments import load_moments, save_moments
from modular_concepts.files.safe import write_safetensors
from modular_concepts.moments import Moment

CASES = int(os.environ.get("MODULAR_CONCEPTS_FUZZ_CASES", "1000"))
KINDS = {
    "concept": (save_concept, load_concept),
    "compact": (lambda concept, path: save_concept(concept, path, compact=True), load_concept),
    "kohya": (export_kohya, import_kohya),
    "diffusers": (export_diffusers, import_diffusers),
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
NUMBERS = [None, True, -1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf")]
TEXTS = ["", "F32", "F64", "BF16", "I64", "../x", "\ud800", "lora", "block", "haar", "file", "x" * 5000]
LISTS = [[], [0], [1, 2], [[]], [2**40, 4]]
OBJECTS = [{}, {"range": [0, 9, 1]}, {"range": [0, 2**60, 1]}, {"a": {"b": 1}}]
NASTY = NUMBERS + TEXTS + LISTS + OBJECTS


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three changes, of the bytes or of the header's own structure."""
    for _ in range(rng.randint(1, 3)):
        data = bytes(mutate_header(data, rng) if rng.random() < 0.6 else mutate_bytes(bytearray(data), rng))
    return data


def mutate_bytes(data: bytearray, rng: random.Random) -> bytearray:
    if not data:
        return data
    at, length = rng.randrange(len(data)), rng.randint(1, 40)
    match rng.randrange(7):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = rng.randbytes(length)
        case 4:
            data += rng.randbytes(length)
        case 5:
            data[:8] = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data), len(data) + 1]).to_bytes(8, "little")
        case 6:
            data[at : at + 4] = b"\x00\x00\xc0\x7f"
    return data


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Change one value, key or entry of the JSON header or of the JSON in its metadata; fit the length."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        mutate_json(header, rng)
        raw = json.dumps(header).encode()
    except (ValueError, AttributeError, RecursionError):
        return data
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def mutate_json(node: object, rng: random.Random) -> None:
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        value = node[key]
        if isinstance(value, str) and value.startswith("{") and rng.random() < 0.9:
            inner = json.loads(value)
            mutate_json(inner, rng)
            node[key] = json.dumps(inner)
            return
        if isinstance(value, dict | list) and value and rng.random() < 0.85:
            node = value
            continue
        match rng.randrange(4):
            case 0 | 1:
                node[key] = rng.choice(NASTY)
            case 2:
                del node[key]
            case 3 if isinstance(node, dict):
                node[str(rng.choice(NASTY))] = node.pop(key)
            case 3:
                node.append(value + rng.randint(-2, 2) if isinstance(value, int) else value)
        return


def peak_memory(reset: bool = False) -> int:
    """Peak resident bytes of this process since the last reset; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_file_ends_in_a_value_or_an_adapter_error(make_concept, tmp_path, kind):
    write, read = KINDS[kind]
    path = tmp_path / "x.safetensors"
    write(make_concept("block_orthogonal"), path)
    sound = path.read_bytes()
    read(path)
    before, refused, slowest = peak_memory(reset=True), 0, 0.0
    for case in range(CASES // len(KINDS)):
        path.write_bytes(mutated(sound, random.Random(f"{kind} {case}")))  # noqa: S311
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
