"""In the host: put the same concepts into the toy base by every method, as weights and as activations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.weight_adapter
import torch
from left_behind import hooks_on, weights
from modular_concepts_pack.host import toy_base as toy
from modular_concepts_pack.host.files.concepts import concept_names
from modular_concepts_pack.host.layers import host_layers
from modular_concepts_pack.host.merging import fusion
from modular_concepts_pack.host.merging import notices as merging_words
from modular_concepts_pack.modular_concepts.merging import MergeOptions
from modular_concepts_pack.nodes import concepts as loading
from modular_concepts_pack.nodes import merging
from modular_concepts_pack.nodes.reports import CrosstalkReport

import nodes


@torch.inference_mode()
def merged_by_method(plan: dict, folder: Path, warnings: list[str]) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts); `folder` is the host's, with the plan's concepts among its own."""
    model, clip, _ = toy.load_toy_base()
    layers = host_layers(model, clip)
    before, found, facts = weights(model, clip), {}, {"untouched": [], "refused": {}}

    def key_of(name: str) -> str:
        return f"{'model' if layers[name].part == 'unet' else 'clip'}.{layers[name].key}"

    def back_to_base() -> None:
        comfy.model_management.unload_all_models()
        after = weights(model, clip)
        same = all(torch.equal(before[name], after[name]) for name in before)
        facts["untouched"].append(same and hooks_on(model, clip) == 0)

    def look(title: str, patched, patched_clip) -> None:
        comfy.model_management.load_models_gpu([patched, patched_clip.patcher])
        now = weights(patched, patched_clip)
        found.update({f"{title}|{name}": now[key_of(name)] for name in plan["layers"]})
        found[f"{title}|by_weight"] = patched.model.apply_model(latent, sigma, c_crossattn=context)
        patched.unpatch_model()
        patched_clip.patcher.unpatch_model()
        back_to_base()

    def look_by_bypass(title: str, patched) -> None:
        manager = comfy.weight_adapter.BypassInjectionManager()
        for key, [patch] in patched.patches.items():
            manager.add_adapter(key, patch[1], strength=patch[0])
        bypassing = model.clone()
        bypassing.set_injections("bypass", manager.create_injections(bypassing.model))
        comfy.model_management.load_models_gpu([bypassing])
        bypassing.inject_model()
        found[f"{title}|by_bypass"] = bypassing.model.apply_model(latent, sigma, c_crossattn=context)
        bypassing.eject_model()
        back_to_base()

    latent, sigma = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([2.0])
    context = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(4))
    found |= {f"base|{name}": before[key_of(name)] for name in plan["layers"]}
    found["base|by_weight"] = model.model.apply_model(latent, sigma, c_crossattn=context)
    stacks = {name: loading.ConceptLoader.execute(f"{name}.safetensors", s)[0] for name, s in plan["strengths"].items()}
    facts["listed"] = concept_names()
    sockets = {f"concept{index}": stack for index, stack in enumerate(stacks.values())}
    for how in plan["methods"]:
        result = merging.ConceptMerge.execute(model, clip, sockets, how, **plan["options"]).args
        look(how, *result[:2])
        look_by_bypass(how, result[0])
    options = MergeOptions(**plan["options"])
    facts["svd"] = merging_words.kept_by_cut(sum(stacks.values(), ()), options)

    # Fusion: drawn once, then read from beside the files.
    asked = (model, clip, sockets, plan["prompts"], 2, plan["ridge"], 2, 32)
    look("fusion", *merging.ConceptFusion.execute(*asked).args[:2])
    look_by_bypass("fusion", merging.ConceptFusion.execute(*asked)[0])
    drawing = fusion.Drawing(plan["prompts"].splitlines(), 2, 2, 32)
    stack = sum(stacks.values(), ())
    facts["second"] = fusion.fuse(fusion.HostModel(model, clip), stack, drawing, plan["ridge"])[2]
    facts["anew"] = fusion.fuse(fusion.HostModel(model, clip), stack[:1], drawing, plan["ridge"], anew=True)[2]
    other, other_clip, _ = toy.load_toy_base()
    with torch.no_grad():
        for weight in other.model.diffusion_model.parameters():
            weight.mul_(1.01)
    facts["other base"] = fusion.fuse(fusion.HostModel(other, other_clip), stack[:1], drawing, plan["ridge"])[2]
    asked_again = fusion.Drawing(["a {concept}"], 2, 2, 32)
    facts["other prompts"] = fusion.fuse(fusion.HostModel(other, other_clip), stack[:1], asked_again, plan["ridge"])[2]
    facts["back"] = fusion.fuse(fusion.HostModel(model, clip), stack[:1], drawing, plan["ridge"])[2]
    # Another concept under tom's name, with an older date than the moments.
    tom = folder / "concepts" / "tom.safetensors"
    whole = tom.read_bytes()
    tom.write_bytes((folder / "another_tom.safetensors").read_bytes())
    os.utime(tom, (1, 1))
    replaced = loading.ConceptLoader.execute("tom.safetensors", 1.0)[0]
    facts["replaced"] = fusion.fuse(fusion.HostModel(model, clip), replaced, drawing, plan["ridge"])[2]
    tom.write_bytes(whole)
    stack = (*loading.ConceptLoader.execute("tom.safetensors", plan["strengths"]["tom"])[0], *stack[1:])
    facts["put back"] = fusion.fuse(fusion.HostModel(model, clip), stack[:1], drawing, plan["ridge"])[2]
    report = CrosstalkReport.execute(sockets, True).args
    facts["report"], facts["figures"] = report[1], json.loads(report[2])
    half = loading.ConceptStrength.execute(stacks["tom"], 1.0, "mid=0.5")[0]
    facts["changed"] = fusion.fuse(fusion.HostModel(model, clip), half, drawing, plan["ridge"])[2]
    facts["listed again"] = concept_names()
    # A concept called like another one's moments, and moments under their former name.
    for name, like in {"minka.moments": "tom.safetensors", "rex.moments": "rex.moments"}.items():
        (folder / "concepts" / f"{name}.safetensors").write_bytes((folder / "concepts" / like).read_bytes())
    facts["listed at last"] = concept_names()
    for name in ("minka.moments", "rex.moments"):
        (folder / "concepts" / f"{name}.safetensors").unlink()
    back_to_base()

    # What the test exported of each method, in core's own loader.
    warned = len(warnings)
    for how in plan["exported"]:
        look(f"stock {how}", *nodes.LoraLoader().load_lora(model, clip, f"{how}.safetensors", 1.0, 1.0))
    facts["stock warnings"] = warnings[warned:]

    # Made orthogonal, and strong in parts.
    orthogonal, facts["kept"] = merging.ConceptOrthogonalize.execute(sockets, "symmetric").args
    look("orthogonal", *merging.ConceptMerge.execute(model, clip, {"concept0": orthogonal}, "sum").args[:2])
    parts = loading.ConceptLoader.execute("tom.safetensors", 0.7, plan["blocks"])[0]
    look("blocks", *merging.ConceptMerge.execute(model, clip, {"concept0": parts}, "sum").args[:2])

    # Part of a weight, a function of the delta, another strength, a smaller dtype: as the host may ask.
    patched = merging.ConceptMerge.execute(model, clip, sockets, "sum")[0]
    key = layers[plan["square"]].key
    adapter, weight = patched.patches[key][0][1], before[key_of(plan["square"])]
    out = len(weight)
    for title, (patch, given) in {
        "third": ((1.0, adapter, 1.0, (0, out, out), None), weight.repeat(3, 1)),
        "function": ((0.5, adapter, 1.0, None, lambda delta: 2 * delta), weight.clone()),
        "strength": ((-0.4, adapter, 1.0, None, None), weight.clone()),
        "half": ((1.0, adapter, 1.0, None, None), weight.to(torch.float16)),
    }.items():
        found[f"asked|{title}"] = comfy.lora.calculate_weight([patch], given, key)
    # As the host's dynamic memory takes an adapter's tensors along; older hosts do not.
    if hasattr(comfy.lora, "prefetch_prepared_value"):
        adapter = comfy.lora.prefetch_prepared_value(adapter, [0], None, None, False)
    moved = (1.0, adapter, 1.0, None, None)
    found["asked|prefetched"] = comfy.lora.calculate_weight([moved], weight.clone(), key)

    # Inside a hook whose strength changes while sampling.
    hook = comfy.hooks.WeightHook()
    hook.need_weight_init, hook.weights = False, {key: patch[0][1] for key, patch in patched.patches.items()}
    group = comfy.hooks.HookGroup()
    group.add(hook)
    hooked = model.clone()
    hooked.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    comfy.model_management.load_models_gpu([hooked])
    for title, strength in (("hook", 0.4), ("hook later", 1.5)):
        hook.hook_keyframe._current_keyframe = comfy.hooks.HookKeyframe(strength)
        hooked.clear_cached_hook_weights()
        hooked.patch_hooks(group)
        found[title] = hooked.model.state_dict()[key].clone()
    hooked.unpatch_hooks()
    back_to_base()

    for title, attempt in {
        "no prompt": lambda: merging.ConceptFusion.execute(model, clip, sockets, " \n", 2, 1e-3),
        "unknown part": lambda: loading.ConceptStrength.execute(stacks["tom"], 1.0, "middle=2"),
        "no trigger": lambda: merging.ConceptFusion.execute(
            model, clip, {"a": loading.ConceptLoader.execute("plain.safetensors", 1.0)[0]}, plan["prompts"], 1, 1e-3
        ),
    }.items():
        try:
            attempt()
            facts["refused"][title] = ""
        except ValueError as error:
            facts["refused"][title] = f"{type(error).__name__}: {error}"
    back_to_base()
    return found, facts
