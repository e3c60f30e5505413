# ruff: noqa: F811 (fixtures of another file)
"""What a hasty hand types: the sentence names the thing, and the way to write it."""

import os
from dataclasses import replace

import pytest
from test_cli import DRAW, QUICK, concept, files, here, made, run  # noqa: F401 - fixtures

from modular_concepts.files.concept import load_concept, save_concept

Image = pytest.importorskip("PIL.Image")

TRAIN = ["--name", "tom", "--class-word", "man", *QUICK]


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "words"),
    [("0", "no word of the prompt is drawn"), ("-0.0", "no word of the prompt is drawn"), ("-2", "led away from")],
)
def test_guidance_that_does_not_draw_the_prompt_is_said(made, here, capsys, cfg, words):
    code, _, err = run(capsys, "sample", "a man", "--steps", "1", f"--cfg={cfg}", "--negative", "a dog")
    assert code == 0 and words in err and "changes nothing" not in err, err
    assert err.index("note: cfg is") < err.index("sample: ")
    assert "cfg is" not in run(capsys, "sample", "a man", "--steps", "1", "--cfg", "0.5")[2]


def test_without_guidance_the_negative_prompt_is_not_read(made, here, capsys):
    code, _, err = run(capsys, "sample", "a man", *DRAW, "--negative", "a dog")
    assert code == 0 and "--negative changes nothing without guidance" in err


@pytest.mark.parametrize("cfg", ["1e30", "-1e30", "101", "nan", "inf"])
def test_guidance_that_no_picture_survives_is_refused(made, here, capsys, cfg):
    code, _, err = run(capsys, "sample", "a man", "--steps", "1", f"--cfg={cfg}")
    assert code == 2 and "from -100 to 100" in err and err.count("\n") == 1 and files(here) == {}


def test_strengths_of_zero_are_said(made, here, capsys):
    both = [f"{concept(made)}:0", f"{concept(made, 'tim')}:-0.0"]
    code, _, err = run(capsys, "merge", *both, "--out", "none.safetensors")
    assert code == 0 and "every strength is 0, so the merge changes no layer" in err, err
    layers = load_concept(here / "none.safetensors").layers
    assert layers and not any(adapter.delta().any() for adapter in layers.values())
    code, _, err = run(capsys, "merge", both[0], concept(made, "tim"), "--out", "one.safetensors")
    assert code == 0 and "note: tom has strength 0" in err and "every" not in err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["FILE", "0.5"], "'0.5' is no file; a strength stands behind its file and a colon, without a space: FILE:0.5"),
        (["FILE:", "0.5"], "FILE:0.5"),
        (["FILE", "50%"], "FILE:0.5"),
        (["FILE", "0,5"], "FILE:0.5"),
        (["0.5", "FILE"], "'0.5' is no file"),
        (["FILE=0.5"], "'=0.5' is no strength; write FILE:0.5"),
        (["FILE@0.5"], "write FILE:0.5"),
        (["FILE 0.5"], "write FILE:0.5"),
        (["FILE:0.5:0.2"], "'0.5:0.2' is no strength; write FILE:0.5 or FILE:0.2"),
        (["FILE:50%"], "'50%' is no strength; write FILE:0.5"),
        (["FILE:0,5"], "'0,5' is no strength; write FILE:0.5"),
        (["FILE:"], "write FILE:0.8"),
        (["FILE=half"], "'=half' is no strength; write FILE:0.8"),
    ],
)
def test_strengths_in_other_spellings(made, here, capsys, typed, words):
    own = [text.replace("FILE", str(concept(made))) for text in typed]
    code, _, err = run(capsys, "merge", *own, "--out", "m.safetensors")
    assert code == 2 and words.replace("FILE", str(concept(made))) in err and err.count("\n") == 1, err
    if len(own) == 1:
        code, _, err = run(capsys, "sample", "a man", *DRAW, "--concept", *own)
        assert code == 2 and words.replace("FILE", str(concept(made))) in err
    assert files(here) == {}


def test_a_space_behind_the_colon_is_taken(made, here, capsys):
    assert run(capsys, "merge", f"{concept(made)}: 0.5", "--out", "a.safetensors")[0] == 0
    assert run(capsys, "merge", f"{concept(made)}:0.5", "--out", "b.safetensors")[0] == 0
    one, other = (load_concept(here / name).layers for name in ("a.safetensors", "b.safetensors"))
    assert all(one[layer].delta().equal(other[layer].delta()) for layer in other)


@pytest.mark.parametrize("typed", ["concepts/tom", "concepts\\tom.safetensors", "concepts/tmo.safetensors"])
def test_a_file_that_is_nearly_named_is_named(made, here, capsys, monkeypatch, typed):
    monkeypatch.chdir(made)
    code, _, err = run(capsys, "inspect", typed)
    assert code == 2 and "there is no such file; perhaps" in err and "tom.safetensors is meant" in err, err


# --- regions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        (["0.5,0.5,0.501,0.501:a dog"], "'a dog' is smaller than one of the 16 x 16 positions"),
        (["0,0,0.001,1:a dog"], "'a dog' is smaller than one"),
        (["0,0,0.5,1:a dog", "0,0,0.5,1:a cat"], "'a dog' and 'a cat' are in the same place: they share it"),
        (["0,0,0.5,1:a dog", "0,0,0.5001,1:a cat"], "are in the same place"),
        (["0,0,16,32:a dog", "0,0,16,32:a dog"], "'a dog' and 'a dog' are in the same place"),
    ],
)
def test_regions_that_hardly_draw_are_said_before_drawing(made, here, capsys, boxes, words):
    regions = [part for box in boxes for part in ("--region", box)]
    units = ["--units", "pixels"] if "16" in boxes[0] else []
    code, _, err = run(capsys, "sample", "a beach", *DRAW, *regions, *units)
    assert code == 0 and words in err and err.index(words) < err.index("sample: "), err


def test_regions_side_by_side_say_nothing(made, here, capsys):
    regions = ["--region", "0,0,0.5,1:a dog", "--region", "0.5,0,1,1:a cat", "--region", "0,0,0.07,0.07:a man"]
    code, _, err = run(capsys, "sample", "a beach", *DRAW, *regions)
    assert code == 0 and "note" not in err, err


# --- what is printed to be typed ----------------------------------------------------------------------------


def test_two_who_follow_the_line_that_pictures_prints_have_slots_of_their_own(here, capsys):
    from modular_concepts.toy.standard import BY_NAME

    slots = []
    for name in BY_NAME:
        line = run(capsys, "pictures", name)[1].splitlines()[1]
        slots.append(int(line.split("--slot ")[1]))
    assert len(set(slots)) == len(BY_NAME) and max(slots) < 16  # as many as the toy base has at its usual rank


def test_a_resume_with_other_settings_is_refused_before_the_estimate(made, here, capsys):
    train = ["train", made / "pictures/tom", *TRAIN, "--checkpoints", "kept"]
    code, out, _ = run(capsys, *train, "--steps", "1")
    assert code == 0 and "for 1 step;" in out
    code, out, err = run(capsys, *train, "--resume", "kept", "--steps", "2", "--overwrite")
    assert code == 2 and "steps was 1, is now 2" in err and "a step" not in out, out
    code, out, _ = run(capsys, *train, "--resume", "kept", "--steps", "2", "--accept-changes", "--overwrite")
    assert code == 0 and "for 1 more step after step 1;" in out


def test_a_finished_training_says_how_it_goes_on_to_more_steps(made, here, capsys):
    train = ["train", made / "pictures/tom", *TRAIN, "--checkpoints", "kept", "--overwrite"]
    assert run(capsys, *train, "--steps", "2")[0] == 0
    code, _, err = run(capsys, *train, "--resume", "kept", "--steps", "3")
    assert code == 2 and "is finished" in err and "--accept-changes trains on to step 3" in err, err
    assert run(capsys, *train, "--resume", "kept", "--steps", "3", "--accept-changes")[0] == 0


@pytest.mark.parametrize("first", ["", "man red shirt"])
def test_a_description_that_is_missing_or_new_on_resume_is_called_by_its_name(made, here, capsys, first):
    second = "" if first else "man red shirt"
    train = ["train", made / "pictures/tom", *QUICK, "--name", "ann", "--class-word", "man", "--checkpoints", "kept"]
    train = [*train, "--overwrite", "--description"]
    assert run(capsys, *train, first)[0] == 0
    code, _, err = run(capsys, *train, second, "--resume", "kept")
    words = "--description was there, and is not" if first else "--description is there, and was not"
    assert code == 2 and words in err and "--accept-changes" in err, err


@pytest.mark.parametrize(("trigger", "taken"), [("man", True), ("A", True), ("<man>", False), ("zorp", False)])
def test_a_concept_that_takes_a_word_of_the_base_says_so(made, here, capsys, trigger, taken):
    tom = load_concept(concept(made))
    (rows,) = tom.tokens.values()
    recipe = replace(tom.recipe, triggers=(trigger,))
    save_concept(replace(tom, name="ordinary", tokens={trigger: rows}, recipe=recipe), here / "o.safetensors")
    for command in (
        ["sample", f"a photo of {trigger}", *DRAW, "--concept", "o.safetensors", "--out", "a.png"],
        ["merge", "o.safetensors", "--base", "toy", "--out", "m.safetensors"],
    ):
        code, _, err = run(capsys, *command)
        assert code == 0 and ("is a word that the base knows" in err) == taken, err
        assert not taken or f"note: {trigger} is" in err


# --- the wrong thing in a place -----------------------------------------------------------------------------


def test_an_embedding_in_the_place_of_a_concept_is_called_so(made, here, capsys):
    assert run(capsys, "export", concept(made), "--out", "x.safetensors")[0] == 0
    for command in (["inspect"], ["merge", "--out", "m.safetensors"], ["sample", "a man", *DRAW, "--concept"]):
        code, _, err = run(capsys, *command, "embeddings/tom.safetensors")
        assert code == 2 and "tom.safetensors: this is an embedding, a learned word of" in err, err
        assert "embedding:tom in a prompt" in err and "another architecture" not in err and err.count("\n") == 1


def test_both_parts_of_sdxls_embeddings_are_called_so(here, capsys):
    import torch
    from safetensors.torch import save_file

    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "word.safetensors")
    assert "an embedding, a learned word of 2 vectors" in run(capsys, "inspect", "word.safetensors")[2]
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 8)}, "half.safetensors")
    assert "embedding" not in run(capsys, "inspect", "half.safetensors")[2]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sample", "a.png", *DRAW], "a.png is a file, but its name is read as the prompt"),
        (["sample", "a man", "--steps", "1", "--negative", "a.png"], "a.png is a file, but its name is read"),
        (["sample", " ", *DRAW], "the prompt is empty"),
    ],
)
def test_a_prompt_that_is_none_is_said(here, capsys, command, words):
    (here / "a.png").write_bytes(b"")
    code, _, err = run(capsys, *command)
    assert code == 0 and words in err, err


def test_a_picture_in_the_place_of_the_folder_is_called_a_file(made, here, capsys):
    code, _, err = run(capsys, "train", made / "pictures/tom/00.png", *TRAIN)
    assert code == 2 and "00.png: this is a file; give the folder" in err, err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["inspect", "-tom.safetensors"], ["no option -tom.safetensors", "./-name"]),
        (["merge", "x", "--out", "-m.safetensors"], ["no option -m.safetensors", "behind an ="]),
        (["sample", "a", "man"], ["nothing is meant by man", "in quotes"]),
        (["sample", "a man", "--concept", "a", "b"], ["nothing is meant by b", "before each of its values"]),
        (["sample", "a man", "--size", "32"], ["no option --size; see"]),
        (["sample", "a man", "-verbose"], ["no option -verbose"]),
        (["sample", "a man", "--seeed", "1"], ["no option --seeed, perhaps --seed"]),
        (["train", "x", "--name", "a", "--class-word", "b", "--noise-offset", "1e30"], ["noise_offset", "at most 10"]),
        (["train", "x", "--name", "a", "--class-word", "b", "--token-noise", "1e30"], ["token_noise", "at most 100"]),
    ],
)
def test_lines_that_cannot_be_meant(here, capsys, line, words):
    code, out, err = run(capsys, *line)
    assert code == 2 and all(word in err for word in words) and err.count("\n") == 1 and out == "", err


def test_a_number_below_zero_is_a_value(made, here, capsys):
    code, _, err = run(capsys, "sample", "a man", "--steps", "-1")
    assert code == 2 and "steps is -1" in err
    code, _, err = run(capsys, "inspect", "--", "-tom.safetensors")
    assert code == 2 and "-tom.safetensors: there is no such file" in err


@pytest.mark.parametrize(
    "out", ["$HOME/m", "${HOME}/m", "%USERPROFILE%/m", "~nobodyatall/m", "a\\m", "C:\\m", "*", "what?", "http://a.b/m"]
)
def test_paths_that_a_shell_left_as_they_were_are_refused(made, here, capsys, out):
    for command, ending in ((["merge", concept(made)], ".safetensors"), (["sample", "a man", *DRAW], ".png")):
        code, _, err = run(capsys, *command, "--out", out + ending)
        assert code == 2 and "choose another --out" in err and err.count("\n") == 1, err
    assert files(here) == {} and list(here.iterdir()) == []


@pytest.mark.parametrize("out", ["m.safetensors/", "folder/"])
def test_a_file_to_write_does_not_end_as_a_folder(made, here, capsys, out):
    code, _, err = run(capsys, "merge", concept(made), "--out", out)
    assert code == 2 and "ends as a folder does" in err and files(here) == {}


# --- trainings ----------------------------------------------------------------------------------------------


def test_a_warm_up_that_does_not_end_is_said(made, here, capsys):
    code, _, err = run(capsys, "train", made / "pictures/tom", *TRAIN, "--warmup", "5")
    assert code == 0 and "--warmup 5 is no shorter than --steps" in err


def test_what_could_not_be_read_again_is_not_written(made, here, capsys):
    code, _, err = run(capsys, "train", made / "pictures/tom", *TRAIN, "--adapter-lr", "1e30", "--steps", "1")
    assert code == 2 and "which no weight survives" in err, err
    assert files(here) == {}


def test_a_merge_does_not_replace_one_of_its_parts(made, here, capsys):
    (here / "tom.safetensors").write_bytes(concept(made).read_bytes())
    before = files(here)
    both = ["./tom.safetensors:0.5", concept(made, "tim")]
    code, _, err = run(capsys, "merge", *both, "--out", "tom.safetensors", "--overwrite")
    assert code == 2 and "would replace tom.safetensors, one of its parts" in err and files(here) == before


@pytest.mark.parametrize("between", [",", "+", ", ", ";"])
def test_two_files_in_one_are_called_so(made, here, capsys, between):
    code, _, err = run(capsys, "merge", f"{concept(made)}{between}{concept(made, 'tim')}", "--out", "m.safetensors")
    assert code == 2 and "these are two files; give them with a space between" in err, err


def test_a_file_in_the_place_of_a_folder_to_make_is_called_so(made, here, capsys):
    (here / "file").write_bytes(b"")
    for command in (["pictures", "tom", "--out"], ["train", made / "pictures/tom", *TRAIN, "--checkpoints"]):
        for place in ("file", "file/more"):
            code, _, err = run(capsys, *command, place)
            assert code == 2 and f"the folder {place} cannot be made: file is a file" in err, err


@pytest.mark.skipif(os.name != "posix", reason="names of other bytes are of POSIX")
def test_a_name_that_is_no_text_is_refused_before_it_could_not_be_read(made, here, capsys):
    odd = os.fsdecode(b"b\xff.safetensors")
    for command in (["merge", concept(made)], ["export", concept(made)], ["train", made / "pictures/tom", *TRAIN]):
        code, _, err = run(capsys, *command, "--out", odd)
        assert code == 2 and "b\\udcff.safetensors: a name in this path is no UTF-8" in err, err
    assert files(here) == {}
    (here / odd).write_bytes(concept(made).read_bytes())
    code, _, err = run(capsys, "inspect", odd)
    assert code == 0, err  # what is there already is read


def test_a_training_that_learns_nothing_is_said(made, here, capsys):
    train = ["train", made / "pictures/tom", "--name", "tom", "--class-word", "man", "--rank", "2", "--steps", "1"]
    for alpha in ("0", "nan", "1e30"):
        code, _, err = run(capsys, *train, "--alpha", alpha)
        assert code == 2 and f"alpha is {float(alpha):g}; with 0 nothing is learned" in err and "twice" not in err, err
    code, _, err = run(capsys, *train, "--method", "words", "--token-lr", "0")
    assert code == 0 and "all learning rates are 0" in err
