"""Each method of the papers in the host: the headless concept, to the rounding, and a model that is as it was."""

from __future__ import annotations

import types

import comfy.sd
import comfy.utils
import pytest
import torch
from laws import relative_error
from left_behind import traces
from lessons import Material, Seen, fixed_loss, lesson, outcome
from modular_concepts_pack.host.toy_base import load_toy_base as load_toy_base_in_host
from modular_concepts_pack.host.training import train as training
from modular_concepts_pack.host.training.base import host_base
from modular_concepts_pack.modular_concepts.files.concept import save_concept
from modular_concepts_pack.modular_concepts.training.methods import new_words

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
    {"name": "stoppedcompany", "settings": {"method": "lora", "rank": 2, "steps": 8, "batch": 2, "company": 0.5}},
]
RATES = {"learning_rate": 5e-3, "token_learning_rate": 1e-2, "preview_every": 0}
SD_CASES = [
    {**CASES[0], "settings": {**CASES[0]["settings"], "steps": 4, "batch": 1}, **RATES},
    {**CASES[3], "settings": {**CASES[3]["settings"], "steps": 4}, **RATES, "prior": 2},
    {"name": "company", "settings": {"method": "lora", "rank": 2, "steps": 4, "batch": 2, "company": 1.0}, **RATES},
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
def told(replaced):
    """What the host would show on the node, as it comes; every step is told, however fast the machine."""
    replaced.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0)
    replaced.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    lines: list[str] = []
    replaced.setattr(training, "show_text", lines.append)
    return lines


@pytest.fixture(scope="module")
def found(folder, told, pictures):
    """(the host's folder, facts)."""
    drawn, masks, captions = pictures
    material, loaded = Material("toy", drawn, captions, masks), load_toy_base_in_host()
    facts = learned(loaded, material, CASES, folder, told)
    for case in STOPPED:
        facts |= stop_and_go_on(loaded, material, case)
    facts["short"] = short_of_something(loaded, material, STOPPED[0])
    return folder, facts


@torch.inference_mode()
def learned(loaded, material: Material, cases: list[dict], place, told: list[str]) -> dict:
    """Train each case to the end, and save it as `place`/NAME.safetensors."""
    base, facts = host_base(*loaded), {}
    for case in cases:
        own, seen, before = lesson(material, case), Seen(), traces(*loaded[:2])
        told.clear()
        concept, result = training.train_in_host(base, own)
        save_concept(concept, place / f"{case['name']}.safetensors")
        facts[case["name"]] = {
            "losses": result.losses,
            "fixed": [fixed_loss(base, own.subject, fresh(base, own)), fixed_loss(base, own.subject, concept)],
            "previews": list(seen.previews),
            "said": list(told),
            "untouched": traces(*loaded[:2]) == before,
        }
    return facts


def fresh(base, own) -> types.SimpleNamespace:
    """What the training starts from: its new word, and no layer that differs."""
    start = {own.subject.trigger: base.word_rows(own.subject.class_word)}
    words = new_words(start, own.settings, base.cross_attention_layers)
    return types.SimpleNamespace(layers={}, tokens={word: rows.detach() for word, rows in words.items()})


@torch.inference_mode()
def stop_and_go_on(loaded, material: Material, case: dict) -> dict:
    """A cancel, then the rest: the same bits as without; then with another setting, refused and let through."""
    base, before = host_base(*loaded), traces(*loaded[:2])
    whole, _ = training.train_in_host(base, lesson(material, case))
    place = training.checkpoint_folder(case["name"])
    place.rename(place.with_name(f"{case['name']}-whole"))
    Seen(stop_at=5)
    stopped = outcome(lambda: training.train_in_host(base, lesson(material, case)))
    Seen()
    resumed, result = training.train_in_host(base, lesson(material, {**case, "resume": True}))
    other = {**case, "settings": {**case["settings"], "steps": case["settings"]["steps"] + 2}, "resume": True}
    refused = outcome(lambda: training.train_in_host(base, lesson(material, other)))
    accepted, longer = training.train_in_host(base, lesson(material, {**other, "accept_changes": True}))
    resuming = [
        stopped,
        len(result.losses),
        whole.layers.keys() == resumed.layers.keys(),
        all(torch.equal(resumed.layers[name].lora_up, adapter.lora_up) for name, adapter in whole.layers.items()),
        all(torch.equal(resumed.tokens[word], rows) for word, rows in whole.tokens.items()),
        traces(*loaded[:2]) == before,
    ]
    changing = [refused, len(longer.losses), longer.losses[: len(result.losses)] == result.losses]
    return {f"resumed {case['name']}": resuming, f"changed {case['name']}": changing}


@torch.inference_mode()
def short_of_something(loaded, material: Material, case: dict) -> dict:
    """What each option needs, and memory that runs out before, in and between steps: a sentence, and no trace."""
    base, before = host_base(*loaded), traces(*loaded[:2])

    def with_settings(**changes):
        own = {**case, "name": "short", "settings": {**case["settings"], **changes}}
        return outcome(lambda: training.train_in_host(base, lesson(material, own)))

    short = {
        "masks": with_settings(attention_regularisation=0.01),
        "bitsandbytes": with_settings(optimizer="adamw8bit"),
        "optimizer": with_settings(optimizer="sgd"),
    }
    deep = loaded[0].model.diffusion_model.out[1]
    for when, call in (("estimate", 1), ("step", 5)):
        count = {"calls": 0}

        def fail(*_, count=count, call=call):
            count["calls"] += 1
            if count["calls"] == call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        handle = deep.register_forward_hook(fail)
        short[f"memory in {when}"] = with_settings()
        handle.remove()
    encode = loaded[2].encode

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    loaded[2].encode = full
    short["memory in the VAE"] = with_settings()
    loaded[2].encode = encode
    short["untouched"] = traces(*loaded[:2]) == before
    return short


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
def sd(folder, told, checkpoint, tmp_path_factory):
    """The same on a generated checkpoint in Stable Diffusion 1.5's layout, half precision."""
    place = tmp_path_factory.mktemp("sd15methods")
    drawn = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    captions = ["a photo of {concept}", "a photo of {concept} outside", "{concept} at home"]
    loaded = comfy.sd.load_checkpoint_guess_config(str(checkpoint("sd15")))[:3]
    return place, learned(loaded, Material("sd15", drawn, captions), SD_CASES, place, told)


@named(SD_CASES)
def test_stable_diffusion_learns_by_every_method(sd, case):
    place, facts = sd
    own = facts[case["name"]]
    before, after = own["fixed"]
    assert after < before and own["untouched"]
    concept = load_concept(place / f"{case['name']}.safetensors")
    (rows,) = concept.tokens.values()
    assert rows.shape == ((4, *rows.shape[1:]) if case["settings"].get("layerwise") else rows.shape)
    assert rows.shape[-1] == 768 and concept.recipe.architecture == "sd15"
