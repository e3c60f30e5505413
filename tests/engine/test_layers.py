"""One canonical name per layer, whatever the installed libraries call their levels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modular_concepts.errors import AdapterError
from modular_concepts.models.layers import block_of, chosen_layers, file_key, find_layers, name_of_key

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

STEM = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def tiny_unet(**changes) -> nn.Module:
    settings = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=2,
        norm_num_groups=8,
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**settings | changes)


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def text_encoder():
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=32, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip


def test_attention_is_the_four_projections_of_both_attentions(unet):
    layers = find_layers(unet, None, "attention")
    blocks = 1 + 1 + 2  # down, mid, up with one transformer block each
    assert len(layers) == 8 * blocks
    assert layers[f"{STEM}.attn2.to_k"].weight.shape == (16, 24)
    assert f"{STEM}.attn1.to_out.0" in layers
    assert all(name.rsplit(".to_", 1)[1] in ("q", "k", "v", "out.0") for name in layers)


def test_targets_add_up(unet, text_encoder):
    attention, feed = (find_layers(unet, text_encoder, t, t) for t in ("attention", "feed_forward"))
    both = find_layers(unet, text_encoder, ["attention", "feed_forward"], ["attention", "feed_forward"])
    every = find_layers(unet, text_encoder, "all_linear", "all_linear")
    assert not set(attention) & set(feed) and set(both) == set(attention) | set(feed) == set(every)
    assert {name.split(".transformer_blocks.0.")[-1] for name in feed if name.startswith("unet")} == {
        "ff.net.0.proj",
        "ff.net.2",
    }


def test_linear_projections_around_the_blocks_belong_to_all_linear():
    names = set(find_layers(tiny_unet(use_linear_projection=True), None, "all_linear"))
    assert {"unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_out"} <= names
    assert not any("time_emb" in name or "resnets" in name for name in names)


def test_text_layers_have_one_name_with_and_without_the_text_model_level(text_encoder):
    wrapped, bare = nn.Module(), nn.Module()
    inner = text_encoder.text_model if hasattr(text_encoder, "text_model") else text_encoder
    wrapped.text_model = inner
    bare.encoder = inner.encoder
    found = [find_layers(None, model, text_encoder_targets="attention") for model in (wrapped, bare, text_encoder)]
    assert list(found[0]) == list(found[1]) == list(found[2]) and len(found[0]) == 8
    assert "text_encoder.text_model.encoder.layers.1.self_attn.out_proj" in found[0]
    assert all(one is other for one, other in zip(found[0].values(), found[1].values(), strict=True))


def test_found_modules_are_the_models_own(unet):
    name, module = next(iter(find_layers(unet, None).items()))
    assert module is unet.get_submodule(name.removeprefix("unet."))


def test_keys_and_names_are_inverse(unet, text_encoder):
    names = list(find_layers(unet, text_encoder, "all_linear", "all_linear"))
    keys = [file_key(name) for name in names]
    assert len(set(keys)) == len(keys) == len(names)
    assert [name_of_key(key) for key in keys] == names
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1" in keys
    assert file_key(f"{STEM}.attn1.to_out.0") == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    )
    assert name_of_key("lora_te1_text_model_encoder_layers_0_mlp_fc1") == (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    )


@pytest.mark.parametrize(
    ("counted", "level"),
    [
        ("input_blocks_4_1", "down_blocks.1.attentions.0"),
        ("input_blocks_8_1", "down_blocks.2.attentions.1"),
        ("middle_block_1", "mid_block.attentions.0"),
        ("output_blocks_2_1", "up_blocks.0.attentions.2"),
        ("output_blocks_3_1", "up_blocks.1.attentions.0"),
    ],
)
def test_sdxls_blocks_counted_through_are_known(counted, level):
    layer = "transformer_blocks_1_attn2_to_k"
    assert name_of_key(f"lora_unet_{counted}_{layer}") == f"unet.{level}.transformer_blocks.1.attn2.to_k"
    assert name_of_key("lora_unet_input_blocks_4_0_in_layers_2") == "unet.down_blocks.1.resnets.0.conv1"


@pytest.mark.parametrize(
    "key",
    [
        *("", "lora_unet_", "lora_unet__a", "lora_unet_a_", "lora_unet_a/b", "other_a", "lora_te1_a"),
        "lora_unet_" + "down_blocks_" * 60 + "!",
        "lora_unet_double_blocks_0_img_attn_qkv",  # of a family that is not here
        "lora_unet_input_blocks_4_1",
    ],
)
def test_strange_keys_have_no_name(key):
    assert name_of_key(key) is None


@pytest.mark.parametrize("name", ["", "unet", "vae.a", "unet..a", "unet.a/b", "unet." + "a" * 300, 7])
def test_strange_names_have_no_key(name):
    with pytest.raises(AdapterError, match="dotted path"):
        file_key(name)


def test_blocks_have_a_persons_words(unet, text_encoder):
    names = find_layers(unet, text_encoder, "attention", "attention")
    assert list(dict.fromkeys(map(block_of, names))) == ["down 0", "mid", "up 1", "text 0", "text 1"]
    assert block_of("unet.time_embedding.linear_1") == "other"


def test_unknown_targets_and_empty_models_are_refused(unet):
    with pytest.raises(AdapterError, match="target 'atention' is unknown"):
        find_layers(unet, None, "atention")
    with pytest.raises(AdapterError, match="no layer matches"):
        find_layers(nn.Sequential(nn.Linear(2, 2)), None)
    with pytest.raises(AdapterError, match="no layer matches"):
        find_layers(None, None)
    assert torch.is_tensor(next(iter(find_layers(unet, None).values())).weight)


def joint_blocks(count: int = 2) -> dict[str, nn.Module]:
    """The Linear layers of a diffusion transformer's joint blocks by name, and some around them."""
    named = {"unet.x_embedder.proj": nn.Conv2d(4, 8, 2), "unet.final_layer.linear": nn.Linear(8, 8)}
    for block in range(count):
        for side in ("x_block", "context_block"):
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
                named[f"unet.joint_blocks.{block}.{side}.{layer}"] = nn.Linear(8, 8)
    return named


def test_a_diffusion_transformer_has_the_same_targets_under_its_own_names():
    named = joint_blocks(11)
    attention, feed, every = (chosen_layers(named, t) for t in ("attention", "feed_forward", "all_linear"))
    assert {name.split("_block.")[1] for name in attention} == {"attn.qkv", "attn.proj"}
    assert {name.split("_block.")[1] for name in feed} == {"mlp.fc1", "mlp.fc2"}
    assert len(attention) == len(feed) == 4 * 11 and len(every) == 10 * 11
    assert [block_of(name) for name in list(attention)[::4]] == [f"joint {block}" for block in range(11)]
    for target in ("cross_attention", "cross_attention_kv"):
        with pytest.raises(AdapterError, match="no cross-attention of its own; choose attention"):
            chosen_layers(named, ["attention", target])


def test_two_text_encoders_have_keys_of_their_own():
    path = "text_model.encoder.layers.1.mlp.fc1"
    named = {f"{part}.{path}": nn.Linear(4, 4) for part in ("text_encoder_2", "text_encoder")} | joint_blocks(1)
    assert list(chosen_layers(named, (), ["feed_forward"])) == [f"text_encoder.{path}", f"text_encoder_2.{path}"]
    key = path.replace(".", "_")
    assert file_key(f"text_encoder.{path}") == f"lora_te_{key}"
    assert file_key(f"text_encoder.{path}", "sdxl") == f"lora_te1_{key}"
    assert file_key(f"text_encoder_2.{path}", "sdxl") == f"lora_te2_{key}"
    assert block_of(f"text_encoder_2.{path}") == "second text 1"
    for name in chosen_layers(named, "all_linear", "all_linear"):
        assert name_of_key(file_key(name, "sd3")) == name
