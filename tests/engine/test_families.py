"""A family is one record: what differs between models stands in `families/`, and a new one needs no other file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laws import EFFECT, relative_error, seeded
from made_up_family import CHANNELS, MADE_UP, NETWORK, TOKENS, WIDTH, MadeUpBase, made_up_family
from torch import Tensor

from modular_concepts.adapters.attach import attached
from modular_concepts.adapters.low_rank import new_lora
from modular_concepts.adapters.sites import Site, layer_of, put_together, rows_of_sites, with_sites
from modular_concepts.concept import Concept, Recipe
from modular_concepts.crosstalk.measures import crosstalk_table
from modular_concepts.errors import AdapterError
from modular_concepts.families import families, find_family, titles
from modular_concepts.families.family import JOINT, NEITHER, POSITIONS, TEXTS
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.lora import import_lora
from modular_concepts.merging import merge_concepts
from modular_concepts.merging.compatibility import fit
from modular_concepts.models.layers import block_of, file_key, name_of_key, tokens_of
from modular_concepts.models.targets import Targets
from modular_concepts.regions.gating import Gate
from modular_concepts.regions.geometry import Region
from modular_concepts.regions.moment import Moment
from modular_concepts.regions.shares import Places
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, train_concept

ROOT = Path(__file__).parents[2]
QKV = "unet.stream_blocks.0.attn.qkv"
ALL = Targets(("all_linear",), ("feed_forward",))
FRAMES, HEIGHT, SIDE = 2, 4, 6


@pytest.fixture(autouse=True)
def family():
    with made_up_family() as made:
        yield made


def pictures() -> Tensor:
    return torch.rand(3, 3, HEIGHT, SIDE, generator=seeded(1))


def trained(name: str, method: str = "lora", slot: int | None = None, **more) -> Concept:
    subject = Subject(name, pictures(), [f"a <{name}> man"] * 3, "man")
    settings = TrainSettings(method=method, rank=2, slot=slot, steps=3, batch=2, adapter_lr=0.05, name=name, **more)
    concept, result = train_concept(MadeUpBase(), subject, settings, ALL)
    assert result.finished
    return concept


def filled(name: str, layers: dict[str, tuple[int, int]], seed: int, rank: int = 2) -> Concept:
    """A concept with a LoRA of each (out, in)."""
    adapters = {}
    for number, (layer, (out, inp)) in enumerate(layers.items()):
        up = torch.randn(out, rank, generator=seeded(100 * seed + number))
        adapters[layer] = new_lora(out, inp, rank, 1.0, seeded(seed + number)).replace(lora_up=up)
    return Concept(name, adapters, {}, Recipe(rank=rank, architecture=MADE_UP.name, triggers=(f"<{name}>",)))


def answers(base: MadeUpBase) -> Tensor:
    noisy = torch.randn(2, CHANNELS, FRAMES, HEIGHT, SIDE, generator=seeded(7))
    with torch.no_grad():
        return base.predict(noisy, torch.tensor([0.2, 0.7]), base.context(["a man", "the beach"], {}))


def with_deltas(base: MadeUpBase, concepts: list[Concept], strengths: list[float]) -> Tensor:
    """What the base answers with all deltas written into its weights."""
    places = with_sites(base.every_layer())
    with torch.no_grad():
        for concept, strength in zip(concepts, strengths, strict=True):
            for name, adapter in concept.layers.items():
                places[name].weight.add_(strength * adapter.delta())
    return answers(base)


# -- facts of the records


def test_what_differs_between_families_stands_in_their_folder():
    names = "|".join(family.name for family in families() if family.name != "made-up")
    words = re.compile(rf'"({names})"|joint_blocks|attn2|clip_[lg]|t5xxl')
    elsewhere = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for part in ("modular_concepts", "host", "nodes")
        for path in sorted((ROOT / part).rglob("*.py"))
        if not {"families", "toy"} & set(path.relative_to(ROOT).parts)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert elsewhere == []


def test_every_family_has_a_name_of_its_own_and_says_what_it_is():
    assert {"sd15", "sd2", "sdxl", "sd3", "toy", "made-up"} <= {family.name for family in families()}
    for texts in zip(*((family.name, family.title, family.modelspec) for family in families()), strict=True):
        assert len(set(texts)) == len(families()) and all(texts)
    assert titles().endswith("the toy base and Made-Up 1")
    assert find_family("flux") is None


@pytest.mark.parametrize(
    ("name", "tokens"),
    [(QKV, JOINT), (f"{QKV}.k", JOINT), ("unet.stream_blocks.1.modulation", NEITHER), ("unet.text_in", TEXTS),
     ("unet.picture_out", POSITIONS), ("text_encoder.text_model.mlp.fc1", NEITHER)],
)  # fmt: skip
def test_a_layer_says_which_tokens_it_sees(name, tokens):
    assert tokens_of(name) == tokens


def test_names_blocks_and_sites_come_from_the_record():
    assert block_of(QKV) == block_of(f"{QKV}.v") == "stream 0"
    for name in (QKV, f"{QKV}.k", "unet.stream_blocks.1.mlp.2", "unet.picture_in"):
        assert name_of_key(file_key(name, MADE_UP.name)) == name
    assert rows_of_sites(QKV, WIDTH) == {f"{QKV}.{part}": (i * WIDTH, WIDTH) for i, part in enumerate("qkv")}
    assert layer_of(f"{QKV}.k") == layer_of(QKV) == QKV
    assert not rows_of_sites("unet.stream_blocks.0.attn.proj", WIDTH)


def test_a_target_that_the_family_lacks_is_refused_in_its_words():
    with pytest.raises(AdapterError, match="cross_attention': one attention reads text and picture"):
        MadeUpBase().layers(("cross_attention",), None)


# -- training


@pytest.mark.parametrize("method", ["lora", "orthogonal", "block", "block_orthogonal", "custom_diffusion"])
def test_a_concept_is_trained_on_each_projection_apart(method):
    slot = None if method in ("lora", "custom_diffusion") else 1
    concept = trained("tom", method, slot, blocks=3)
    assert {f"{QKV}.{part}" for part in "qkv"} < set(concept.layers) and QKV not in concept.layers
    assert all(bool(adapter.lora_up.any()) for adapter in concept.layers.values())
    if "block" in method:  # each projection has rows of the concept's own, and not the first one alone
        assert [concept.layers[f"{QKV}.{part}"].rows.tolist() for part in "qkv"] == [[4, 5, 6, 7]] * 3
    assert concept.recipe.architecture == "made-up"


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"precision": "bf16"}])
def test_gradients_of_sites_are_those_of_plain_autograd(options):
    lean = trained("tom", **options)
    MadeUpBase.lean = False
    try:
        plain = trained("tom", **options)
    finally:
        MadeUpBase.lean = True
    for name, adapter in lean.layers.items():
        assert relative_error(adapter.delta(), plain.layers[name].delta()) < (
            1e-4 if "precision" not in options else 0.3
        )


# -- sums


def concepts() -> list[Concept]:
    sizes = {f"{QKV}.q": (WIDTH, WIDTH), f"{QKV}.v": (WIDTH, WIDTH), "unet.stream_blocks.1.mlp.0": (2 * WIDTH, WIDTH)}
    whole = {QKV: (3 * WIDTH, WIDTH), "unet.stream_blocks.1.attn.proj": (WIDTH, WIDTH)}
    return [filled("tom", sizes, 1), filled("tim", whole, 2)]


def test_a_sum_of_whole_layers_and_parts_is_that_of_the_deltas():
    base, stack, strengths = MadeUpBase(), concepts(), [0.8, -0.5]
    places = with_sites(base.every_layer())
    shapes = {name: place.weight.shape for name, place in places.items() if hasattr(place, "weight")}
    merged, _ = fit(MADE_UP.name, shapes, zip(stack, strengths, strict=True))
    assert f"{QKV}.k" in merged and QKV not in merged  # taken apart, for another has a part of it
    with attached(places, merged):
        summed = answers(base)
    assert relative_error(summed, answers(base)) > EFFECT
    assert relative_error(summed, with_deltas(MadeUpBase(), stack, strengths)) < 1e-5


def test_adapters_of_sites_act_on_their_own_rows_alone():
    base, (tom, _) = MadeUpBase(), concepts()
    places = with_sites(base.every_layer())
    x = torch.randn(2, 5, WIDTH, generator=seeded(3))
    plain = places[QKV](x)
    with attached(places, {f"{QKV}.v": tom.layers[f"{QKV}.v"]}):
        changed = places[QKV](x)
    assert torch.equal(changed[..., : 2 * WIDTH], plain[..., : 2 * WIDTH])
    want = plain[..., 2 * WIDTH :] + tom.layers[f"{QKV}.v"].residual(x)
    assert relative_error(changed[..., 2 * WIDTH :], want) < 1e-6 and relative_error(changed, plain) > EFFECT


@pytest.mark.parametrize("how", ["sum", "mean", "ties", "svd", "magnitude"])
def test_the_order_of_a_stack_of_both_kinds_is_no_matter(how):
    stack = concepts()
    one, other = (merge_concepts(order, [0.7, 0.7], how) for order in (stack, stack[::-1]))
    assert set(one) == set(other)
    for name, layer in one.items():
        assert relative_error(layer.delta(), other[name].delta()) < 1e-5


def test_crosstalk_compares_rows_that_both_write():
    table = crosstalk_table(concepts())
    assert set(table["layers"]) == {f"{QKV}.q", f"{QKV}.v"}
    apart = crosstalk_table(
        [filled("tom", {f"{QKV}.q": (WIDTH, WIDTH)}, 1), filled("tim", {f"{QKV}.k": (WIDTH, WIDTH)}, 2)]
    )
    assert apart["pairs"] == {}


# -- regions


def test_a_gate_over_everything_is_the_merge_and_outside_of_a_region_nothing_changes():
    base, stack = MadeUpBase(), [(concept, 0.9) for concept in concepts()]
    places = with_sites(base.every_layer())

    def gated(*regions: Region) -> tuple[Tensor, Tensor]:
        gate = Gate(stack, [(), *[(0, 1)] * len(regions)], Places(regions), places)
        with gate.attached(places, lambda: Moment((HEIGHT, SIDE), positions=HEIGHT * SIDE)):
            x = torch.randn(1, TOKENS + HEIGHT * SIDE, WIDTH, generator=seeded(5))
            return places[QKV](x), x

    whole, x = gated(Region("a <tom>", (0.0, 0.0, 1.0, 1.0)))
    merged = merge_concepts([concept for concept, _ in stack], [0.9, 0.9])
    with attached(places, {name: layer for name, layer in merged.items() if layer_of(name) == QKV}):
        everywhere = places[QKV](x)
    picture = slice(TOKENS, None)
    assert relative_error(whole[:, picture], everywhere[:, picture]) < 1e-6
    plain = places[QKV](x)
    assert torch.equal(whole[:, :TOKENS], plain[:, :TOKENS])  # the global text calls none of them
    left, _ = gated(Region("a <tom>", (0.0, 0.0, 0.5, 1.0)))
    columns = left[:, picture].unflatten(1, (HEIGHT, SIDE))
    assert torch.equal(columns[:, :, SIDE // 2 :], plain[:, picture].unflatten(1, (HEIGHT, SIDE))[:, :, SIDE // 2 :])
    inside = everywhere[:, picture].unflatten(1, (HEIGHT, SIDE))[:, :, : SIDE // 2]
    assert relative_error(columns[:, :, : SIDE // 2], inside) < 1e-6
    assert relative_error(left, plain) > EFFECT


def test_a_layer_of_no_tokens_is_not_gated():
    modulation = {"unet.stream_blocks.0.modulation": (WIDTH, WIDTH)}
    gate = Gate([(filled("tom", modulation, 1), 1.0)], [(0,)], Places([]), with_sites(MadeUpBase().every_layer()))
    assert gate.gated == {}


# -- files


def test_a_concept_is_saved_read_exported_and_read_again(tmp_path):
    concept = trained("tom")
    save_concept(concept, tmp_path / "tom.safetensors")
    again = load_concept(tmp_path / "tom.safetensors")
    assert set(again.layers) == set(concept.layers)
    assert all(torch.equal(again.layers[name].delta(), own.delta()) for name, own in concept.layers.items())
    export_kohya(concept, tmp_path / "k.safetensors")
    back = import_lora(tmp_path / "k.safetensors")
    assert back.unmatched == [] and back.concept.recipe.architecture == "made-up"
    whole = put_together(concept.layers)
    assert set(back.concept.layers) == set(whole) and QKV in whole
    for name, adapter in whole.items():
        assert relative_error(back.concept.layers[name].delta(), adapter.delta()) < 1e-6
    base = with_deltas(MadeUpBase(), [concept], [1.0])
    assert relative_error(with_deltas(MadeUpBase(), [back.concept], [1.0]), base) < 1e-5
    with pytest.raises(AdapterError, match="cannot hold layers of Made-Up 1"):
        export_diffusers(concept, tmp_path / "d.safetensors")


def test_what_was_taken_apart_comes_together_without_more_rank():
    (_, tim) = concepts()
    parts = merge_concepts([tim, concepts()[0]], [1.0, 0.0])
    assert f"{QKV}.q" in parts
    joined = put_together({name: layer.as_low_rank() for name, layer in parts.items() if layer_of(name) == QKV})
    assert relative_error(joined[QKV].delta(), tim.layers[QKV].delta()) < 1e-6


def test_a_layer_of_another_height_than_its_familys_is_one_piece():
    assert list(with_sites({QKV: torch.nn.Linear(WIDTH, 2 * WIDTH)})) == [QKV]
    assert isinstance(with_sites({QKV: torch.nn.Linear(WIDTH, 3 * WIDTH)})[f"{QKV}.q"], Site)


def test_the_record_of_another_family_under_the_same_name_is_refused():
    from modular_concepts.families import register

    with pytest.raises(AdapterError, match="registered twice"):
        register(replace(MADE_UP, title="another"))
    assert find_family("made-up").denoiser is NETWORK
