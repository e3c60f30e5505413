"""A file's name and what it holds may be anything; what is said of it stays one line that does nothing else."""

import time
from pathlib import Path

import pytest
import torch
from mutations import in_shell, toy_base

from modular_concepts.adapters.basis import load_basis
from modular_concepts.cli.main import main
from modular_concepts.data.dataset import load_folder, load_picture
from modular_concepts.data.latents import kept
from modular_concepts.errors import AdapterError
from modular_concepts.files.lora import read_concept
from modular_concepts.load import load_base
from modular_concepts.models.diffusers_folder import load_diffusers_base
from modular_concepts.regions.parsing import region_box, regions_from_json
from modular_concepts.storage.names import resolved, safe_child
from modular_concepts.storage.safetensors import write_safetensors
from modular_concepts.storage.strict_json import MAX_DEPTH, parse_json
from modular_concepts.training.checkpoint import newest_checkpoint

NAMES = ("a\nerror: b", "a\x1b[2J", "a\u202eb", "a\u2028b", "a\tb")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_breaks_no_line_and_moves_no_cursor(tmp_path, name, capsys):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(b"no file of tensors")
    with pytest.raises(AdapterError) as caught:
        read_concept(path)
    assert str(caught.value).isprintable() and "this is not a safetensors file" in str(caught.value)
    in_shell("inspect", str(path))
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


DOORS = {
    "basis": load_basis,
    "pictures": lambda path: load_folder(path, (32, 32)),
    "picture": lambda path: load_picture(Path(path)),
    "concept": read_concept,
    "base": load_base,
    "folder of a base": load_diffusers_base,
    "checkpoint": newest_checkpoint,
    "latents": lambda path: kept(toy_base(), Path(path), "pictures", list),
    "what is written": lambda path: write_safetensors(path, {"a": torch.ones(1)}, {}),
}


@pytest.mark.parametrize("name", ["a" * 5000, "b/" * 3000 + "a", "a\0b"])
@pytest.mark.parametrize("door", DOORS)
def test_a_path_that_no_system_has_is_one_sentence(tmp_path, monkeypatch, door, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError) as caught:
        DOORS[door](name)
    assert str(caught.value).isprintable() and not list(tmp_path.iterdir())


def test_no_name_at_all_is_no_basis_and_no_file_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for door in ("basis", "what is written"):
        with pytest.raises(AdapterError, match="name"):
            DOORS[door]("")


def test_a_name_that_people_read_is_said_as_it_is(tmp_path):
    path = tmp_path / "Мой\u3000concept é.safetensors"
    path.write_bytes(b"no file of tensors")
    with pytest.raises(AdapterError, match="Мой\u3000concept é.safetensors: this is not"):
        read_concept(path)


@pytest.mark.parametrize("text", ['{"a": 1e999}', '{"a": [-1e400]}', '{"a": NaN}'])
def test_infinity_by_another_name_is_no_json(text):
    with pytest.raises(AdapterError, match="x holds .*; the file is damaged"):
        parse_json(text, "x")


@pytest.mark.parametrize("text", ['"\\ud800"', '{"a": ["x\\uDFFF"]}', '{"\\udc00": 1}'])
def test_half_a_character_is_no_text(text):
    with pytest.raises(AdapterError, match="^x holds half a character; the file is damaged$"):
        parse_json(text, "x")
    assert parse_json('["\\ud83d\\ude00"]', "x") == ["\U0001f600"]


@pytest.mark.parametrize("outer, inner", [('{"a":', "}"), ("[", "]")])
def test_nesting_is_bounded_before_anything_looks_into_it(outer, inner):
    assert parse_json(outer * MAX_DEPTH + "1" + inner * MAX_DEPTH, "x")
    for depth in (MAX_DEPTH + 1, 450, 900, 100_000):
        with pytest.raises(AdapterError, match="^x is (nested too deeply|not sound JSON); the file is damaged$"):
            parse_json(outer * depth + "1" + inner * depth, "x")


@pytest.mark.parametrize("depth", [10, 450, 900])
def test_deep_regions_and_boxes_are_one_sentence(depth):
    box = {"x": 0, "y": 0, "width": 1, "height": 1}
    for _ in range(depth):
        box = [box]
    with pytest.raises(AdapterError, match="a bounding box has x, y, width and height"):
        region_box(box)
    with pytest.raises(AdapterError, match="must be a JSON object|nested too deeply"):
        regions_from_json("[" * depth + "]" * depth)


def test_a_name_of_a_link_that_leads_to_itself_is_one_sentence_or_a_file(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert resolved(tmp_path / "loop" / "x") == tmp_path.resolve() / "loop" / "x"
    assert safe_child(tmp_path, "loop/x") == tmp_path.resolve() / "loop" / "x"


def test_an_entry_twice_among_many_is_found_at_once():
    many = ",".join(f'"a{number}":1' for number in range(60_000))
    started = time.process_time()
    with pytest.raises(AdapterError, match="the entry 'a59999' twice"):
        regions_from_json(f'[{{{many},"a59999":1}}]')
    assert time.process_time() - started < 5
