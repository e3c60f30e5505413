"""Regions in the host: the headless sampler's attention, exact where it must be, and no random number of their own."""

from __future__ import annotations

import pytest
import regional_pictures
import torch
from laws import relative_error
from made_concepts import made_concept, toy_base

from modular_concepts.files.concept import save_concept
from modular_concepts.regions.attention import regional_attention
from modular_concepts.regions.geometry import region_from
from modular_concepts.regions.moment import Clock, Moment
from modular_concepts.regions.shares import Places
from modular_concepts.sampling import customised

PROMPT, NEGATIVE, INSIDE = "a man and a dog and a cat on the beach", "a car", "a <rex> dog in the snow"
STACK = [["tom", 0.8], ["rex", 1.0]]
SAMPLERS = ["euler", "euler_ancestral", "dpmpp_2m_sde", "uni_pc"]
LEFT = {"prompt": "a <tom> man on the beach", "box": [0.0, 0.0, 1 / 3, 1.0]}
RIGHT = {"prompt": INSIDE, "box": [0.5, 0.25, 1.0, 1.0]}
REGIONS = [
    LEFT,
    {**RIGHT, "feather": 0.4, "strength": 0.7, "negative": "a robot"},
    {"prompt": "a cat", "mask": "mask", "units": "pixels", "feather": 3.0},
    {"prompt": "a bird", "units": "pixels", "box": [10.0, 4.0, 70.0, 20.0]},
]
PICTURES = {
    "two": [LEFT, RIGHT],
    "two in other order": [RIGHT, LEFT],
    "two and a silent one": [LEFT, RIGHT, {"prompt": "a robot", "box": [0.2, 0.0, 0.9, 1.0], "strength": 0.0}],
    "full": [{"prompt": INSIDE}],
    "full mask": [{"prompt": INSIDE, "mask": "white"}],
    "one text everywhere": [{"prompt": PROMPT, "mask": "mask"}, {**LEFT, "prompt": PROMPT, "feather": 0.2}],
}


@pytest.fixture(scope="module")
def asked():
    generator = torch.Generator().manual_seed(8)
    return {
        "noisy": torch.randn(2, 12, 16, 48, generator=generator),  # 96 x 32 pixels
        "timesteps": torch.tensor([120, 800]),
        "mask": torch.rand(1, 40, 50, generator=generator),
        "white": torch.ones(1, 7, 9),
        "two masks": torch.ones(2, 8, 8),
    }


@pytest.fixture(scope="module")
def concepts():
    return [made_concept("tom"), made_concept("rex", slot=1)]


@pytest.fixture(scope="module")
def found(folder, asked, concepts):
    """(tensors, facts)."""
    for concept in concepts:
        save_concept(concept, folder / f"{concept.name}.safetensors")
    plan = {"prompt": PROMPT, "negative": NEGATIVE, "inside": INSIDE, "stack": STACK, "samplers": SAMPLERS}
    found, facts = regional_pictures.drawn(asked, {**plan, "regions": REGIONS, "pictures": PICTURES}, folder)
    return {key: value.float().clone() for key, value in found.items()}, facts


def test_the_network_listens_to_regions_as_the_headless_sampler_makes_it(found, asked, concepts):
    tensors, _ = found
    base, noisy, timesteps = toy_base(), asked["noisy"], asked["timesteps"].repeat(2)
    regions = [
        region_from(
            entry["prompt"],
            tuple(entry.get("box", (0.0, 0.0, 1.0, 1.0))),
            entry.get("units") == "pixels",
            asked[entry["mask"]] if "mask" in entry else None,
            entry.get("feather", 0.0),
            entry.get("strength", 1.0),
            entry.get("negative", ""),
        ).placed(96, 32)
        for entry in REGIONS
    ]
    with torch.no_grad(), customised(base, concepts, [strength for _, strength in STACK]) as tokens:

        def both(positive: str, negative: str) -> torch.Tensor:
            return torch.cat([base.context([positive] * 2, tokens), base.context([negative] * 2, tokens)])

        contexts = torch.stack([both(region.prompt, region.negative or NEGATIVE) for region in regions])
        doubled = noisy.repeat(2, 1, 1, 1)
        with regional_attention(base.unet, Places(regions), contexts, Clock(Moment((16, 48)))):
            expected = base.predict(doubled, timesteps, both(PROMPT, NEGATIVE))
        plain = base.predict(doubled, timesteps, both(PROMPT, NEGATIVE))
    assert relative_error(tensors["plain"], plain) < 1e-5
    assert relative_error(tensors["regional"], expected) < 1e-5
    assert relative_error(tensors["regional"], plain) > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_region_everywhere_is_plain_sampling_to_the_last_bit(found, sampler):
    tensors, _ = found
    assert torch.equal(tensors[f"full|{sampler}"], tensors[f"plain inside|{sampler}"])
    assert torch.equal(tensors[f"full mask|{sampler}"], tensors[f"plain inside|{sampler}"])
    assert relative_error(tensors[f"full|{sampler}"], tensors[f"plain|{sampler}"]) > 1e-2


def test_without_guidance_too(found):
    assert torch.equal(found[0]["unguided"], found[0]["unguided plain"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_regions_add_up_in_any_order_and_draw_no_random_number(found, sampler):
    tensors, _ = found
    two = tensors[f"two|{sampler}"]
    assert torch.isfinite(two).all()
    assert relative_error(tensors[f"two in other order|{sampler}"], two) < 1e-5
    # Samplers that add noise at every step would show a single number drawn too many.
    assert relative_error(tensors[f"two and a silent one|{sampler}"], two) < 1e-5
    assert relative_error(tensors[f"one text everywhere|{sampler}"], tensors[f"plain|{sampler}"]) < 1e-5
    assert relative_error(two, tensors[f"plain|{sampler}"]) > 1e-2


def test_a_stack_is_applied_once_wherever_it_comes_from(found):
    tensors, _ = found
    assert torch.equal(tensors["stack on base"], tensors["two|euler"])
    assert torch.equal(tensors["stack twice"], tensors["two|euler"])


def test_regions_leave_the_model_as_it_was(found):
    assert torch.equal(found[0]["plain afterwards"], found[0]["plain|euler"])


def test_a_global_prompt_of_several_sections_is_fine(found):
    assert torch.isfinite(found[0]["long prompt"]).all()
    assert relative_error(found[0]["long prompt"], found[0]["two|euler"]) > 1e-2


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("none", "there is no region; connect a Concept Region"),
        ("outside", "region 'a dog' reaches to (500, 32), but the picture is only 96 x 32 pixels"),
        ("fractions", "reaches outside the picture: as fractions all four are at most 1; correct them, or set units"),
        ("crossed", "0 <= left < right"),
        ("nan", "region 'a dog' has strength nan; it must be from 0 to 1"),
        ("cfg", "cfg is nan; it must be a finite number"),
        ("masks", "region 'a dog' has 2 masks; give one, a region for each"),
        ("patched", "another node has changed the model's cross-attention already"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_plain_words(found, title, words):
    said = found[1]["refused"][title]
    assert said.startswith("AdapterError: ") and words in said, said
