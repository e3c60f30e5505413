"""A small file asks for no more memory and time than what it holds can justify; what a merge takes is said first."""

import json
import math
import time

import pytest
import torch
from mutations import in_shell, peak_memory

from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.adapters.low_rank import (
    LowRank,
    block_rows,
    check_size,
    new_block_orthogonal,
    new_full,
    new_orthogonal,
)
from modular_concepts.concept import Concept, Recipe
from modular_concepts.crosstalk.measures import crosstalk_table, delta_norm
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import KEY, load_concept, save_concept
from modular_concepts.files.lora import read_concept
from modular_concepts.merging import merge_concepts
from modular_concepts.models import budget
from modular_concepts.storage import room
from modular_concepts.storage.safetensors import write_safetensors

MIB = 2**20
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.{}.attn2.to_k"


def compact(path, layers, **recipe):
    """A compact file by hand.  layers: (lora_up, its description) or those and a stored lora_down."""
    tensors, described = {}, {}
    for number, (up, entry, *down) in enumerate(layers):
        name = LAYER.format(number)
        key = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(up.shape[1]))}
        tensors |= {f"{key}.lora_down.weight": down[0]} if down else {}
        described[name] = entry
    basis = OrthogonalBasis(recipe.get("basis_kind", "hadamard"), 7)
    recipe = Recipe(**{"basis": basis.identity, "basis_kind": "hadamard", "basis_seed": 7} | recipe)
    document = {"format": 1, "name": "x", "compact": True, "recipe": recipe.to_json(), "layers": described}
    widths = {math.prod(e["down_shape"][1:]) for e in described.values() if "columns" in e}
    document["bases"] = {str(width): basis.fingerprint(width) if width < 1100 else "0" * 16 for width in widths}
    write_safetensors(path, tensors, {KEY: json.dumps(document)})
    return path


def identities(path):
    """206 kB that stood for 774 MiB."""
    up = torch.full((1, 4096), 0.1)
    return compact(path, [(up, {"kind": "full", "down_shape": [4096, 4096]})] * 12)


def identities_of_many_widths(path):
    widths = range(1500, 1540)
    return compact(path, [(torch.ones(1, w), {"kind": "full", "down_shape": [w, w]}) for w in widths])


def reflections(path):
    """3 kB that took 18 s a layer."""
    entry = {"kind": "orthogonal", "columns": {"range": [0, 2048, 1]}, "down_shape": [2048, 2048]}
    return compact(path, [(torch.ones(1, 2048).half(), entry)], basis_kind="haar")


def reflections_of_many_widths(path):
    layers = [
        (torch.ones(1, 1), {"kind": "orthogonal", "columns": [w - 1], "down_shape": [1, w]}) for w in range(1000, 1008)
    ]
    return compact(path, layers, basis_kind="haar")


def columns(path):
    entry = {"kind": "orthogonal", "columns": {"range": [0, 4000, 1]}, "down_shape": [4000, 4096]}
    return compact(path, [(torch.ones(1, 4000).half(), entry)])


def columns_of_a_kernel(path):
    entry = {"kind": "orthogonal", "columns": {"range": [0, 1000, 1]}, "down_shape": [1000, 2**18, 2, 2]}
    return compact(path, [(torch.ones(1, 1000).half(), entry)])


def rows_without_end(path):
    entry = {"kind": "block", "rows": {"range": [0, 2**20, 1]}, "out": 2**20}
    return compact(path, [(torch.ones(4, 4), entry, torch.ones(4, 8))] * 20, blocks=4)


def a_layer_without_end(path):
    """18 kB that made inspect, export and TIES ask for 8 to 17 GB."""
    entry = {"kind": "block", "rows": [5], "out": 2**20}
    return compact(path, [(torch.ones(1, 2000), entry, torch.ones(2000, 1))], blocks=2**20)


def a_plain_layer_without_end(path):
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_"
    tensors = {f"{key}up.weight": torch.ones(2**16, 1).half(), f"{key}down.weight": torch.ones(1, 2**16).half()}
    write_safetensors(path, tensors, {})
    return path


HOSTILE = (
    identities,
    identities_of_many_widths,
    reflections,
    reflections_of_many_widths,
    columns,
    columns_of_a_kernel,
    rows_without_end,
    a_layer_without_end,
    a_plain_layer_without_end,
)


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_small_file_that_asks_for_much_is_one_sentence(tmp_path, make):
    path = make(tmp_path / "x.safetensors")
    assert path.stat().st_size < 400_000
    read_or_refuse(path)  # warm
    before, started = peak_memory(reset=True), time.process_time()
    with pytest.raises(AdapterError) as caught:
        read_concept(path)
    assert "damaged" in str(caught.value) and str(caught.value).startswith("x.safetensors: ")
    assert time.process_time() - started < 2.5 and peak_memory() - before < 64 * MIB


def read_or_refuse(path):
    try:
        return read_concept(path)
    except AdapterError:
        return None


def concept(*adapters, **recipe):
    layers = {LAYER.format(number): adapter for number, adapter in enumerate(adapters)}
    return Concept("x", layers, {}, Recipe(**recipe))


def filled(adapter):
    up = torch.randn(adapter.lora_up.shape, generator=torch.Generator().manual_seed(0))
    return adapter.replace(lora_up=up)


BASES = {kind: OrthogonalBasis(kind, 7) for kind in ("hadamard", "haar")}
OF_BASIS = {
    kind: {"basis": basis.identity, "basis_kind": kind, "basis_seed": 7, "method": "orthogonal"}
    for kind, basis in BASES.items()
}
HONEST = {
    "whole key and value layers of SDXL": lambda: (concept(*[filled(new_full(640, 2048))] * 4), 2048**2 * 4),
    "wide columns": lambda: (
        concept(
            *[filled(new_orthogonal(1280, 5120, 20, None, BASES["hadamard"], range(20, 40)))] * 3,
            **OF_BASIS["hadamard"],
            slot=1,
        ),
        5120 * 20 * 4,
    ),
    "a hundredth of the rows": lambda: (
        concept(
            filled(new_block_orthogonal(640, 2048, None, block_rows(640, 100, 3), BASES["hadamard"], range(20))),
            **OF_BASIS["hadamard"],
            blocks=100,
            slot=0,
        ),
        2048 * 20 * 4,
    ),
    "the last reflections": lambda: (
        concept(
            filled(new_orthogonal(640, 2048, 20, None, BASES["haar"], range(2020, 2040))), **OF_BASIS["haar"], slot=101
        ),
        2048 * 20 * 4,
    ),
}


@pytest.mark.parametrize("form", HONEST)
def test_what_training_makes_is_left_out_and_comes_back_the_same_and_once(tmp_path, form):
    made, size = HONEST[form]()
    save_concept(made, tmp_path / "x.safetensors", compact=True)
    up = sum(adapter.lora_up.numel() * 4 for adapter in made.layers.values())
    assert (tmp_path / "x.safetensors").stat().st_size < up + 8000
    back = load_concept(tmp_path / "x.safetensors")
    for name, adapter in made.layers.items():
        assert torch.equal(back.layers[name].lora_down, adapter.lora_down)
    assert len({adapter.lora_down.data_ptr() for adapter in back.layers.values()}) == 1
    assert size == back.layers[LAYER.format(0)].lora_down.numel() * 4


def test_what_reading_would_refuse_is_kept_in_the_file(tmp_path):
    made = concept(filled(new_full(1, 3000)), filled(new_full(64, 64)))
    save_concept(made, tmp_path / "x.safetensors", compact=True)
    assert (tmp_path / "x.safetensors").stat().st_size > 3000 * 3000 * 4
    back = load_concept(tmp_path / "x.safetensors")
    assert all(torch.equal(back.layers[name].lora_down, a.lora_down) for name, a in made.layers.items())


def test_inspecting_forms_no_weight(tmp_path):
    path = tmp_path / "x.safetensors"
    adapter = LowRank(torch.ones(8192, 1), torch.ones(1, 8192), 1.0, "lora", None, 8192)
    save_concept(concept(adapter), path)
    in_shell("inspect", str(path))
    before = peak_memory(reset=True)
    in_shell("inspect", str(path))
    assert peak_memory() - before < 64 * MIB
    assert delta_norm(adapter) == pytest.approx(8192.0)


@pytest.mark.parametrize("how", ["ties", "dare", "magnitude"])
def test_a_merge_that_memory_cannot_hold_says_what_it_takes(monkeypatch, how):
    adapter = LowRank(torch.ones(4096, 1), torch.ones(1, 4096), 1.0, "lora", None, 4096)
    monkeypatch.setattr(room, "free_memory", lambda: 512 * MIB)
    with pytest.raises(AdapterError, match=rf"4096 x 4096 numbers, merged by {how}, takes about 0.4 GiB.*by sum"):
        merge_concepts([concept(adapter), concept(adapter)], [1.0, 1.0], how)
    assert merge_concepts([concept(adapter), concept(adapter)], [1.0, 1.0])


def test_a_container_bounds_what_is_free_and_what_the_machine_has(monkeypatch, tmp_path):
    """A machine of 64 GiB is none of 64 GiB to a program in a container of one."""
    for name, text in {"max": "1073741824", "current": "268435456", "stat": "anon 1\nfile 67108864\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    alone = room.machine_memory() or 2**40
    monkeypatch.setattr(room, "_GROUP", tmp_path)
    assert alone > 2**30 and room.machine_memory() == 2**30 and room.free_memory() <= 2**30 - 2**28 + 2**26
    assert budget.machine_memory() == 2**30
    (tmp_path / "memory.max").write_text("max\n")
    assert (room.machine_memory() or 2**40) >= alone


def test_free_memory_is_told_and_less_than_there_is():
    free = room.free_memory()
    assert free is None or 2**24 < free < 2**50
    with pytest.raises(AdapterError, match="this takes about .* GiB of memory, and .* GiB are free; do less"):
        room.check_room("this", 2**62, "do less")


HUGE = {
    "factors": (torch.full((8, 2), 3e38), torch.full((2, 8), 3e38), 2.0),
    "alpha": (torch.ones(8, 2), torch.ones(2, 8), 3e38),
    "double precision": (torch.full((8, 2), 1e200, dtype=torch.float64), torch.ones(2, 8, dtype=torch.float64), 2.0),
    "one factor": (torch.full((8, 2), 1e30), torch.full((2, 8), 1e-30), 2.0),
}


@pytest.mark.parametrize("kind", HUGE)
def test_finite_numbers_that_make_no_weight_are_refused_in_every_form(tmp_path, monkeypatch, kind):
    up, down, alpha = HUGE[kind]
    adapter = LowRank(up, down, alpha, "lora", None, 8)
    with pytest.raises(AdapterError, match="no weight survives"):
        check_size("x", adapter)
    with pytest.raises(AdapterError, match="no weight survives"):
        save_concept(concept(adapter), tmp_path / "x.safetensors")
    with monkeypatch.context() as patch:  # as a program would that does not look
        patch.setattr("modular_concepts.files.concept.check_size", lambda *_: None)
        save_concept(concept(adapter), tmp_path / "x.safetensors")
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(alpha)}
    write_safetensors(tmp_path / "y.safetensors", tensors, {})
    for name in ("x", "y"):
        with pytest.raises(AdapterError, match=rf"{name}.safetensors: .*no weight survives"):
            read_concept(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("how", ["sum", "ties", "dare", "magnitude", "svd", "mean"])
def test_factors_of_two_precisions_merge_as_one(how):
    up, down = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.eye(6)[:2].double()
    mixed, plain = (LowRank(up, d, 2.0, "lora", None, 6) for d in (down, down.float()))
    for pair in ([mixed, plain], [plain, mixed], [mixed, mixed]):
        concepts = [concept(adapter) for adapter in pair]
        merged = merge_concepts(concepts, [1.0, 0.5], how)[LAYER.format(0)].delta()
        other = merge_concepts([concept(plain)] * 2, [1.0, 0.5], how)[LAYER.format(0)].delta()
        if how != "dare":  # a concept's own draws follow from its name and layer alone
            assert torch.allclose(merged.double(), other.double(), atol=1e-6)
        assert merged.abs().max() > 0.1
    assert torch.equal(mixed.delta().float(), plain.delta())


def test_layers_of_one_name_and_two_shapes_have_no_crosstalk():
    wide, narrow = (LowRank(torch.ones(6, 1), torch.ones(1, n), 1.0, "lora", None, 6) for n in (8, 12))
    one, other = concept(wide), concept(narrow)
    assert crosstalk_table([one, other])["pairs"] == {}
    assert crosstalk_table([one, one])["pairs"]


def sparse(path, tensors, size):
    """A file of 4 KiB on the disk, whose header says `size` bytes of tensors that were never written."""
    header, begin = {}, 0
    for name, shape in tensors.items():
        end = begin + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + begin)
    assert begin == size
    return path


def test_a_file_that_was_never_written_is_not_read(tmp_path):
    from modular_concepts.adapters.basis import load_basis
    from modular_concepts.files.embeddings import import_embedding
    from modular_concepts.files.moments import load_moments

    stem = "lora_unet_mid_block_attentions_0_proj_in.lora_"
    shapes = {f"{stem}up.weight": [2**26, 8], f"{stem}down.weight": [8, 2**26]}
    path = sparse(tmp_path / "x.safetensors", shapes, 2**32)
    square = sparse(tmp_path / "y.safetensors", {"m": [32768, 32768]}, 2**32)
    for read, file in ((read_concept, path), (load_moments, path), (import_embedding, square), (load_basis, square)):
        before = peak_memory(reset=True)
        with pytest.raises(AdapterError, match="never written; the copy broke off"):
            read(file)
        assert peak_memory() - before < 16 * MIB


def test_a_file_larger_than_memory_says_so(tmp_path, monkeypatch):
    from modular_concepts.storage import safetensors as safe

    adapter = LowRank(torch.ones(2**21, 8), torch.ones(8, 8), 1.0, "lora", None, 2**21)
    save_concept(concept(adapter), tmp_path / "x.safetensors")
    monkeypatch.setattr(safe, "_SMALL", 2**20)
    monkeypatch.setattr(safe, "free_memory", lambda: 2**24)
    with pytest.raises(AdapterError, match="reading it takes 0.1 GiB of memory, and 0.0 GiB are free; close"):
        read_concept(tmp_path / "x.safetensors")
    monkeypatch.setattr(safe, "free_memory", lambda: None)
    assert read_concept(tmp_path / "x.safetensors").concept.layers
