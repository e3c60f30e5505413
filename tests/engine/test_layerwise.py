"""Layer-wise words: every cross-attention reads its own text, in training, sampling and regions, and in files."""

import pytest
import torch
from laws import EFFECT, relative_error, seeded
from tiny_layers import ORDER, tiny_base
from untrained_toy import QUICK, filled_concept, picture, traces, untrained_base

from modular_concepts.concept import Concept, Recipe
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.regions.geometry import Region
from modular_concepts.sampling import SampleSettings, customised
from modular_concepts.text.layerwise import cross_attention_transformers, routed
from modular_concepts.text.words import layer_count, learned_rows

LAYERS = 4
PROMPTS = ["a man", "a <x> on the beach", "at night", "<x> and a dog"]
TIMESTEPS = torch.tensor([1, 250, 600, 990])


def layered(seed: int = 0) -> torch.Tensor:
    """Rows of their own for each of the toy base's layers, of a word's usual size."""
    rows = untrained_base().word_rows("man")
    return rows + rows.std() * torch.randn(LAYERS, 2, rows.shape[1], generator=seeded(seed))


def word_concept(name: str, rows: torch.Tensor) -> Concept:
    recipe = Recipe(method="words", base_hash=untrained_base().hash, architecture="toy", triggers=(f"<{name}>",))
    return Concept(name, {}, {f"<{name}>": rows}, recipe)


# --- contexts ---


def test_layers_are_counted_in_the_order_in_which_the_base_runs_them():
    base, ran = untrained_base(), []
    transformers = cross_attention_transformers(base.unet)
    assert list(transformers) == [
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    ]
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path)) for path, module in transformers.items()
    ]
    try:
        with torch.no_grad():
            base.predict(torch.zeros(1, 12, 16, 16), TIMESTEPS[:1], base.context(["a man"], {}))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(transformers) and base.cross_attention_layers == LAYERS
    assert tuple(cross_attention_transformers(tiny_base().unet)) == ORDER


@torch.no_grad()
def test_rows_that_are_alike_in_all_layers_are_an_ordinary_word():
    base, rows = untrained_base(), layered()[:1]
    noisy = torch.randn(4, 12, 16, 16, generator=seeded(1))
    plain = base.context(PROMPTS, {"<x>": rows[0]})
    each = base.context(PROMPTS, {"<x>": rows.expand(LAYERS, -1, -1)})
    assert each.shape == (4, LAYERS, *plain.shape[1:])
    assert relative_error(each, plain[:, None].expand_as(each)) < 1e-6
    assert relative_error(base.predict(noisy, TIMESTEPS, each), base.predict(noisy, TIMESTEPS, plain)) < 1e-6
    assert torch.equal(each[0, 0], each[0, 3])


@torch.no_grad()
def test_each_layers_context_is_that_of_its_own_rows():
    """Also beside a word without layers, and whatever stands in the other prompts."""
    base, rows, other = untrained_base(), layered(), untrained_base().word_rows("dog")
    tokens = {"<y>": other, "<x>": rows}
    prompts = [*PROMPTS, "a <y> and <x>", "a <y>"]
    whole = base.context(prompts, tokens)
    for layer in range(LAYERS):
        alone = base.context(prompts, {"<y>": other, "<x>": rows[layer]})
        assert relative_error(whole[:, layer], alone) < 1e-6
    assert relative_error(whole[1, 0], whole[1, 1]) > EFFECT
    assert torch.equal(whole[5, 0], whole[5, 1])
    assert torch.equal(learned_rows(tokens, 2), torch.cat([other, rows[2]]))


@torch.no_grad()
def test_each_layer_reads_its_slice_alone():
    base, before = untrained_base(), traces(untrained_base())
    context = torch.randn(2, LAYERS, 40, 128, generator=seeded(2))
    seen = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _module, _args, named, path=path: seen.update({path: named["encoder_hidden_states"]}),
            with_kwargs=True,
        )
        for path, module in base.unet.named_modules()
        if path.endswith("attn2")
    ]
    try:
        base.predict(torch.zeros(2, 12, 16, 16), TIMESTEPS[:2], context)
    finally:
        for handle in handles:
            handle.remove()
    order = list(cross_attention_transformers(base.unet))
    assert {order.index(path.split(".transformer_blocks.")[0]) for path in seen} == set(range(LAYERS))
    for path, text in seen.items():
        assert torch.equal(text, context[:, order.index(path.split(".transformer_blocks.")[0])])
    assert traces(base) == before


def test_the_base_is_as_before_after_an_exception():
    base, before = untrained_base(), traces(untrained_base())
    with pytest.raises(RuntimeError, match="stop"), routed(base.unet, torch.zeros(1, LAYERS, 2, 128)):
        assert traces(base) != before
        raise RuntimeError("stop")
    assert traces(base) == before


# --- pictures ---


def test_a_picture_listens_to_the_rows_of_every_layer():
    rows = layered()
    shown = picture("a <x> on the beach", tokens={"<x>": rows})
    assert torch.equal(picture("a <x> on the beach", tokens={"<x>": rows}), shown)
    flat = picture("a <x> on the beach", tokens={"<x>": rows[0]})
    assert relative_error(shown, flat) > EFFECT / 10
    alike = picture("a <x> on the beach", tokens={"<x>": rows[:1].expand(LAYERS, -1, -1)})
    assert relative_error(alike, flat) < 1e-5
    for layer in range(LAYERS):
        changed = rows.clone()
        changed[layer] = layered(7)[layer]
        assert relative_error(picture("a <x> on the beach", tokens={"<x>": changed}), shown) > 1e-5


def test_a_known_word_beside_a_layer_wise_one_draws_what_it_always_draws():
    plain = picture("a red car at night")
    assert relative_error(picture("a red car at night", tokens={"<x>": layered()}), plain) < 1e-5


def test_guidance_runs_both_halves_in_one_batch():
    sizes = []
    handle = untrained_base().unet.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    try:
        picture("a <x>", tokens={"<x>": layered()})
    finally:
        handle.remove()
    assert sizes == [2, 2]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_one_full_region_is_plain_sampling(cfg):
    tokens, settings = {"<x>": layered()}, SampleSettings(steps=2, cfg=cfg)
    regional = picture("a man", tokens=tokens, settings=settings, regions=[Region("a <x> at night", (0, 0, 1, 1))])
    plain = picture("a <x> at night", tokens=tokens, settings=settings)
    assert torch.equal(regional, plain)
    assert relative_error(regional, picture("a man", settings=settings)) > EFFECT


def test_regions_read_their_own_layers():
    tokens = {"<x>": layered(), "<y>": layered(3)}
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    same = picture("a <x>", tokens=tokens, regions=[Region("a <x>", left), Region("a <x>", right)])
    assert relative_error(same, picture("a <x>", tokens=tokens)) < 1e-5
    mixed = picture("a <x>", tokens=tokens, regions=[Region("a <x>", left), Region("a <y>", right)])
    assert relative_error(mixed, same) > EFFECT / 10


# --- concepts and files ---


def test_a_file_brings_the_same_picture_back(tmp_path):
    concept = word_concept("x", layered())
    save_concept(concept, tmp_path / "x.safetensors")
    loaded = load_concept(tmp_path / "x.safetensors")
    assert torch.equal(loaded.tokens["<x>"], concept.tokens["<x>"])
    drawn = []
    for own in (concept, loaded):
        with customised(untrained_base(), [own], [1.0]) as tokens:
            drawn.append(picture("a <x>", tokens=tokens))
    assert torch.equal(*drawn)


def test_words_with_and_without_layers_are_merged_and_drawn_together(tmp_path):
    concepts = [word_concept("x", layered()), filled_concept("tom", 1)]
    save_concept(merged_concept("both", concepts, [1.0, 0.5]), tmp_path / "both.safetensors")
    with customised(untrained_base(), concepts, [1.0, 0.5]) as tokens:
        apart = picture("a <x> and a <tom>", tokens=tokens)
    both = load_concept(tmp_path / "both.safetensors")
    with customised(untrained_base(), [both], [1.0]) as tokens:
        assert relative_error(picture("a <x> and a <tom>", tokens=tokens), apart) < 1e-5
    assert both.tokens["<x>"].shape == (LAYERS, 2, 128) and both.tokens["<tom>"].dim() == 2


def test_words_of_another_number_of_layers_are_refused():
    with pytest.raises(AdapterError, match="<x>: the word was learned for 16 .* this base has 4"):
        picture("a <x>", tokens={"<x>": torch.zeros(16, 1, 128)}, settings=QUICK)
    with pytest.raises(AdapterError, match="<x> for 16 and <y> for 4"):
        layer_count({"<x>": torch.zeros(16, 1, 128), "<y>": torch.zeros(4, 1, 128)})
    with (
        pytest.raises(AdapterError, match="encoded for 3 cross-attention layers, this base has 4"),
        routed(untrained_base().unet, torch.zeros(1, 3, 2, 128)),
    ):
        pass
