# ruff: noqa: F811 (fixtures of another file)
"""What is given is used, or the shell says so before it begins; numbers are taken as far as they make sense."""

import pytest
from laws import relative_error
from test_cli import DRAW, concept, files, here, made, run  # noqa: F401 - fixtures

from modular_concepts.files.concept import load_concept

Image = pytest.importorskip("PIL.Image")


# --- strengths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", ["5", "-4", "0.33", "-100", "100"])
def test_strengths_are_taken_as_far_as_the_host_takes_them(made, here, capsys, strength):
    code, _, err = run(capsys, "merge", f"{concept(made)}:{strength}", "--out", "sum.safetensors")
    assert code == 0, err
    whole, merged = load_concept(concept(made)).layers, load_concept(here / "sum.safetensors").layers
    for layer, adapter in merged.items():
        assert relative_error(adapter.delta(), float(strength) * whole[layer].delta()) < 1e-6
    draw = ["sample", "a <tom>", *DRAW, "--concept", f"{concept(made)}:{strength}"]
    assert run(capsys, *draw)[0] == 0


@pytest.mark.parametrize("strength", ["100.1", "-101", "nan", "inf", "-inf", "1e9"])
def test_no_number_and_far_too_much_stay_refused(made, here, capsys, strength):
    for command in (["merge", "--out", "sum.safetensors"], ["sample", "a <tom>", *DRAW, "--concept"]):
        code, _, err = run(capsys, *command, f"{concept(made)}:{strength}")
        assert code == 2 and "from -100 to 100" in err and err.count("\n") == 1
    assert files(here) == {}


# --- bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--zoom", "100000"], ["--zoom", "at most 10000"]),
        (["--zoom", "10000"], ["zoom is 10000", "choose at most 256"]),
        (["--zoom", "9" * 5000], ["--zoom", "at most 10000"]),
        (["--width", "100000"], ["100000 x 32 pixels", "at most 8192"]),
        (["--height", str(8 * 10**12)], ["pixels", "at most 8192"]),
        (["--width", "8192", "--height", "8192"], ["8192 x 8192 pixels would take about", "this machine has"]),
        (["--count", "1000000000"], ["--count", "at most 10000"]),
        (["--steps", "1000000000"], ["steps is 1000000000"]),
        (["--seed", str(2**63 - 1), "--count", "2"], [f"seed {2**63}"]),
    ],
)
def test_what_would_eat_the_machine_is_one_sentence(here, capsys, monkeypatch, more, words):
    monkeypatch.setattr("modular_concepts.models.budget.machine_memory", lambda: 4 * 2**30)
    code, out, err = run(capsys, "sample", "a man", *DRAW, *more)
    assert code == 2 and all(word in err for word in words), err
    assert err.count("\n") == 1 and files(here) == {} and out == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--batch", "1000000000"], ["batch is 1000000000", "at most"]),
        (["--batch", "60000"], ["this training would take about", "lower --batch"]),
        (["--steps", "1000000000000"], ["steps is 1000000000000", "at most"]),
        (["--token-vectors", "100000000"], ["token_vectors is 100000000", "at most 64"]),
        (["--seed", str(2**64)], [f"seed is {2**64}", "at most"]),
        (["--size", "80000x80000"], ["80000 x 80000 pixels", "at most 8192"]),
        (["--size", "8192x8192"], ["8192 x 8192 pixels would take about"]),
        (["--rank", "1000000000"], ["rank is 1000000000"]),
        (["--prior", "1000000000"], ["--prior"]),
        (["--keep-checkpoints", "99999999999"], ["keep_checkpoints"]),
    ],
)
def test_a_training_that_would_eat_the_machine_is_one_sentence(made, here, capsys, monkeypatch, more, words):
    monkeypatch.setattr("modular_concepts.models.budget.machine_memory", lambda: 4 * 2**30)
    train = ["train", made / "pictures/tom", "--name", "tom", "--class-word", "man", "--rank", "2", "--steps", "1"]
    code, _, err = run(capsys, *train, *more)
    assert code == 2 and all(word in err for word in words), err
    assert err.count("\n") == 1 and files(here) == {}


def test_more_pictures_than_a_batch_are_those_that_come_alone(made, here, capsys):
    draw = ["sample", "a <tom>", *DRAW, "--concept", concept(made)]
    code, out, err = run(capsys, *draw, "--count", "18", "--out", "many.png")
    assert code == 0 and "many-17.png (seed 17)" in out, err
    assert len(files(here)) == 18
    assert run(capsys, *draw, "--seed", "16", "--count", "2", "--out", "two.png")[0] == 0
    assert (here / "many-17.png").read_bytes() == (here / "two-01.png").read_bytes()


# --- concepts that nobody calls -----------------------------------------------------------------------------


def lora_of(made, here):
    """tom's layers as another program's LoRA, whose metadata names no trigger."""
    from dataclasses import replace

    from modular_concepts.files.concept import save_concept

    tom = load_concept(concept(made))
    save_concept(
        replace(tom, name="sketch", tokens={}, recipe=replace(tom.recipe, triggers=())), here / "sketch.safetensors"
    )
    return here / "sketch.safetensors"


def test_a_concept_that_no_prompt_calls_is_told_before_drawing(made, here, capsys):
    draw = ["sample", "a man on the beach", *DRAW, "--concept", concept(made)]
    region = ["--region", "0,0,0.5,1:a cat on the beach"]
    code, _, err = run(capsys, *draw, *region)
    assert code == 0 and "no prompt says <tom>, so tom acts nowhere" in err
    code, _, err = run(capsys, *draw, *region, "--mode", "merged")
    assert code == 0 and "no prompt says <tom>: tom changes the whole picture" in err
    code, _, err = run(capsys, *draw)
    assert code == 0 and "no prompt says <tom>: tom changes the whole picture" in err
    for called in (["--region", "0,0,0.5,1:photo of<Tom>"], ["--region", "0,0,0.5,1:a <tom>", "--mode", "merged"]):
        code, _, err = run(capsys, *draw, *called)
        assert code == 0 and "no prompt says" not in err


def test_a_lora_without_trigger_in_gated_regions_is_told(made, here, capsys):
    draw = ["sample", "a man on the beach", *DRAW, "--concept", lora_of(made, here)]
    code, _, err = run(capsys, *draw, "--region", "0,0,0.5,1:a cat on the beach")
    assert code == 0 and "sketch has no trigger word that could call it, so it acts nowhere" in err
    assert "--mode merged" in err
    for acts in (["--region", "0,0,0.5,1:a cat on the beach", "--mode", "merged"], []):
        code, _, err = run(capsys, *draw, *acts)
        assert code == 0 and "sketch" not in err


# --- options that nothing reads -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method", "lora", "--slot", "3"], "--slot changes nothing: lora does not read it, but orthogonal, block"),
        (["--method", "lora", "--blocks", "3"], "--blocks changes nothing"),
        (["--layout", "strided"], "--layout changes nothing: orthogonal does not read it"),
        (["--method", "words", "--rank", "3"], "--rank changes nothing: words"),
        (["--method", "words", "--adapter-lr", "0.1"], "--adapter-lr changes nothing"),
        (["--method", "words", "--targets", "attention"], "--targets changes nothing"),
        (
            ["--method", "custom_diffusion", "--alpha", "3", "--targets", "cross_attention_kv"],
            "--alpha changes nothing",
        ),
        (["--text-encoder-lr", "0.1"], "--text-encoder-lr changes nothing without --text-encoder"),
        (["--prior-weight", "2"], "--prior-weight changes nothing without --prior"),
        (["--company-pictures", "2"], "--company-pictures changes nothing without --company"),
        (["--checkpoint-every", "2"], "--checkpoint-every changes nothing without --checkpoints"),
        (["--keep-checkpoints", "2"], "--keep-checkpoints changes nothing without --checkpoints"),
        (["--accept-changes"], "--accept-changes changes nothing without --resume"),
        (["--token-noise", "1", "--token-start", "random + class"], "--token-noise changes nothing without a word"),
    ],
)
def test_a_training_says_which_options_it_does_not_read(made, here, capsys, more, words):
    train = ["train", made / "pictures/tom", "--name", "tom", "--class-word", "man", "--steps", "1", "--batch", "1"]
    code, _, err = run(capsys, *train, *more)
    assert code == 0 and f"note: {words}" in err, err
    assert err.count("changes nothing") == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--density", "0.5"], "--density changes nothing: sum does not read it, but magnitude, dare, ties would"),
        (["--rank", "3", "--how", "average"], "--rank changes nothing: average"),
        (["--seed", "3", "--how", "ties"], "--seed changes nothing: ties"),
        (["--ridge", "3"], "--ridge changes nothing"),
        (["--moments", "a", "b"], "--moments changes nothing"),
        (["--density", "0.5", "--how", "ties"], ""),
    ],
)
def test_a_merge_says_which_options_it_does_not_read(made, here, capsys, more, words):
    code, _, err = run(capsys, "merge", concept(made), concept(made, "tim"), "--out", "sum.safetensors", *more)
    assert code == 0, err
    assert f"note: {words}" in err if words else "changes nothing" not in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--mode", "merged"], "--mode changes nothing without --region"),
        (["--mode", "gated"], "--mode changes nothing without --region"),
        (["--units", "pixels"], "--units changes nothing without --region"),
        (["--negative", "a tree"], "--negative changes nothing without guidance"),
    ],
)
def test_a_drawing_says_which_options_it_does_not_read(here, capsys, more, words):
    code, _, err = run(capsys, "sample", "a man on the beach", *DRAW, *more)
    assert code == 0 and f"note: {words}" in err


def test_the_table_knows_every_option_of_every_command():
    import argparse

    from modular_concepts.cli import main as cli
    from modular_concepts.unread import MERGE, SAMPLE, TRAIN

    commands = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for name, table in (("train", TRAIN), ("merge", MERGE), ("sample", SAMPLE)):
        assert {action.dest for action in commands[name]._actions} - {"help"} == set(table), name
        assert all(read.needs == "" or read.needs in table or " " in read.needs for read in table.values())


# --- text that is not heard ---------------------------------------------------------------------------------


def test_a_prompt_and_captions_say_what_falls_off_and_what_weighs_nothing(made, here, capsys):
    long = "man " * 40 + "in the snow"
    code, _, err = run(capsys, "sample", long, *DRAW, "--negative", "a (red:1.3) dog", "--cfg", "2")
    assert code == 0 and "falls off 'man man in the snow'" in err and "read as text: (red:1.3)" in err
    folder = here / "set"
    folder.mkdir()
    for number in range(2):
        Image.open(made / f"pictures/tom/{number:02d}.png").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {{concept}} (red:1.3) {long}")
    train = ["train", folder, "--name", "tom", "--class-word", "man", "--steps", "1", "--batch", "1"]
    code, _, err = run(capsys, *train)
    assert code == 0 and "reads 40 tokens of a caption" in err and "weigh no words here" in err
