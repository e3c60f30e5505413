"""What scripts/queue_workflow.py does before and after the server: values, titles, names of files, and mistakes."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path

import pytest

from scripts.queue_workflow import _say, described, file_name, keep, main, title_of, variants

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
THREE = API / "2_train_three_and_merge.json"


@pytest.fixture(scope="module")
def workflow() -> dict:
    return json.loads(THREE.read_text(encoding="utf-8"))


def test_every_combination_is_a_prompt_and_the_workflow_stays_as_it_is(workflow):
    before = json.dumps(workflow)
    found = list(variants(workflow, ["strength of tom.strength=0.4,1", "draw tom.seed=1,2,3"]))
    assert [tuple(values.values()) for values, _ in found] == [(0.4, 1), (0.4, 2), (0.4, 3), (1, 1), (1, 2), (1, 3)]
    for values, prompt in found:
        own = {node["_meta"]["title"]: node["inputs"] for node in prompt.values()}
        assert own["strength of tom"]["strength"] == values["strength of tom.strength"]
        assert own["draw tom"]["seed"] == values["draw tom.seed"]
    assert json.dumps(workflow) == before
    assert [described(values) for values, _ in found][1] == "strength of tom.strength=0.4, draw tom.seed=2"
    assert [described(values) for values, _ in variants(workflow, [])] == ["as it is"]


def test_a_value_is_of_the_kind_that_the_input_has():
    inputs = {"text": "a cat", "seed": 1, "cfg": 4.0, "keep": True}
    workflow = {"1": {"class_type": "Node", "inputs": inputs}}
    for choice, value in [("1.text=7", "7"), ("1.text=", ""), ("1.seed=7", 7), ("1.cfg=5", 5), ("1.keep=false", False)]:
        ((values, prompt),) = variants(workflow, [choice])
        assert list(values.values()) == [value] and value in prompt["1"]["inputs"].values()
        assert type(next(iter(values.values()))) is type(value)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("draw tom.seed", "write for instance 'draw tom.seed=1,2'"),
        ("seed=1", "is not NODE.INPUT=VALUES"),
        ("draw tom.seed=", "draw tom.seed is a number, 1 in the workflow; '' is not"),
        ("draw tom.seed=1,x", "'x' is not"),
        ("draw tom.seed=NaN", "'NaN' is not"),
        ("draw tom.seed=" + "9" * 5000, "is a number, 1 in the workflow"),
        ("draw tom.sed=1", "'draw tom' has no input 'sed'; it has "),
        ("draw tim and tom.seed=1", "0 nodes are titled 'draw tim and tom'; there are: "),
    ],
)
def test_a_mistake_is_one_sentence(choice, words, capsys):
    with pytest.raises(SystemExit) as refused:
        main([str(THREE), "--set", choice, "--server", "127.0.0.1:1"])
    assert words in str(refused.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ('{"nodes": [], "links": []}', "Export (API)"),
        *((json.dumps({"1": {"inputs": inputs}}), "Export (API)") for inputs in (None, 3, ["seed"], "seed")),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"1": {"inputs": {"a": ' + "[" * 600 + "]" * 600 + "}}}", "nested too deeply"),
    ],
)
def test_a_file_that_is_no_workflow_is_named(tmp_path, capsys, content, words):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as refused:
        main([str(path)])
    assert refused.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "mine.json" in said and words in said


def test_nodes_are_called_by_their_titles(workflow):
    node = next(node for node, about in workflow.items() if about["_meta"]["title"] == "draw tom")
    assert title_of(workflow, node) == "draw tom"
    assert title_of({"5": {"class_type": "KSampler"}}, "5") == "KSampler" and title_of({}, "9") == "node 9"


def test_a_picture_is_named_after_its_values():
    assert file_name({"strength of tom.strength": 0.4, "draw tom.seed": 1}, "tom_00007_.png") == (
        "strength=0.4_seed=1_tom_00007_.png"
    )
    both = {"draw tom.seed": 1, "draw tim.seed": 2}
    assert file_name(both, "a.png") == "draw-tom.seed=1_draw-tim.seed=2_a.png"
    odd = file_name({"prompt.text": 'a <tom>: "who?"\n../' + "x" * 400}, "a.png")
    assert not set(odd) & set('<>:"/\\|?*\n ') and len(odd) < 100 and odd.endswith("_a.png")
    assert file_name({}, "a.png") == "a.png"


def test_no_picture_takes_anothers_place_and_the_index_tells_them_apart(tmp_path):
    for picture, seed in [(b"one", 1), (b"two", 2), (b"one", 1)]:
        keep(tmp_path / "new", "a.png", picture, {"values": {"draw tom.seed": seed}})
    lines = [json.loads(line) for line in (tmp_path / "new" / "index.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["a.png", "a_2.png", "a.png"]
    assert [line["values"]["draw tom.seed"] for line in lines] == [1, 2, 1]
    assert {path.read_bytes() for path in (tmp_path / "new").glob("*.png")} == {b"one", b"two"}


@pytest.mark.parametrize("meta", ["x", None, 3, ["title"], {"title": ["x"]}, {"title": None}])
def test_a_node_that_nobody_titled_goes_by_its_class_and_its_id(tmp_path, capsys, meta):
    node = {"class_type": "Sampler", "inputs": {"seed": 1}, "_meta": meta}
    (tmp_path / "w.json").write_text("\ufeff" + json.dumps({"1": node}), encoding="utf-8")
    assert title_of({"1": node}, "1") == "Sampler"
    assert main([str(tmp_path / "w.json"), "--set", "1.seed=1,2", "--server", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().out.startswith("no ComfyUI answers at 127.0.0.1:1")
    with pytest.raises(SystemExit, match=r"0 nodes are titled 'x'; there are: 1 \(None\)"):
        main([str(tmp_path / "w.json"), "--set", "x.seed=1"])


LONG = {
    "signs": ({"a.text": "猫" * 40, "b.text": "犬" * 40, "c.text": "鳥" * 40}, "ComfyUI_00001_.png"),
    "Cyrillic": ({"a.text": "кот на пляже " * 4, "b.text": "пёс " * 12, "c.text": "дом " * 12}, "картинка_1_.png"),
    "beyond 16 bits": ({"a.text": "𠮷" * 40, "b.text": "𡈽" * 40}, "a.png"),
    "marks": ({"a.text": "e\u0301" * 20, "b.text": "e\u0301" * 20, "c.text": "e\u0301" * 20, "d.text": "ee"}, "a.png"),
    "no text at all": ({"a.text": "caf\udce9 " * 6, "b.text": "\udcff" * 40}, "a.png"),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_picture_with_long_values_is_saved_under_whole_letters(tmp_path, kind):
    values, name = LONG[kind]
    for picture in (b"one", b"two"):  # the second one's name has a number more
        keep(tmp_path, file_name(values, name), picture, {"values": values})
    one, two = sorted(path.name for path in tmp_path.glob("*.png"))
    assert one.endswith(name) and two.endswith("_2.png") and not unicodedata.combining(one[0])
    assert len(one.encode()) <= 200 and "\ufffd" not in one and "=" in one
    assert json.loads((tmp_path / "index.jsonl").read_text().splitlines()[0])["values"] == values


def test_a_name_that_cannot_be_written_costs_no_picture(tmp_path, capsys):
    for name in ("x" * 300 + ".png", "a\0b.png", "no/folder.png", "y" * 300):
        keep(tmp_path, name, name.encode(), {})
    assert {path.read_bytes().decode()[0] for path in tmp_path.glob("picture*")} == set("xany")
    lines = [json.loads(line)["file"] for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert lines == ["picture.png", "picture_2.png", "picture_3.png", "picture"]
    assert capsys.readouterr().out.count("saved as picture") == 4


def test_a_terminal_without_a_letter_costs_no_picture(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    _say("a.text=猫\udcff")
    assert stream.buffer.getvalue() == b"a.text=\\u732b\\udcff\n"
