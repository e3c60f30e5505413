"""No command replaces a person's file unasked: it refuses before any work, and --overwrite is the way out."""

from pathlib import Path

import pytest
from test_cli import files, refused, run

from modular_concepts.cli import main as cli
from modular_concepts.files.concept import load_concept
from modular_concepts.toy import model

pytest.importorskip("PIL.Image")

QUICK = ["--batch", "2", "--rank", "2", "--targets", "cross_attention", "--class-word", "man"]


@pytest.fixture
def here(weights, tmp_path, monkeypatch, capsys) -> Path:
    """A working folder with pictures of tom and concepts of tom and tim."""
    monkeypatch.setattr(model, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pictures", "tom"]) == 0
    for slot, name in enumerate(("tom", "tim")):
        assert run(capsys, *train(name, "--steps", "1", "--slot", slot))[0] == 0
    return tmp_path


def train(name: str, *more) -> list:
    return ["train", "pictures/tom", "--name", name, *QUICK, *more]


def test_a_concept_is_replaced_only_when_asked(here, capsys, monkeypatch):
    tom, tim, way_out = "concepts/tom.safetensors", "concepts/tim.safetensors", "replace it with --overwrite"
    both = "both.safetensors"
    (here / both).write_bytes(b"something of a person's")
    with monkeypatch.context() as patch:
        patch.setattr(model, "WEIGHTS", here / "nowhere")  # refused before anything is loaded
        refused(capsys, here, train("tom"), f"{tom} is there already", way_out)
        refused(capsys, here, ["merge", tom, tim, "--out", both], f"{both} is there already", way_out)
        refused(
            capsys, here, ["merge", tom, tim, "--out", tom, "--overwrite"], f"would replace {tom}, one of its parts"
        )
        refused(capsys, here, ["export", tom, "--out", tim], f"{tim} is there already", way_out)
    before = files(here)
    for command in (train("tim", "--steps", "2"), ["merge", tom, tim, "--out", both]):
        assert run(capsys, *command, "--overwrite")[0] == 0
    after = files(here)
    assert {name for name in before if before[name] != after[name]} == {tim, both}
    assert set(load_concept(both).tokens) == {"<tom>", "<tim>"}


def test_an_export_in_a_second_format_keeps_the_word_and_another_concepts_word_is_not_replaced(here, capsys):
    assert run(capsys, "export", "concepts/tom.safetensors")[0] == 0
    assert run(capsys, "export", "concepts/tom.safetensors", "--format", "diffusers")[0] == 0
    assert run(capsys, *train("tom", "--steps", "2", "--out", "other.safetensors"))[0] == 0
    export = ["export", "other.safetensors", "--out", "exports/other.safetensors"]
    refused(capsys, here, export, "error: exports/embeddings/tom.safetensors is there already")
    assert run(capsys, *export, "--overwrite")[0] == 0


def test_pictures_may_be_written_again_but_not_over_a_persons_own(here, capsys):
    assert run(capsys, "pictures", "tom")[0] == 0
    (here / "pictures/tom/03.txt").write_text("a {concept} in my garden")
    refused(capsys, here, ["pictures", "tom"], "pictures/tom/03.txt is there already", "--overwrite")
    assert run(capsys, "pictures", "tom", "--overwrite")[0] == 0
    assert "garden" not in (here / "pictures/tom/03.txt").read_text()


def test_a_resumed_training_replaces_its_own_concept_and_no_other(here, capsys):
    start = train("ann", "--steps", "1", "--checkpoints", "steps")
    assert run(capsys, *start)[0] == 0
    further = train("ann", "--steps", "2", "--resume", "steps", "--accept-changes")
    assert run(capsys, *further)[0] == 0
    assert load_concept("concepts/ann.safetensors").recipe.training["steps_done"] == 2
    other = [*further, "--out", "concepts/tom.safetensors"]
    refused(capsys, here, other, "concepts/tom.safetensors is there already", "--overwrite")
    assert run(capsys, *other, "--overwrite")[0] == 0


def test_what_an_unfinished_training_leaves_takes_no_others_place(here, capsys, monkeypatch):
    """A cancel cannot be refused, so it finds a free name."""
    monkeypatch.setattr("modular_concepts.cli.progress.Interruption.__call__", lambda self: True)
    for seed in ("1", "2"):
        assert run(capsys, *train("ann", "--steps", "3", "--seed", seed))[0] == 130
    left = {name: load_concept(here / f"concepts/{name}.safetensors") for name in ("ann-step1", "ann-step1-2")}
    assert [concept.recipe.training["seed"] for concept in left.values()] == [1, 2]


def test_a_link_that_leads_to_itself_is_no_file_to_write_and_can_be_replaced(here, capsys):
    tom, tim = "concepts/tom.safetensors", "concepts/tim.safetensors"
    for command in (["export", tom], ["merge", tom, tim]):
        (here / "loop.safetensors").symlink_to("loop.safetensors")
        refused(capsys, here, [*command, "--out", "loop.safetensors"], "is a link to nothing", "--overwrite")
        assert run(capsys, *command, "--out", "loop.safetensors", "--overwrite")[0] == 0
        assert (here / "loop.safetensors").is_file()
        (here / "loop.safetensors").unlink()
    (here / "round").symlink_to("round")
    (here / "gone").symlink_to("nowhere")  # before the work, not after it
    for folder in ("round", "gone"):
        for command in (["export", tom], ["merge", tom, tim], train("x")):
            refused(capsys, here, [*command, "--out", f"{folder}/x.safetensors"], f"{folder} is not a folder")
