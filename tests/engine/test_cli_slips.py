# ruff: noqa: F811 (fixtures of another file)
"""What slips from a newcomer's hand: other programs' words, other systems' quotes and marks, ways to start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import DRAW, QUICK, concept, files, here, made, run  # noqa: F401 - fixtures

import modular_concepts
from modular_concepts.errors import AdapterError
from modular_concepts.models.prompts import unheard_of

Image = pytest.importorskip("PIL.Image")

TRAIN = ["--name", "tom", "--class-word", "man", *QUICK]
PACKAGE = Path(modular_concepts.__file__).parent


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("train x --name a --class-word b", "--lr=1e-4", "--adapter-lr"),
        ("train x --name a --class-word b", "--learning_rate=1e-4", "--adapter-lr"),
        ("train x --name a --class-word b", "--network_dim=8", "--rank"),
        ("train x --name a --class-word b", "--max_train_steps=5", "--steps"),
        ("train x --name a --class-word b", "--resolution=512", "--size"),
        ("train x --name a --class-word b", "--train_batch_size=1", "--batch"),
        ("sample x", "--cfg-scale=7", "--cfg"),
        ("sample x", "--num_inference_steps=20", "--steps"),
        ("sample x", "--lora=a", "--concept"),
        ("merge x", "-o=a", "--out"),
    ],
)
def test_an_option_of_another_program_is_told_what_it_is_here(here, capsys, command, typed, meant):
    code, _, err = run(capsys, *command.split(), typed)
    name = typed.partition("=")[0]
    assert code == 2 and f"there is no option {name}; {meant} is what is meant, perhaps" in err, err
    assert err.count("\n") == 1


def test_what_a_command_does_not_have_is_not_said_to_be_meant(here, capsys):
    assert "is meant" not in run(capsys, "inspect", "x", "--lr", "1")[2]


@pytest.mark.parametrize("quoted", ["“a man”", "„a man“", "«a man»", "‘a man’"])
def test_quotes_of_a_text_program_are_called_so(here, capsys, quoted):
    code, _, err = run(capsys, "sample", *quoted.split(), *DRAW)
    assert code == 2 and "no shell reads" in err and err.count("\n") == 1, err
    assert "no shell reads" not in run(capsys, "sample", "a", "man")[2]


@pytest.mark.parametrize("prompt", ["a man AND a dog", "a man BREAK a dog", "a {man|dog} here", "a {man | dog}"])
def test_prompts_that_other_programs_part_are_said_to_be_read_as_text(made, here, capsys, prompt):
    code, _, err = run(capsys, "sample", prompt, *DRAW)
    assert code == 0 and "nothing parts a prompt here or chooses from it" in err, err
    assert err.index("nothing parts") < err.index("sample: ")
    _, _, err = run(capsys, "sample", "a man", *DRAW, "--region", f"0,0,0.5,1:{prompt}")
    assert "nothing parts a prompt" in err


def test_plain_words_are_not_taken_for_parts():
    import modular_concepts as mc

    assert unheard_of(mc.load_base("toy"), ["a man and a dog", "a {concept} at night"], {}) == []


def test_two_files_in_one_are_parted_as_the_command_takes_them(made, here, capsys):
    both = f"{concept(made)},{concept(made, 'tim')}"
    code, _, err = run(capsys, "sample", "a man", *DRAW, "--concept", both)
    assert code == 2 and "these are two files; give them each after a --concept of its own" in err, err
    for command in (["merge", "--out", "m.safetensors"], ["inspect"]):
        assert "give them with a space between" in run(capsys, *command, both)[2]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("pictures\\tom", "pictures/tom"),
        (".\\pictures\\tom", "pictures/tom"),
        ("pictures/Tom", "pictures/tom"),
        ("picture/tom", None),
        ("pictures/tmo", "pictures/tom"),
        ("picturse", "pictures"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="elsewhere these are the folder itself")
def test_a_folder_that_is_nearly_named_is_named(made, capsys, monkeypatch, typed, meant):
    monkeypatch.chdir(made)
    code, _, err = run(capsys, "train", typed, *TRAIN, "--out", "new.safetensors")
    words = f"there is no such folder; perhaps {meant} is meant" if meant else "there is no such folder; give"
    assert code == 2 and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("tom", "perhaps concepts/tom.safetensors is meant"),
        ("tom.safetensors", "perhaps concepts/tom.safetensors is meant"),
        ("concepts/tmo.safetensors", "perhaps concepts/tom.safetensors is meant"),
        ("concepts/*.safetensors", "the shell left it as it stands; name each file"),
        ("concepts/t?m.safetensors", "perhaps concepts/tom.safetensors is meant"),
    ],
)
def test_a_file_is_named_by_a_path_that_can_be_typed(made, capsys, monkeypatch, typed, words):
    monkeypatch.chdir(made)
    for command in (["inspect"], ["sample", "a man", *DRAW, "--concept"]):
        code, _, err = run(capsys, *command, typed)
        assert code == 2 and words in err and err.count("\n") == 1, err


def test_a_size_is_taken_as_messages_write_it(made, here, capsys):
    code, out, err = run(capsys, "train", made / "pictures/tom", *TRAIN, "--size", "32×32")
    assert code == 0 and "wrote concepts/tom.safetensors" in out, err


@pytest.mark.parametrize("place", [PACKAGE, PACKAGE / "__main__.py"])
def test_started_by_its_path_it_says_how_it_is_started(tmp_path, place):
    done = subprocess.run([sys.executable, place, "--version"], capture_output=True, text=True, cwd=tmp_path)  # noqa: S603 - our own command
    assert done.returncode != 0 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "python -m modular_concepts" in done.stderr


def test_without_docstrings_it_says_what_takes_them_away(tmp_path):
    env = os.environ | {"PYTHONOPTIMIZE": "2", "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-m", "modular_concepts", "sample", "a man", *DRAW]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=env)  # noqa: S603 - our own command
    assert done.returncode == 2 and "PYTHONOPTIMIZE=2" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_library_that_cannot_be_imported_is_named(here, capsys, monkeypatch):
    import diffusers

    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("Failed to import diffusers.models because of the following error:\nno module named x")

    monkeypatch.setitem(sys.modules, "diffusers", Broken())
    assert diffusers is not sys.modules["diffusers"]
    code, _, err = run(capsys, "sample", "a man", *DRAW)
    assert code == 2 and "diffusers is installed but cannot be imported (no module named x)" in err, err


def test_weights_that_were_not_unpacked_are_said(tmp_path):
    from modular_concepts.toy.base import load_toy_base

    with pytest.raises(AdapterError, match=r"the toy base's weights are not at .*install this pack anew"):
        load_toy_base(tmp_path)
