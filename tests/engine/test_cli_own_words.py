"""Concepts at their own words in the shell: trained, drawn, merged into one file, and what is told or refused."""

from dataclasses import replace

import pytest
import torch
from laws import seeded
from test_cli import run
from untrained_toy import filled_concept, write_untrained

from modular_concepts.adapters.low_rank import new_lora
from modular_concepts.adapters.own_words import reads_text
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.toy import model
from modular_concepts.toy.base import load_toy_base

Image = pytest.importorskip("PIL.Image")
QUICK = ("--steps", "2", "--batch", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tom and tim, as if trained for their own words, and rex, as if everywhere."""
    folder = tmp_path_factory.mktemp("own words")
    weights = tmp_path_factory.mktemp("weights")
    write_untrained(weights)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "WEIGHTS", weights)
        patched.chdir(folder)
        for seed, name in enumerate(("tom", "tim", "rex")):
            concept = filled_concept(name, seed)
            layers = {layer: adapter.replace(lora_up=30 * adapter.lora_up) for layer, adapter in concept.layers.items()}
            if name != "rex":
                layers = {layer: adapter for layer, adapter in layers.items() if reads_text(layer)}
                concept = replace(concept, recipe=replace(concept.recipe, method="own_words"))
            save_concept(replace(concept, layers=layers), f"{name}.safetensors")
        yield folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def shown(capsys, name, prompt, *concepts, **options):
    more = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)]
    files = [text for concept in concepts for text in ("--concept", concept)]
    code, _, err = run(capsys, "sample", prompt, *files, "--steps", "2", "--out", name, "--overwrite", *more)
    assert code == 0, err
    with Image.open(name) as picture:
        return picture.convert("RGB").tobytes(), err


def test_the_method_takes_the_layers_that_read_text_by_itself(here, capsys):
    assert run(capsys, "pictures", "tom", "--out", "pictures")[0] == 0
    train = ("train", "pictures", "--name", "x", "--class-word", "man", *QUICK)
    for chosen in (("--preset", "own words"), ("--method", "own_words")):
        code, _, err = run(capsys, *train, *chosen, "--out", "x.safetensors", "--overwrite")
        assert code == 0 and "note" not in err, err
        concept = load_concept("x.safetensors")
        assert concept.recipe.method == "own_words" and concept.layers and all(map(reads_text, concept.layers))
    code, _, err = run(capsys, *train, "--method", "own_words", "--targets", "attention", "--out", "y.safetensors")
    assert code == 2 and "targets cross_attention_kv" in err


def test_a_sum_is_the_concept_alone_and_a_prompt_without_its_word_the_base(here, capsys):
    alone, _ = shown(capsys, "a.png", "a <tom> at night", "tom.safetensors")
    both, err = shown(capsys, "b.png", "a <tom> at night", "tom.safetensors", "tim.safetensors")
    assert both == alone
    assert "no prompt says <tim>, so tim acts nowhere" in err
    base, _ = shown(capsys, "c.png", "a man at night")
    assert shown(capsys, "d.png", "a man at night", "tom.safetensors")[0] == base != alone


def test_others_act_at_their_words_where_that_is_asked(here, capsys):
    base, _ = shown(capsys, "a.png", "a man at night")
    everywhere, err = shown(capsys, "b.png", "a man at night", "rex.safetensors")
    assert everywhere != base and "changes the whole picture" in err
    asked, err = shown(capsys, "c.png", "a man at night", "rex.safetensors", act_on="own words")
    assert asked == base and "no prompt says <rex>, so rex acts nowhere" in err
    assert "% of its energy is in layers that read the picture or in the text encoder" in err


def test_several_become_one_file_and_not_together_with_one_that_acts_everywhere(here, capsys):
    code, out, err = run(capsys, "merge", "tom.safetensors", "tim.safetensors:0.5", "--out", "both.safetensors")
    assert code == 0 and "crosstalk tom and tim: 0.0000" in out, err
    apart, _ = shown(capsys, "a.png", "a <tom> and a <tim>", "tom.safetensors", "tim.safetensors:0.5")
    one, _ = shown(capsys, "b.png", "a <tom> and a <tim>", "both.safetensors")
    assert max(abs(left - right) for left, right in zip(one, apart, strict=True)) <= 1
    code, _, err = run(capsys, "merge", "tom.safetensors", "rex.safetensors", "--out", "mixed.safetensors")
    assert code == 2 and "which one file cannot hold" in err and not (here / "mixed.safetensors").exists()
    options = ("--act-on", "own words", "--out", "three.safetensors")
    code, _, err = run(capsys, "merge", "tom.safetensors", "rex.safetensors", *options)
    assert code == 0 and "is left out" in err
    assert load_concept("three.safetensors").recipe.method == "own_words"
    code, out, _ = run(capsys, "inspect", "three.safetensors")
    assert code == 0 and "acts at <tom> alone" in out and "acts at <rex> alone" in out
    code, _, err = run(capsys, "merge", "tom.safetensors", "--how", "ties", "--out", "ties.safetensors")
    assert code == 2 and "choose the sum" in err


def test_a_compact_file_that_would_leave_out_nothing_is_refused_before_a_step(here, capsys):
    train = ("train", "pictures", "--name", "z", "--class-word", "man", "--method", "own_words", "--compact", *QUICK)
    code, _, err = run(capsys, *train)
    assert code == 2 and "leave --compact away" in err and not (here / "concepts/z.safetensors").exists()


def test_what_acts_by_region_and_word_is_told_what_it_loses(here, capsys):
    whole = load_concept("rex.safetensors")
    options = {"act_on": "own words", "region": "0,0,0.5,1:a <rex>"}
    _, err = shown(capsys, "a.png", "a man", "rex.safetensors", **options)
    assert "read the picture" not in err
    encoder = load_toy_base().layers(("attention",), ("attention",))
    name = next(layer for layer in encoder if layer.startswith("text_encoder"))
    out, inp = encoder[name].weight.shape
    adapter = new_lora(out, inp, 2, None, seeded(3)).replace(lora_up=torch.ones(out, 2))
    save_concept(replace(whole, layers={**whole.layers, name: adapter}), "deep.safetensors")
    _, err = shown(capsys, "b.png", "a man", "deep.safetensors", **options)
    assert "of its energy is in the text encoder, which no word can hold" in err


def test_the_negative_prompt_calls_it_too_and_the_option_needs_a_concept(here, capsys):
    _, err = shown(capsys, "a.png", "a man", "tom.safetensors", negative="<tom>")
    assert "acts nowhere" not in err
    _, err = shown(capsys, "b.png", "a man", act_on="own words")
    assert "--act-on changes nothing without --concept" in err


def test_a_merge_at_own_words_is_told_as_it_was_made(here, capsys):
    options = ("--act-on", "own words", "--out", "pair.safetensors", "--overwrite")
    code, out, err = run(capsys, "merge", "tom.safetensors", "rex.safetensors", *options)
    assert code == 0 and "acts everywhere" not in err and "crosstalk tom and rex: 0.0000" in out


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_an_export_that_would_act_everywhere_is_refused_and_writes_nothing(here, capsys, form):
    before = sorted(here.rglob("*"))
    code, _, err = run(capsys, "export", "tom.safetensors", "--format", form, "--out", f"{form}.safetensors")
    assert code == 2 and "tom was trained for its own words alone" in err
    assert sorted(here.rglob("*")) == before


def test_a_damaged_list_of_parts_is_told_in_one_sentence(here, capsys):
    concept = load_concept("tom.safetensors")
    save_concept(replace(concept, name="broken"), "broken.safetensors")
    data = (here / "broken.safetensors").read_bytes()
    wrong = data.replace(b'\\"origin\\":{}', b'\\"origin\\":{\\"own_words\\":7}', 1)
    size = int.from_bytes(data[:8], "little") + len(wrong) - len(data)
    (here / "broken.safetensors").write_bytes(size.to_bytes(8, "little") + wrong[8:])
    code, _, err = run(capsys, "sample", "a <tom>", "--concept", "broken.safetensors", "--out", "x.png")
    assert code == 2 and "which words its parts have cannot be read" in err and "Traceback" not in err
