# ruff: noqa: F811 (fixtures of another file)
"""Files that appear while a command works, and places that get in each other's way."""

import os
import sys
import threading
import tracemalloc

import pytest
from test_cli import DRAW, QUICK, concept, files, here, made, run  # noqa: F401 - fixtures

import modular_concepts.cli.merge
import modular_concepts.cli.sample
import modular_concepts.cli.train
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept
from modular_concepts.storage import atomic
from modular_concepts.storage.atomic import Taken, all_or_none, only_new, replacing, write_atomically

Image = pytest.importorskip("PIL.Image")

TRAIN = ["--name", "tom", "--class-word", "man", *QUICK]
PRECIOUS = b"another's"


def appearing(monkeypatch, module, path, name="base_named"):
    """Another program writes `path` after the command has looked for it, and before it writes."""
    there = getattr(module, name)

    def and_meanwhile(*args, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PRECIOUS)
        return there(*args, **options)

    monkeypatch.setattr(module, name, and_meanwhile)


@pytest.mark.parametrize("out", [[], ["--out", "mine/tom.safetensors"]])
def test_a_training_leaves_what_has_come_to_its_place_and_is_written_beside(made, here, capsys, monkeypatch, out):
    path = here / (out[1] if out else "concepts/tom.safetensors")
    appearing(monkeypatch, modular_concepts.cli.train, path)
    code, stdout, err = run(capsys, "train", made / "pictures" / "tom", *TRAIN, *out)
    assert path.read_bytes() == PRECIOUS
    assert code == 2 and "is there now and was not before" in err and "tom-2.safetensors instead" in err, err
    assert "tom-2.safetensors: " in stdout and load_concept(path.with_stem("tom-2")).name == "tom"


def test_a_training_replaces_it_where_it_may(made, here, capsys, monkeypatch):
    path = here / "concepts/tom.safetensors"
    appearing(monkeypatch, modular_concepts.cli.train, path)
    code, _, err = run(capsys, "train", made / "pictures" / "tom", *TRAIN, "--overwrite")
    assert code == 0 and load_concept(path).name == "tom", err


@pytest.mark.parametrize(("out", "beside"), [([], "sample-2.png"), (["--out", "x.png"], "x-2.png")])
def test_a_picture_leaves_what_has_come_to_its_place(made, here, capsys, monkeypatch, out, beside):
    path = here / (out[1] if out else "sample.png")
    appearing(monkeypatch, modular_concepts.cli.sample, path)
    code, stdout, err = run(capsys, "sample", "a man", *DRAW, *out)
    assert code == 0 and path.read_bytes() == PRECIOUS
    assert f"wrote {beside} " in stdout and "stays as it is, and the picture is written beside it" in err
    Image.open(here / beside).load()


def test_a_merge_and_an_export_leave_what_has_come_to_their_place(made, here, capsys, monkeypatch):
    path = here / "both.safetensors"
    with monkeypatch.context() as patched:
        appearing(patched, modular_concepts.cli.merge, path, "concepts_at")
        code, _, err = run(capsys, "merge", concept(made), concept(made, "tim"), "--out", path)
    assert code == 2 and path.read_bytes() == PRECIOUS and "is there now and was not before" in err
    word = here / "exports" / "embeddings" / "tom.safetensors"
    appearing(monkeypatch, modular_concepts.cli.merge, here / "exports" / "tom_kohya.safetensors", "folder")
    code, _, err = run(capsys, "export", concept(made))
    assert code == 2 and "is there now and was not before" in err and not word.exists()
    assert not [name for name in files(here) if name.endswith(".tmp")]


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_that_want_a_name_has_it(tmp_path, monkeypatch, links):
    if not links:

        def none(*_args):
            raise PermissionError("no links here")

        monkeypatch.setattr(atomic.os, "link", none)
    ends, start = [], threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        try:
            with only_new():
                write_atomically(tmp_path / "x", bytes([number]) * 1000)
            ends.append(number)
        except Taken:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 1 and (tmp_path / "x").read_bytes() == bytes(ends) * 1000
    assert os.listdir(tmp_path) == ["x"]


def test_all_or_none_of_new_files_leaves_another_s_and_none_of_its_own(tmp_path):
    (tmp_path / "b").write_bytes(PRECIOUS)
    with pytest.raises(Taken), only_new(), all_or_none():
        for name in "abc":
            write_atomically(tmp_path / name, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"b": PRECIOUS}
    with only_new(), all_or_none():
        for name in "ac":
            write_atomically(tmp_path / name, b"new")
    assert len(os.listdir(tmp_path)) == 3


def test_only_new_ends_with_its_block(tmp_path):
    with only_new(), replacing(tmp_path / "x") as file:
        file.write(b"1")
    write_atomically(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"2"
    assert issubclass(Taken, AdapterError)


# --- places in each other's way -----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--checkpoints", "--cache"])
@pytest.mark.parametrize("place", ["x.safetensors", "x.safetensors/inside", "./sub/../x.safetensors"])
def test_a_folder_where_the_concept_is_to_be_is_refused_before_the_work(made, here, capsys, option, place):
    more = ["--out", "x.safetensors", option, place]
    code, _, err = run(capsys, "train", made / "pictures" / "tom", *TRAIN, *more)
    assert code == 2 and f"choose another {option}" in err and err.count("\n") == 1 and not list(here.iterdir())


def test_a_training_that_is_refused_leaves_no_folder(made, here, capsys):
    more = ["--checkpoints", "new/steps", "--cache", "latents"]
    for pictures, words in (("nosuch", []), (made / "pictures" / "tom", ["--rank", "4000"])):
        code, _, err = run(capsys, "train", pictures, *TRAIN, *more, *words)
        assert code == 2 and not list(here.iterdir()), err


# --- numbers and order --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        ["sample", "a man", "--steps", "1_0"],
        ["sample", "a man", "--cfg", "1_0"],
        ["sample", "a man", "--region", "0,0,0_5,1:a man"],
        ["sample", "a man", "--concept", "CONCEPT:0_8"],
        ["merge", "CONCEPT:0_8", "--out", "y.safetensors"],
        ["train", "PICTURES", *TRAIN, "--size", "3_2x32"],
        ["train", "PICTURES", *TRAIN, "--min-snr", "0_5"],
    ],
)
def test_no_number_has_an_underscore(made, here, capsys, line):
    meant = {"CONCEPT": str(concept(made)), "PICTURES": str(made / "pictures" / "tom")}
    for name, path in meant.items():
        line = [part.replace(name, path) for part in line]
    code, _, err = run(capsys, *line)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and files(here) == {}, err


def test_options_before_the_command_are_told_where_they_stand(made, here, capsys):
    code, _, err = run(capsys, "--out", "x.png", "sample", "a man")
    assert code == 2 and "--out stands before the command; options stand behind theirs" in err
    assert run(capsys, "--help")[0] == 0 and run(capsys, "--version")[0] == 0


@pytest.mark.parametrize("strength", ["0", "-0"])
@pytest.mark.parametrize("region", [[], ["--region", "0,0,0.5,1:a <tom>"]])
def test_a_concept_of_no_strength_is_said_where_it_is_drawn_too(made, here, capsys, strength, region):
    code, _, err = run(capsys, "sample", "a <tom>", *DRAW, *region, "--concept", f"{concept(made)}:{strength}")
    assert code == 0 and "tom has strength 0, so nothing of what its layers learned is drawn" in err, err


def test_what_a_persons_file_holds_is_not_read_whole_to_know_whose_it_is(made, here, capsys, monkeypatch):
    (here / "out").mkdir()
    for name, command in (("report.md", ["demo"]), ("00.png", ["pictures", "tom"])):
        (here / "out" / name).write_bytes(b"mine")
        os.truncate(here / "out" / name, 2**31)
        tracemalloc.start()
        code, _, err = run(capsys, *command, "--out", "out")
        assert code == 2 and f"{name} is there already" in err, err
        assert tracemalloc.get_traced_memory()[1] < 2**28
        tracemalloc.stop()
        (here / "out" / name).unlink()


def test_a_concept_of_another_family_is_refused_and_not_called_less_good(made, here, capsys, tmp_path):
    from tiny_sd import write_tiny_sd

    write_tiny_sd(here / "sd")
    code, _, err = run(capsys, "sample", "a man", *DRAW, "--base", "sd", "--concept", concept(made))
    assert code == 2 and "acts less well" not in err and "tom was trained on 'toy'" in err


def test_an_export_of_a_concept_whose_name_no_file_can_have_is_called_after_its_file(made, here, capsys):
    from dataclasses import replace

    from modular_concepts.files.concept import save_concept

    save_concept(replace(load_concept(concept(made)), name="."), here / "dot.safetensors")
    code, out, err = run(capsys, "export", "dot.safetensors")
    assert code == 0 and "wrote exports/dot_kohya.safetensors" in out, err


def test_a_resumed_training_of_another_class_word_is_refused_and_replaces_nothing(made, here, capsys):
    line = ["train", made / "pictures" / "tom", "--name", "tom", *QUICK, "--checkpoints", "steps"]
    assert run(capsys, *line, "--class-word", "man")[0] == 0
    before = files(here)
    code, _, err = run(capsys, *line, "--class-word", "dog", "--resume", "steps")
    assert code == 2 and err.count("error: ") == 1 and files(here) == before, err
    code, _, err = run(capsys, *line, "--class-word", "dog", "--resume", "steps", "--out", "other.safetensors")
    assert code == 2 and "the class word, the description or the trigger word is another one" in err, err
    line = ["all_linear" if part == "attention" else part for part in line]
    code, _, err = run(capsys, *line, "--class-word", "man", "--resume", "steps", "--overwrite")
    assert code == 2 and "the layers that are trained, or their frozen factors, are others" in err, err


@pytest.mark.parametrize("module", ["modular_concepts", "modular_concepts.cli.main"])
def test_every_way_to_start_works_or_says_so(made, here, module):
    from subprocess import run as run_process

    line = [sys.executable, "-m", module, "inspect", str(concept(made))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = run_process(line, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    assert done.returncode == 0 and "concept 'tom'" in done.stdout


def test_a_warning_that_python_was_told_to_raise_is_one_sentence(made, here, capsys, monkeypatch):
    def warns(_name):
        raise DeprecationWarning("of old")

    monkeypatch.setattr(modular_concepts.cli.sample, "base_named", warns)
    code, _, err = run(capsys, "sample", "a man")
    assert code == 2 and err.startswith("error: a library's warning ended this") and "of old" in err


def test_a_concept_is_not_called_as_a_checkpoint_beside_it(made, here, capsys):
    out = "steps/step-00000002.safetensors"
    code, _, err = run(capsys, "train", made / "pictures/tom", *TRAIN, "--checkpoints", "steps", "--out", out)
    assert code == 2 and "is what a checkpoint there is called" in err and not list(here.iterdir())
