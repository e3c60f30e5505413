"""In the host: gradients by plain autograd in float64, through copies of the networks that nobody has frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.ops
import comfy.sd1_clip
import tiny_models
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

CONFIGS = {"clip_l": "sd1_clip_config.json", "clip_g": "clip_config_bigg.json"}
END = 49407
WIDTHS = [768, 1280]


def gradients(
    loaded, adapters: Mapping, rows: Tensor, clip, prompts: Sequence[str], noisy: Tensor, times: Tensor, wanted: Tensor
) -> dict[str, Tensor]:
    """Layer name -> gradient of the mean squared error for lora_up; "word" -> for the rows that stand in prompts.

    adapters: name -> (adapter, the weight's key in the patcher).  clip: its tokenizer knows the word's rows already.
    """
    model = loaded[0].model
    with torch.inference_mode(False), torch.enable_grad():
        networks = {"diffusion_model": _unfrozen_model(model)} | {
            name: _unfrozen_text(name, getattr(loaded[1].cond_stage_model, name).transformer) for name in CONFIGS
        }
        ups = {}
        for name, (adapter, key) in adapters.items():
            ups[name] = adapter.lora_up.detach().double().requires_grad_()
            part, path = key.removesuffix(".weight").replace(".transformer.", ".", 1).split(".", 1)
            networks[part].get_submodule(path).register_forward_hook(_adding(ups[name], adapter))
        word = rows.detach().double().requires_grad_()
        context = _context(model, networks, word, rows, clip, prompts)
        predicted = networks["diffusion_model"](
            noisy.double(),
            times.double(),
            transformer_options={
                "optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
            },
            **_told(model, context, noisy),
        )
        (predicted - wanted.double()).square().mean().backward()
    return {name: up.grad for name, up in ups.items()} | {"word": word.grad}


def _adding(up: Tensor, adapter):
    def add(_module, args, output):
        return output + (args[0] @ adapter.lora_down.double().mT @ up.mT) * (adapter.alpha / adapter.rank)

    return add


def _unfrozen_model(model) -> torch.nn.Module:
    config = {**model.model_config.unet_config, "dtype": torch.float64}
    network = type(model.diffusion_model)(**config, device="cpu", operations=comfy.ops.disable_weight_init)
    return _filled(network, model.diffusion_model)


def _unfrozen_text(name: str, transformer) -> torch.nn.Module:
    config = json.loads((Path(comfy.sd1_clip.__file__).parent / CONFIGS[name]).read_text())
    config |= tiny_models.TEXT[f"{name}_model_config"]
    network = comfy.clip_model.CLIPTextModel(config, torch.float64, "cpu", comfy.ops.disable_weight_init)
    for layer in network.text_model.encoder.layers:
        layer.forward = partial(_text_layer, layer)
    return _filled(network, transformer)


def _text_layer(layer: torch.nn.Module, x: Tensor, mask, optimized_attention) -> Tensor:
    """As the host's own, which adds in place, where plain autograd would have needed what was there."""
    x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
    return x + layer.mlp(layer.layer_norm2(x))


def _filled(network: torch.nn.Module, source: torch.nn.Module) -> torch.nn.Module:
    network.load_state_dict({key: value.detach().double() for key, value in source.state_dict().items()})
    return network.eval().requires_grad_(False)


def _context(model, networks: Mapping, word: Tensor, rows: Tensor, clip, prompts: Sequence[str]):
    """(text, pooled) as the two families' papers have them: penultimate layers side by side, and the end's summary."""
    hidden, pooled = [], []
    for number, (name, columns) in enumerate(zip(CONFIGS, word.split(WIDTHS, dim=1), strict=True)):
        learned = rows.split(WIDTHS, dim=1)[number]
        table = networks[name].get_input_embeddings().weight
        embeds, ends = [], []
        for prompt in prompts:
            (section,) = clip.tokenize(prompt)[name.removeprefix("clip_")]
            tokens = [token for token, *_ in section]
            ends.append(next(i for i, token in enumerate(tokens) if not torch.is_tensor(token) and token == END))
            embeds.append(
                torch.stack(
                    [
                        columns[next(i for i, row in enumerate(learned) if torch.equal(row, token))]
                        if torch.is_tensor(token)
                        else table[token]
                        for token in tokens
                    ]
                )
            )
        _, middle, projected, plain = networks[name](
            None,
            None,
            embeds=torch.stack(embeds),
            num_tokens=[end + 1 for end in ends],
            intermediate_output=-2,
            final_layer_norm_intermediate=False,
            dtype=torch.float64,
        )
        hidden.append(middle)
        pooled.append(projected if name == "clip_g" else plain)
    text = torch.cat(hidden, dim=-1)
    if type(model).__name__ == "SD3":
        return F.pad(text, (0, 4096 - text.shape[-1])), torch.cat(pooled, dim=-1)
    return text, pooled[1]


def _told(model, context, noisy: Tensor) -> dict[str, Tensor]:
    text, pooled = context
    if type(model).__name__ == "SD3":
        return {"context": text, "y": pooled}
    height, width = (8 * side for side in noisy.shape[2:])
    half = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(128).double() / 128)
    # SDXL's six numbers: the picture's size, the crop's corner, the size that is wanted.
    angles = torch.tensor([height, width, 0, 0, height, width]).double()[:, None] * half
    numbers = torch.cat([angles.cos(), angles.sin()], dim=1).flatten()
    return {"context": text, "y": torch.cat([pooled, numbers.expand(len(pooled), -1)], dim=1)}
