"""Promise: orthogonal means orthogonal, and the same columns come out everywhere."""

import itertools

import numpy as np
import pytest
import torch
from laws import relative_error, seeded
from safetensors.torch import save_file

from modular_concepts.adapters.basis import (
    OrthogonalBasis,
    _generated,
    capacity,
    hashed_indices,
    load_basis,
    slot_indices,
)
from modular_concepts.adapters.low_rank import new_orthogonal
from modular_concepts.errors import AdapterError

GOLDEN = {
    ("hadamard", 320): "6edec27e8b0f61ed",
    ("hadamard", 640): "1f2c5c90e0a00a0c",
    ("hadamard", 768): "63c841ac56acd750",
    ("hadamard", 1280): "b7505ba67c888d0c",
    ("hadamard", 5120): "1563850bb6b0d6d4",
    ("haar", 320): "44bf8d5d6d89222f",
}


def gram_error(columns):
    """Of the float32 columns, multiplied in float64: lengths summed in float32 would blur it by 1e-6."""
    columns = columns.double()
    return (columns @ columns.mT - torch.eye(len(columns), dtype=columns.dtype)).abs().max().item()


@pytest.mark.parametrize(("kind", "width"), GOLDEN)
def test_columns_are_the_same_bits_everywhere(kind, width):
    assert OrthogonalBasis(kind, 0).fingerprint(width) == GOLDEN[kind, width]
    assert OrthogonalBasis(kind, 1).fingerprint(width) != GOLDEN[kind, width]


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 48, 63, 64, 127, 320])
def test_the_whole_matrix_is_orthogonal(kind, width):
    columns = OrthogonalBasis(kind, 3).columns(width, range(width))
    assert columns.dtype == torch.float32 and columns.shape == (width, width)
    assert gram_error(columns) <= 1e-6
    assert gram_error(columns.mT) <= 1e-6


@pytest.mark.parametrize("width", [640, 1280, 5120, 20480])
def test_wide_columns_are_orthonormal(width):
    spread = list(range(0, width, width // 40))
    assert gram_error(OrthogonalBasis().columns(width, spread)) <= 1e-6


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
def test_columns_do_not_depend_on_which_others_are_asked_for(kind):
    basis = OrthogonalBasis(kind, 2)
    together = basis.columns(96, [5, 90, 17])
    _generated.cache_clear()
    assert torch.equal(basis.columns(96, [17])[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_the_global_generators_take_no_part():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    OrthogonalBasis().columns(64, [1]), hashed_indices(64, 4, "ada", "layer")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("width", [63, 320])
def test_the_fast_basis_spreads_like_haar(width):
    """Slots take as much of foreign directions as a Haar-random basis' slots: mean 1, same spread."""
    position = torch.arange(width)
    waves = torch.stack([torch.cos(torch.pi * f * (position + 0.5) / width) for f in range(30)])
    directions = torch.cat([waves, torch.eye(width)[:: width // 20]])
    directions = directions / directions.norm(dim=1, keepdim=True)

    def spread(kind):
        taken = []
        for seed in range(3):
            slots = OrthogonalBasis(kind, seed).columns(width, range(width // 20 * 20))
            shares = (directions @ slots.mT).square().unflatten(1, (-1, 20)).sum(-1) * width / 20
            taken.append(shares.flatten())
        return torch.cat(taken)

    fast, haar = spread("hadamard"), spread("haar")
    assert abs(fast.mean() - 1) < 0.1
    assert fast.std() < 1.15 * haar.std()
    assert fast.max() < 1.5 * haar.max()
    assert haar.std() > 0.1


@pytest.mark.parametrize("kernel", [None, (3, 3)])
def test_disjoint_slots_are_orthogonal(kernel):
    width = 320 * (9 if kernel else 1)
    slots = [slot_indices(width, 20, slot) for slot in range(capacity(width, 20))][:16]
    assert len(set(itertools.chain(*slots))) == 20 * 16
    downs = [new_orthogonal(8, 320, 20, None, OrthogonalBasis(), s, kernel).lora_down.flatten(1) for s in slots]
    for first, second in itertools.combinations(downs, 2):
        assert (first @ second.mT).abs().max() <= 1e-6
    assert (downs[0] @ downs[0].mT).abs().max() > 0.99


def test_capacity_is_stated_where_a_slot_is_refused():
    assert capacity(320, 20) == 16 and capacity(320, 32) == 10
    with pytest.raises(AdapterError, match="holds 16 concepts of rank 20, slots 0 to 15"):
        slot_indices(320, 20, 16)
    for slot in (-1, 10**9):
        with pytest.raises(AdapterError, match="does not exist"):
            slot_indices(320, 20, slot)
    with pytest.raises(AdapterError, match="rank 321 is larger than the layer's input width 320"):
        slot_indices(320, 321, 0)
    with pytest.raises(AdapterError, match="rank is 0"):
        hashed_indices(320, 0, "ada", "layer")


def test_names_choose_other_columns_in_every_layer():
    chosen = hashed_indices(320, 20, "ada", "first")
    assert chosen == hashed_indices(320, 20, "ada", "first")
    assert len(set(chosen)) == 20 and min(chosen) >= 0 and max(chosen) < 320
    assert chosen != hashed_indices(320, 20, "ada", "second")
    assert chosen != hashed_indices(320, 20, "bob", "first")


@pytest.mark.parametrize("bad", [[320], [-1], [3, 3]])
def test_columns_that_do_not_exist_are_refused(bad):
    with pytest.raises(AdapterError, match="basis column"):
        OrthogonalBasis().columns(320, bad)


def test_unusable_kinds_are_refused():
    with pytest.raises(AdapterError, match="unknown"):
        OrthogonalBasis("dct")
    with pytest.raises(AdapterError, match="needs matrices"):
        OrthogonalBasis("file")
    with pytest.raises(AdapterError, match="use the hadamard basis"):
        OrthogonalBasis("haar").columns(5120, [0])


def orthogonal_matrix(width):
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=seeded(width)))[0]


@pytest.mark.parametrize("form", ["safetensors", "file", "folder"])
def test_a_basis_is_read_from_a_file(tmp_path, form):
    matrices = {width: orthogonal_matrix(width) for width in ((24,) if form == "file" else (24, 40))}
    for width, matrix in matrices.items():
        np.save(tmp_path / f"{width}.npy", matrix.numpy())
    path = {"file": tmp_path / "24.npy", "folder": tmp_path}.get(form, tmp_path / "basis.safetensors")
    if form != "folder":  # beside .npy files it would be refused
        save_file({str(w): m.contiguous() for w, m in matrices.items()}, tmp_path / "basis.safetensors")
    basis = load_basis(path)
    assert relative_error(basis.columns(24, [3, 1]), matrices[24][:, [3, 1]].mT) < 1e-6
    assert basis.identity == load_basis(path).identity != OrthogonalBasis().identity
    with pytest.raises(AdapterError, match="no matrix for width 32"):
        basis.columns(32, [0])


def test_one_changed_number_changes_a_file_basis_fingerprint():
    matrix = orthogonal_matrix(24).float()
    changed = matrix.clone()
    changed[7, 9] += 1e-6
    first, second = (OrthogonalBasis("file", 0, {24: m}) for m in (matrix, changed))
    assert first.fingerprint(24) != second.fingerprint(24) and first.identity != second.identity


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.eye(4)[:3], "square"),
        (np.eye(4) * 1.01, "not orthogonal"),
        (np.full((4, 4), np.nan), "not orthogonal"),
        (np.eye(4, dtype=np.int64), "not a matrix of real numbers"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
        (b"\x93NUMPY\x01\x00garbage", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_an_unusable_basis_file_is_refused(tmp_path, content, message):
    path = tmp_path / "4.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(AdapterError, match=message):
        load_basis(path)


def test_a_missing_or_empty_basis_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no basis matrices"):
        load_basis(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 40)
    for name in ("x.safetensors", "absent.npy", "absent.safetensors"):
        with pytest.raises(AdapterError, match="cannot be read"):
            load_basis(tmp_path / name)
