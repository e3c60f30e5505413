"""Strengths by block: names mean the same on every model, missing blocks shift nothing, later entries win."""

import pytest
from laws import filled_adapter, relative_error

from modular_concepts.errors import AdapterError
from modular_concepts.merging import BlockStrengths

NAMES = {
    "down 0": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down 2": "unet.down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "up 1": "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "text 11": "text_encoder.text_model.encoder.layers.11.self_attn.q_proj",
    "other": "unet.conv_in",
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", [1, 1, 1, 1, 1, 1]),
        ("mid=0.5, up 1=0; text=0.8", [1, 1, 0.5, 0, 0.8, 1]),
        ("DOWN = 0.2\ndown 2 = -1", [0.2, -1, 1, 1, 1, 1]),
        ("down 2=3, down=0.2", [0.2, 0.2, 1, 1, 1, 1]),
        ("down 7=5, other=0, text 1=9", [1, 1, 1, 1, 1, 0]),
    ],
)
def test_text_becomes_factors(text, wanted):
    strengths = BlockStrengths.parse(text)
    assert [strengths.of(name) for name in NAMES.values()] == wanted


@pytest.mark.parametrize("text", ["mid", "mid=", "mid=lots", "mid=nan", "mid 2=1", "down x=1", "attn=1", "0.5,0.5"])
def test_what_is_no_entry_is_refused_with_an_example(text):
    with pytest.raises(AdapterError, match="mid=0.5, up 1=0"):
        BlockStrengths.parse(text)


def test_adapters_take_their_blocks_factor_once():
    layers = {name: filled_adapter("orthogonal", 8, 16, 2) for name in NAMES.values()}
    scaled = BlockStrengths.parse("mid=0.5, up=0").on(layers)
    assert NAMES["up 1"] not in scaled and len(scaled) == len(layers) - 1
    assert relative_error(scaled[NAMES["mid"]].delta(), 0.5 * layers[NAMES["mid"]].delta()) < 1e-6
    assert relative_error(scaled[NAMES["other"]].delta(), layers[NAMES["other"]].delta()) == 0


def test_blocks_that_no_layer_lies_in_are_named():
    strengths = BlockStrengths.parse("down 7=5, mid=0, text=0.5, up 1=1, down 7=2")
    assert strengths.unmet([NAMES["mid"], NAMES["up 1"]]) == ["down 7", "text"]
    assert strengths.unmet(NAMES.values()) == ["down 7"] and BlockStrengths.parse("").unmet([]) == []


def test_blocks_of_every_family_can_be_named():
    strengths = BlockStrengths.parse("joint=0.5, joint 2=0, second text 3=0.25, second text=2")
    assert strengths.of("unet.joint_blocks.1.x_block.attn.qkv") == 0.5
    assert strengths.of("unet.joint_blocks.2.x_block.attn.qkv.k") == 0
    assert strengths.of("text_encoder_2.text_model.encoder.layers.3.mlp.fc1") == 2
    assert strengths.of("text_encoder.text_model.encoder.layers.3.mlp.fc1") == 1
    for wrong in ("middle=1", "mid 3=1", "other 1=1", "joint x=1", "second=1"):
        with pytest.raises(AdapterError, match="blocks are down N, mid, up N, joint N, text N, second text N, other"):
            BlockStrengths.parse(wrong)
