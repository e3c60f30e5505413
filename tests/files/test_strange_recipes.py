"""A recipe is free-form in parts, and anyone may have written it: the concept can be used, or is refused."""

import json

import pytest
from mutations import in_shell, made_concept, toy_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modular_concepts.crosstalk.report import warnings_on_base
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import KEY, load_concept, save_concept
from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.sampling import customised


def nested(depth, key=None):
    value = []
    for _ in range(depth):
        value = [value] if key is None else {key: value, "b": 1}
    return value


STRANGE = {
    "parts that are a number": {"origin": {"parts": 5}},
    "parts that are a text": {"origin": {"parts": "kodo"}},
    "parts of numbers": {"origin": {"parts": [1, None, {"name": [2]}, {"name": "a\nb"}]}},
    "words of numbers": {"origin": {"words": {"<kodo>": {"class_word": 5, "strength": "x"}}}},
    "words in a list": {"origin": {"words": ["<kodo>"]}},
    "a strength without end": {"origin": {"words": {"<kodo>": {"class_word": "man", "strength": 1e300}}}},
    "a class word of many": {"origin": {"words": {"<kodo>": {"class_word": "man " * 5000, "strength": 0.5}}}},
    "a base's sample that is a number": {"origin": {"base_sample": 5}},
    "a base's sample that is a list": {"origin": {"base_sample": [1, 2]}},
    "a base's sample of other letters": {"origin": {"base_sample": "%%%%"}},
    "a long base's sample": {"origin": {"base_sample": "QUJD" * 9000}},
    "deep origins": {"origin": {"a": nested(300)}},
    "origins deeper than what looks into them": {"origin": {"a": nested(450, "a")}},
    "very deep settings": {"training": {"a": nested(900)}},
    "many settings": {"training": {f"a{i}": i for i in range(20_000)}},
    "settings over lines": {"training": {"a\nb\x1b[2J": "c\nd\x1b[2J"}},
    "another program's merge": {"origin": {"merge": {"a": 1}, "program": 7}},
    "a slot beyond all": {"slot": 2**60},
    "blocks beyond all": {"blocks": 2**60},
    "no block": {"blocks": 0},
    "rank beyond all": {"rank": 2**60, "alpha": -1e12},
    "a seed below zero": {"basis_seed": -(2**63)},
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strange_recipe_is_refused_or_used(tmp_path, case):
    path = tmp_path / "x.safetensors"
    save_concept(made_concept(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    document = json.loads(metadata[KEY])
    for part, value in STRANGE[case].items():
        document["recipe"][part] = value
    save_file(load_file(path), path, metadata | {KEY: json.dumps(document)})
    out = tmp_path / "out"
    out.mkdir()
    try:
        concept = load_concept(path)
    except AdapterError as error:
        assert str(error).startswith("x.safetensors: ") and "\n" not in str(error) and len(str(error)) < 500
        return
    merged_concept("both", [concept, made_concept("fell", 1)], [0.5, 1.0])
    with customised(toy_base(), [concept], [0.5]) as tokens:
        assert set(tokens) == {"<kodo>"}
    for sentence in warnings_on_base([concept], toy_base().hash, toy_base().sample):
        assert "\n" not in sentence
    in_shell("inspect", "-v", str(path))
    in_shell("export", str(path), "--out", str(out / "kohya.safetensors"))


def test_merges_of_merges_of_merges_stay_readable(tmp_path):
    """Each adds its parts' origins to its own; what a reader would refuse is never written."""
    whole, path = made_concept(), tmp_path / "x.safetensors"
    for number in range(240):
        whole = merged_concept(f"merge {number}", [whole], [1.0])
        if number % 80 == 79:
            save_concept(whole, path)
            assert load_concept(path).recipe.origin["parts"][0]["name"] == f"merge {number - 1}"
