# ruff: noqa: F811 (fixtures of another file)
"""What slips from a person's hand: empty values, homes, links, folders for files, options twice, strengths unasked."""

import pytest
from test_cli import DRAW, QUICK, concept, files, here, made, run  # noqa: F401 - fixtures

Image = pytest.importorskip("PIL.Image")

TRAIN = ["--name", "tom", "--class-word", "man", *QUICK]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["train", "{pictures}", *TRAIN], "--out"),
        (["train", "{pictures}", *TRAIN], "--cache"),
        (["train", "{pictures}", *TRAIN], "--checkpoints"),
        (["train", "{pictures}", *TRAIN], "--resume"),
        (["train", "{pictures}", *TRAIN], "--base"),
        (["merge", "{concept}", "--out", "m.safetensors"], "--base"),
        (["merge", "{concept}", "--out", "m.safetensors"], "--thumbnail"),
        (["export", "{concept}"], "--out"),
        (["sample", "a man", *DRAW], "--out"),
        (["sample", "a man", *DRAW], "--base"),
        (["demo"], "--out"),
        (["pictures", "tom"], "--out"),
    ],
)
def test_an_empty_value_is_not_the_folder_one_is_in(made, here, capsys, command, option):
    places = {"pictures": made / "pictures/tom", "concept": concept(made)}
    code, out, err = run(capsys, *[text.format(**places) for text in command], f"{option}=")
    assert code == 2 and (f"{option}: it is empty" in err or "no base ''" in err), err
    assert err.count("\n") == 1 and out == "" and files(here) == {}


@pytest.mark.parametrize("text", ["", "  ", ":0.5"])
def test_a_concept_without_a_name_is_said(made, here, capsys, text):
    for command in (["inspect"], ["export"], ["merge", "--out", "m.safetensors"], ["sample", "x", *DRAW, "--concept"]):
        code, _, err = run(capsys, *command, text)
        assert code == 2 and f"{text!r}, which names no file" in err, err
    assert files(here) == {}


def test_a_home_is_ones_home_wherever_it_is_typed(made, here, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    monkeypatch.setenv("USERPROFILE", str(here / "home"))
    assert run(capsys, "merge", f"{concept(made)}:0.5", "--out=~/half.safetensors")[0] == 0
    assert run(capsys, "merge", "~/half.safetensors:2", "--out=~/whole.safetensors")[0] == 0
    assert sorted(files(here)) == ["home/half.safetensors", "home/whole.safetensors"]


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_strength_is_refused_where_none_is_used(made, here, capsys, command):
    code, out, err = run(capsys, command, f"{concept(made)}:0.5")
    assert code == 2 and f"{command} takes a concept as it is" in err and "merge" in err, err
    assert out == "" and files(here) == {}


def test_words_alone_say_that_no_concept_file_is_written(made, here, capsys):
    words = ["train", made / "pictures/tom", "--name", "w", "--class-word", "man", "--method", "words", "--steps", "1"]
    assert run(capsys, *words)[0] == 0
    code, out, err = run(capsys, "export", "concepts/w.safetensors", "--out", "x/y.safetensors")
    assert code == 0 and "x/y.safetensors is not written" in err, err
    assert "x/embeddings/w.safetensors" in out and sorted(files(here / "x")) == ["embeddings/w.safetensors"]
    assert run(capsys, "export", "concepts/w.safetensors", "--out", "z/y.safetensors", "--format", "concept")[2] == ""


def test_an_option_twice_is_said_before_the_work(made, here, capsys):
    merge = ["merge", concept(made), concept(made, "tim"), "--out", "a.safetensors", "--out", "b.safetensors"]
    code, _, err = run(capsys, *merge, "--how", "sum", "--how", "sum")
    assert code == 0 and err == "note: --out is there twice; the last counts, b.safetensors, and not a.safetensors\n"
    assert sorted(files(here)) == ["b.safetensors"]
    code, _, err = run(capsys, "sample", "a man", *DRAW, "--seed", "1", "--seed", "2", "--out", "s.png")
    assert code == 0 and "note: --seed is there twice; the last counts, 2, and not 1\n" in err
    code, _, err = run(capsys, "train", made / "pictures/tom", *TRAIN, "--steps", "1")
    assert code == 0 and "note: --steps is there twice; the last counts, 1, and not 2\n" in err


def test_a_list_twice_is_refused(made, here, capsys):
    code, _, err = run(capsys, "train", made / "pictures/tom", *TRAIN, "--targets", "feed_forward")
    assert code == 2 and "--targets: is there twice" in err and err.count("\n") == 1
    fuse = ["merge", concept(made), concept(made, "tim"), "--out", "a.safetensors", "--how", "fusion"]
    code, _, err = run(capsys, *fuse, "--moments", "a", "--moments", "b")
    assert code == 2 and "give all of them after one --moments" in err and files(here) == {}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--thumbnail", "none.png"], "none.png: there is no such file"),
        (["--thumbnail", "."], ".: this is a folder"),
        (["--title", "x" * 5000], "its title cannot be written"),
        (["--author", "a\x07"], "its author cannot be written"),
    ],
)
def test_what_a_file_says_of_itself_is_looked_at_before_the_merge(made, here, capsys, monkeypatch, more, words):
    monkeypatch.setattr("modular_concepts.merging.as_concept.merge_layers", lambda *_: pytest.fail("merged"))
    code, _, err = run(capsys, "merge", concept(made), concept(made, "tim"), "--out", "m.safetensors", *more)
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert files(here) == {}


@pytest.mark.parametrize("kind", ["moving", "transparent", "both", "plain", "opaque"])
def test_what_a_thumbnail_does_not_show_is_said(made, here, capsys, kind):
    from PIL import Image

    alpha = 255 if kind in ("plain", "opaque", "moving") else 100
    first, second = (Image.new("RGBA", (64, 64), (red, 0, 0, alpha)) for red in (255, 100))
    more = {"save_all": True, "append_images": [second]} if kind in ("moving", "both") else {}
    (first.convert("RGB") if kind == "plain" else first).save(here / "shown.png", **more)
    export = ["export", concept(made), "--out", "m.safetensors", "--thumbnail", "shown.png"]
    code, _, err = run(capsys, *export)
    assert code == 0 and ("the first frame is shown" in err) == bool(more), err
    assert ("transparent parts are white" in err) == (kind in ("transparent", "both")), err
    assert all(line.startswith("note: --thumbnail shown.png: ") for line in err.splitlines()), err
    assert (err == "") == (kind in ("plain", "opaque"))


def test_a_link_to_nothing_is_not_replaced_unasked(made, here, capsys):
    for name in ("m.safetensors", "s.png", "s-00.png", "t_kohya.safetensors"):
        (here / name).symlink_to("gone")
    (here / "pictures/tom").mkdir(parents=True)
    (here / "pictures/tom/03.png").symlink_to("gone")
    for command in (
        ["merge", concept(made), "--out", "m.safetensors"],
        ["export", concept(made), "--out", "t_kohya.safetensors"],
        ["train", made / "pictures/tom", *TRAIN, "--out", "m.safetensors"],
        ["sample", "a man", *DRAW, "--out", "s.png"],
        ["sample", "a man", *DRAW, "--out", "s.png", "--count", "2"],
        ["pictures", "tom"],
    ):
        code, _, err = run(capsys, *command)
        assert code == 2 and "is a link to nothing" in err and "--overwrite" in err, (command, err)
    assert files(here) == {} and all(path.is_symlink() for path in here.iterdir() if path.name != "pictures")


def test_a_folder_in_the_place_of_a_numbered_picture_is_found_before_drawing(here, capsys, monkeypatch):
    monkeypatch.setattr("modular_concepts.sampling.sample", lambda *_, **__: pytest.fail("drawn"))
    (here / "v-01.png").mkdir()
    code, _, err = run(capsys, "sample", "a man", *DRAW, "--count", "2", "--out", "v.png", "--overwrite")
    assert code == 2 and "v-01.png is a folder" in err and files(here) == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", "folder: this is a folder; give a file in it"),
        ("link", "link: this is a link to gone, which is not there"),
        ("/dev/null", "/dev/null: this is a device or a pipe"),
    ],
)
def test_what_is_no_file_is_called_what_it_is(here, capsys, name, words):
    (here / "folder").mkdir()
    (here / "link").symlink_to("gone")
    code, _, err = run(capsys, "inspect", name)
    assert code == 2 and words in err, err


def test_one_concept_twice_is_called_so(made, here, capsys):
    code, _, err = run(capsys, "merge", concept(made), concept(made), "--out", "m.safetensors")
    assert code == 2 and "tom is there twice" in err and "leave one away" in err, err
    assert files(here) == {}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "1.5"], "--seed: '1.5' is not a whole number"),
        (["--cfg", "strong"], "--cfg: 'strong' is not a number"),
        (["--seed", "9" * 5000], "is not a whole number"),
    ],
)
def test_what_is_no_number_is_a_short_sentence(here, capsys, more, words):
    code, _, err = run(capsys, "sample", "a man", *more)
    assert code == 2 and words in err and len(err) < 300, err


def test_a_seed_too_large_for_a_later_picture_is_found_before_the_first(here, capsys, monkeypatch):
    monkeypatch.setattr("modular_concepts.sampling.sample", lambda *_, **__: pytest.fail("drawn"))
    code, _, err = run(capsys, "sample", "a man", *DRAW, "--count", "100", "--seed", str(2**63 - 99))
    assert code == 2 and f"seed {2**63} is not" in err and err.count("\n") == 1 and files(here) == {}


@pytest.mark.parametrize("seed", ["-1", str(2**63), "-99999999999999999999", "9" * 30])
def test_the_seed_of_a_merge_has_bounds_too(made, here, capsys, seed):
    merge = ["merge", concept(made), concept(made, "tim"), "--out", "m.safetensors", "--how", "dare"]
    code, _, err = run(capsys, *merge, "--seed", seed)
    assert code == 2 and "seed is" in err and err.count("\n") == 1 and files(here) == {}, err
    assert run(capsys, *merge, "--seed", str(2**63 - 1))[0] == 0
