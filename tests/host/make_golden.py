"""Make golden/CONCEPT_VERSION.safetensors with the host that COMFYUI_PATH names, as a user would: train and save.

    PYTHONPATH=.:tests/host python tests/host/make_golden.py minka

Prints the digest that test_golden_files.py holds the file to.  A released file is never made again: a new host version
or a new form of concept gets a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from finding import find_host
from served import HostServer

from modular_concepts.concept import Concept
from modular_concepts.files.concept import load_concept

FOLDER = Path(__file__).parent / "golden"
# Small: one column or row block of rank 1 in the layers that hear the prompt.
LESSON = {
    "steps": 24,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "token_learning_rate": 1e-2,
    "token_vectors": 4,
    "targets": "cross-attention k,v",
    "preview_every": 0,
    "checkpoint_every": 0,
}


def lesson(server: HostServer, name: str) -> dict:
    """Train a standard concept on four pictures and save it: minka in columns, any other in a block of rows."""
    inputs = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "dataset": ["data", 0]}
    inputs |= {"name": name, "class_word": ["pictures", 3], "description": ["pictures", 4], **LESSON}
    basis = {"basis": server.node("OrthoBasisLoader", rank=1)} if name == "minka" else {}
    if basis:
        trainer = server.node("OrthoLoRATrainer", **inputs, ortho_basis=["basis", 0], slot=2)
    else:
        trainer = server.node("BlockLoRATrainer", **inputs, rank=1, blocks=3, slot=1)
    return {
        "base": server.node("ToyBaseLoader"),
        "pictures": server.node("ToyPictures", concept=name, count=4),
        "data": server.node("ConceptDataset", images=["pictures", 0], captions=["pictures", 1], width=32, height=32),
        **basis,
        "train": trainer,
        "save": server.node("ConceptSave", concept=["train", 0], filename=name),
    }


def digest(concept: Concept) -> str:
    """Every bit that was learned: layers by name, then words."""
    whole = hashlib.sha256()
    for layer, adapter in sorted(concept.layers.items()):
        rows = "all rows" if adapter.rows is None else adapter.rows.tolist()
        whole.update(f"{layer} {adapter.kind} {adapter.alpha} {rows}".encode())
        for factor in (adapter.lora_up, adapter.lora_down):
            whole.update(f"{factor.dtype} {tuple(factor.shape)}".encode() + factor.numpy().tobytes())
    for word, rows in sorted(concept.tokens.items()):
        whole.update(word.encode() + rows.numpy().astype(np.float32).tobytes())
    return whole.hexdigest()


def main(name: str) -> None:
    with TemporaryDirectory() as folder:
        server = HostServer(find_host(), Path(folder))
        try:
            version = json.loads(server.get("/system_stats"))["system"]["comfyui_version"]
            server.run(lesson(server, name))
            made = server.models / "concepts" / f"{name}.safetensors"
            FOLDER.mkdir(exist_ok=True)
            kept = FOLDER / f"{name}_{version}.safetensors"
            kept.write_bytes(made.read_bytes())
        finally:
            server.stop()
    sys.stdout.write(f"{kept.name}: {kept.stat().st_size} bytes, {digest(load_concept(kept))}\n")


if __name__ == "__main__":
    main(sys.argv[1])
