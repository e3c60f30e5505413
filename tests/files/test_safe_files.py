"""Promises 1 and 2: named attacks on files are refused, and a file is written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal

import pytest
import torch

from modular_concepts.errors import AdapterError
from modular_concepts.storage import safetensors as safetensors_files
from modular_concepts.storage.atomic import all_or_none, reason, replacing
from modular_concepts.storage.names import safe_child, safe_name
from modular_concepts.storage.safetensors import (
    DTYPES,
    read_foreign,
    read_safetensors,
    tensor_bytes,
    write_safetensors,
)
from modular_concepts.storage.strict_json import parse_json

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def file_of(header: dict | bytes, data: bytes = bytes(16), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


SOUND = file_of({"a": A, "b": B})
ATTACKS = {
    "empty file": (b"", "not a safetensors"),
    "truncated header": (SOUND[:30], "cut short"),
    "truncated data": (SOUND[:-1], "cut short: 1 bytes"),
    "trailing bytes": (SOUND + b"x", "1 bytes follow"),
    "header of 2**63": (file_of({"a": A}, length=2**63), "not a safetensors"),
    "header length 0": (file_of({"a": A}, length=0), "not a safetensors"),
    "hole": (file_of({"a": A, "b": B | {"data_offsets": [12, 20]}}, bytes(20)), "hole"),
    "overlap": (file_of({"a": A, "b": B | {"data_offsets": [4, 12]}}, bytes(12)), "overlaps"),
    "same bytes twice": (file_of({"a": A, "b": A}, bytes(8)), "overlaps"),
    "duplicate key": (
        file_of(b'{"a":%b,"a":%b}' % (json.dumps(A).encode(), json.dumps(B).encode())),
        "twice",
    ),
    "duplicate inner key": (file_of(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "twice"),
    "climbing name": (file_of({"../../a": A}, bytes(8)), "not a layer's name"),
    "backslash name": (file_of({"..\\a": A}, bytes(8)), "not a layer's name"),
    "control name": (file_of({"a\x1b[2J": A}, bytes(8)), "not a layer's name"),
    "shape that lies": (file_of({"a": A | {"shape": [2**40]}}, bytes(8)), "does not fit"),
    "overflowing shape": (file_of({"a": A | {"shape": [2**32, 2**32, 2**33]}}, bytes(8)), "does not fit"),
    "negative shape": (file_of({"a": A | {"shape": [-2, -1]}}, bytes(8)), "whole numbers"),
    "boolean shape": (file_of({"a": A | {"shape": [True, 2]}}, bytes(8)), "whole numbers"),
    "fractional shape": (file_of({"a": A | {"shape": [2.0]}}, bytes(8)), "whole numbers"),
    "empty tensor": (file_of({"a": A | {"shape": [0], "data_offsets": [0, 0]}}, b""), "does not fit"),
    "odd dtype": (file_of({"a": A | {"dtype": "F8_E4M3"}}, bytes(8)), "dtype"),
    "dtype that is a list": (file_of({"a": A | {"dtype": ["F32"]}}, bytes(8)), "dtype"),
    "integers where floats belong": (file_of({"a": A | {"dtype": "I64", "shape": [1]}}, bytes(8)), "dtype"),
    "nan": (file_of({"a": A}, b"\0\0\xc0\x7f" * 2), "NaN or infinity"),
    "infinity": (file_of({"a": A}, b"\0\0\x80\xff" * 2), "NaN or infinity"),
    "not json": (file_of(b"{'a': 1}        "), "not sound JSON"),
    "not utf-8": (file_of(b'{"\xff":1}'), "UTF-8"),
    "list": (file_of(b"[1,2,3]"), "not a JSON object"),
    "deep nesting": (file_of(b"[" * 100_000), "not sound JSON"),
    "very many lists": (file_of(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), "more entries"),
    "very many numbers": (file_of(b'{"a":[' + b"-9," * 1_300_000 + b"1]}"), "more entries"),
    "json nan": (file_of(b'{"a":NaN}'), "holds NaN"),
    "long integer": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not sound JSON"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "a": A}, bytes(8)), "metadata"),
    "text": (b"This is a note, not a model. " * 10, "not a safetensors"),
    "pickle": (pickle.dumps({"a": [0.0] * 9}, protocol=4), "pickle"),
    "zip": (b"PK\x03\x04" + bytes(range(200)), "pickle or zip"),
}


def test_sound_file_is_read(tmp_path):
    (tmp_path / "x").write_bytes(SOUND)
    tensors, metadata = read_safetensors(tmp_path / "x")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {"a": (2,), "b": (2,)}
    assert metadata == {}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused_in_one_sentence(tmp_path, attack):
    data, words = ATTACKS[attack]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match=words) as caught:
        read_safetensors(tmp_path / "x.safetensors")
    message = str(caught.value)
    assert message.startswith("x.safetensors: ") and "\n" not in message and len(message) < 400


def test_missing_file_folder_and_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", ".", "pipe", "nul\0byte"):
        with pytest.raises(AdapterError):
            read_safetensors(tmp_path / name)


def test_every_dtype_survives_and_the_library_reads_our_files(tmp_path):
    from safetensors.torch import load_file

    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
    tensors = {f"t{i}": torch.tensor([[1, 2], [3, 0]]).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors["scalar"] = torch.tensor(3.0)
    write_safetensors(tmp_path / "x", tensors, {"b": "ü", "a": "2"})
    ours, metadata = read_safetensors(tmp_path / "x", ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL"))
    theirs = load_file(tmp_path / "x")
    assert metadata == {"a": "2", "b": "ü"} and set(ours) == set(theirs) == set(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(ours[key], tensor) and torch.equal(theirs[key], tensor)
        assert ours[key].dtype == theirs[key].dtype == tensor.dtype


def test_loaded_tensors_do_not_change_with_the_file(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(1000)}, {})
    tensors, _ = read_safetensors(tmp_path / "x")
    with open(tmp_path / "x", "r+b") as handle:
        handle.seek(200)
        handle.write(bytes(3000))
    assert torch.equal(tensors["a"], torch.ones(1000))


def test_writer_that_raises_leaves_the_old_file_whole(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x") as handle:
        handle.write(b"half of the new")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    with replacing(tmp_path / "x") as handle:
        handle.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match="the disk is full"):
        write_safetensors(tmp_path / "x", {"a": torch.ones(4)}, {})
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_write_that_the_system_itself_refuses_leaves_the_old_file_whole(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(AdapterError, match="larger than the system allows"):
            write_safetensors(tmp_path / "x", {"a": torch.ones(4000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_killed_process_leaves_the_old_file_whole(tmp_path, moment):
    write_safetensors(tmp_path / "x", {"a": torch.ones(4)}, {})
    old = (tmp_path / "x").read_bytes()
    child = os.fork()
    if child == 0:
        try:
            if moment != "write":
                setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            with replacing(tmp_path / "x") as handle:
                handle.write(b"half of the new")
                handle.flush()
                if moment == "write":
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "x").read_bytes() == old
    assert len(os.listdir(tmp_path)) == 2  # the torn file has another name, and is a file of its own


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(AdapterError, match="the folder does not exist"):
        write_safetensors(tmp_path / "absent" / "x", {"a": torch.ones(4)}, {})


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("kodo", "kodo"),
        ("<kodo> the dog", "kodo_the_dog"),
        ("../../etc/passwd", "etc_passwd"),
        ("con", "_con"),
        ("a\0b\nc", "a_b_c"),
        ("小明", "小明"),
        ("C:\\x", "C_x"),
        ("x" * 999, "x" * 120),
    ],
)
def test_typed_names_become_file_names(typed, name, tmp_path):
    assert safe_name(typed) == name
    assert safe_child(tmp_path, safe_name(typed)).parent == tmp_path.resolve()


@pytest.mark.parametrize("typed", ["", "...", "///", "\0", " "])
def test_names_of_nothing_are_refused(typed):
    with pytest.raises(AdapterError, match="at least one letter"):
        safe_name(typed)


def test_child_stays_in_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    assert safe_child(tmp_path / "out", "sub/x.png") == tmp_path.resolve() / "out" / "sub" / "x.png"
    for name in (
        "../x",
        "..\\x",
        "/etc/passwd",
        "sub/../../x",
        "link/x",
        "",
        ".",
        "a\0b",
        "C:x",
        "..",
        "out\n",
    ):
        with pytest.raises(AdapterError):
            safe_child(tmp_path / "out", name)


def test_strict_json():
    assert parse_json('{"a": [1, {"b": null}]}', "x") == {"a": [1, {"b": None}]}
    for text in ('{"a":1,"a":2}', "[NaN]", "[Infinity]", "[" * 10_000, "{", ""):
        with pytest.raises(AdapterError, match="^x "):
            parse_json(text, "x")


def test_of_several_files_the_one_that_cannot_take_its_name_is_named(tmp_path):
    first, second = tmp_path / "first.bin", tmp_path / "second.bin"
    second.mkdir()
    with pytest.raises(AdapterError, match=r"second\.bin: cannot be written"), all_or_none():
        for path in (first, second):
            with replacing(path) as file:
                file.write(b"new")
    assert list(tmp_path.iterdir()) == [second]


@pytest.mark.parametrize("when", ["emptied", "cut", "another", "gone"])
@pytest.mark.parametrize("read", [read_safetensors, lambda path: read_foreign(path, lambda key: True)])
def test_a_file_that_is_written_over_while_it_is_read_is_one_sentence(tmp_path, monkeypatch, when, read):
    """In place, as programs do that open it to write: what is mapped into memory would end the process."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(5000), "b": torch.ones(100, 100)}, {})
    changes = {
        "emptied": lambda: open(path, "wb").close(),
        "cut": lambda: os.truncate(path, 4096),
        "another": lambda: write_safetensors(path, {"a": torch.ones(100, 150)}, {}),
        "gone": path.unlink,
    }
    monkeypatch.setattr(safetensors_files, "check_fits", lambda *_: changes[when]())
    with pytest.raises(AdapterError, match="x.safetensors: ") as caught:
        read(path)
    assert "changed while it was read" in str(caught.value) or when == "gone"


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.int16, torch.uint16, torch.float8_e4m3fn, torch.complex64])
def test_the_reader_gives_what_the_library_gives(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    numbers = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors = {"a": numbers, "b": numbers[0, 0, 0].clone(), "c": torch.zeros(0, 3, dtype=dtype), "d": torch.ones(7)}
    save_file(tensors, tmp_path / "x.safetensors", {"said": "a"})
    mine, metadata = read_foreign(tmp_path / "x.safetensors", lambda key: True)
    theirs = load_file(tmp_path / "x.safetensors")
    assert metadata == {"said": "a"} and set(mine) == set(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape
        assert tensor_bytes(mine[name]) == tensor_bytes(tensor)


def test_what_may_not_be_read_is_not_called_unwritable():
    assert reason(PermissionError(errno.EACCES, "x"), "read") == "you have no permission to read it"
    assert reason(PermissionError(errno.EACCES, "x")) == "you have no permission to write there"
