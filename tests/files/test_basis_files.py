"""A basis file that nobody vouches for is a basis or one sentence, whatever its header says."""

import os
import time

import numpy as np
import pytest
import torch
from mutations import peak_memory, run
from safetensors.torch import save_file

from modular_concepts.adapters.basis import load_basis
from modular_concepts.errors import AdapterError

SHAPE, DESCR, ORDER = "'shape': (8, 8)", "'descr': '<f8'", "'fortran_order': False"
SOUND = f"{{{DESCR}, {ORDER}, {SHAPE}, }}"
HEADERS = {
    "a string that does not end": SOUND.replace("'<f8'", "'<f8"),
    "brackets that do not end": SOUND.replace("(8, 8)", "(8, 8"),
    "a shape of one": SOUND.replace("(8, 8)", "(64,)"),
    "no shape": SOUND.replace("(8, 8)", "()"),
    "a shape below zero": SOUND.replace("(8, 8)", "(-8, -8)"),
    "a shape of many digits": SOUND.replace("(8, 8)", f"({'9' * 400}, 8)"),
    "a shape beyond every file": SOUND.replace("(8, 8)", "(9999999, 9999999)"),
    "a shape of words": SOUND.replace("(8, 8)", "(True, 8)"),
    "a shape in Persian": SOUND.replace("(8, 8)", "(\u06f8, 8)"),
    "a longer shape": SOUND.replace("(8, 8)", "(8, 8, 1)"),
    "an empty shape": SOUND.replace("(8, 8)", "(0, 0)"),
    "objects": SOUND.replace("<f8", "|O"),
    "fields": SOUND.replace("'<f8'", "[('a', '<f8')]"),
    "texts": SOUND.replace("<f8", "<U2"),
    "dates": SOUND.replace("<f8", "<M8[s]"),
    "complex numbers": SOUND.replace("<f8", "<c16"),
    "whole numbers": SOUND.replace("<f8", "<i8"),
    "a type of nothing": SOUND.replace("'<f8'", "None"),
    "an order of one": SOUND.replace("False", "1"),
    "a call": SOUND.replace("False", "exit()"),
    "an entry twice": SOUND.replace(ORDER, f"{ORDER}, {ORDER}"),
    "an entry too many": SOUND.replace(ORDER, f"{ORDER}, 'more': 1"),
    "an entry too few": SOUND.replace(f"{ORDER}, ", ""),
    "a list": "[1, 2]",
    "deep nesting": "[" * 3000,
    "nothing": "",
    "null": "\0" * 40,
}


def npy(header: str, numbers: bytes = np.eye(8).tobytes(), version: int = 1) -> bytes:
    raw = header.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(2 if version == 1 else 4, "little") + raw + numbers


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_not_sound_is_one_sentence(tmp_path, header):
    (tmp_path / "8.npy").write_bytes(npy(HEADERS[header]))
    with pytest.raises(AdapterError) as caught:
        load_basis(tmp_path / "8.npy")
    assert str(caught.value).startswith("8.npy: ") and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("header", [SOUND, SOUND.replace("'", '"'), f"{{{SHAPE},{ORDER},{DESCR}}}  \n"])
def test_a_header_that_any_program_writes_is_read(tmp_path, header, version):
    (tmp_path / "8.npy").write_bytes(npy(header, version=version))
    assert torch.equal(load_basis(tmp_path / "8.npy").columns(8, range(8)), torch.eye(8))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_order_of_bytes_and_numbers_is_the_same_basis(tmp_path, dtype, order):
    matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(600, 600)))[0]
    np.save(tmp_path / "600.npy", np.asarray(matrix, dtype, order=order))
    columns = load_basis(tmp_path / "600.npy").columns(600, [5, 599])
    assert np.abs(columns.numpy() - matrix[:, [5, 599]].T).max() < 1e-6


@pytest.mark.parametrize("size", [8 * 2**30, 8 * 2**30 + 1, 100])
def test_a_file_without_numbers_asks_for_no_memory(tmp_path, size):
    with open(tmp_path / "x.npy", "wb") as file:
        file.write(npy(SOUND.replace("8, 8", "32768, 32768"), b""))
        file.truncate(size + file.tell() if size > 100 else size)
    before, started = peak_memory(reset=True), time.process_time()
    with pytest.raises(AdapterError):
        load_basis(tmp_path / "x.npy")
    assert peak_memory() - before < 64 * 2**20 and time.process_time() - started < 1


def test_a_matrix_of_one_column_twice_is_not_orthogonal(tmp_path):
    matrix = torch.eye(1200)
    matrix[:, 1100] = matrix[:, 3]
    save_file({"m": matrix}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="x.safetensors, m: the matrix is not orthogonal"):
        load_basis(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["basis", "basis npy"])
def test_changed_files_are_refused_or_used(tmp_path, kind):
    (outcome,) = run(300, 0, tmp_path / "x", [kind])
    assert not outcome.faults and outcome.accepted > 10 and outcome.refused > 100
    assert outcome.slowest < 1 and outcome.growth < 64 * 2**20


@pytest.mark.parametrize("name", ["08", "1_0", "\uff18", "+8", " 8", "8 ", "8.0", "8e0", "-8", "16", "\u0668", "8_"])
def test_a_number_for_a_name_is_the_width_in_plain_digits(tmp_path, name):
    """What int() takes for a number is not what another program looks for, and may be of another width."""
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    save_file({name: torch.eye(8)}, tmp_path / "one/x.safetensors")
    np.save(tmp_path / f"many/{name}.npy", np.eye(8))
    for path in ("one/x.safetensors", "many"):
        if name == "8_":  # no number to anybody
            assert torch.equal(load_basis(tmp_path / path).columns(8, range(8)), torch.eye(8))
            continue
        with pytest.raises(AdapterError, match="the name is a number, but the matrix is 8 wide; call it 8") as caught:
            load_basis(tmp_path / path)
        assert str(caught.value).isprintable()


def test_names_that_are_no_numbers_or_the_width_are_read(tmp_path):
    names = {"8": torch.eye(8), "matrix": torch.eye(16), "nan": torch.eye(4), "320x320": torch.eye(2)}
    save_file(names, tmp_path / "x.safetensors")
    assert set(load_basis(tmp_path / "x.safetensors").matrices) == {8, 16, 4, 2}
    np.save(tmp_path / "2024.npy", np.eye(8))  # one file alone may be called after anything
    assert set(load_basis(tmp_path / "2024.npy").matrices) == {8}


ODD = {
    "a dead link": "a link to",
    "a link to itself": "a link to",
    "a pipe": "a device or a pipe",
    "a folder": "a folder",
}


def odd_file(path, kind):
    """Something of this name that no program can read as a file."""
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if "itself" in kind else path.with_name("nowhere"))
    return path


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["8.npy", "x.safetensors"])
def test_what_is_no_file_is_called_what_it_is(tmp_path, kind, name):
    path = odd_file(tmp_path / name, kind)
    if kind == "a folder" and name == "8.npy":
        path = tmp_path  # a folder of such a folder
    with pytest.raises(AdapterError, match=f"this basis file cannot be read: .*{ODD[kind]}"):
        load_basis(path)


@pytest.mark.parametrize("name", ["512.safetensors", "320.pt", "x.PTH", "y.npz"])
def test_matrices_of_another_form_beside_npy_files_are_named(tmp_path, name):
    np.save(tmp_path / "8.npy", np.eye(8))
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(AdapterError, match=f"{name} is not read beside .npy files"):
        load_basis(tmp_path)


def test_a_folder_of_npy_files_is_read_in_any_case_and_without_what_is_hidden(tmp_path):
    np.save(tmp_path / "8.npy", np.eye(8))
    np.save(tmp_path / "16.npy", np.eye(16))
    (tmp_path / "16.npy").rename(tmp_path / "16.NPY")
    (tmp_path / "._8.npy").write_bytes(b"\0\5\x16\7")
    (tmp_path / "notes.txt").write_text("ours")
    assert set(load_basis(tmp_path).matrices) == {8, 16}


def test_the_ending_of_a_basis_file_may_be_upper_case(tmp_path):
    from safetensors.torch import save_file

    save_file({"8": torch.eye(8)}, tmp_path / "u.SAFETENSORS")
    assert set(load_basis(tmp_path / "u.SAFETENSORS").matrices) == {8}
