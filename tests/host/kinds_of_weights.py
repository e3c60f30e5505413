"""In the host: one merge on weights in full, quantised and offloaded, as weights and as activations; what comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel as unets
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.utils
import tiny_models
import torch
from comfy_extras.nodes_model_merging import ModelSave
from modular_concepts_pack.host import layers
from modular_concepts_pack.host import toy_base as toy
from modular_concepts_pack.host.merging import notices as merging
from modular_concepts_pack.host.merging import weights as patching
from modular_concepts_pack.host.regions import gating
from modular_concepts_pack.modular_concepts import concept as concept_of
from modular_concepts_pack.modular_concepts.adapters import low_rank as adapters
from modular_concepts_pack.modular_concepts.merging import merge_concepts
from modular_concepts_pack.modular_concepts.models.layers import tokens_of
from modular_concepts_pack.modular_concepts.regions import geometry as regions
from modular_concepts_pack.modular_concepts.regions.shares import Places
from modular_concepts_pack.nodes.concepts import LoRAToConcept
from safetensors.torch import load_file

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def random_weights() -> dict[str, torch.Tensor]:
    """Of Stable Diffusion 1.5's layout, one level; exact in float16."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for key, value in (
        unets.UNetModel(**tiny_models.SD15_UNET, operations=comfy.ops.disable_weight_init).state_dict().items()
    ):
        norm = key.endswith("weight") and value.dim() == 1
        made[key] = (torch.randn(value.shape, generator=generator) * 0.05 + norm).half().float()
    return made


def loaded(weights: dict[str, torch.Tensor], dtype: torch.dtype | None = None):
    options = {} if dtype is None else {"dtype": dtype}
    return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=options)


def quantised(
    weights: dict[str, torch.Tensor], form: str, dtype: torch.dtype, largest: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights in the host's mixed precision: Linear layers of the attentions in few bits, what they stand for)."""
    form = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    stored, meant = dict(weights), dict(weights)
    for key, value in weights.items():
        if ".transformer_blocks." in key and key.endswith("weight") and value.dim() == 2:
            scale = value.abs().max() / largest
            stored[key] = (value / scale).round().to(dtype) if dtype == torch.int8 else (value / scale).to(dtype)
            stored[f"{key}_scale"], stored[key.replace(".weight", ".comfy_quant")] = scale, form
            meant[key] = stored[key].float() * scale
    return stored, meant


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)


def fused_keys(patching, clip, found: dict, facts: dict, output) -> None:
    """A LoRA in diffusers' keys on Stable Diffusion 3, whose queries, keys and values are one layer here."""
    network = mmdit.OpenAISignatureMMDITWrapper(
        **tiny_models.SD3_UNET, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    model = loaded(
        {key: value.float() for key, value in tiny_models.random_weights(network, 0.1).items()}, torch.float32
    )
    weights, lora = model.model.state_dict(), {}
    generator = torch.Generator().manual_seed(5)
    names = comfy.utils.mmdit_to_diffusers(model.model.model_config.unet_config, output_prefix="diffusion_model.")
    for name, target in names.items():
        key, rows = (target, None) if isinstance(target, str) else target[:2]
        if not name.endswith(".weight") or "transformer_blocks" not in name or key not in weights or "norm" in name:
            continue
        out, inp = weights[key].shape
        stem = f"transformer.{name.removesuffix('.weight')}"
        lora[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(4, inp, generator=generator)
        lora[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(rows[2] if rows else out, 4, generator=generator)
    (own, _), *_ = stack = LoRAToConcept.execute(lora, "diffusers", model, None).args[0]
    facts["fused"] = [len(lora) // 2, len(own.layers), sum(name.endswith("qkv") for name in own.layers)]
    core = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0.0)[0]
    latent = torch.randn(1, 16, 8, 8, generator=generator)
    inputs = (
        (latent, torch.tensor([0.5])),
        dict(c_crossattn=torch.randn(1, 20, 4096, generator=generator), y=torch.randn(1, 2048, generator=generator)),
    )
    found["sd3|base"], found["sd3|core"] = output(model, inputs=inputs), output(core, inputs=inputs)
    for apply in ("weights", "activations"):
        changed = patching.merge_into(model, clip, [(own, 0.7)], beside=apply == "activations")[0]
        found[f"sd3|{apply}"] = output(changed, inputs=inputs)
    assert len(stack) == 1


@torch.inference_mode()
def on_kinds_of_weights(folder: Path, warnings: list[str]) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts); folder: where a model is saved."""
    clip, weights = toy.load_toy_base()[1], random_weights()
    found, facts = {}, {"untouched": {}, "names": {}, "warned": {}, "called": {}}
    latent, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([2.0])
    context = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(4))

    plain = loaded(weights, torch.float32)
    generator, made = torch.Generator().manual_seed(7), {}
    for name, layer in layers.host_layers(plain, None).items():
        shape = layer.module.weight.shape
        up, down = torch.randn(shape[0], 6, generator=generator), torch.randn(6, *shape[1:], generator=generator)
        made[name] = adapters.LowRank(0.02 * up, 0.3 * down / shape[1:].numel() ** 0.5, 6.0, "lora", None, shape[0])
    concepts = [
        (concept_of.Concept(name, own, {}, concept_of.Recipe(architecture="sd15")), strength)
        for name, strength, own in (
            ("one", 0.7, made),
            (
                "two",
                -0.4,
                {name: adapter.replace(lora_up=adapter.lora_up.roll(1, 0)) for name, adapter in made.items()},
            ),
        )
    ]
    keys = {name: layer.key for name, layer in layers.host_layers(plain, None).items()}

    def with_delta(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        summed = merge_concepts(*map(list, zip(*concepts, strict=True)))
        changed = dict(base)
        for name, own in summed.items():
            key = keys[name].removeprefix("diffusion_model.")
            changed[key] = base[key] + own.delta().reshape(base[key].shape)
        return changed

    usual = (latent, sigma), {"c_crossattn": context}

    def output(patcher, offloaded: bool = False, inputs: tuple = usual) -> torch.Tensor:
        if offloaded:
            patcher.patch_model(CPU, lowvram_model_memory=1)
            facts["offloaded"] = bool(patcher.model.model_lowvram) and facts.get("offloaded", True)
        else:
            comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        patcher.inject_model()
        options = patcher.model_options["transformer_options"]
        result = patcher.model.apply_model(*inputs[0], **inputs[1], transformer_options=options).float()
        patcher.eject_model()
        if offloaded:
            patcher.unpatch_model(CPU)
        comfy.model_management.unload_all_models()
        return result

    stored, meant = quantised(weights, "float8_e4m3fn", FP8, 400)
    rounded = {key: value.to(FP8).float() if value.dim() > 1 else value for key, value in weights.items()}
    kinds = {"float32": (lambda: plain, weights), "fp8": (lambda: loaded(rounded, FP8), None)}
    kinds["mixed"] = (lambda: loaded(stored), meant)
    if "int8_tensorwise" in comfy.quant_ops.QUANT_ALGOS:
        few, few_meant = quantised(weights, "int8_tensorwise", torch.int8, 127)
        kinds["int8"] = (lambda: loaded(few), few_meant)
    facts["kinds"] = list(kinds)
    for kind, (make, own) in kinds.items():
        base = make()
        before = {key: value.clone() for key, value in base.model.state_dict().items()}
        facts["warned"][kind] = merging.warnings_of(merging.HostModel(base, clip), concepts, "weights")
        facts["names"][kind] = set(layers.host_layers(base, None)) == set(made)
        if own is None:  # norms and biases are rounded too
            own = {key.removeprefix("diffusion_model."): value.float() for key, value in before.items()}
        found[f"{kind}|base"], found[f"{kind}|wanted"] = (
            output(loaded(w, torch.float32)) for w in (own, with_delta(own))
        )
        found[f"{kind}|its base"] = output(base)
        # One region has the whole picture, and the whole context is its text.
        whole = regions.Region("", (0.0, 0.0, 1.0, 1.0), concepts=("one", "two"))
        held = [
            (replace(own, layers={n: a for n, a in own.layers.items() if tokens_of(n) != "neither"}), s)
            for own, s in concepts
        ]
        gate = gating.HostGate(gating.HostModel(base, clip), held, [(), (0, 1)], Places([whole]))
        comfy.model_management.load_models_gpu([base], force_full_load=True)
        with gate.attached(base.model.diffusion_model, gating.Moment((8, 8), lengths=(77,)), {}):
            found[f"{kind}|gated"] = base.model.apply_model(*usual[0], **usual[1]).float()
        comfy.model_management.unload_all_models()
        facts["called"][kind] = [len(gate.gate.called), len(gate.gate.gated), len(held[0][0].layers)]
        found[f"{kind}|gated wanted"] = output(patching.merge_into(base, clip, held, beside=True)[0])
        for apply in ("weights", "activations"):
            changed = patching.merge_into(base, clip, concepts, beside=apply == "activations")[0]
            for place in ("", " offloaded"):
                found[f"{kind}|{apply}{place}"] = output(changed, bool(place))
        # `changed` adds as activations now.  One layer alone, on the same input with and without.
        name = next(name for name in made if name.endswith("attn1.to_q"))
        layer, x = layers.host_layers(base, None)[name].module, torch.randn(1, 64, made[name].weight_shape[1])
        comfy.model_management.load_models_gpu([changed], force_full_load=True)
        changed.eject_model()
        without = layer(x)
        changed.inject_model()
        found[f"{kind}|layer"] = layer(x).double() - without.double()
        changed.eject_model()
        comfy.model_management.unload_all_models()
        delta = sum(strength * own.layers[name].delta().double() for own, strength in concepts)
        found[f"{kind}|layer wanted"] = x.double() @ delta.mT
        after = base.model.state_dict()
        same = [torch.equal(bits(before[key]), bits(after[key])) for key in before]
        facts["untouched"][kind] = all(same) and not any(m._forward_hooks for m in base.model.modules())

    fused_keys(patching, clip, found, facts, output)

    # Saved by core's node, loaded by core: the merge's weights, bit for bit, and the picture of them.
    changed = patching.merge_into(plain, clip, concepts)[0]
    saver = ModelSave()
    saver.output_dir = str(folder)
    saver.save(changed, "saved")
    saved = load_file(next(folder.glob("saved*.safetensors")))
    wanted = with_delta(weights)
    facts["saved"] = [
        max(float((saved[f"model.diffusion_model.{key}"].double() - value.double()).norm() / value.double().norm())
            for key, value in wanted.items()),
        max(float((wanted[key] - value).norm() / value.norm()) for key, value in weights.items()),
    ]  # fmt: skip
    found["float32|saved"] = output(loaded(saved, torch.float32))
    # What a device in half precision gives the host's patching.
    own = merge_concepts(*map(list, zip(*concepts, strict=True)))[name]
    for dtype in (torch.float16, torch.bfloat16):
        weight = plain.model.state_dict()[keys[name]].to(dtype)
        exact = weight.double() + own.delta().double()
        for title, function in {"": lambda value: value, ", changed": torch.clone}.items():
            added = patching.MergedWeight(set(), (own, None)).calculate_weight(
                weight.clone(), "", 1.0, 1.0, None, function
            )
            found[f"rounded {dtype}{title}"] = (added.double() - exact).abs().max() / exact.abs().max()
            found[f"rounding {dtype}{title}"] = (exact.to(dtype).double() - exact).abs().max() / exact.abs().max()
    facts["silent"] = [line for line in warnings if "without being called" in line]
    return found, facts
