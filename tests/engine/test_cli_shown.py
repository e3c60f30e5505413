# ruff: noqa: F811 (fixtures of another file)
"""What stands in files is shown on one line, short, and without power over the terminal that shows it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import DRAW, QUICK, concept, files, here, made, run  # noqa: F401 - fixtures

from modular_concepts.concept import check_text, clip
from modular_concepts.errors import AdapterError, listed
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.storage.safetensors import read_header

Image = pytest.importorskip("PIL.Image")

EVIL = "fine\x1b[2J\x1b]0;owned\x07\nerror: all is lost\r\u202e\u2028evil\x85"


def shows_nothing_evil(text: str) -> bool:
    return all(sign.isprintable() or sign == "\n" for sign in text.replace("\r", "")) and "\nerror: all" not in text


def with_metadata(path, target, **entries):
    save_file(load_file(path), target, read_header(path).metadata | entries)
    return target


def test_what_a_file_says_of_itself_moves_no_cursor(made, here, capsys):
    said = {f"modelspec.{name}": EVIL for name in ("title", "author", "description", "license", "tags")}
    evil = with_metadata(concept(made), here / "evil.safetensors", **said)
    for command in (["inspect", evil, "-v"], ["export", evil], ["merge", evil, "--out", "m.safetensors"]):
        _, out, err = run(capsys, *command)
        assert shows_nothing_evil(out + err), (command, out, err)
    assert "\\nerror: all is lost" in run(capsys, "inspect", evil)[1]


def test_a_recipe_moves_no_cursor(made, here, capsys):
    tom = load_concept(concept(made))
    recipe = replace(tom.recipe, training={EVIL: EVIL}, origin={EVIL: [EVIL, {EVIL: 1}], "program": EVIL * 1000})
    save_concept(replace(tom, recipe=recipe), "evil.safetensors")
    code, out, _ = run(capsys, "inspect", "evil.safetensors", "-v")
    assert code == 0 and shows_nothing_evil(out) and len(out) < 6000 and "letters)" in out


def test_a_lora_with_thousands_of_foreign_keys_names_a_few(made, here, capsys):
    from modular_concepts.files.kohya import export_kohya

    export_kohya(load_concept(concept(made)), here / "plain.safetensors")
    foreign = {f"other.model.{'some_block_' * 6}{number}.weight": torch.ones(1) for number in range(9000)}
    foreign |= {f"{EVIL[:4]}{number}": torch.ones(1) for number in range(3)}
    save_file(load_file("plain.safetensors") | foreign, "wide.safetensors")
    code, out, err = run(capsys, "inspect", "wide.safetensors")
    assert code == 0 and "no place for 9003 keys" in err and "and 8998 more" in err, err[:500]
    assert len(out + err) < 3000 and shows_nothing_evil(out + err)


def test_a_prompt_of_a_thousand_unknown_words_names_a_few(here, capsys):
    prompt = " ".join(f"nix{'abcdefghij'[n % 10]}{'abcdefghij'[n // 10 % 10]}{'abc'[n // 100]}" for n in range(300))
    code, _, err = run(capsys, "sample", f"a man {prompt}", *DRAW)
    assert code == 0 and "and 290 more" in err and len(err) < 1500, err


def test_names_in_a_sentence_are_few_short_and_visible():
    assert listed(["b", "a"]) == "b, a" and listed([]) == ""
    assert listed({f"n{number}": 0 for number in range(9)}, 2) == "n0, n1 and 7 more"
    assert listed(["x" * 500], longest=4) == "xxx…x" and listed(["a\x1bb", "e\u0301"]) == "a\\x1bb, \xe9"


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("place", ["at the end", "at the beginning", "in the middle"])
def test_names_that_are_shortened_can_be_told_apart(count, place):
    before, behind = {"at the end": (300, 0), "at the beginning": (0, 300), "in the middle": (100, 100)}[place]
    names = [f"{'block_' * (before // 6)}{number}{'_block' * (behind // 6)}" for number in range(count)]
    assert len(names[0]) > 80 and len(set(listed(names).split(", "))) == count
    assert all(len(shown) <= 241 for shown in listed(names).split(", "))


def test_what_cannot_be_read_is_shown_with_its_end():
    assert clip("a" * 500 + "the end").endswith("the end'") and len(clip("a" * 500)) == 63
    with pytest.raises(AdapterError, match="the_end"):
        check_text("a name", "\0" + "a" * 500 + "the_end")


def test_a_file_name_moves_no_cursor(made, here, capsys):
    evil = here / "e\x1b[2J\nv.safetensors"
    evil.write_bytes(concept(made).read_bytes())
    for command in (["inspect", evil], ["export", evil, "--out", "x.safetensors"], ["inspect", f"{evil}x"]):
        _, out, err = run(capsys, *command)
        assert "\x1b" not in out + err and (out + err), (command, out, err)


def test_every_line_that_is_printed_goes_through_one_door():
    from pathlib import Path

    import modular_concepts

    for path in Path(modular_concepts.__file__).parent.glob("cli*.py"):
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip().startswith("print(")]
        raw = [line for line in lines if "in_one_line" not in line and "stderr" not in line and "report.md" not in line]
        assert raw == [], (path.name, raw)


def test_json_of_a_report_is_json(made, here, capsys):
    """What scripts read is not shortened."""
    from modular_concepts.crosstalk.report import explained

    text = explained([load_concept(concept(made)), load_concept(concept(made, "tim"))]).to_json()
    assert json.loads(text)["pairs"][0]["first"] == "tom"
