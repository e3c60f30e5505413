"""Promise 10 where concepts are gated: each acts in its region alone, and one region over everything is a merge."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from laws import EFFECT, relative_error, seeded
from torch import nn
from untrained_toy import QUICK, filled_concept, traces, untrained_base

from modular_concepts.adapters.low_rank import ConvGeometry, LowRank, new_block, new_full, new_lora
from modular_concepts.concept import Concept
from modular_concepts.errors import AdapterError
from modular_concepts.families.family import NEITHER, POSITIONS, TEXTS
from modular_concepts.models.layers import tokens_of
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.regions.assignment import acting
from modular_concepts.regions.gating import Gate, Gated, Held
from modular_concepts.regions.geometry import Region
from modular_concepts.regions.moment import Moment
from modular_concepts.regions.shares import Places
from modular_concepts.sampling import SampleSettings, customised, sample

WHOLE, LEFT, RIGHT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
EVERYWHERE = "a man on the beach"
TOM, TIM, TED = "a <tom> at night", "a <tim> in the snow", "a <ted> in the city"


@cache
def friends() -> list[tuple[Concept, float]]:
    """Three concepts, in all attention layers of the U-Net and of the text encoder."""
    return [
        (filled_concept(name, seed), strength)
        for name, seed, strength in (("tom", 1, 1.0), ("tim", 2, 0.7), ("ted", 3, 1.0))
    ]


def gated(regions, prompt=EVERYWHERE, stack=None, settings=QUICK, seed=0, **more):
    stack = friends() if stack is None else stack
    return sample(untrained_base(), [prompt], [seed], None, settings, regions, mode="gated", stack=stack, **more)[0]


def merged(prompt, stack, settings=QUICK, regions=()):
    with customised(untrained_base(), *zip(*stack, strict=True)) as tokens:
        return sample(untrained_base(), [prompt], [0], tokens, settings, regions)[0]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("where", [{"box": WHOLE}, {"mask": torch.ones(5, 7)}], ids=["box", "mask"])
def test_one_full_region_is_plain_sampling_with_its_concept_merged(cfg, where):
    settings = SampleSettings(steps=2, cfg=cfg)
    found = gated([Region(TIM, **where)], settings=settings)
    assert torch.equal(found, merged(TIM, friends()[1:2], settings))
    assert relative_error(found, merged(TIM, friends()[:1] + friends()[1:2], settings)) > EFFECT
    assert relative_error(found, gated([Region(TIM, **where, concepts=())], settings=settings)) > EFFECT


def test_several_concepts_in_one_full_region_are_their_merge():
    region = Region("a <tom> with a <tim>", WHOLE)
    assert torch.equal(gated([region]), merged(region.prompt, friends()[:2]))
    named = replace(region, prompt=TOM, concepts=("tim", "tom"))
    assert torch.equal(gated([named]), merged(TOM, friends()[:2]))


def test_words_of_a_layer_each_are_gated_too():
    """One concept with words for each cross-attention beside one without, each as if it were alone."""
    (tom, strength), tim = friends()[:2]
    rows = torch.randn(untrained_base().cross_attention_layers, 2, 128, generator=seeded(7))
    stack = [(replace(tom, tokens={"<tom>": rows}), strength), tim]
    for prompt, own in ((TOM, stack[:1]), (TIM, stack[1:])):
        found = gated([Region(prompt, WHOLE)], stack=stack)
        assert relative_error(found, merged(prompt, own)) < 2e-5
        assert relative_error(found, gated([Region(prompt, LEFT)], stack=stack)) > EFFECT
    assert relative_error(gated([Region(TOM, WHOLE)], stack=stack), gated([Region(TOM, WHOLE)])) > EFFECT


@pytest.mark.parametrize(
    "places",
    [
        [{"box": LEFT}, {"box": RIGHT}],
        [{"box": LEFT, "feather": 0.4}, {"box": RIGHT, "feather": 0.4}],
        [{"box": WHOLE}, {"box": (0.4, 0.0, 1.0, 0.6)}],
        [{"mask": torch.full((3, 3), 0.25)}, {"mask": torch.full((2, 2), 0.75)}],
    ],
    ids=["neighbours", "soft neighbours", "overlap", "both everywhere"],
)
def test_one_prompt_and_concept_in_masks_that_cover_everything_is_plain_sampling(places):
    plain = merged(TOM, friends()[:1])
    assert relative_error(gated([Region(TOM, **place) for place in places]), plain) < 2e-5
    assert relative_error(gated([Region(TOM, **place) for place in places], prompt=TOM), plain) < 2e-5
    assert relative_error(gated([Region(TOM, **places[0])]), plain) > EFFECT or places[0].get("box") == WHOLE


def test_a_concept_without_a_region_acts_outside_of_all_if_the_global_prompt_calls_it():
    plain = merged(TOM, friends()[:1])
    assert torch.equal(gated([], prompt=TOM), plain)
    nowhere = Region(TIM, mask=torch.zeros(2, 2))
    assert torch.equal(gated([nowhere], prompt=TOM), plain)
    assert torch.equal(gated([Region(TIM, WHOLE)], prompt=TOM), merged(TIM, friends()[1:2]))
    confined = gated([Region(TOM, LEFT)], prompt=TOM)
    assert relative_error(confined, plain) > EFFECT
    assert relative_error(confined, gated([Region(TOM, LEFT)])) > EFFECT  # the word is said, though it does not act
    uncalled = gated([Region("a man at night", LEFT)])
    assert torch.equal(uncalled, gated([Region("a man at night", LEFT)], stack=[]))


def test_regions_without_concepts_are_those_of_merged_mode():
    regions = [Region("a red car at night", LEFT), Region("a white cat", (0.3, 0.0, 1.0, 0.7), feather=0.2)]
    assert torch.equal(gated(regions, stack=[]), sample(untrained_base(), [EVERYWHERE], [0], None, QUICK, regions)[0])


def test_the_order_of_regions_and_of_concepts_does_not_matter():
    regions = [
        Region(TOM, (0.0, 0.0, 0.6, 1.0)),
        Region(TIM, (0.4, 0.0, 1.0, 0.7), strength=0.8),
        Region(TED, mask=torch.rand(13, 9, generator=seeded(4))),
    ]
    first = gated(regions)
    for shuffled in (regions[::-1], [*regions[1:], regions[0]]):
        assert relative_error(gated(shuffled), first) < 2e-5
    assert relative_error(gated(regions, stack=friends()[::-1]), first) < 2e-5
    for dropped in range(3):
        fewer = [replace(region, concepts=()) if number == dropped else region for number, region in enumerate(regions)]
        assert relative_error(gated(fewer), first) > EFFECT / 10


def test_pictures_of_one_call_are_those_of_calls_of_their_own_and_nothing_random_is_drawn():
    """Prompts that call different concepts are drawn apart; order and seeds stay with them."""
    before = torch.get_rng_state()
    prompts, regions = [TOM, EVERYWHERE, "a <tom> on the beach"], [Region(TIM, LEFT)]
    together = sample(untrained_base(), prompts, [3, 4, 5], None, QUICK, regions, mode="gated", stack=friends())
    assert torch.equal(torch.get_rng_state(), before)
    for number, prompt in enumerate(prompts):
        alone = gated(regions, prompt=prompt, seed=3 + number)
        assert relative_error(together[number], alone) < 2e-5


def test_the_base_is_as_it_was_also_after_an_exception():
    base, before = untrained_base(), traces(untrained_base())
    gated([Region(TOM, LEFT), Region(TIM, RIGHT)])
    assert traces(base) == before

    def fail(_done, _total):
        assert traces(base) != before
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        gated([Region(TOM, LEFT)], callback=fail)
    assert traces(base) == before


def test_a_region_has_its_concept_for_its_part_of_the_sampling():
    settings = SampleSettings(steps=4, cfg=4.0)
    always, early, late = (
        gated([Region(TOM, LEFT, start=start, end=end)], settings=settings)
        for start, end in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))
    )
    never = gated([Region(TOM, LEFT, strength=0.0)], settings=settings)
    for one, other in itertools.combinations((always, early, late, never), 2):
        assert relative_error(one, other) > EFFECT


def test_who_acts_where():
    regions = [
        Region(TIM, LEFT),
        Region(TOM, LEFT, concepts=("ted",)),
        Region("a <Tom> and <ted>", LEFT),
        Region("tom", LEFT),
    ]
    assert acting(friends(), "the <ted> and <tim>", regions[:1]) == [(2,), (1,)]
    assert acting(friends(), "the <ted>", regions) == [(), (1,), (2,), (0, 2), ()]
    assert acting(friends(), "", [Region(TOM, LEFT, concepts=())]) == [(), ()]
    with pytest.raises(
        AdapterError, match=r"asks for the concept 'bob', and there is none of that name; there is tom, tim, ted"
    ):
        acting(friends(), "", [Region("a", LEFT, concepts=("tom", "bob"))])
    with pytest.raises(AdapterError, match="there are no concepts"):
        gated([Region("a", LEFT, concepts=("tom",))], stack=[])


def test_modes_are_not_mixed():
    with pytest.raises(AdapterError, match="mode is 'fused'; choose one of gated, merged"):
        sample(untrained_base(), ["a"], [0], mode="fused")
    with pytest.raises(AdapterError, match="merge the concepts into it, or choose gated"):
        sample(untrained_base(), ["a"], [0], stack=friends())


def test_what_tokens_a_layer_has():
    for name in concept_layers(untrained_base(), Targets(("all_linear",))):
        assert tokens_of(name) == (TEXTS if name.endswith(("attn2.to_k", "attn2.to_v")) else POSITIONS)
    assert tokens_of("unet.joint_blocks.0.context_block.attn.qkv") == TEXTS
    assert tokens_of("unet.joint_blocks.0.x_block.mlp.fc1") == POSITIONS
    assert tokens_of("unet.down_blocks.0.resnets.0.conv1") == POSITIONS
    for name in (
        "mid_block.resnets.0.time_emb_proj",
        "time_embedding.linear_1",
        "joint_blocks.1.context_block.adaLN_modulation.1",
    ):
        assert tokens_of(f"unet.{name}") == NEITHER
    assert tokens_of("text_encoder.text_model.encoder.layers.0.mlp.fc1") == NEITHER
    for unknown in ("unet.double_blocks.0.img_attn.qkv", "unet.a.b", "unet.transformer_blocks.0.attn.add_k_proj"):
        with pytest.raises(AdapterError, match="none of the models that concepts are for"):
            tokens_of(unknown)


# -- at one layer


def linear_adapters(kind: str, count: int, out: int, inp: int) -> list[LowRank]:
    made = []
    for number in range(count):
        generator = seeded(number)
        rows = torch.arange(number, out, count)
        adapter = {
            "lora": lambda g=generator: new_lora(out, inp, 3, 6.0, g),
            "block": lambda g=generator, rows=rows: new_block(out, inp, 3, 6.0, rows, g),
            "full": lambda: new_full(out, inp),
        }[kind]()
        made.append(adapter.replace(lora_up=torch.randn(adapter.lora_up.shape, generator=generator)))
    return [adapter.to(dtype=torch.float64) for adapter in made]


def weights_of(kind: str, count: int, tokens: int) -> torch.Tensor:
    owner = torch.arange(tokens) * count // tokens
    hard = torch.stack([(owner == number).float() for number in range(count)])
    soft = torch.rand(count, tokens, generator=seeded(9))
    gap = torch.arange(tokens) % 5 != 0
    return {
        "hard": hard,
        "soft": soft * gap,
        "few": hard * (torch.arange(tokens) % 7 == 0),
        "full": torch.ones(count, tokens),
    }[kind]


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("weights", ["hard", "soft", "few", "full"])
@pytest.mark.parametrize("kind", ["lora", "block", "full"])
def test_a_concept_changes_its_own_tokens_and_no_others(kind, weights, count):
    """In float64 against the formula; outside to the last bit, whichever way the layer goes."""
    x, weight = torch.randn(2, 35, 12, generator=seeded(1)).double(), torch.randn(18, 12, generator=seeded(2)).double()
    adapters, strengths = linear_adapters(kind, count, 18, 12), [0.5 + number for number in range(count)]
    shares = weights_of(weights, count, 35)
    base = x @ weight.mT
    found = Gated(tuple(range(count)), tuple(adapters), tuple(strengths)).add(base.clone(), x, Held(shares, x))
    expected = base + sum(
        s * share[:, None] * (x @ a.delta().mT)
        for s, share, a in zip(strengths, shares.double(), adapters, strict=True)
    )
    assert relative_error(found, expected) < 1e-12 and relative_error(found, base) > EFFECT
    outside = shares.sum(0) == 0
    assert torch.equal(found[:, outside], base[:, outside])


@pytest.mark.parametrize("shape", [(3, 3), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_masks_the_positions_that_it_writes(shape, stride):
    conv = nn.Conv2d(6, 8, shape, stride, shape[0] // 2).double()
    x = torch.randn(2, 6, 9, 7, generator=seeded(3)).double()
    output = conv(x).detach()
    adapters = []
    for number in range(3):
        adapter = new_lora(8, 6, 2, None, seeded(number), shape)
        adapters.append(adapter.replace(lora_up=torch.randn(8, 2, generator=seeded(number))).to(dtype=torch.float64))
    shares = weights_of("hard", 3, output[0, 0].numel())
    shares[:, ::4] = 0
    geometry = ConvGeometry.of(conv)
    found = Gated((0, 1, 2), tuple(adapters), (1.0, 0.5, 2.0), geometry).add(output.clone(), x, Held(shares, x))
    maps = shares.double().unflatten(1, output.shape[2:])
    expected = output + sum(
        s * m * a.residual(x, geometry) for s, m, a in zip((1.0, 0.5, 2.0), maps, adapters, strict=True)
    )
    assert relative_error(found, expected) < 1e-12 and relative_error(found, output) > EFFECT
    outside = maps.sum(0) == 0
    assert torch.equal(found[..., outside], output[..., outside])


def test_a_gate_on_a_real_network_leaves_each_layer_alone_outside_of_its_region():
    """Every layer by itself: the same input with the gate and without, at every grid and for texts."""
    base = untrained_base()
    layers = base.layers(("all_linear",), ("all_linear",))
    places = Places([Region(TOM, LEFT)])
    gate = Gate(friends(), acting(friends(), "", places.regions), places, layers)
    for name in gate.gated:
        tokens = 12 if tokens_of(name) == TEXTS else 64
        x = torch.randn(2, tokens, layers[name].in_features, generator=seeded(1))
        with torch.no_grad():
            plain = layers[name](x)
            with gate.attached(layers, lambda: Moment((16, 16), lengths=(5,))):
                found = layers[name](x)
        inside = torch.arange(12) >= 7 if tokens == 12 else torch.arange(64) % 8 < 4
        assert torch.equal(found[:, ~inside], plain[:, ~inside])
        assert relative_error(found[:, inside], plain[:, inside]) > EFFECT
