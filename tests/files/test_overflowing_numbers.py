"""Numbers that single precision cannot hold, or not once squared, are refused or read as what they are."""

import base64
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modular_concepts.concept import Concept, Recipe
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import TOKENS_KEY, load_concept, save_concept
from modular_concepts.files.embeddings import import_embedding
from modular_concepts.files.moments import FORMAT, load_moments

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize("value", [1e300, 1e39, 3e38, 1e13])
def test_an_embedding_beyond_single_precision_is_refused(tmp_path, value):
    save_file({"<kodo>": torch.full((1, 8), value, dtype=torch.float64)}, tmp_path / "kodo.safetensors")
    with pytest.raises(AdapterError, match="^kodo.safetensors: trigger word '<kodo>': its numbers reach"):
        import_embedding(tmp_path / "kodo.safetensors")


def test_a_learned_word_whose_squares_overflow_is_refused(tmp_path):
    path = tmp_path / "kodo.safetensors"
    save_concept(Concept("kodo", {}, {"<kodo>": torch.ones(1, 8)}, Recipe(method="words")), path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    data = base64.b64encode(np.full(8, 3e38, "<f4").tobytes()).decode()
    metadata[TOKENS_KEY] = json.dumps({"<kodo>": {"shape": [1, 8], "float32": data}})
    save_file({}, path, metadata)
    with pytest.raises(AdapterError, match="^kodo.safetensors: trigger word '<kodo>': its numbers reach"):
        load_concept(path)


def test_moments_in_double_precision_are_scaled_before_they_are_cut(tmp_path):
    tensors = {
        f"{LAYER}.factor": torch.full((2, 8), 1e300, dtype=torch.float64),
        f"{LAYER}.scale": torch.tensor([1e-300, 0.0], dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "kodo.moments", {"format": FORMAT})
    assert torch.allclose(load_moments(tmp_path / "kodo.moments")[LAYER].factor, torch.ones(2, 8))
