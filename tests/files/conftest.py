"""Tiny concepts of every kind for the file tests, and the one behind the golden files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.adapters.low_rank import KINDS, LowRank, block_rows, new_full
from modular_concepts.adapters.own_words import reads_text
from modular_concepts.concept import Concept, Recipe

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
SHAPES = {  # layer -> (out, in, kernel)
    f"{BLOCK}.attn1.to_q": (16, 16, ()),
    f"{BLOCK}.attn2.to_k": (16, 24, ()),
    f"{BLOCK}.attn2.to_out.0": (16, 16, ()),
    f"{BLOCK}.ff.net.0.proj": (64, 16, ()),
    "unet.mid_block.attentions.0.proj_in": (16, 16, (1, 1)),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (24, 24, ()),
}
RANK = 4


def wave(*shape: int, phase: float = 0.0) -> torch.Tensor:
    """Numbers in -1..1, none of them zero, the same on every machine: sixteenths of a sawtooth."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + int(phase * 16)) % 31 - 15.5).div(16).reshape(shape)


def build_adapter(kind: str, out: int, inp: int, kernel: tuple[int, ...], basis: OrthogonalBasis) -> LowRank:
    if kind == "full":
        fresh = new_full(out, inp, kernel)
        return fresh.replace(lora_up=wave(*fresh.lora_up.shape, phase=out / 16))
    rows = block_rows(out, 4, 1, "strided") if kind.startswith("block") else None
    up = wave(out if rows is None else len(rows), RANK, phase=out / 16)
    down = wave(RANK, inp, *kernel, phase=inp / 16)
    if kind.endswith("orthogonal"):
        down = basis.columns(down[0].numel(), [3, 4, 5, 9]).reshape(down.shape)
    return LowRank(up, down, 2.0, kind, rows, out)


def build_concept(kind: str = "orthogonal", tokens: bool = True) -> Concept:
    basis = OrthogonalBasis("hadamard", 7)
    orthogonal = kind.endswith("orthogonal")
    recipe = Recipe(
        method="custom_diffusion" if kind == "full" else kind,
        rank=RANK,
        alpha=2.0,
        base_hash="ab" * 32,
        architecture="toy",
        triggers=("<kodo>", "<fell>"),
        class_word="dog",
        basis=basis.identity if orthogonal else None,
        basis_kind="hadamard" if orthogonal else None,
        basis_seed=7 if orthogonal else None,
        slot=1,
        slot_policy="slot",
        blocks=4 if kind.startswith("block") else None,
        layout="strided" if kind.startswith("block") else None,
        training={"steps": 400, "adapter_lr": 0.001, "betas": [0.9, 0.999]},
        origin={"pictures": 16, "fingerprint": "cd" * 32},
    )
    layers = {name: build_adapter(kind, *shape, basis) for name, shape in SHAPES.items()}
    words = {"<kodo>": wave(1, 24), "<fell>": wave(3, 2, 24, phase=0.5)} if tokens else {}
    return Concept("kodo the dog", layers, words, recipe)


def build_own_words(parts: bool = False) -> Concept:
    """For its own words alone; parts: two of them in one file."""
    concept = build_concept("lora")
    layers = {name: adapter for name, adapter in concept.layers.items() if reads_text(name)}
    origin = (
        {**concept.recipe.origin, "own_words": [[["<kodo>"], 1], [["<fell>"], 3]]} if parts else concept.recipe.origin
    )
    recipe = replace(concept.recipe, method="own_words", slot=None, slot_policy=None, origin=origin)
    return replace(concept, layers=layers, recipe=recipe)


@pytest.fixture
def make_concept():
    return build_concept


@pytest.fixture
def make_own_words():
    return build_own_words


@pytest.fixture(params=KINDS)
def concept(request) -> Concept:
    return build_concept(request.param)


@pytest.fixture
def same_concept():
    """Assert that two concepts are equal in every bit and field."""

    def compare(one: Concept, other: Concept) -> None:
        assert (one.name, one.recipe) == (other.name, other.recipe)
        assert set(one.layers) == set(other.layers) and set(one.tokens) == set(other.tokens)
        for name, adapter in one.layers.items():
            twin = other.layers[name]
            assert torch.equal(adapter.lora_up, twin.lora_up) and adapter.lora_up.abs().max() > 0.1
            assert torch.equal(adapter.lora_down, twin.lora_down) and adapter.lora_down.abs().max() > 0.1
            assert (adapter.kind, adapter.alpha, adapter.out_features) == (
                twin.kind,
                twin.alpha,
                twin.out_features,
            )
            assert (adapter.rows is None) == (twin.rows is None)
            assert adapter.rows is None or torch.equal(adapter.rows, twin.rows)
        for word, vectors in one.tokens.items():
            assert torch.equal(vectors, other.tokens[word]) and vectors.abs().max() > 0.1

    return compare
