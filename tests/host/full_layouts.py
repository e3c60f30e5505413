"""In the host: networks of full size without their weights, and whether the stock loader knows every name of ours."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.modules.diffusionmodules.mmdit as transformers
import comfy.ldm.modules.diffusionmodules.openaimodel as unets
import comfy.lora
import comfy.model_detection
import comfy.ops
import comfy.sdxl_clip
import torch
from modular_concepts_pack.host import layers
from modular_concepts_pack.modular_concepts.models import layers as names
from tiny_models import SD3_UNET, SDXL_UNET

WITHOUT_WEIGHTS = dict(dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init)


def sdxl() -> torch.nn.Module:
    return unets.UNetModel(
        **SDXL_UNET | {"channel_mult": [1, 2, 4]},
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        **WITHOUT_WEIGHTS,
    )


def sd3(depth: int, **more) -> torch.nn.Module:
    text = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    config = SD3_UNET | {"depth": depth, "context_embedder_config": text, **more}
    return transformers.OpenAISignatureMMDITWrapper(**config, **WITHOUT_WEIGHTS)


def shapes(network: torch.nn.Module, keys: dict[str, str]) -> dict[str, list[int]]:
    weights = network.state_dict()
    return {name: list(weights[key].shape) for name, key in keys.items()}


def layouts() -> dict[str, dict]:
    """Title of a full-size network -> what its layers are called and how many there are."""
    facts = {}
    clip = SimpleNamespace(cond_stage_model=comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16))
    text = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    made = {
        "sdxl": sdxl(),
        "sd3 medium": sd3(24),
        "sd3.5 medium": sd3(24, qk_norm="rms", x_block_self_attn_layers=list(range(13))),
        "sd3.5 large": sd3(38, qk_norm="rms"),
    }
    for title, network in made.items():
        config = comfy.model_detection.model_config_from_unet(network.state_dict(), "")
        config.set_inference_dtype(torch.float16, None)
        model = SimpleNamespace(model=config.get_model(network.state_dict(), "", device="meta"))
        known = {**comfy.lora.model_lora_keys_unet(model.model, {}), **text}
        architecture, found = layers.architecture_of(model), layers.host_layers(model, clip)
        modules = {name: layer.module for name, layer in found.items()}
        spelled = {
            key: names.name_of_key(key)
            for key in known
            if key.startswith("lora_unet_") and "_transformer_blocks_" in key and "norm" not in key
        }
        facts[title] = {
            "class": type(config).__name__,
            "architecture": architecture,
            "unknown": [
                name for name, layer in found.items() if known.get(names.file_key(name, architecture)) != layer.key
            ],
            "targets": {
                target: len(names.chosen_layers(modules, target, None))
                for target in ("attention", "feed_forward", "all_linear")
            },
            "other spellings": [
                key for key, name in spelled.items() if name not in found or found[name].key != known[key]
            ],
            "spellings": len(spelled),
            "hashed": [shapes(model.model, layers.host_family_of(model).weight_names(model))]
            + [
                shapes(clip.cond_stage_model, layers._text_names(name, encoder))
                for name, encoder in layers.text_encoders_of(clip).items()
            ],
            "text": len(names.chosen_layers(modules, (), "all_linear")),
        }
    return facts
