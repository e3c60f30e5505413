"""Promise 10: regions are consistent, at the layer where they act and in the picture."""

import itertools

import pytest
import torch
from laws import EFFECT, relative_error, seeded
from untrained_toy import QUICK, filled_concept, picture, traces, untrained_base

from modular_concepts.errors import AdapterError
from modular_concepts.regions.attention import attend_by_region, regional_attention
from modular_concepts.regions.geometry import Region, grid_of, region_from, region_weights
from modular_concepts.regions.moment import Clock, Moment
from modular_concepts.regions.shares import Division, Places
from modular_concepts.sampling import SampleSettings, customised

WHOLE, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
EVERYWHERE, HERE = "a man on the beach", "a red car at night"


def soft_mask(seed: int) -> torch.Tensor:
    return torch.rand(13, 9, generator=seeded(seed))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("where", [{"box": WHOLE}, {"mask": torch.ones(5, 7)}], ids=["box", "mask"])
def test_one_full_region_is_plain_sampling_with_its_prompt(cfg, where):
    settings = SampleSettings(steps=2, cfg=cfg)
    regional = picture(EVERYWHERE, settings=settings, regions=[Region(HERE, **where)])
    assert torch.equal(regional, picture(HERE, settings=settings))
    assert relative_error(regional, picture(EVERYWHERE, settings=settings)) > EFFECT


def test_one_full_region_is_plain_sampling_with_concepts_too():
    concepts = [filled_concept("tom", 1), filled_concept("tim", 2)]
    with customised(untrained_base(), concepts, [1.0, 0.7]) as tokens:
        regional = picture(EVERYWHERE, tokens=tokens, regions=[Region("a <tim> at night", WHOLE)])
        plain = picture("a <tim> at night", tokens=tokens)
    assert torch.equal(regional, plain)
    assert relative_error(plain, picture("a man at night")) > EFFECT


@pytest.mark.parametrize(
    "places",
    [
        [{"box": LEFT}, {"box": RIGHT}],
        [{"box": (0.1, 0.2, 0.7, 0.9)}, {"box": (0.4, 0.0, 1.0, 0.6)}],
        [{"mask": soft_mask(1)}],
        [{"mask": soft_mask(2)}, {"mask": soft_mask(3) * 0.2}, {"box": LEFT}],
    ],
    ids=["neighbours", "overlap and gap", "soft", "soft and hard"],
)
def test_the_same_prompt_in_any_masks_is_plain_sampling(places):
    regional = picture(EVERYWHERE, regions=[Region(EVERYWHERE, **place) for place in places])
    assert relative_error(regional, picture(EVERYWHERE)) < 1e-5
    other = picture(EVERYWHERE, regions=[Region(HERE, **place) for place in places])
    assert relative_error(other, regional) > EFFECT


def test_the_order_of_regions_does_not_matter():
    regions = [
        Region(HERE, (0.0, 0.0, 0.6, 1.0)),
        Region("a white cat in the snow", (0.4, 0.0, 1.0, 0.7)),
        Region("a robot in the city", mask=soft_mask(4)),
    ]
    first = picture(EVERYWHERE, regions=regions)
    for shuffled in itertools.permutations(regions):
        assert relative_error(picture(EVERYWHERE, regions=shuffled), first) < 1e-5
    assert relative_error(picture(EVERYWHERE, regions=regions[:2]), first) > EFFECT


def test_adding_a_region_draws_nothing_random():
    before = torch.get_rng_state()
    nowhere = picture(EVERYWHERE, regions=[Region(HERE, mask=torch.zeros(4, 4)), Region(HERE, mask=torch.zeros(1, 1))])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(nowhere, picture(EVERYWHERE))


def test_a_region_changes_nothing_outside_its_mask_at_the_first_layer_where_it_acts():
    def first_cross_attention(regions):
        seen = []
        layer = next(module for name, module in untrained_base().unet.named_modules() if name.endswith("attn2"))
        handle = layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            picture(EVERYWHERE, settings=SampleSettings(steps=1, cfg=4.0), regions=regions)
        finally:
            handle.remove()
        return seen[0].unflatten(1, grid_of(seen[0].shape[1], 16, 16))

    plain, regional = first_cross_attention([]), first_cross_attention([Region(HERE, LEFT)])
    half = plain.shape[2] // 2
    assert torch.equal(regional[1:, :, half:], plain[1:, :, half:])
    assert relative_error(regional[1:, :, :half], plain[1:, :, :half]) > EFFECT
    assert torch.equal(regional[0], plain[0])  # the unconditional row has the same negative prompt everywhere


def test_a_region_has_its_own_negative_prompt():
    same = picture(EVERYWHERE, regions=[Region(HERE, LEFT, negative="")])
    assert torch.equal(same, picture(EVERYWHERE, regions=[Region(HERE, LEFT)]))
    own = picture(EVERYWHERE, regions=[Region(HERE, LEFT, negative="a man")])
    assert relative_error(own, same) > EFFECT


def test_the_base_gets_its_processors_back_also_after_an_exception():
    base = untrained_base()
    before = traces(base)

    def fail(_done, _total):
        raise RuntimeError("on purpose")

    from modular_concepts.sampling import sample

    with pytest.raises(RuntimeError, match="on purpose"):
        sample(base, [EVERYWHERE], [0], settings=QUICK, regions=[Region(HERE, LEFT)], callback=fail)
    assert traces(base) == before
    clock = Clock(Moment((16, 16)))
    with regional_attention(base.unet, Places([Region(HERE, LEFT)]), torch.zeros(1, 1, 2, 128), clock):
        assert traces(base)[2] != before[2]
    assert traces(base) == before


@pytest.mark.parametrize("overlap", ["average", "priority"])
def test_every_cell_is_shared_out_whole(overlap):
    """Texts told apart as unit vectors: what comes back are their shares."""
    masks = torch.cat([torch.rand(3, 40, generator=seeded(5)), torch.zeros(3, 8), torch.ones(3, 8)], dim=1)
    masks[1, 48:] = 0
    places = Places([Region("", mask=mask.unflatten(0, (4, 14))) for mask in masks], overlap)
    division = places.division(56, Moment((4, 14)), masks)
    texts = [(row, row) for row in torch.eye(4)[:, None, None]]
    shares = attend_by_region(
        lambda query, _key, value: value.expand_as(query), torch.zeros(1, 56, 4), texts, division
    )[0]
    assert (shares.sum(1) - 1).abs().max() < 1e-6 and shares.min() >= 0
    assert torch.equal(shares[40:48], torch.eye(4)[:1].expand(8, 4))
    on_top = [0.0, 0.5, 0.0, 0.5] if overlap == "average" else [0.0, 0.0, 0.0, 1.0]
    assert torch.equal(shares[48:], torch.tensor(on_top).expand(8, 4))
    assert (division.texts[1:].sum(0) <= 1 + 1e-6).all()


def test_priority_decides_who_lies_on_top_and_of_equals_the_later():
    left, middle = (0.0, 0.0, 0.75, 1.0), (0.25, 0.0, 1.0, 1.0)
    later = region_weights([Region("a", left), Region("b", middle)], 1, 4, "priority")
    assert torch.equal(later[:, 0], torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 1]]))
    higher = region_weights([Region("a", left, priority=1), Region("b", middle)], 1, 4, "priority")
    assert torch.equal(higher[:, 0], torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]]))
    thin = region_weights([Region("a", left), Region("b", middle, strength=0.25)], 1, 4, "priority")
    assert torch.equal(thin[:, 0, 1], torch.tensor([0.75, 0.25]))
    with pytest.raises(AdapterError, match="overlap is 'sum'; choose one of average, priority"):
        region_weights([], 1, 4, "sum")


def test_a_region_holds_for_its_part_of_the_sampling():
    early, late = Region(HERE, WHOLE, end=0.5), Region("a robot", WHOLE, start=0.5)
    assert [early.holds(p) for p in (0.0, 0.49, 0.5, 1.0)] == [True, True, False, False]
    assert [late.holds(p) for p in (0.0, 0.49, 0.5, 1.0)] == [False, False, True, True]
    settings = SampleSettings(steps=4, cfg=4.0)
    seen = {}
    for title, regions in {
        "none": [],
        "early": [early],
        "late": [late],
        "both": [early, late],
        "first": [HERE],
    }.items():
        prompt = regions.pop() if title == "first" else EVERYWHERE
        seen[title] = picture(prompt, settings=settings, regions=regions)
    for one, other in itertools.combinations(seen.values(), 2):
        assert relative_error(one, other) > EFFECT
    whole = Region(HERE, WHOLE, start=0.0, end=1.0)
    assert torch.equal(picture(EVERYWHERE, settings=settings, regions=[whole]), seen["first"])
    with pytest.raises(AdapterError, match="has control -1; it must be from 0 to 10"):
        Region(HERE, WHOLE, control=-1)
    with pytest.raises(AdapterError, match="from 0.5 to 0.5 of the sampling"):
        Region(HERE, WHOLE, start=0.5, end=0.5)


def test_a_cell_that_two_texts_share_is_divided_only_where_they_do():
    division = Division(torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.25]]))
    assert torch.equal(division.rest, torch.tensor([1.0, 0.0, 0.25])) and not division.replaced
    first, second = division.regions
    assert first.index.tolist() == [1, 2] and second.share.tolist() == [[0.25]]
    assert Division(torch.zeros(1, 3)).regions == (None,) and Division(torch.ones(1, 3)).regions[0].everything


def test_neighbours_leave_no_gap_and_small_boxes_keep_a_cell():
    generator = seeded(6)
    for height, width in ((1, 1), (2, 2), (8, 8), (8, 24), (7, 5)):
        for _ in range(40):
            cuts = [0.0, *torch.rand(2, generator=generator).sort().values.tolist(), 1.0]
            boxes = [(left, 0.0, right, 1.0) for left, right in itertools.pairwise(cuts) if left < right]
            weights = region_weights([Region("", box) for box in boxes], height, width)
            assert weights.sum(0).min() >= 1
            assert weights.flatten(1).sum(1).min() >= height
            corner = (torch.rand(2, generator=generator) * 0.999).tolist()
            small = Region("", (*corner, corner[0] + 1e-3, corner[1] + 1e-3))
            assert region_weights([small], height, width).sum() >= 1
    thirds = [Region("", (i / 3, 0.0, (i + 1) / 3, 1.0)) for i in range(3)]
    for width in (3, 6, 16, 24, 48):
        assert torch.equal(region_weights(thirds, 4, width).sum(0), torch.ones(4, width))


def test_a_mask_is_averaged_over_each_cell():
    mask = torch.zeros(4, 4)
    mask[:2, :1] = 1
    assert torch.equal(region_weights([Region("", mask=mask)], 2, 2)[0], torch.tensor([[0.5, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("feather", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [(8, 24), (16, 16), (13, 7)])
def test_neighbours_with_one_feather_still_share_every_cell_out(feather, size):
    edges = (0.0, 0.3, 0.55, 1.0)
    row = [Region("a", (low, 0.0, high, 1.0), feather=feather) for low, high in itertools.pairwise(edges)]
    weights = region_weights(row, *size)
    assert (weights.sum(0) - 1).abs().max() < 1e-6
    assert torch.equal(
        region_weights([Region("a", (0.0, 0.0, 1.0, 1.0), feather=feather)], *size), torch.ones(1, *size)
    )
    assert ((weights > 0) & (weights < 1)).any() == (feather * min(size) > 1)


def test_a_feather_is_a_ramp_of_its_width_around_the_edge():
    (weights,) = region_weights([Region("a", (0.5, 0.0, 1.0, 1.0), feather=0.5)], 8, 16)
    assert torch.allclose(weights[0, 5:11], torch.tensor([0.0, 0.125, 0.375, 0.625, 0.875, 1.0]))


def test_strength_scales_a_region_and_zero_is_no_region():
    box = (0.0, 0.0, 0.5, 1.0)
    whole, half, none = region_weights([Region("a", box, strength=s) for s in (1.0, 0.5, 0.0)], 4, 4)
    assert torch.equal(half, 0.5 * whole) and not none.any() and whole.any()
    silent = picture("a man", regions=[Region("a dog", box, strength=0.0)])
    assert torch.equal(silent, picture("a man"))


def test_pixels_become_fractions_once_the_picture_is_known():
    region = region_from("a dog", (8.0, 0.0, 24.0, 16.0), True, None, 4.0, 1.0, " ")
    placed = region.placed(32, 16)
    assert (placed.box, placed.feather, placed.negative) == ((0.25, 0.0, 0.75, 1.0), 0.25, None)
    assert placed.placed(99, 99) is placed
    with pytest.raises(AdapterError, match=r"reaches to \(24, 16\), but the picture is only 16 x 16 pixels"):
        region.placed(16, 16)
    with pytest.raises(AdapterError, match="pixels of a picture that nobody named"):
        region_weights([region], 4, 4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"box": (0.0, 0.0, 12.0, 1.0)}, "outside the picture: as fractions all four are at most 1"),
        ({"strength": float("nan")}, "strength nan"),
        ({"strength": 1.5}, "strength 1.5"),
        ({"feather": -0.1}, "feather of -0.1"),
        ({"feather": float("inf")}, "feather of inf"),
        ({"mask": torch.ones(3, 4, 4)}, "3 masks"),
    ],
)
def test_what_a_person_cannot_mean_is_refused(changed, words):
    filled = {"box": (0.0, 0.0, 1.0, 1.0), "mask": None, "feather": 0.0, "strength": 1.0, **changed}
    with pytest.raises(AdapterError, match=words):
        region_from("a dog", filled["box"], False, filled["mask"], filled["feather"], filled["strength"], "")


def test_the_grid_of_a_layer_follows_from_its_positions():
    assert grid_of(16 * 48, 16, 48) == (16, 48) and grid_of(8 * 24, 16, 48) == (8, 24)
    assert grid_of(2 * 3, 7, 9) == (2, 3)


@pytest.mark.parametrize(
    "where",
    [
        {"box": WHOLE, "mask": torch.ones(2, 2)},
        {"box": (0.5, 0.0, 0.5, 1.0)},
        {"box": (0.6, 0.0, 0.5, 1.0)},
        {"box": (-0.1, 0.0, 0.5, 1.0)},
        {"box": (0.0, 0.0, 1.1, 1.0)},
        {"box": (0.0, 0.0, float("nan"), 1.0)},
        {"box": (0.0, 0.0, float("inf"), 1.0)},
        {"mask": torch.ones(1, 4, 4)},
        {"mask": torch.ones(0, 4)},
        {"mask": torch.full((4, 4), float("nan"))},
    ],
)
def test_a_region_that_is_none_is_refused(where):
    with pytest.raises(AdapterError, match="'a dog'"):
        Region("a dog", **where)


def test_a_layer_that_is_no_halving_is_refused():
    with pytest.raises(AdapterError, match="63 positions"):
        grid_of(63, 16, 16)
