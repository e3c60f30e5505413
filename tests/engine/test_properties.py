"""Laws for inputs that nobody chose: hypothesis searches where other tests draw a few shapes, the same each time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import relative_error
from torch import Tensor

from modular_concepts.adapters.low_rank import LowRank
from modular_concepts.adapters.sites import put_together, taken_apart
from modular_concepts.errors import AdapterError
from modular_concepts.families import families
from modular_concepts.merging import merge_concepts
from modular_concepts.merging.block_strengths import BlockStrengths
from modular_concepts.models.layers import block_of, file_key, name_of_key, tokens_of
from modular_concepts.regions.geometry import OVERLAPS, Region, region_weights
from modular_concepts.regions.parsing import regions_from_json
from modular_concepts.storage.names import safe_child, safe_name
from modular_concepts.storage.strict_json import parse_json

SEARCH = settings(max_examples=60, derandomize=True, deadline=None)
small = st.integers(0, 3)
unet_paths = st.builds(
    "{}.attentions.{}.transformer_blocks.{}.{}".format,
    st.one_of(st.builds("down_blocks.{}".format, small), st.just("mid_block"), st.builds("up_blocks.{}".format, small)),
    small,
    st.integers(0, 11),
    st.sampled_from(["attn1.to_q", "attn2.to_k", "attn2.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]),
)
resnet_paths = st.builds(
    "down_blocks.{}.resnets.{}.{}".format, small, small, st.sampled_from(["conv1", "time_emb_proj", "conv_shortcut"])
)
joint_paths = st.builds(
    "joint_blocks.{}.{}_block.{}".format,
    st.integers(0, 37),
    st.sampled_from(["x", "context"]),
    st.sampled_from(["attn.qkv", "attn.qkv.q", "attn2.proj", "mlp.fc1", "adaLN_modulation.1"]),
)
text_paths = st.builds(
    "text_model.encoder.layers.{}.{}".format, st.integers(0, 31), st.sampled_from(["self_attn.q_proj", "mlp.fc2"])
)
names = st.one_of(
    st.builds("unet.{}".format, st.one_of(unet_paths, resnet_paths, joint_paths)),
    st.builds("{}.{}".format, st.sampled_from(["text_encoder", "text_encoder_2"]), text_paths),
)


@SEARCH
@given(names, st.sampled_from([family.name for family in families()]))
def test_every_name_comes_back_from_its_key(name, architecture):
    assert name_of_key(file_key(name, architecture)) == name
    assert tokens_of(name) and block_of(name)


@st.composite
def stacks(draw) -> tuple[list[SimpleNamespace], list[float]]:
    """Concepts of one layer of any shape and ranks, some with rows of their own, and finite strengths."""
    out, inp, count = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    concepts = []
    for number in range(count):
        rank = draw(st.integers(1, 3))
        rows = draw(st.one_of(st.none(), st.sets(st.integers(0, out - 1), min_size=1)))
        rows = None if rows is None else torch.tensor(sorted(rows))
        up = torch.randn(out if rows is None else len(rows), rank, generator=generator)
        down = torch.randn(rank, inp, generator=generator)
        kind = "lora" if rows is None else "block"
        adapter = LowRank(up, down, draw(st.floats(0.25, 4)), kind, rows, out)
        concepts.append(SimpleNamespace(name=f"c{number}", layers={"layer": adapter}))
    return concepts, [draw(st.floats(-2, 2, allow_subnormal=False)) for _ in concepts]


def written_out(concepts: list[SimpleNamespace], strengths: list[float]) -> Tensor:
    deltas = []
    for concept, strength in zip(concepts, strengths, strict=True):
        adapter = concept.layers["layer"]
        up = torch.zeros(adapter.out_features, adapter.rank, dtype=torch.float64)
        up[slice(None) if adapter.rows is None else adapter.rows] = adapter.lora_up.double()
        deltas.append(strength * adapter.alpha / adapter.rank * up @ adapter.lora_down.double())
    return sum(deltas)


@SEARCH
@given(stacks())
def test_a_sum_is_the_formula_in_any_order(stack):
    concepts, strengths = stack
    want = written_out(concepts, strengths)
    for turn in (1, -1):
        merged = merge_concepts(concepts[::turn], strengths[::turn])["layer"].delta().double()
        assert (merged - want).norm() <= 1e-5 * max(1.0, float(want.norm()))


@SEARCH
@given(stacks(), st.floats(-2, 2, allow_subnormal=False))
def test_a_sum_is_linear_in_its_strengths(stack, factor):
    concepts, strengths = stack
    once = merge_concepts(concepts, strengths)["layer"].delta().double()
    scaled = merge_concepts(concepts, [factor * strength for strength in strengths])["layer"].delta().double()
    assert (scaled - factor * once).norm() <= 1e-5 * max(1.0, float(once.norm()))


@SEARCH
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**31))
def test_a_fused_layer_taken_apart_comes_together_again(width, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    name = "unet.joint_blocks.0.x_block.attn.qkv"
    up = torch.randn(3 * width, rank, generator=generator)
    adapter = LowRank(up, torch.randn(rank, width, generator=generator), 2.0, "lora", None, 3 * width)
    parts = taken_apart(name, adapter)
    assert set(parts) == {f"{name}.{part}" for part in "qkv"}
    again = put_together(parts)[name]
    assert again.rank == rank and relative_error(again.delta(), adapter.delta()) < 1e-6


sides = st.floats(0, 1).map(lambda value: round(value, 3))
boxes = st.tuples(sides, sides, sides, sides).filter(lambda box: box[0] < box[2] and box[1] < box[3])


@SEARCH
@given(st.lists(boxes, min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12), st.sampled_from(OVERLAPS))
def test_shares_of_regions_are_shares(places, height, width, overlap):
    regions = [Region(f"r{number}", box, priority=number) for number, box in enumerate(places)]
    weights = region_weights(regions, height, width, overlap)
    assert weights.shape == (len(places), height, width) and weights.isfinite().all()
    assert weights.min() >= 0 and weights.max() <= 1 and (weights.flatten(1).sum(1) > 0).sum() >= 1
    if overlap == "priority":
        assert weights.sum(0).max() <= 1 + 1e-6


@SEARCH
@given(st.integers(1, 11), st.integers(2, 16))
def test_neighbours_leave_no_gap(thousandths, cells):
    edge = thousandths / 12
    both = region_weights([Region("a", (0.0, 0.0, edge, 1.0)), Region("b", (edge, 0.0, 1.0, 1.0))], 1, cells)
    assert (both.sum(0) >= 1).all()


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=12,
)
entries = st.dictionaries(
    st.sampled_from(["prompt", "box", "mask", "strength", "feather", "concepts", "start", "end", "units", "x"]), values
)


@SEARCH
@given(st.one_of(st.text(max_size=40), st.lists(entries, max_size=3).map(json.dumps), values.map(json.dumps)))
def test_readers_of_json_give_what_it_says_or_one_sentence(text):
    for read in (lambda: parse_json(text, "the file"), lambda: regions_from_json(text)):
        try:
            read()
        except AdapterError as error:
            assert str(error) and "\n" not in str(error)


@SEARCH
@given(st.text(max_size=60))
def test_names_are_safe_or_refused(text):
    try:
        name = safe_name(text)
    except AdapterError:
        return
    assert name == safe_name(name) and not set(name) & set('<>:"/\\|?*\0') and not name.startswith(".")


@SEARCH
@given(st.text(max_size=40), st.sampled_from(["", "../", "a/../../", "/", "\\..\\"]))
def test_children_stay_in_their_folder(text, prefix):
    folder = Path("/folder/of/concepts")
    try:
        child = safe_child(folder, prefix + text)
    except AdapterError:
        return
    assert child != folder and child.is_relative_to(folder)


@SEARCH
@given(
    st.lists(st.tuples(st.sampled_from(["down", "mid", "up 1", "text 3", "joint 2"]), st.integers(0, 20)), min_size=1)
)
def test_block_strengths_are_read_as_they_are_written(pairs):
    parsed = BlockStrengths.parse(", ".join(f"{name}={value / 10}" for name, value in pairs))
    assert parsed.entries == tuple((name, value / 10) for name, value in pairs)
    with pytest.raises(AdapterError):
        BlockStrengths.parse("down=")
