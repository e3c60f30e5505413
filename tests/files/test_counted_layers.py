"""Layers by kohya's names, whose blocks are counted through, are those that the dotted names say."""

import pytest
import torch
from safetensors.torch import save_file

from modular_concepts.files.lora import by_rule, read_concept

RESNET = ("in_layers.2", "out_layers.3", "emb_layers.1", "skip_connection")
ATTENTION = ("proj_in", "transformer_blocks.0.attn2.to_k", "transformer_blocks.9.ff.net.0.proj", "proj_out")
PATHS = [
    *("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.2"),
    *(f"{side}_blocks.{n}.0.{part}" for side in ("input", "output") for n in range(1, 9) for part in RESNET),
    *(f"{side}_blocks.{n}.1.{part}" for side in ("input", "output") for n in range(1, 9) for part in ATTENTION),
    *(f"middle_block.{n}.{part}" for n in (0, 2) for part in RESNET),
    *(f"middle_block.1.{part}" for part in ATTENTION),
    *(f"input_blocks.{n}.0.op" for n in (3, 6)),
    *(f"output_blocks.{n}.{m}.conv" for n, m in ((2, 1), (2, 2), (5, 2))),
]


@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris"])
def test_every_counted_layer_is_the_dotted_one(prefix):
    named = {path: by_rule(f"{prefix}_{path.replace('.', '_')}") for path in PATHS}
    assert named == {path: by_rule(f"diffusion_model.{path}") for path in PATHS}
    assert None not in named.values() and len(set(named.values())) == len(PATHS) - 1  # an upsampler has two numbers


@pytest.mark.parametrize(
    "stem", ["input_blocks_4_0_in_layers_0", "time_embed_1", "label_emb_1_0", "out_0", "out_2_x", "input_blocks_0_0_op"]
)
def test_a_counted_layer_that_no_model_has_is_none(stem):
    assert by_rule(f"lora_unet_{stem}") is None


def test_convolutions_and_embeddings_of_sdxl_find_their_place_without_a_model(tmp_path):
    shapes = {
        "input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
            (6, 8),
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        ),
        "input_blocks_4_0_in_layers_2": ((6, 4, 3, 3), "down_blocks.1.resnets.0.conv1"),
        "input_blocks_4_0_emb_layers_1": ((6, 5), "down_blocks.1.resnets.0.time_emb_proj"),
        "input_blocks_4_0_skip_connection": ((6, 4, 1, 1), "down_blocks.1.resnets.0.conv_shortcut"),
        "input_blocks_3_0_op": ((4, 4, 3, 3), "down_blocks.0.downsamplers.0.conv"),
        "output_blocks_2_2_conv": ((4, 4, 3, 3), "up_blocks.0.upsamplers.0.conv"),
        "label_emb_0_0": ((9, 7), "add_embedding.linear_1"),
        "time_embed_0": ((9, 4), "time_embedding.linear_1"),
        "out_2": ((4, 4, 3, 3), "conv_out"),
    }
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for stem, ((out, inp, *kernel), _) in shapes.items():
        up = torch.randn(out, 1, *([1, 1] if kernel else []), generator=generator)
        down = torch.randn(1, inp, *kernel, generator=generator)
        tensors |= {f"lora_unet_{stem}.lora_up.weight": up, f"lora_unet_{stem}.lora_down.weight": down}
    save_file(tensors, tmp_path / "x.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    concept, unmatched = read_concept(tmp_path / "x.safetensors")
    assert not unmatched and concept.recipe.architecture == "sdxl"
    for stem, (shape, name) in shapes.items():
        wanted = tensors[f"lora_unet_{stem}.lora_up.weight"].flatten(1) @ tensors[
            f"lora_unet_{stem}.lora_down.weight"
        ].flatten(1)
        assert torch.equal(concept.layers[f"unet.{name}"].delta(), wanted.reshape(shape))
