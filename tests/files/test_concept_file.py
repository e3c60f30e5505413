"""Promise 2: the format is stable, and what is saved comes back in every bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from modular_concepts.adapters.basis import OrthogonalBasis, hashed_indices, slot_indices
from modular_concepts.concept import Recipe
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import KEY, load_concept, save_concept
from modular_concepts.models.layers import file_key
from modular_concepts.storage.safetensors import read_safetensors, write_safetensors

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_KIND = "block_orthogonal"


# Said of the golden concept; the picture is a JPEG of one pixel's first bytes.
ABOUT = {
    "title": "Kodo, the dog",
    "author": "somebody",
    "date": "2026-11-21T20:00:00Z",
    "description": "A dog.\nIn two lines.",
    "thumbnail": "data:image/jpeg;base64,/9j/4AAQSkZJRgABAQEASABIAAA=",
}


@pytest.mark.parametrize("compact", [False, True])
def test_golden_file_of_version_1_is_written_and_read_the_same_for_ever(make_concept, same_concept, tmp_path, compact):
    golden = GOLDEN / ("concept-v1-about-compact.safetensors" if compact else "concept-v1-about.safetensors")
    concept = dataclasses.replace(make_concept(GOLDEN_KIND), about=ABOUT)
    same_concept(load_concept(golden), concept)
    assert load_concept(golden).about == ABOUT
    save_concept(concept, tmp_path / "again.safetensors", compact)
    assert (tmp_path / "again.safetensors").read_bytes() == golden.read_bytes()


@pytest.mark.parametrize("parts", [False, True], ids=["one", "several"])
def test_golden_file_of_own_words_is_written_and_read_the_same_for_ever(make_own_words, same_concept, tmp_path, parts):
    golden = GOLDEN / f"concept-v1-own-words{'-parts' * parts}.safetensors"
    concept = make_own_words(parts)
    same_concept(load_concept(golden), concept)
    save_concept(concept, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == golden.read_bytes()
    assert all(key.startswith("own_words.lora_unet_") for key in load_file(golden))


@pytest.mark.parametrize("file", ["concept-v1.safetensors", "concept-v1-compact.safetensors"])
def test_golden_file_without_entries_for_other_programs_is_read_for_ever(make_concept, same_concept, file):
    same_concept(load_concept(GOLDEN / file), make_concept(GOLDEN_KIND))


@pytest.mark.parametrize("file", ["concept-v1.safetensors", "concept-v1-about.safetensors"])
def test_golden_file_has_the_keys_shapes_and_metadata_of_version_1(file):
    with safe_open(GOLDEN / file, framework="pt") as file:
        shapes = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    assert len(shapes) == 18
    assert shapes[f"{stem}_attn2_to_k.lora_up.weight"] == (16, 4)
    assert shapes[f"{stem}_attn2_to_k.lora_down.weight"] == (4, 24)
    assert shapes[f"{stem}_attn2_to_out_0.alpha"] == ()
    assert shapes["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] == (16, 4, 1, 1)
    assert shapes["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"] == (4, 24)
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_module"] == "networks.lora"
    document = json.loads(metadata[KEY])
    assert set(document) == {"format", "name", "compact", "recipe", "layers"} and document["format"] == 1
    layer = document["layers"]["unet.mid_block.attentions.0.proj_in"]
    assert layer == {"kind": "block_orthogonal", "rows": {"range": [1, 14, 4]}}
    assert set(document["recipe"]) == {entry.name for entry in dataclasses.fields(Recipe)}


def test_save_load_save_is_byte_identical(concept, same_concept, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_concept(concept, first)
    loaded = load_concept(first)
    same_concept(loaded, concept)
    save_concept(loaded, second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["orthogonal", "block", "block_orthogonal", "full"])
def test_compact_file_expands_to_the_same_bits(make_concept, same_concept, tmp_path, kind):
    full, compact, again = (tmp_path / name for name in ("full.st", "compact.st", "again.st"))
    concept = make_concept(kind)
    save_concept(concept, full)
    save_concept(concept, compact, compact=True)
    expanded = load_concept(compact)
    same_concept(expanded, load_concept(full))
    save_concept(expanded, again, compact=True)
    assert compact.read_bytes() == again.read_bytes()
    tensors, _ = read_safetensors(compact)
    assert any("lora_down" in key for key in tensors) == (kind == "block")


def test_compact_halves_a_real_layer(tmp_path, make_concept):
    concept = make_concept("orthogonal", tokens=False)
    basis = OrthogonalBasis("hadamard", 7)
    adapter = concept.layers["unet.mid_block.attentions.0.proj_in"].replace(
        lora_up=torch.ones(640, 20), lora_down=basis.columns(640, list(range(20))), out_features=640
    )
    concept = dataclasses.replace(concept, layers={"unet.mid_block.to_q": adapter})
    save_concept(concept, tmp_path / "full")
    save_concept(concept, tmp_path / "compact", compact=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("full", "compact")]
    assert 0.45 < sizes[1] / sizes[0] < 0.55


def test_an_identity_too_wide_to_be_given_back_stays_in_a_compact_file(
    make_concept, same_concept, tmp_path, monkeypatch
):
    monkeypatch.setattr("modular_concepts.files.concept.MAX_LAYER_ELEMENTS", 16 * 16)
    concept = make_concept("full")
    save_concept(concept, tmp_path / "x", compact=True)
    same_concept(load_concept(tmp_path / "x"), concept)
    tensors, _ = read_safetensors(tmp_path / "x")
    assert {len(tensor) for key, tensor in tensors.items() if "lora_down" in key} == {24}


def test_compact_keeps_a_frozen_factor_that_the_basis_does_not_give(make_concept, same_concept, tmp_path):
    concept = make_concept("orthogonal")
    name, adapter = next(iter(concept.layers.items()))
    odd = adapter.replace(lora_down=adapter.lora_down * 1.5)
    concept = dataclasses.replace(concept, layers={**concept.layers, name: odd})
    save_concept(concept, tmp_path / "mixed", compact=True)
    same_concept(load_concept(tmp_path / "mixed"), concept)
    tensors, _ = read_safetensors(tmp_path / "mixed")
    assert [key for key in tensors if "lora_down" in key] == [f"{file_key(name)}.lora_down.weight"]


def test_compact_is_refused_where_it_would_leave_out_nothing(make_concept, tmp_path):
    gaussian = make_concept("orthogonal")
    layers = {name: adapter.replace(lora_down=adapter.lora_down * 2) for name, adapter in gaussian.layers.items()}
    for concept in (make_concept("lora"), dataclasses.replace(gaussian, layers=layers)):
        with pytest.raises(AdapterError, match="nothing to leave out"):
            save_concept(concept, tmp_path / "x", compact=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_come_back_in_their_own_bits(make_concept, same_concept, tmp_path, dtype):
    concept = make_concept("block_orthogonal")
    half = dataclasses.replace(concept, layers={name: a.to(dtype=dtype) for name, a in concept.layers.items()})
    for compact in (False, True):
        save_concept(half, tmp_path / "half", compact)
        loaded = load_concept(tmp_path / "half")
        same_concept(loaded, half)
        assert {adapter.lora_down.dtype for adapter in loaded.layers.values()} == {dtype}


def test_words_without_adapters_are_a_concept_too(make_concept, same_concept, tmp_path):
    concept = dataclasses.replace(make_concept("lora"), layers={})
    save_concept(concept, tmp_path / "words")
    same_concept(load_concept(tmp_path / "words"), concept)


@pytest.mark.parametrize("compact", [False, True])
def test_another_basis_is_refused_in_plain_words(make_concept, tmp_path, compact):
    save_concept(make_concept("orthogonal"), tmp_path / "x", compact)
    load_concept(tmp_path / "x", OrthogonalBasis("hadamard", 7))
    with pytest.raises(AdapterError, match=r"^x: .*trained on shared basis"):
        load_concept(tmp_path / "x", OrthogonalBasis("hadamard", 8))


def rewritten(path: Path, change) -> None:
    tensors, metadata = read_safetensors(path)
    document = json.loads(metadata[KEY])
    change(document, tensors)
    write_safetensors(path, tensors, metadata | {KEY: json.dumps(document)})


def test_basis_from_a_file_is_asked_for(make_concept, same_concept, tmp_path):
    haar = OrthogonalBasis("haar", 3)
    widths = {width: haar.columns(width, range(width)).mT.contiguous() for width in (16, 24)}
    basis = OrthogonalBasis("file", 0, widths)
    concept = make_concept("orthogonal")
    layers = {}
    for name, adapter in concept.layers.items():
        columns = basis.columns(adapter.lora_down[0].numel(), [9, 2, 11, 0])
        layers[name] = adapter.replace(lora_down=columns.reshape(adapter.lora_down.shape))
    recipe = dataclasses.replace(concept.recipe, basis=basis.identity, basis_kind="file", basis_seed=None)
    concept = dataclasses.replace(concept, layers=layers, recipe=recipe)
    with pytest.raises(AdapterError, match="load the basis file"):
        save_concept(concept, tmp_path / "x", compact=True)
    save_concept(concept, tmp_path / "x", compact=True, basis=basis)
    with pytest.raises(AdapterError, match=r"^x: .*load the basis file"):
        load_concept(tmp_path / "x")
    same_concept(load_concept(tmp_path / "x", basis), concept)
    assert not any("lora_down" in key for key in read_safetensors(tmp_path / "x")[0])


@pytest.mark.parametrize("policy", ["slot", "hashed"])
def test_columns_of_the_recipes_own_policy_are_found_without_a_search(make_concept, tmp_path, monkeypatch, policy):
    concept = make_concept("orthogonal")
    basis = OrthogonalBasis("hadamard", 7)
    layers = {}
    for name, adapter in concept.layers.items():
        width = adapter.lora_down[0].numel()
        chosen = slot_indices(width, 4, 1) if policy == "slot" else hashed_indices(width, 4, concept.name, name)
        layers[name] = adapter.replace(lora_down=basis.columns(width, chosen).reshape(adapter.lora_down.shape))
    recipe = dataclasses.replace(concept.recipe, slot=1 if policy == "slot" else None, slot_policy=policy)
    monkeypatch.setattr("modular_concepts.files.concept._nearest_columns", None)
    save_concept(dataclasses.replace(concept, layers=layers, recipe=recipe), tmp_path / "x", compact=True)
    assert not any("lora_down" in key for key in read_safetensors(tmp_path / "x")[0])


LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN = f"{file_key(LAYER)}.lora_down.weight"
LIES = {
    "fingerprint": (True, "not the one", lambda d, t: d["bases"].update({"16": "0" * 16})),
    "seed": (True, "not the one", lambda d, t: d["recipe"].update(basis_seed=8)),
    "huge shape": (
        True,
        "larger than any",
        lambda d, t: d["layers"][LAYER].update(down_shape=[4, 2**20, 9, 9]),
    ),
    "rank": (True, "does not fit", lambda d, t: d["layers"][LAYER].update(down_shape=[5, 16])),
    "columns": (True, "distinct", lambda d, t: d["layers"][LAYER].update(columns=[1, 1, 2, 3])),
    "column range": (
        True,
        "between 0",
        lambda d, t: d["layers"][LAYER].update(columns={"range": [0, 10**9, 1]}),
    ),
    "rows": (False, "between 0", lambda d, t: d["layers"][LAYER].update(rows=[0, 99])),
    "other rows": (
        False,
        "outside the adapter's block",
        lambda d, t: d["layers"][LAYER].update(rows=[0, 1, 2]),
    ),
    "kind": (False, "kind", lambda d, t: d["layers"][LAYER].update(kind="loha")),
    "no rows": (False, "lacks block rows", lambda d, t: d["layers"][LAYER].pop("rows")),
    "stranger": (False, "belongs to no layer", lambda d, t: d["layers"].pop(LAYER)),
    "missing": (False, "is missing", lambda d, t: d["layers"].update({"unet.x": {"kind": "lora"}})),
    "path": (False, "dotted path", lambda d, t: d["layers"].update({"unet.../x": {"kind": "lora"}})),
    "format": (False, "format 2", lambda d, t: d.update(format=2)),
    "recipe": (False, "recipe: rank", lambda d, t: d["recipe"].update(rank="4")),
    "extra": (False, "unknown entry", lambda d, t: d["recipe"].update(surprise=1)),
    "rank mismatch": (False, "mixes two adapters", lambda d, t: t.update({DOWN: torch.ones(3, 16)})),
}


FULL_LIES = {
    "no identity": (False, "not the identity", lambda d, t: t.update({DOWN: 2 * torch.eye(16)})),
    "more than the identity": (False, "not the identity", lambda d, t: t.update({DOWN: torch.eye(16) + 1})),
    "low rank": (False, "mixes two adapters", lambda d, t: t.update({DOWN: torch.eye(16)[:4]})),
    "columns": (True, "as its kind asks", lambda d, t: d["layers"][LAYER].update(columns=list(range(16)))),
    "another kind": (True, "as its kind asks", lambda d, t: d["layers"][LAYER].update(kind="lora")),
    "not square": (True, "not square", lambda d, t: d["layers"][LAYER].update(down_shape=[16, 20])),
    "huge": (True, "larger than any", lambda d, t: d["layers"][LAYER].update(down_shape=[16, 2**20, 3, 3])),
}


@pytest.mark.parametrize("lie", FULL_LIES)
def test_a_whole_weight_that_lies_is_refused(make_concept, tmp_path, lie):
    compact, words, change = FULL_LIES[lie]
    save_concept(make_concept("full"), tmp_path / "x", compact)
    load_concept(tmp_path / "x")
    rewritten(tmp_path / "x", change)
    with pytest.raises(AdapterError, match=f"^x: .*{words}"):
        load_concept(tmp_path / "x")


@pytest.mark.parametrize("lie", LIES)
def test_description_that_lies_is_refused(make_concept, tmp_path, lie):
    compact, words, change = LIES[lie]
    path = tmp_path / "x"
    save_concept(make_concept("block_orthogonal"), path, compact)
    load_concept(path)
    rewritten(path, change)
    with pytest.raises(AdapterError, match=f"^x: .*{words}"):
        load_concept(path)


def test_nan_is_refused_before_anything_is_written(make_concept, tmp_path):
    concept = make_concept("lora")
    next(iter(concept.layers.values())).lora_up[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="diverged"):
        save_concept(concept, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_plain_lora_is_told_apart(make_concept, tmp_path):
    write_safetensors(tmp_path / "x", {"lora_unet_a.alpha": torch.ones(())}, {})
    with pytest.raises(AdapterError, match="import it as a LoRA"):
        load_concept(tmp_path / "x")
