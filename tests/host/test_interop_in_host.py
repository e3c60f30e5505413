"""Promise 7 in the host: LoRAs of any origin give the weights that core gives, and our merges go wherever core's do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exchanges import exchanged
from laws import relative_error
from made_concepts import CONVOLUTIONS, made_concept, toy_base, wide_concept
from safetensors.torch import load_file, save_file

from modular_concepts.files.concept import save_concept
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.files.kohya import export_kohya
from modular_concepts.merging import Evidence, merge_concepts
from modular_concepts.models.fingerprint import weights_sample
from modular_concepts.models.layers import file_key
from modular_concepts.recording import text_features, usual_text
from modular_concepts.training.methods import seeded

FILES = ["kohya.safetensors", "peft.safetensors", "locon.safetensors", "own.safetensors"]
WAYS = ["weights", "activations"]
WORD = torch.randn(1, 128, generator=seeded(5, "word")) * 0.3
STRANGE = {"lora_unet_nowhere.alpha", "encoder.diff", "lora_te_text_model_final_layer_norm.w_norm"}


def locon() -> dict[str, torch.Tensor]:
    """LyCORIS' three factors on a 1x1 and a 3x3 convolution, and two on a Linear layer."""
    generator, made = seeded(4, "locon"), {}
    base = toy_base()
    modules = {f"unet.{name}": module for name, module in base.unet.named_modules()}
    for name, kernel in CONVOLUTIONS.items():
        out, inp = modules[name].weight.shape[:2]
        shapes = {"up": (out, 4, 1, 1), "mid": (4, 4, *kernel), "down": (4, inp, 1, 1)}
        made |= {f"{file_key(name)}.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.2
                 for part, shape in shapes.items()}  # fmt: skip
        made[f"{file_key(name)}.alpha"] = torch.tensor(2.0)
    name = next(name for name in wide_concept().layers if name.endswith("attn1.to_q"))
    out, inp = modules[name].weight.shape
    return made | {
        f"{file_key(name)}.lora_up.weight": torch.randn(out, 3, generator=generator) * 0.2,
        f"{file_key(name)}.lora_down.weight": torch.randn(3, inp, generator=generator) * 0.2,
    }


@pytest.fixture(scope="module")
def concepts():
    return {"tom": made_concept("tom", "lora"), "rex": made_concept("rex", "lora", slot=1), "wide": wide_concept()}


@pytest.fixture(scope="module")
def found(folder, replaced, warnings, concepts):
    """(tensors, facts, names of the layers)."""
    (folder / "loras" / "people").mkdir()
    for name, concept in concepts.items():
        save_concept(concept, folder / f"concepts/{name}.safetensors")
    export_kohya(concepts["wide"], folder / "loras/kohya.safetensors")
    export_diffusers(concepts["wide"], folder / "loras/peft.safetensors")
    save_file(locon(), folder / "loras/locon.safetensors")
    text = {name: own for name, own in concepts["wide"].layers.items() if name.startswith("text_encoder")}
    for name in ("tom", "rex"):
        both = replace(concepts[name], layers={**concepts[name].layers, **text})
        export_kohya(both, folder / f"loras/people/{name}.safetensors")
    plain = load_file(folder / "loras/kohya.safetensors") | {key: torch.ones(2, 2) for key in STRANGE}
    save_file(plain, folder / "concepts/strange.safetensors")
    words = {"bundle_emb.buddy.string_to_param.*": WORD, "bundle_emb.old/tom.string_to_param.*": WORD.clone()}
    save_file(load_file(folder / "loras/kohya.safetensors") | words, folder / "loras/bundled.safetensors")
    plan = {
        "prompt": "a photo of buddy on the beach",
        "files": FILES,
        "twins": {"peft.safetensors": "kohya.safetensors"},
        "ways": WAYS,
        "layers": sorted(concepts["wide"].layers),
        "sample": weights_sample({"some.weight": torch.randn(9, 9)}),
    }
    found, facts = exchanged(plan, folder, warnings, replaced)
    return {key: value.clone() for key, value in found.items()}, facts, plan["layers"]


def same_weights(found, one: str, other: str, tolerance: float = 1e-6) -> None:
    tensors, _, layers = found
    moved = 0.0
    for layer in layers:
        assert relative_error(tensors[f"{one}|{layer}"], tensors[f"{other}|{layer}"]) < tolerance, layer
        moved = max(moved, relative_error(tensors[f"{one}|{layer}"], tensors[f"base|{layer}"]))
    assert moved > 1e-2


@pytest.mark.parametrize("file", FILES)
def test_a_lora_of_any_program_gives_the_weights_that_core_gives(found, file):
    same_weights(found, f"ours {file}", f"core {file}")
    unused = found[1]["unused"][file]
    assert unused == "" or (file == "own.safetensors" and unused.count(".diff_b") == 5 and "for 42 keys" in unused)
    assert found[1]["names"][file] == file.removesuffix(".safetensors")


def test_a_lora_model_is_the_same_as_its_file(found):
    same_weights(found, "LORA_MODEL", "ours own.safetensors")


def test_a_lora_stack_keeps_both_strengths_and_either_slash(found):
    same_weights(found, "ours stack", "core stack")
    assert found[1]["stack"] == [["tom", 0.7], ["rex", 1.0]]


def test_words_that_come_in_a_lora_are_said_and_follow_the_text_encoders_strength(found):
    tensors, facts, _ = found
    same_weights(found, "ours bundled", "core bundled")
    context = {title: tensors[f"words|{title}"] for title in ("loud", "two", "silent", "off", "plain")}
    assert torch.equal(context["silent"], context["plain"]) and torch.equal(context["off"], context["plain"])
    assert relative_error(context["loud"], context["plain"]) > relative_error(context["two"], context["plain"]) > 1e-2
    assert relative_error(tensors["words|merged"], tensors["words|merged without"]) > 1e-2


def test_words_that_come_in_a_lora_are_shown_saved_and_named_where_left_out(found):
    triggers, (shown,) = found[1]["bundled"]
    assert triggers == ("buddy",) and "buddy" in shown
    left_out = "bundled.safetensors: the learned word old/tom is left out: it has a slash"
    assert left_out in shown and left_out in found[1]["unused"]["loud"] and "buddy" not in found[1]["unused"]["loud"]
    concept, lora = found[1]["bundled saved"]
    assert "trigger words: buddy" in concept and "buddy is embedding:bundled" in lora


def test_what_of_a_thumbnail_does_not_go_into_the_file_is_told(found):
    clear, opaque, plain = found[1]["thumbnails"]
    first, without = "of 2 thumbnails the first is used", "kept without its transparency"
    assert first in clear and without in clear
    assert without not in opaque + plain and first not in opaque and first in plain


def test_what_is_in_a_model_comes_out_as_one_exact_concept(found):
    same_weights(found, "taken out", "in turn", 3e-6)
    same_weights(found, "taken out by core", "in turn", 3e-6)
    assert found[1]["taken"] == ["all of them", ["<rex>", "<tom>", "<wide>"], "ties, sum"]


@pytest.mark.parametrize("form", ["concept", "LoRA for stock loaders", "LoRA in diffusers' keys"])
def test_a_saved_stack_is_one_lora_that_core_loads_to_the_same_weights(found, form):
    same_weights(found, f"saved {form}", "stacked", 3e-6)
    assert found[1]["load warnings"] == []
    assert found[1]["previews"] == [["BytesIO"]] * 3


def test_custom_diffusions_merge_is_the_engines_with_the_hosts_words(found, concepts):
    tensors, _, layers = found
    evidence = Evidence(texts=[tensors["evidence|0"], tensors["evidence|1"]], usual=tensors["evidence|usual"])
    for name, rows in (("tom", tensors["evidence|0"]), ("rex", tensors["evidence|1"])):
        assert relative_error(rows, text_features(toy_base(), concepts[name])) < 1e-4
    assert relative_error(evidence.usual, usual_text(toy_base())) < 1e-4
    pair = [concepts["tom"], concepts["rex"]]
    merged = merge_concepts(pair, [0.7, 1.0], "custom_diffusion", evidence=evidence)
    for layer in layers:
        base, now = tensors[f"base|{layer}"], tensors[f"custom|{layer}"]
        if layer in merged:
            assert relative_error(now - base, merged[layer].delta().reshape(base.shape)) < 1e-2, layer
    read = next(layer for layer in merged if layer.endswith("attn2.to_k"))
    delta = tensors[f"custom|{read}"] - tensors[f"base|{read}"]
    for name, strength, rows in (("tom", 0.7, evidence.texts[0]), ("rex", 1.0, evidence.texts[1])):
        wanted = strength * rows @ concepts[name].layers[read].delta().detach().mT
        assert relative_error(rows @ delta.mT, wanted) < 2e-2


@pytest.mark.parametrize("title", ["drawn", "drawn again", "drawn louder", "drawn in turn"])
def test_activations_draw_what_weights_draw(found, title):
    tensors, facts, _ = found
    weights, activations = (tensors[f"{title}|{way}"] for way in WAYS)
    assert relative_error(activations, weights) < 1e-4
    assert relative_error(weights, tensors["drawn|base"]) > 1e-2
    assert title == "drawn" or torch.equal(weights, tensors["drawn|weights"]) == (title == "drawn again")
    assert facts["patches"]["activations"] == 0 < facts["patches"]["weights"]


def test_a_hook_changes_the_strength_while_sampling(found):
    tensors = found[0]
    assert relative_error(tensors["hook|steady"], tensors["hook|weights"]) < 1e-4
    assert relative_error(tensors["hook|weights"], tensors["hook|base"]) > 3e-3
    for other in ("base", "steady"):
        assert relative_error(tensors["hook|late"], tensors[f"hook|{other}"]) > 1e-3


def test_a_checkpoint_of_cores_node_holds_the_merge(found, concepts):
    tensors, _, layers = found
    merged = merge_concepts([concepts["tom"], concepts["wide"]], [0.7, -0.5])
    moved = 0.0
    for layer in layers:
        saved, base = tensors[f"checkpoint|{layer}"], tensors[f"base|{layer}"]
        assert torch.equal(saved, tensors[f"before saving|{layer}"]), layer
        assert relative_error(saved, base + merged[layer].delta().reshape(base.shape)) < 1e-6
        moved = max(moved, relative_error(saved, base))
    assert moved > 1e-2


def test_what_does_not_belong_together_is_said_on_the_node(found):
    said = "\n".join(found[1]["warnings"])
    assert "rex was trained on another checkpoint of this family" in said
    assert "tom was trained on another" not in said and found[1]["no warnings"] == []
    # Beside what is told of concepts that no prompt calls.
    about_bases = [text for text in found[1]["regional warnings"] if "trained on" in text]
    assert len(about_bases) == 2  # once in each mode
    for said in about_bases:
        assert "rex was trained on another checkpoint" in said and "tom was trained on another" not in said


def test_each_key_without_a_place_is_named_and_a_file_is_read_once(found):
    assert len(found[1]["strange"]) == 1
    assert all(key in found[1]["strange"][0] for key in STRANGE)
    assert found[1]["kept"] == [True, False]


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("not there", "there is no file 'nobody.safetensors' in models/loras"),
        ("outside", "leads outside the folder"),
        ("no stack", "a LORA_STACK is a list of (file name, model strength, clip strength)"),
        ("plain model", "there is no concept in this model"),
    ],
)
def test_what_cannot_be_read_is_refused_in_plain_words(found, title, words):
    said = found[1]["refused"][title]
    assert said.startswith("AdapterError: ") and words in said


def test_the_loaded_base_is_untouched_after_everything(found):
    assert len(found[1]["untouched"]) > 20 and all(found[1]["untouched"])
