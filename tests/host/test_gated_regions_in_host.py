"""Gated regions in the host: promise 10 on the toy base and in Stable Diffusion 1.5's layout, whatever samples."""

from __future__ import annotations

import gated_pictures
import pytest
import torch
from laws import relative_error
from made_concepts import made_concept, toy_base

from modular_concepts.files.concept import save_concept
from modular_concepts.regions.assignment import acting
from modular_concepts.regions.conditioning import Speaking
from modular_concepts.regions.geometry import Region
from modular_concepts.regions.shares import Places

PROMPT, NEGATIVE, INSIDE = "a man and a dog and a cat on the beach", "a car", "a <rex> dog in the snow"
STACK = [["tom", 0.8], ["rex", 1.0]]
SAMPLERS = ["euler_ancestral", "dpmpp_2m_sde"]
LEFT = {"prompt": "a <tom> man on the beach", "box": [0.0, 0.0, 1 / 3, 1.0]}
RIGHT = {"prompt": INSIDE, "box": [0.5, 0.25, 1.0, 1.0]}
REGIONS = [
    LEFT,
    {**RIGHT, "feather": 0.4, "strength": 0.7, "negative": "a robot"},
    {"prompt": "a <tom> and a <rex>", "mask": "mask"},
    {"prompt": "a bird", "pixels": True, "box": [10.0, 4.0, 70.0, 20.0]},
]
PICTURES = {
    "two": [LEFT, RIGHT],
    "two in other order": [RIGHT, LEFT],
    "one text everywhere": [
        {"prompt": INSIDE, "box": [0.0, 0.0, 0.4, 1.0]},
        {"prompt": INSIDE, "box": [0.4, 0.0, 1.0, 1.0]},
    ],
    "overlap": [{"prompt": INSIDE}, {**LEFT, "box": [0.0, 0.0, 0.6, 1.0]}],
}
FULL = [
    "euler",
    *SAMPLERS,
    "unguided",
    "rescaled guidance",
    "perturbed attention",
    "batch",
    "image to image",
    "inpainting",
]


@pytest.fixture(scope="module")
def asked():
    generator = torch.Generator().manual_seed(8)
    return {
        "noisy": torch.randn(2, 12, 16, 48, generator=generator),  # 96 x 32 pixels
        "start": torch.randn(2, 12, 16, 48, generator=generator),
        "timesteps": torch.tensor([120, 800]),
        "mask": torch.rand(1, 40, 50, generator=generator),
    }


@pytest.fixture(scope="module")
def concepts():
    return [made_concept("tom"), made_concept("rex", slot=1)]


@pytest.fixture(scope="module")
def found(folder, checkpoint, asked, concepts):
    """(tensors, facts)."""
    for concept in concepts:
        save_concept(concept, folder / f"{concept.name}.safetensors")
    plan = {"prompt": PROMPT, "negative": NEGATIVE, "inside": INSIDE, "everywhere": INSIDE, "stack": STACK}
    plan |= {"samplers": SAMPLERS, "regions": REGIONS, "pictures": PICTURES}
    found, facts = gated_pictures.drawn(plan, asked, folder, checkpoint("sd15"))
    return {key: value.float().clone() for key, value in found.items()}, facts


def test_the_network_has_concepts_by_region_as_the_headless_sampler_makes_it(found, asked, concepts):
    tensors, _ = found
    base, noisy, timesteps = toy_base(), asked["noisy"], asked["timesteps"].repeat(2)
    regions = []
    for entry in REGIONS:
        mask = asked[entry["mask"]][0] if "mask" in entry else None
        box = None if mask is not None else tuple(entry["box"])
        regions.append(Region(**{**entry, "mask": mask, "box": box}).placed(96, 32))
    stack = [(concept, strength) for concept, (_, strength) in zip(concepts, STACK, strict=True)]
    speaking = Speaking(base, Places(regions), {}, stack, acting(stack, PROMPT, regions))
    with torch.no_grad():
        context, texts = speaking.contexts([PROMPT] * 2, NEGATIVE)
        turned = [own.roll(2, dims=0) for own in texts]  # the headless sampler has the negative's rows first
        with speaking.acting(turned, (16, 48)):
            expected = base.predict(noisy.repeat(2, 1, 1, 1), timesteps, context.roll(2, dims=0))
        plain = base.predict(noisy.repeat(2, 1, 1, 1), timesteps, context.roll(2, dims=0))
    assert relative_error(tensors["network"], expected) < 1e-5
    assert relative_error(tensors["network"], plain) > 1e-2
    with torch.no_grad(), Speaking(base, Places(regions), {}, [], [()] * 5).acting(turned, (16, 48)):
        ungated = base.predict(noisy.repeat(2, 1, 1, 1), timesteps, context.roll(2, dims=0))
    assert relative_error(tensors["network"], ungated) > 1e-2


@pytest.mark.parametrize("title", [*FULL, "odd size", "sd15 euler", "sd15 odd size", "sd15 controlled", "sd15 adapted"])
def test_one_full_region_is_plain_sampling_with_its_concept_merged(found, title):
    tensors, _ = found
    assert relative_error(tensors[f"{title}|full"], tensors[f"{title}|merged"]) < 1e-4
    assert torch.isfinite(tensors[f"{title}|full"]).all()


@pytest.mark.parametrize("base", ["", "sd15 "])
def test_what_is_compared_is_more_than_nothing(found, base):
    tensors, facts = found
    assert relative_error(tensors[f"{base}euler|full"], tensors[f"{base}inside, nothing gated"]) > 1e-2
    assert relative_error(tensors[f"{base}two"], tensors[f"{base}euler|full"]) > 1e-2
    assert facts["kinds"] == [2, 4]  # convolutions are among the layers


@pytest.mark.parametrize("base", ["", "sd15 "])
def test_the_same_text_and_concept_in_masks_that_cover_everything_is_plain_sampling(found, base):
    tensors, _ = found
    assert relative_error(tensors[f"{base}one text everywhere"], tensors[f"{base}plain text everywhere"]) < 1e-4


@pytest.mark.parametrize("title", ["two", *(f"two|{sampler}" for sampler in SAMPLERS), "sd15 two"])
def test_the_order_of_regions_does_not_matter_with_any_sampler(found, title):
    other = title.replace("two", "two in other order")
    assert relative_error(found[0][other], found[0][title]) < 1e-4


def test_it_is_one_pass_whether_the_host_batches_both_prompts_or_not(found):
    tensors, facts = found
    assert facts["calls"] == {"batched": [4] * 2, "split": [2] * 4}
    assert relative_error(tensors["split"], tensors["batched"]) < 1e-4


def test_a_gate_is_no_merge_and_no_absence(found):
    tensors, _ = found
    titles = ["two", "without concepts", "merged mode", "on top", "shared", "early", "late"]
    for number, title in enumerate(titles):
        for other in titles[:number]:
            assert relative_error(tensors[title], tensors[other]) > 5e-4, (title, other)
    assert torch.equal(tensors["all in one"], tensors["two"])


@pytest.mark.parametrize("title", ["sd15 controlled", "sd15 adapted"])  # by a ControlNet, by a T2I-Adapter
def test_control_holds_in_regions_as_much_as_they_let_it(found, title):
    tensors, _ = found
    assert relative_error(tensors[f"{title}|full"], tensors["sd15 euler|full"]) > 1e-2
    assert relative_error(tensors[f"{title}, free"], tensors["sd15 euler|full"]) < 1e-4
    half, free, whole = (tensors[f"{title}{part}"] for part in (", half free", ", free", "|full"))
    assert relative_error(half, free) > 1e-3 and relative_error(half, whole) > 1e-3


@pytest.mark.parametrize("title", ["", ", called"])
def test_places_are_found_once_for_a_seed_and_share_nothing(found, title):
    tensors, facts = found
    masks = tensors[f"found{title}"]
    assert masks.shape == (2, 16, 48) and masks.sum(0).max() == 1
    assert (masks.flatten(1).sum(1) >= 1).all() and masks.sum() < masks[0].numel()
    assert torch.equal(masks, tensors[f"found again{title}"])
    assert facts["kept"] == [True, True]


def test_a_sampler_finds_places_by_itself(found):
    tensors, _ = found
    assert torch.equal(tensors["found by the sampler"], tensors["found before"])
    assert relative_error(tensors["found before"], tensors["two"]) > 1e-2


def test_the_model_is_as_it_was_also_after_an_exception(found):
    tensors, facts = found
    assert (
        facts["failed"] == "on purpose"
        and facts["untouched by failing"]
        and facts["untouched"]
        and facts["sd15 untouched"]
    )
    hooks = facts["hooks"]
    assert hooks["inside"] > hooks["before"] == hooks["after"] == hooks["after failing"]
    assert hooks["sd15 after"] == hooks["sd15 before"]
    assert torch.equal(tensors["afterwards"], tensors["two"])


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("merged already", "tom is merged into this model already, so it acts everywhere and no region can hold it"),
        ("unknown", "asks for the concept 'tim', and there is none of that name; there is tom, rex"),
        ("mode", "mode is 'both'; choose one of gated, merged"),
        ("overlap", "overlap is 'sum'; choose one of average, priority"),
        ("unplaced", "region 'a <tom>' has no place; give it a box or a mask"),
        ("nothing to look for", "region 'a bird' has neither a place nor a concept"),
        ("unsaid", "neither it nor the global prompt says <tom>, by which one could be found"),
        ("two pictures", "2 pictures are drawn at once, and regions without a place lie elsewhere in each"),
        ("no room", "GB for them; take fewer of them or of a smaller rank, or the merged mode"),
        ("twice", "another node has changed the model's cross-attention already"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_plain_words(found, title, words):
    said = found[1]["refused"][title]
    assert said.startswith("AdapterError: ") and words in said, said
