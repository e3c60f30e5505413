"""The headless face: every command end to end, and one clear sentence for everything that a person can get wrong."""

import errno
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from laws import relative_error
from safetensors.torch import load_file

from modular_concepts.cli import main as cli
from modular_concepts.cli import progress as cli_progress
from modular_concepts.cli import train as cli_training
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept
from modular_concepts.files.lora import import_lora
from modular_concepts.toy import model

Image = pytest.importorskip("PIL.Image")

QUICK = ["--steps", "2", "--batch", "2", "--rank", "2", "--adapter-lr", "0.01", "--targets", "attention"]
DRAW = ["--steps", "1", "--cfg", "1"]


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    return code, said.out, said.err


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory) -> Path:
    """A folder in which pictures were written and three concepts trained; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("made")
        patch.setattr(model, "WEIGHTS", weights)
        patch.chdir(folder)
        for slot, name in enumerate(("tom", "tim")):
            assert cli.main(["pictures", name]) == 0
            train = ["train", f"pictures/{name}", "--name", name, "--class-word", "man", "--slot", str(slot)]
            assert cli.main([*train, *QUICK]) == 0
        assert cli.main(["train", "pictures/tom", "--name", "tom", "--class-word", "man", *QUICK]
                        + ["--method", "lora", "--out", "concepts/plain.safetensors"]) == 0  # fmt: skip
    return folder


@pytest.fixture
def here(made, weights, tmp_path, monkeypatch) -> Path:
    """An empty working folder, the untrained base in the place of the shipped one."""
    monkeypatch.setattr(model, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def concept(made: Path, name: str = "tom") -> Path:
    return made / "concepts" / f"{name}.safetensors"


# --- the commands -------------------------------------------------------------------------------------------


def test_pictures_writes_sixteen_with_captions(made):
    names = sorted(path.name for path in (made / "pictures/tom").iterdir())
    assert names == sorted(f"{number:02d}.{kind}" for number in range(16) for kind in ("png", "txt"))
    assert Image.open(made / "pictures/tom/00.png").size == (32, 32)
    assert "{concept}" in (made / "pictures/tom/00.txt").read_text()


@pytest.mark.parametrize("name", ["rex", "candy", "riso"])
def test_the_line_that_pictures_prints_trains(here, capsys, name):
    code, out, _ = run(capsys, "pictures", name)
    assert code == 0
    words = shlex.split(out.splitlines()[1])
    assert words[:3] == ["python", "-m", "modular_concepts"]
    code, out, err = run(capsys, *words[3:], *QUICK)
    assert code == 0, err
    trained = load_concept(here / f"concepts/{name}.safetensors")
    assert list(trained.tokens) == [f"<{name}>"] and f"<{name}>" in trained.recipe.triggers


@pytest.mark.parametrize("place", ["{concept}", "<TOK>", "<bob>"])
def test_captions_name_the_concept_in_three_ways(made, here, capsys, place):
    """Both places for any name, and the name itself; all mean the same."""
    taught = {}
    for number, word in enumerate((place, "{concept}")):
        folder = some_pictures(made, here, place=word, name=f"of {number}")
        train = ["train", folder, "--name", "bob", "--class-word", "man", *QUICK, "--out", f"{number}.safetensors"]
        code, _, err = run(capsys, *train)
        assert code == 0, err
        taught[number] = load_concept(here / f"{number}.safetensors").tokens["<bob>"]
    assert torch.equal(taught[0], taught[1])


def test_train_keeps_the_recipe(made):
    trained = load_concept(concept(made, "tim"))
    assert trained.name == "tim" and list(trained.tokens) == ["<tim>"]
    assert (trained.recipe.method, trained.recipe.rank, trained.recipe.slot) == ("orthogonal", 2, 1)
    assert trained.recipe.origin["pictures"] == 16 and trained.recipe.training["steps_done"] == 2
    assert max(adapter.delta().norm() for adapter in trained.layers.values()) > 1e-3


def test_train_resumes_from_its_checkpoints(made, here, capsys):
    train = ["train", made / "pictures/tom", "--name", "tom", "--class-word", "man", "--slot", "0", *QUICK]
    assert run(capsys, *train, "--checkpoints", "steps", "--checkpoint-every", "1")[0] == 0
    (here / "steps/step-00000002.safetensors").unlink()
    once = load_concept(here / "concepts/tom.safetensors")
    code, _, err = run(capsys, *train, "--resume", "steps", "--out", "again.safetensors")
    assert code == 0, err
    again = load_concept(here / "again.safetensors")
    for layer, adapter in once.layers.items():
        assert torch.equal(adapter.lora_up, again.layers[layer].lora_up)
    assert torch.equal(once.tokens["<tom>"], again.tokens["<tom>"])


def test_train_reads_masks_and_writes_compact_files(made, here, capsys):
    for number in range(3):
        picture = Image.open(made / f"pictures/tom/{number:02d}.png")
        picture.save(here / f"{number}.png")
        picture.convert("L").save(here / f"{number}.mask.png")
    code, _, err = run(capsys, "train", ".", "--name", "New Tom", "--class-word", "man", "--compact", *QUICK)
    assert code == 0, err
    compact = here / "concepts/New_Tom.safetensors"
    assert list(load_concept(compact).tokens) == ["<new_tom>"]
    assert compact.stat().st_size < 0.8 * concept(made).stat().st_size


def test_train_beside_pictures_that_the_base_draws_itself(made, here, capsys):
    """In any size that the base can draw; and the result depends on them."""
    train = ["train", made / "pictures/tom", "--name", "tom", "--class-word", "man", "--slot", "0", *QUICK]
    for name, more in (("alone", []), ("beside", ["--prior", "2"])):
        code, _, err = run(capsys, *train, "--size", "16x32", *more, "--out", f"{name}.safetensors")
        assert code == 0, err
    alone, beside = (load_concept(here / f"{name}.safetensors").layers for name in ("alone", "beside"))
    assert any(relative_error(beside[layer].delta(), alone[layer].delta()) > 1e-2 for layer in alone)


def test_merge_is_the_sum(made, here, capsys):
    code, out, _ = run(capsys, "merge", f"{concept(made)}:0.5", concept(made, "tim"), "--out", "new/both.safetensors")
    assert code == 0 and "triggers <tom> <tim>" in out and "crosstalk tom and tim: 0.0000" in out
    tom, tim, both = (
        load_concept(path) for path in (concept(made), concept(made, "tim"), here / "new/both.safetensors")
    )
    for layer, merged in both.layers.items():
        wanted = 0.5 * tom.layers[layer].delta() + tim.layers[layer].delta()
        assert relative_error(merged.delta(), wanted) < 1e-6
    assert set(both.tokens) == {"<tom>", "<tim>"}


def test_sample_with_concepts_and_regions(made, here, capsys):
    code, out, err = run(
        capsys, "sample", "a man and a man on the beach", "--width", "64", "--zoom", "2", "--count", "2", *DRAW,
        "--concept", concept(made), "--concept", f"{concept(made, 'tim')}:0.7",
        "--region", "0,0,0.5,1:a <tom> on the beach", "--region", "0.5,0,1,1:a <tim> on the beach",
        "--out", "drawn/joint.png",
    )  # fmt: skip
    assert code == 0, err
    assert sorted(files(here)) == ["drawn/joint-00.png", "drawn/joint-01.png"] and "(seed 1)" in out
    first, second = (Image.open(here / f"drawn/joint-0{number}.png") for number in range(2))
    assert first.size == (128, 64) and first.tobytes() != second.tobytes()
    assert "error" not in err and "note" not in err


def test_regions_in_pixels_and_pictures_of_every_kind(here, capsys):
    draw = ["sample", "a man on the beach", *DRAW, "--width", "64"]
    assert run(capsys, *draw, "--region", "0.5,0,1,1:a cat", "--out", "a.png")[0] == 0
    assert run(capsys, *draw, "--region", "32,0,64,32:a cat", "--units", "pixels", "--out", "b.png")[0] == 0
    assert run(capsys, *draw, "--region", "0,0,32,32:a cat", "--units", "pixels", "--out", "c.png")[0] == 0
    drawn = files(here)
    assert drawn["a.png"] == drawn["b.png"] != drawn["c.png"]
    for ending, form in (("jpg", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP")):
        assert run(capsys, *draw, "--out", f"d.{ending}")[0] == 0
        assert Image.open(here / f"d.{ending}").format == form


def test_regions_hold_concepts_apart_unless_a_merge_is_asked_for(made, here, capsys):
    """A concept that no prompt calls acts in the whole picture when it is merged, and nowhere when it is gated."""
    drawn = {}
    for name, more in (
        ("base", []),
        ("gated", ["--concept", concept(made)]),
        ("merged", ["--concept", concept(made), "--mode", "merged"]),
    ):
        region = ["--region", "0,0,0.5,1:a cat on the beach"]
        assert run(capsys, "sample", "a man on the beach", *DRAW, *region, *more, "--out", f"{name}.png")[0] == 0
        drawn[name] = (here / f"{name}.png").read_bytes()
    assert drawn["gated"] == drawn["base"] != drawn["merged"]
    for strength in ("1", "0"):
        region = ["--region", "0,0,0.5,1:a <tom> on the beach", "--concept", f"{concept(made)}:{strength}"]
        assert run(capsys, "sample", "a man on the beach", *DRAW, *region, "--out", f"{strength}.png")[0] == 0
    assert (here / "1.png").read_bytes() != (here / "0.png").read_bytes()


def test_sample_is_the_same_every_time_and_strength_0_is_the_base(made, here, capsys):
    for name, more in (
        ("a", []),
        ("b", []),
        ("c", ["--concept", f"{concept(made)}:0"]),
        ("d", ["--concept", concept(made)]),
    ):
        assert run(capsys, "sample", "a man in the snow", *DRAW, "--out", f"{name}.png", *more)[0] == 0
    drawn = files(here)
    assert drawn["a.png"] == drawn["b.png"] == drawn["c.png"] != drawn["d.png"]


def test_sample_says_which_words_mean_nothing(here, capsys):
    code, _, err = run(capsys, "sample", "a zeppelin over <tom>", *DRAW)
    assert code == 0 and "does not know <tom>, over, zeppelin" in err and (here / "sample.png").exists()


def test_inspect_tells_what_is_in_a_file(made, here, capsys):
    code, out, _ = run(capsys, "inspect", "-v", concept(made), concept(made, "tim"), concept(made, "plain"))
    assert code == 0
    for words in (
        "concept 'tom'",
        "learned word <tim>: 8 x 128",
        "base_hash: ",
        "slot: 1\n",
        "pictures 16, ",
        "adapter_lr 0.01",
        "mid",
    ):
        assert words in out
    assert "crosstalk tom (1) and tim: 0.0000" in out and "crosstalk tom (1) and tom (2): 0." in out
    assert files(here) == {}


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_export_keeps_every_delta_and_word(made, here, capsys, form):
    code, out, err = run(capsys, "export", concept(made), "--format", form)
    assert code == 0, err
    assert sorted(files(here)) == ["exports/embeddings/tom.safetensors", f"exports/tom_{form}.safetensors"]
    assert out.splitlines()[0].startswith("wrote exports/embeddings/tom.safetensors")
    assert out.splitlines()[1] == f"wrote exports/tom_{form}.safetensors"
    ours, (theirs, unmatched) = load_concept(concept(made)), import_lora(here / f"exports/tom_{form}.safetensors")
    assert unmatched == [] and set(theirs.layers) == set(ours.layers)
    for layer, adapter in ours.layers.items():
        assert relative_error(theirs.layers[layer].delta(), adapter.delta()) < 1e-6
    assert torch.equal(load_file(here / "exports/embeddings/tom.safetensors")["<tom>"], ours.tokens["<tom>"])


def test_export_never_replaces_the_concept_itself(made, here, capsys):
    (here / "tom.safetensors").write_bytes(concept(made).read_bytes())
    assert run(capsys, "export", "tom.safetensors")[0] == 0
    assert (here / "tom.safetensors").read_bytes() == concept(made).read_bytes()
    code, _, err = run(capsys, "export", "tom.safetensors", "--out", "./tom.safetensors", "--overwrite")
    assert code == 2 and "would replace tom.safetensors itself" in err
    assert (here / "tom.safetensors").read_bytes() == concept(made).read_bytes()


# --- bad input ----------------------------------------------------------------------------------------------


def refused(capsys, folder: Path, arguments, *words: str) -> None:
    """Exit code 2, one sentence that holds `words`, behind notes at most, and every file as it was."""
    before = files(folder)
    code, _, err = run(capsys, *arguments)
    assert code == 2, err
    *notes, error = err.splitlines()
    assert error.startswith("error: ") and err.endswith("\n") and all(line.startswith("note: ") for line in notes), err
    for word in words:
        assert word in err, err
    assert files(folder) == before


def train_on(folder, *more) -> list:
    return ["train", folder, "--name", "new", "--class-word", "man", "--slot", "0", *QUICK, *more]


def some_pictures(made: Path, here: Path, count: int = 3, place: str = "<TOK>", name: str = "mine") -> Path:
    folder = here / name
    folder.mkdir()
    for number in range(count):
        for kind in ("png", "txt"):
            data = (made / f"pictures/tom/{number:02d}.{kind}").read_bytes()
            (folder / f"{number:02d}.{kind}").write_bytes(data.replace(b"{concept}", place.encode()))
    return folder


def empty_folder(folder):
    for path in folder.iterdir():
        path.unlink()


def small(folder):
    Image.new("RGB", (1, 1)).save(folder / "00.png")


def not_a_picture(folder):
    (folder / "01.png").write_text("this is a letter to my aunt")


def cut_picture(folder):
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:200])


def no_caption(folder):
    (folder / "02.txt").unlink()


def empty_caption(folder):
    (folder / "02.txt").write_text(" \n")


def one_picture(folder):
    for number in (1, 2):
        (folder / f"{number:02d}.png").unlink()


def caption_without_trigger(folder):
    (folder / "02.txt").write_text("a man in the snow")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (empty_folder, ["mine", "no picture"]),
        (small, ["00.png", "1×1 pixels are too few", "at least 8×8"]),
        (not_a_picture, ["01.png", "not a picture"]),
        (cut_picture, ["01.png", "damaged"]),
        (no_caption, ["02.png", "write the missing .txt files"]),
        (empty_caption, ["02.txt", "empty"]),
        (one_picture, ["only one picture", "give at least 2"]),
        (caption_without_trigger, ["'a man in the snow'", "<new>", "write {concept} in it"]),
    ],
)
def test_bad_pictures(made, here, capsys, spoil, words):
    folder = some_pictures(made, here)
    spoil(folder)
    refused(capsys, here, train_on(folder), *words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rank", "500"], ["rank 500 is larger than this layer allows", "the largest rank that fits"]),
        (["--rank", "0"], ["rank is 0", "at least 1"]),
        (["--slot", "99"], ["slot 99 does not exist", "choose a free slot"]),
        (["--slot", "-1"], ["slot -1 does not exist"]),
        (["--method", "block", "--slot", "15", "--blocks", "3"], ["slot 15"]),
        (["--method", "magic"], ["--method", "magic", "orthogonal", "--help"]),
        (["--steps", "0"], ["steps is 0", "at least 1"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--batch", "0"], ["batch is 0"]),
        (["--adapter-lr", "nan"], ["adapter_lr is nan"]),
        (["--token-lr", "-1"], ["token_lr is -1"]),
        (["--erasure", "1"], ["erasure is 1.0"]),
        (["--seed", "-4"], ["seed is -4"]),
        (["--class-word", "zeppelin"], ["class word 'zeppelin'", "such as man"]),
        (["--class-word", ""], ["class word ''"]),
        (["--name", "///"], ["a name needs at least one letter"]),
        (["--size", "33x32"], ["33x32", "multiples of 8"]),
        (["--size", "big"], ["'big' is not WIDTHxHEIGHT"]),
        (["--base", "no-such-base"], ["no-such-base", "toy"]),
        (["--base", "mine"], ["mine"]),
        (["--out", "mine"], ["mine is a folder"]),
        (["--out", "mine/00.png/x.safetensors"], ["00.png", "not a folder"]),
        (["--checkpoints", "mine/00.png"], ["00.png", "--checkpoints"]),
        (["--resume", "no-such-file"], ["no-such-file: there is no such checkpoint or folder"]),
        (["--resume", "mine"], ["mine holds no checkpoint"]),
        (["--resume", "mine/00.png"], ["00.png cannot be read as a checkpoint"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)  # fmt: skip
def test_bad_training_options(made, here, capsys, more, words):
    some_pictures(made, here)
    refused(capsys, here, train_on("mine", *more), *words)


def test_training_faults_are_found_before_the_base_draws_its_prior(made, here, capsys, monkeypatch):
    monkeypatch.setattr(cli_training, "_prior", lambda *_: pytest.fail("the prior was drawn first"))
    folder = some_pictures(made, here)
    refused(capsys, here, train_on(folder, "--prior", "4", "--rank", "500"), "rank 500 is larger than this layer")
    caption_without_trigger(folder)
    refused(capsys, here, train_on(folder, "--prior", "4"), "does not contain the trigger word <new>")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ["train", "x", "--nmae", "b", "--class-word", "man"],
            ["no option --nmae, perhaps --name", "required: --name"],
        ),
        (["sample", "a man", "--stepz=5"], ["no option --stepz, perhaps --steps"]),
        (["sample", "a man", "on the beach"], ["nothing is meant by on the beach"]),
    ],
)
def test_what_is_misspelt_is_named_with_a_command_that_helps(here, capsys, command, words):
    refused(capsys, here, command, *words, f"see python -m modular_concepts {command[0]} --help")


@pytest.mark.parametrize("command", ["demo", "pictures", "train", "merge", "sample", "inspect", "export"])
def test_every_argument_says_what_it_is(capsys, command):
    parser = cli._parser()._subparsers._group_actions[0].choices[command]
    assert all(action.help for action in parser._actions)
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and out.startswith(f"usage: python -m modular_concepts {command} ")


def test_help_says_the_defaults_and_the_names(capsys):
    def said(command):
        return " ".join(run(capsys, command, "--help")[1].split())

    assert "how many training steps (default 500; toy base 400, or 300 with --description)" in said("train")
    assert "step size of the layers (default 0.0001; toy base 0.0002)" in said("train")
    assert "one of tom, tim, omar, ada" in said("pictures")
    assert "1 is no guidance (default 4)" in said("sample") and "(default sample.png" in said("sample")


def test_no_pictures_at_all(here, capsys):
    refused(capsys, here, train_on("nowhere"), "nowhere", "no such folder")
    refused(capsys, here, ["pictures", "nobody"], "no standard concept 'nobody'", "tom")
    (here / "file").write_text("")
    refused(capsys, here, ["pictures", "tom", "--out", "file"], "file cannot be made")


@pytest.mark.parametrize("command", ["sample", "merge", "inspect", "export"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[: len(data) // 2], ["cut.safetensors", "cut short"]),
        (lambda data: data[:5], ["cut.safetensors", "not a safetensors file"]),
        (lambda data: b"", ["cut.safetensors", "not a safetensors file"]),
        (lambda data: b"This is a letter to my aunt, and not a concept.", ["cut.safetensors"]),
        (lambda data: None, ["cut.safetensors", "no such file"]),
    ],
    ids=["half", "5 bytes", "empty", "text", "missing"],
)
def test_bad_concept_files(made, here, capsys, command, spoil, words):
    if (data := spoil(concept(made).read_bytes())) is not None:
        (here / "cut.safetensors").write_bytes(data)
    arguments = {
        "sample": ["sample", "a man", "--concept", "cut.safetensors", *DRAW],
        "merge": ["merge", concept(made), "cut.safetensors", "--out", "sum.safetensors"],
        "inspect": ["inspect", "cut.safetensors"],
        "export": ["export", "cut.safetensors"],
    }
    refused(capsys, here, arguments[command], *words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--concept", "TOM:nan"], ["strength is nan", "from -100 to 100"]),
        (["--concept", "TOM:inf"], ["strength is inf"]),
        (["--concept", "TOM:1000"], ["tom.safetensors:1000: strength is 1000", "from -100 to 100"]),
        (["--concept", "TOM:loud"], ["'loud' is no strength", "tom.safetensors:0.8"]),
        (["--concept", "TOM", "--concept", "TOM"], ["both answer to <tom>"]),
        (["--concept", "nobody"], ["nobody", "no such file"]),
        (["--region", "nonsense"], ["region 'nonsense'", "LEFT,TOP,RIGHT,BOTTOM:PROMPT"]),
        (["--region", "0,0,1:a man"], ["'0,0,1:a man'"]),
        (["--region", "0,0,1,1:"], ["'0,0,1,1:'"]),
        (["--region", "0,0,one,1:a man"], ["'0,0,one,1:a man'"]),
        (["--region", "0.5,0,0.2,1:a man"], ["'a man'", "left < right"]),
        (["--region", "0,0,nan,1:a man"], ["'a man'", "left < right"]),
        (["--region", "0,0,2,1:a man"], ["the box (0, 0, 2, 1), which reaches outside", "set units to pixels"]),
        (["--region", "0,0,64,32:a man", "--units", "pixels"], ["reaches to (64, 32)", "is only 32 x 32 pixels"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--steps", "5000"], ["steps is 5000"]),
        (["--cfg", "nan"], ["cfg is nan"]),
        (["--width", "33"], ["33 x 32 pixels", "multiples of 8"]),
        (["--width", "0"], ["0 x 32 pixels"]),
        (["--height", "-8"], ["32 x -8 pixels"]),
        (["--seed", "-1"], ["seed -1"]),
        (["--seed", str(2**64)], [f"seed {2**64}"]),
        (["--count", "0"], ["--count", "at least 1"]),
        (["--zoom", "-2"], ["--zoom", "at least 1"]),
        (["--out", "drawn.xyz"], ["drawn.xyz", ".png, .jpg"]),
        (["--out", "drawn"], ["drawn: a picture is written as"]),
        (["--base", "nowhere"], ["no base 'nowhere'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_bad_drawing_options(made, here, capsys, more, words):
    more = [text.replace("TOM", str(concept(made))) for text in more]
    refused(capsys, here, ["sample", "a man", *DRAW, *more], *words)


def test_concepts_that_do_not_fit_together(made, here, capsys):
    out = ["--out", "sum.safetensors"]
    refused(capsys, here, ["merge", concept(made), concept(made, "plain"), *out], "both answer to <tom>")
    refused(capsys, here, ["merge", f"{concept(made)}:nan", *out], "strength is nan")
    block = ["merge", concept(made), concept(made, "tim"), "--how", "block", *out]
    refused(capsys, here, block, "error: tom is not a block adapter", "by sum")
    refused(capsys, here, ["merge", concept(made)], "--out")


# --- the disk -----------------------------------------------------------------------------------------------


def writers(made: Path) -> dict[str, list]:
    return {
        "pictures": ["pictures", "tom"],
        "train": train_on(made / "pictures/tom", "--name", "tom"),
        "merge": ["merge", concept(made), "--out", "old.safetensors", "--overwrite"],
        "sample": ["sample", "a man", *DRAW, "--out", "old.png", "--overwrite"],
        "export": ["export", concept(made), "--out", "old.safetensors", "--overwrite"],
    }


@pytest.mark.parametrize("command", ["pictures", "train", "merge", "sample", "export"])
def test_a_full_disk(made, here, capsys, monkeypatch, command):
    """What was there stays, nothing is half-written, and the sentence says why."""
    for old in ("old.safetensors", "old.png"):
        (here / old).write_bytes(b"what was there before")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    before = files(here)
    code, _, err = run(capsys, *writers(made)[command])
    assert code == 2 and files(here) == before
    *bars, sentence = err.replace("\r", "\n").splitlines()
    assert sentence.startswith("error: ") and "the disk is full" in sentence
    assert not any("Traceback" in line or "error" in line for line in bars)


@pytest.mark.parametrize("command", ["train", "merge", "sample", "export"])
def test_no_permission(made, here, capsys, monkeypatch, command):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(capsys, here, writers(made)[command], "you have no permission in", "--out")


def test_a_folder_that_cannot_be_made(made, here, capsys, monkeypatch):
    def forbid(self, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", forbid)
    for command in (["pictures", "tom"], ["merge", concept(made), "--out", "new/sum.safetensors"]):
        refused(capsys, here, command, "cannot be made", "Permission denied", "--out")


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal has it; programs that run in the background are started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_training_keeps_what_was_learned(made, here, capsys, monkeypatch):
    monkeypatch.setattr(cli_progress.Bar, "__call__", lambda self, done: signal.raise_signal(signal.SIGINT))
    train = train_on(made / "pictures/tom", "--name", "tom", "--checkpoints", "steps")
    code, out, err = run(capsys, *train)
    assert code == 130 and err.endswith("stopped\n") and "wrote concepts/tom-step1.safetensors" in out
    assert load_concept(here / "concepts/tom-step1.safetensors").recipe.training["finished"] is False
    assert set(files(here)) == {"concepts/tom-step1.safetensors", "steps/step-00000001.safetensors"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_interruption_stops_at_once_and_writes_nothing(made, here, capsys, monkeypatch):
    def twice(self, done):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli_progress.Bar, "__call__", twice)
    code, _, err = run(capsys, *train_on(made / "pictures/tom", "--name", "tom"))
    assert code == 130 and err.endswith("stopped\n") and files(here) == {}


def test_a_training_that_diverges_keeps_what_was_learned_and_says_where(made, here, capsys):
    train = [*train_on(made / "pictures/tom", "--name", "tom"), "--checkpoints", "steps"]
    assert run(capsys, *train)[0] == 0
    wild = [
        "--resume",
        "steps",
        "--accept-changes",
        "--adapter-lr",
        "1e30",
        "--steps",
        "6",
        "--out",
        "wild.safetensors",
    ]
    code, _, err = run(capsys, *train, *wild)
    assert code == 2 and "no longer a finite number" in err and "is kept in wild-step2.safetensors" in err
    assert "--adapter-lr and --token-lr" in err
    kept, before = (load_concept(here / name).layers for name in ("wild-step2.safetensors", "concepts/tom.safetensors"))
    assert all(torch.equal(kept[name].lora_up, before[name].lora_up) for name in before)


def test_a_training_that_diverges_at_once_writes_nothing(made, here, capsys):
    code, out, err = run(capsys, *train_on(made / "pictures/tom", "--adapter-lr", "1e30"))
    assert code == 2 and "no longer a finite number" in err and "wrote" not in out and "is kept" not in err
    assert files(here) == {}


def test_a_checkpoint_that_cannot_be_written_keeps_what_was_learned(made, here, capsys, monkeypatch):
    def full(path, data):
        raise AdapterError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr("modular_concepts.training.checkpoint._write_whole", full)
    code, out, err = run(capsys, *train_on(made / "pictures/tom", "--name", "tom", "--checkpoints", "steps"))
    assert code == 2 and "No space left" in err and "is kept in concepts/tom.safetensors" in err
    assert load_concept(here / "concepts/tom.safetensors").recipe.training["finished"] is True


def test_a_base_without_weights(here, capsys, monkeypatch):
    monkeypatch.setattr(model, "WEIGHTS", here / "nowhere")
    refused(capsys, here, ["sample", "a man", *DRAW], "unet.safetensors")
