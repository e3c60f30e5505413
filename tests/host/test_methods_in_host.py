"""Each method of the papers in the host: the headless concept, to the rounding, and a model that is as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from test_training_in_host import relative_error

from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.data.dataset import filled_in, of_pictures
from modular_concepts.files.concept import load_concept
from modular_concepts.models.targets import Targets
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.standard import BY_NAME, pictures_of
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, train_concept

STEPS = 12
COMMON = {"steps": STEPS, "batch": 2, "seed": 4}
ED_LORA = {
    "method": "lora",
    "rank": 4,
    "layerwise": True,
    "token_start": "random + class",
    "noise_offset": 0.01,
    "schedule": "linear",
    "weight_decay": 0.01,
}
CASES = [
    {"name": "edlora", "settings": {**COMMON, **ED_LORA}, "text_encoder": True, "preview_every": 6},
    {"name": "pplus", "settings": {**COMMON, "method": "words", "layerwise": True, "token_vectors": 1}},
    {"name": "inversion", "settings": {**COMMON, "method": "words", "token_vectors": 1}, "preview_every": 6},
    {
        "name": "custom",
        "settings": {**COMMON, "method": "custom_diffusion", "flip": True},
        "targets": ["cross_attention_kv"],
        "preview_every": 6,
    },
    {
        "name": "published",
        "settings": {**COMMON, "method": "orthogonal", "rank": 8, "slot": 1, "layerwise": True, "min_snr": 5.0},
        "targets": ["all_linear"],
        "masks": True,
    },
    {
        "name": "hybrid",
        "settings": {
            **COMMON,
            **{"method": "block_orthogonal", "rank": 4, "slot": 2, "blocks": 5, "erasure": 0.2},
            **{"caption_dropout": 0.3, "shuffle_tags": True, "gradient_checkpointing": True},
        },
    },
    {
        "name": "attentive",
        "settings": {**COMMON, **ED_LORA, "attention_regularisation": 0.01},
        "masks": True,
    },
]
STOPPED = [
    {"name": "stoppedword", "settings": {"method": "words", "layerwise": True, "steps": 8, "batch": 2}},
    {
        "name": "stoppedcustom",
        "settings": {"method": "custom_diffusion", "steps": 8, "batch": 2, "caption_dropout": 0.5},
        "targets": ["cross_attention_kv"],
    },
]
RATES = {"learning_rate": 5e-3, "token_learning_rate": 1e-2, "preview_every": 0}
SD_CASES = [
    {**CASES[0], "settings": {**CASES[0]["settings"], "steps": 4, "batch": 1}, **RATES},
    {**CASES[3], "settings": {**CASES[3]["settings"], "steps": 4}, **RATES, "prior": 2},
]


@pytest.fixture(scope="module")
def base():
    return load_toy_base()


@pytest.fixture(scope="module")
def pictures():
    """Pictures (6, 3, 32, 32), masks (6, 32, 32) and captions that both sides train on."""
    drawn, captions = pictures_of(BY_NAME["tom"], 6)
    masks = torch.zeros(6, 32, 32)
    masks[:, 4:, 8:24] = 1
    return drawn, masks, [text.replace("<tom>", "{concept}") + ", at night, a tree" for text in captions]


@pytest.fixture(scope="module")
def found(host, pictures, tmp_path_factory):
    place = tmp_path_factory.mktemp("methods")
    drawn, masks, captions = pictures
    save_file({"pictures": drawn, "masks": masks}, place / "asked.safetensors")
    (place / "asked.json").write_text(json.dumps({"captions": captions, "cases": CASES, "stopped": STOPPED}))
    host.run("methods.py", place)
    return place, json.loads((place / "facts.json").read_text())


def named(cases: list[dict]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


@named(CASES)
def test_the_host_learns_what_the_headless_face_learns(base, pictures, found, case):
    place, facts = found
    drawn, masks, captions = pictures
    concept = load_concept(place / f"{case['name']}.safetensors")
    known = TrainSettings.__dataclass_fields__
    settings = TrainSettings(**{key: value for key, value in concept.recipe.training.items() if key in known})
    assert {key: getattr(settings, key) for key in case["settings"]} == case["settings"]
    data = of_pictures(list(drawn), captions, list(masks) if case.get("masks") else None, (32, 32))
    data = filled_in(data, (f"<{case['name']}>",))
    subject = Subject(case["name"], data.pictures, data.captions, "man", data.masks, data.fingerprint)
    targets = Targets(tuple(case.get("targets", ["attention"])), ("attention",) if case.get("text_encoder") else None)
    expected, result = train_concept(base, subject, settings, targets, basis=OrthogonalBasis())
    assert concept.layers.keys() == expected.layers.keys()
    assert bool(concept.layers) != (settings.method == "words")
    (rows,), (wanted,) = concept.tokens.values(), expected.tokens.values()
    assert rows.dim() == (3 if settings.layerwise else 2)
    assert relative_error(rows, wanted) < 1e-4
    assert facts[case["name"]]["losses"] == pytest.approx(result.losses, rel=1e-4)
    if expected.layers:
        ups, wanted = (
            torch.cat([one.layers[n].lora_up.flatten() for n in expected.layers]) for one in (concept, expected)
        )
        assert relative_error(ups, wanted) < 1e-3 and wanted.norm() > 0
    assert concept.recipe.to_json() == expected.recipe.to_json()


@named(CASES)
def test_the_loss_falls_and_the_model_is_as_it_was(found, case):
    facts = found[1][case["name"]]
    before, after = facts["fixed"]
    assert after < before
    assert facts["untouched"] and len(facts["losses"]) == STEPS


@named(CASES)
def test_the_node_says_what_to_expect_and_how_it_goes(found, case):
    said = found[1][case["name"]]["said"]
    assert "a step" in said[0] and f"{STEPS} steps" in said[0] and "of memory" in said[0]
    previews = [["JPEG", 256, 256]] * (STEPS // case["preview_every"] if case.get("preview_every") else 0)
    assert found[1][case["name"]]["previews"] == previews


@named(STOPPED)
def test_a_cancelled_training_goes_on_to_the_same_bits(found, case):
    facts = found[1]
    assert facts[f"resumed {case['name']}"] == ["interrupted", 8, True, True, True, True]


@named(STOPPED)
def test_other_settings_are_refused_unless_told_to_go_on(found, case):
    refused, steps, same_start = found[1][f"changed {case['name']}"]
    assert "steps was 8, is now 10" in refused
    assert steps == 10 and same_start


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("masks", "these pictures have none; give a mask for each, or set it to 0"),
        ("bitsandbytes", "bitsandbytes"),
        ("optimizer", "optimizer is 'sgd'; choose one of adamw, adamw8bit"),
        ("memory in estimate", "turn gradient_checkpointing on"),
        ("memory in step", "lower batch (now 2), train on smaller pictures or turn gradient_checkpointing on"),
        ("memory in the VAE", "lower batch (now 2), train on smaller pictures or turn gradient_checkpointing on"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(found, what, words):
    message = found[1]["short"][what]
    assert message.startswith("AdapterError: ") and words in message and "\n" not in message
    assert found[1]["short"]["untouched"]


@pytest.fixture(scope="module")
def sd(host, pictures, tmp_path_factory):
    """The same on a generated checkpoint in Stable Diffusion 1.5's layout, half precision."""
    place = tmp_path_factory.mktemp("sd15methods")
    host.run("tiny_checkpoint.py", place)
    generator = torch.Generator().manual_seed(2)
    save_file({"sd_pictures": torch.rand(3, 3, 64, 64, generator=generator)}, place / "asked.safetensors")
    captions = ["a photo of {concept}", "a photo of {concept} outside", "{concept} at home"]
    (place / "asked.json").write_text(json.dumps({"captions": captions, "sd_cases": SD_CASES}))
    host.run("methods.py", place)
    return place, json.loads((place / "facts.json").read_text())


@named(SD_CASES)
def test_stable_diffusion_learns_by_every_method(sd, case):
    place, facts = sd
    own = facts[f"sd_{case['name']}"]
    before, after = own["fixed"]
    assert after < before and own["untouched"]
    concept = load_concept(place / f"sd_{case['name']}.safetensors")
    (rows,) = concept.tokens.values()
    assert rows.shape == ((4, *rows.shape[1:]) if case["settings"].get("layerwise") else rows.shape)
    assert rows.shape[-1] == 768 and concept.recipe.architecture == "sd15"
