"""Training in the host is headless training: same seed, same pictures, same concept; and the model is as it was."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.utils
import pytest
import torch
import trainings
from laws import relative_error
from lessons import Material, fixed_loss, lesson
from modular_concepts_pack.host.toy_base import load_toy_base as load_toy_base_in_host
from modular_concepts_pack.host.training.base import host_base
from modular_concepts_pack.modular_concepts.files.concept import load_concept as load_concept_in_host

from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.data.dataset import filled_in, of_pictures
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.models.targets import Targets
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.standard import BY_NAME, pictures_of
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, train_concept

STEPS = 16
COMMON = {"steps": STEPS, "batch": 3, "token_vectors": 3}
CASES = [
    {
        "name": "ortho",
        "settings": {**COMMON, "method": "orthogonal", "rank": 4, "slot": 1},
        "description": "man red shirt green hair",
        "text_encoder": True,
        "preview_every": 8,
    },
    {
        "name": "blocks",
        "settings": {**COMMON, "method": "block", "rank": 4, "slot": 2, "blocks": 5, "erasure": 0.3},
        "masks": True,
    },
    {"name": "plain", "settings": {**COMMON, "method": "lora", "rank": 4, "seed": 3}, "prior": 2},
]
STOPPED = {
    "name": "stopped",
    "settings": {"method": "orthogonal", "rank": 2, "slot": 0, "steps": 8, "batch": 2, "checkpoint_every": 3},
    "preview_every": 1,
    "stop_at": 5,
}
TYPED = {
    "plain": "concepts/plain.safetensors",
    "my folder/plain": "concepts/my folder/plain.safetensors",
    "aux/plain": "concepts/aux/plain.safetensors",  # which is there already
    "a b": "concepts/a_b.safetensors ('a b' is no name that every system takes)",
    "CON/nul.x/com1": "concepts/_CON/_nul.x/_com1.safetensors ('CON/nul.x/com1' is no name",
    "dots./x .": "concepts/dots/x.safetensors ('dots./x .' is no name",
    "a\0b": "AdapterError: 'a\\x00b' is not a file name",
    "../out": "AdapterError: '../out' leads outside the folder",
    "x" * 300: "AdapterError: 'xxx",
}
SD_CASES = [
    {
        "name": "ortho",
        "settings": {"method": "orthogonal", "rank": 4, "slot": 3, "steps": 12, "batch": 2},
        "learning_rate": 5e-3,
        "token_learning_rate": 1e-2,
        "masks": True,
        "preview_every": 12,
    },
    {
        "name": "blocks",
        "settings": {"method": "block", "rank": 4, "slot": 1, "blocks": 4, "steps": 4, "batch": 1},
        "learning_rate": 5e-3,
        "text_encoder": True,
    },
]


@pytest.fixture(scope="module")
def base():
    return load_toy_base()


@pytest.fixture(scope="module")
def pictures():
    """Pictures (6, 3, 32, 32), masks (6, 32, 32) and captions that both sides train on."""
    drawn, captions = pictures_of(BY_NAME["tom"], 6)
    generator = torch.Generator().manual_seed(1)
    masks = (torch.rand(6, 32, 32, generator=generator) * 255).round() / 255
    return drawn, masks, [text.replace("<tom>", "{concept}") for text in captions]


def dataset_of(pictures, masked: bool):
    drawn, masks, captions = pictures
    return of_pictures(list(drawn), captions, list(masks) if masked else None, (32, 32))


def headless(base, pictures, case: dict, settings: TrainSettings):
    """The same training without a host."""
    name, text = case["name"], case.get("text_encoder")
    data = filled_in(dataset_of(pictures, case.get("masks", False)), (f"<{name}>",))
    told = case.get("description", "")
    subject = Subject(name, data.pictures, data.captions, "man", data.masks, data.fingerprint, told)
    targets = Targets(("attention",), ("attention",) if text else None)
    return train_concept(base, subject, settings, targets, basis=OrthogonalBasis())


@pytest.fixture(scope="module")
def found(folder, replaced, base, pictures):
    """(the host's folder, facts)."""
    # Every step is told, however fast the machine: the cases stop at steps by their number.
    replaced.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0)
    replaced.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    drawn, masks, captions = pictures
    material, loaded = Material("toy", drawn, captions, masks), load_toy_base_in_host()
    facts = trainings.train_cases(loaded, material, CASES, folder)
    facts |= trainings.core_lora(loaded, folder)
    facts |= trainings.stop_and_resume(loaded, material, STOPPED, folder)
    facts |= trainings.break_it(loaded, material, STOPPED, folder)
    facts["refusals"] = trainings.refusals(loaded, material, STOPPED)
    facts |= trainings.keep_and_save(folder, list(TYPED))
    settings = TrainSettings(**STOPPED["settings"], name="headless", adapter_lr=1e-3, token_lr=3e-2)
    save_concept(headless(base, pictures, {"name": "headless"}, settings)[0], folder / "headless.safetensors")
    concept, own = load_concept_in_host(folder / "headless.safetensors"), host_base(*loaded)
    subject = lesson(material, {**STOPPED, "name": "headless"}).subject
    facts["headless"] = [
        concept.recipe.base_hash == own.hash,
        concept.recipe.architecture == own.architecture,
        fixed_loss(own, subject, concept),
    ]
    return folder, facts


def test_the_host_knows_the_toy_base_as_the_headless_face_does(base, found):
    assert found[1]["base"] == [base.architecture, base.hash, 4]


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case["name"])
def test_training_in_the_host_gives_the_headless_concept(base, pictures, found, case):
    place, facts = found
    concept = load_concept(place / f"{case['name']}.safetensors")
    known = TrainSettings.__dataclass_fields__
    settings = TrainSettings(**{key: value for key, value in concept.recipe.training.items() if key in known})
    expected, result = headless(base, pictures, case, settings)
    assert concept.layers.keys() == expected.layers.keys() and len(concept.layers) >= 24
    found_ups, wanted_ups = (
        torch.cat([one.layers[name].lora_up.flatten() for name in expected.layers]) for one in (concept, expected)
    )
    (rows,), (wanted,) = concept.tokens.values(), expected.tokens.values()
    # Adam divides by the gradient's size, so that where it is almost nothing rounding shows: measured 5e-6 and 1e-5.
    assert (found_ups - wanted_ups).abs().max() < 2e-5 and wanted_ups.abs().max() > 5e-3
    assert relative_error(found_ups, wanted_ups) < 1e-4
    assert relative_error(rows, wanted) < 1e-5
    assert facts[case["name"]]["losses"] == pytest.approx(result.losses, rel=1e-5)
    assert concept.recipe.to_json() == expected.recipe.to_json()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_loss_falls_and_the_model_is_as_it_was(found, case):
    facts = found[1][case["name"]]
    before, after = facts["fixed"]
    assert after < 0.99 * before
    assert facts["untouched"] and facts["plain"]
    assert facts["steps"][-1] == [STEPS, STEPS]


def test_previews_come_when_they_are_due(found):
    assert found[1]["ortho"]["previews"] == [["JPEG", 256, 256]] * 2
    assert found[1]["plain"]["previews"] == []


def test_core_puts_our_lora_into_the_weights_and_takes_it_out_again(found):
    worst, moved, every_layer, known, as_before = found[1]["core"]
    assert worst <= 1e-6 and moved > 1e-5
    assert every_layer and known and as_before


def test_a_patched_model_keeps_its_name_and_is_not_trained_on(base, found):
    assert found[1]["hash_while_patched"] == base.hash
    assert "as its loader gives it" in found[1]["patched_base"]


def test_a_cancel_keeps_a_concept_and_a_checkpoint_and_resuming_is_exact(base, found):
    place, facts = found
    assert facts["stopped"] == ["interrupted", False, True]
    assert facts["stopped_inside"] == "interrupted"
    assert (
        "stopped-cancelled-step5.safetensors" in facts["kept"]
        and "stopped-cancelled-step6.safetensors" in facts["kept"]
    )
    assert facts["resumed"] == [7, 8, True, True]  # first step, losses, layers and words as without a pause
    assert facts["checkpoints"][-1] == "step-00000008.safetensors"
    kept = load_concept(place / "concepts" / "stopped-cancelled-step5.safetensors")
    assert kept.recipe.training["steps_done"] == 5 and not kept.recipe.training["finished"]
    with customised(base, [kept], [1.0]):
        pass


def test_a_cancel_while_the_base_draws_its_prior_leaves_nothing(found):
    assert found[1]["stopped_before_the_first_step"] == ["interrupted", True]
    assert not [name for name in found[1]["kept"] if name.startswith("early")]


def test_a_new_start_puts_old_checkpoints_aside_and_resume_refuses_other_settings(found):
    names = found[1]["checkpoints_of_a_new_start"]
    assert "step-00000002.safetensors" in names and "before/step-00000008.safetensors" in names
    assert "steps was 2, is now 3" in found[1]["other_steps"]


def test_faults_in_mid_training_leave_the_model_as_it_was(found):
    assert found[1]["broken"] == ["ZeroDivisionError: a fault of somebody else's", True]
    assert found[1]["left_by_the_broken"] == ["step-00000001.safetensors", "broken-cancelled-step1.safetensors"]
    message, as_before = found[1]["diverged"]
    assert message.startswith("AdapterError: the loss is no longer a finite number") and as_before


def test_what_was_learned_takes_no_others_place_and_finds_one_where_its_folder_is_gone(found):
    assert found[1]["kept_unfinished"] == [
        "ortho-cancelled-step3.safetensors",
        "ortho-cancelled-step3-2.safetensors",
        "output/modular_concepts/ortho/ortho-cancelled-step3.safetensors",
    ]


@pytest.mark.parametrize(("typed", "written"), TYPED.items(), ids=lambda value: value[:8].replace("\0", "0"))
def test_names_that_some_system_cannot_take_are_said_or_refused_in_every_part(found, typed, written):
    assert found[1]["saved"][typed].startswith(written)
    assert bool(found[1]["problems"][typed]) == written.startswith("AdapterError")


def test_a_concept_that_its_folder_does_not_take_is_written_elsewhere_and_said_where(found):
    for title, files in {
        "concept": ["kept.safetensors"],
        "again": ["agai.safetensors"],
        "lora": ["kept-2-ortho.safetensors", "kept-2.safetensors"],
        "word": ["kept-3.safetensors"],
    }.items():
        name, message, new = found[1]["fallback"][title]
        assert new == files and Path(name).name in files and Path(name).is_absolute(), title
        assert "nowhere" in message and f"it is in {name} instead" in message and "cannot be written" in message


@pytest.mark.parametrize("direction", ["host to headless", "headless to host"])
@torch.no_grad()
def test_concepts_go_both_ways(base, found, direction):
    place, facts = found
    if direction == "headless to host":
        same_base, same_family, loss = facts["headless"]
        assert same_base and same_family and 0 < loss < 1
        return
    concept = load_concept(place / "ortho.safetensors")
    prompts, settings = ["a <ortho> on the beach"], SampleSettings(steps=4, cfg=3.0)
    plain = sample(base, ["a man man man man on the beach"], [0], None, settings)
    with customised(base, [concept], [1.0]) as tokens:
        taught = sample(base, prompts, [0], tokens, settings)
    assert taught.isfinite().all() and relative_error(taught, plain) > 1e-3


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rank", "rank 500 is larger than this layer allows"),
        ("slot", "slot 99 does not exist"),
        ("no vae", "the vae is missing"),
        ("no clip", "the clip is missing"),
        ("no class word", "the class word is empty"),
        ("unknown class word", "class word 'zebra' is not one that the base knows"),
        ("unknown description", "the base does not know zebra"),
        ("no name", "a name needs at least one letter or digit"),
        ("name that would change", "name '../two words' cannot be a trigger word and a file; write it 'two_words'"),
        ("no trigger", "does not contain the trigger word <odd>"),
        ("one picture", "worked"),
        ("tiny picture", "picture 1: 4×4 pixels are too few to train at 32×32"),
        ("captions", "2 captions for 1 pictures"),
        ("mask size", "the mask is 16×16 pixels but its picture is 32×32"),
        ("empty mask", "the mask is black all over"),
        ("odd size", "choose multiples of 4"),
        ("flow model", "which training does not know"),
        ("not a unet", "concepts are for Stable Diffusion 1.x, Stable Diffusion 2.x"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(found, what, words):
    message = found[1]["refusals"][what]
    assert words in message
    assert message == "worked" or message.startswith("AdapterError: ")
    assert "\n" not in message


@pytest.fixture(scope="module")
def sd(folder, replaced, checkpoint, tmp_path_factory):
    """Two short trainings on a generated checkpoint in Stable Diffusion 1.5's layout, half precision."""
    replaced.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    place = tmp_path_factory.mktemp("sd15")
    drawn, masks = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)), torch.ones(3, 64, 64)
    masks[:, :, :16] = 0
    captions = ["a photo of {concept}", "a photo of {concept} (outside)", "{concept} at home"]
    loaded = comfy.sd.load_checkpoint_guess_config(str(checkpoint("sd15")))[:3]
    return place, trainings.train_cases(loaded, Material("sd15", drawn, captions, masks), SD_CASES, place)


@pytest.mark.parametrize("case", SD_CASES, ids=lambda case: case["name"])
def test_stable_diffusion_learns_and_is_as_it_was(sd, case):
    facts = sd[1][case["name"]]
    before, after = facts["fixed"]
    assert after < before and facts["untouched"]
    assert sd[1]["base"][0] == "sd15"
    concept = load_concept(sd[0] / f"{case['name']}.safetensors")
    assert concept.recipe.architecture == "sd15" and len(concept.layers) >= 16 * 2
    assert any(name.startswith("text_encoder.") for name in concept.layers) == case.get("text_encoder", False)
    assert concept.tokens[f"<{case['name']}>"].shape[1] == 768
