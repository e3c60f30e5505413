"""In the host: put concept files into the toy base in several ways, write down the weights that come out."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.weight_adapter
import torch
from left_behind import weights
from modular_concepts_pack.host import toy_base as toy
from modular_concepts_pack.host.layers import host_layers
from modular_concepts_pack.host.merging import weights as patching
from modular_concepts_pack.host.text import words as clip_module
from modular_concepts_pack.nodes import concepts, merging

import nodes


def traces(model, clip) -> list:
    """What a careless node leaves behind on a model."""
    return [
        sorted(map(str, patcher.patches)) + sorted(patcher.injections) + sorted(patcher.attachments) + list(hooks)
        for patcher in (model, clip.patcher)
        for hooks in ([k for m in patcher.model.modules() for k in (*m._forward_hooks, *m._forward_pre_hooks)],)
    ]


@torch.inference_mode()
def merged_weights(plan: dict, folder: Path, warnings: list[str]) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts); `folder` is the host's, with the plan's concepts among its own."""
    model, clip, _ = toy.load_toy_base(embeddings=[str(folder / "embeddings")])
    layers = host_layers(model, clip)
    before, clean = weights(model, clip), traces(model, clip)
    found, facts = {}, {"untouched": [], "clean": [], "layers_patched": {}}

    def key_of(name: str) -> str:
        return f"{'model' if layers[name].part == 'unet' else 'clip'}.{layers[name].key}"

    def back_to_base() -> None:
        comfy.model_management.unload_all_models()
        after = weights(model, clip)
        facts["untouched"].append(all(torch.equal(before[name], after[name]) for name in before))
        facts["clean"].append(traces(model, clip) == clean)

    def look(title: str, patched, patched_clip) -> None:
        comfy.model_management.load_models_gpu([patched, patched_clip.patcher])
        now = weights(patched, patched_clip)
        found.update({f"{title}|{name}": now[key_of(name)] for name in plan["layers"]})
        facts["layers_patched"][title] = sum(not torch.equal(now[key], before[key]) for key in before)
        patched.unpatch_model()
        patched_clip.patcher.unpatch_model()
        back_to_base()

    found |= {f"base|{name}": before[key_of(name)] for name in plan["layers"]}
    stacks = {
        name: concepts.ConceptLoader.execute(f"{name}.safetensors", s)[0] for name, s in plan["strengths"].items()
    }
    for title, names, node, option in plan["merges"]:
        sockets = {f"concept{index}": stacks[name] for index, name in enumerate(names)}
        merged, merged_clip, stack = getattr(merging, node).execute(model, clip, sockets, option).args
        facts.setdefault("patches_per_layer", set()).update(len(p) for p in merged.patches.values())
        facts.setdefault("patches", {})[title] = len(merged.patches) + len(merged_clip.patcher.patches)
        facts.setdefault("inside", {})[title] = list(patching.concepts_in(merged))
        look(title, merged, merged_clip)

    # Our export in core's own loader, and its learned word in core's own embedding lookup.
    saved = concepts.ConceptSave.execute(stacks["tom"][0][0], "", "LoRA for stock loaders").args[0]
    warned = len(warnings)
    stock = nodes.LoraLoader().load_lora(model, clip, saved, *(plan["strengths"]["tom"],) * 2)
    facts["lora_warnings"] = warnings[warned:]
    look("stock", *stock)
    # At full strength, which is what an embedding file says of a word.
    stock = nodes.LoraLoader().load_lora(model, clip, saved, 1.0, 1.0)
    merged, merged_clip, _ = merging.ConceptMerge.execute(model, clip, {"concept0": stacks["tom"][0][0]}, "sum").args
    encode = nodes.CLIPTextEncode().encode
    found["word"] = encode(merged_clip, "a <tom> man on the beach")[0][0][0]
    found["word_stock"] = encode(stock[1], "a embedding:tom man on the beach")[0][0][0]
    merged.unpatch_model()

    # Words of one CLIP after another, and twice the same.
    tokens = {word: rows for name in ("tom", "rex") for word, rows in stacks[name][0][0].tokens.items()}
    at_once = clip_module.with_tokens(clip, tokens)
    one_by_one = clip
    for word in ("<tom>", "<rex>", "<tom>"):
        one_by_one = clip_module.with_tokens(one_by_one, {word: tokens[word]})
    text = "a <rex> dog and a <Tom> man"
    found["words_at_once"], found["words_in_turn"] = (encode(c, text)[0][0][0] for c in (at_once, one_by_one))
    whole = tuple((stacks[name][0][0], 1.0) for name in ("tom", "rex"))
    prompt = concepts.ConceptTextEncode.execute(clip, text, whole)[0]
    # The words of a merge follow its strengths, also where a prompt names the concepts again.
    _, quiet, _ = merging.ConceptMerge.execute(model, clip, {"concept0": (whole[0], (whole[1][0], 0.0))}, "sum").args
    found["word_at_none"] = encode(quiet, "a <rex>")[0][0][0]
    found["word_named_again"] = concepts.ConceptTextEncode.execute(quiet, "a <rex>", whole)[0][0][0]
    found["class_words"] = encode(quiet, "a dog dog")[0][0][0]
    found["words_of_node"] = prompt[0][0]
    found["words_unknown"] = encode(clip, text)[0][0][0]
    back_to_base()

    # The same adapters as activations instead of weights.
    merged, *_ = merging.ConceptMerge.execute(
        model, clip, {f"concept{i}": s for i, s in enumerate(stacks.values())}, "sum"
    ).args
    latent, context = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(3)), prompt[0][0]
    sigma = torch.tensor([2.0])
    comfy.model_management.load_models_gpu([merged])
    found["by_weight"] = merged.model.apply_model(latent, sigma, c_crossattn=context)
    merged.unpatch_model()
    comfy.model_management.unload_all_models()
    manager = comfy.weight_adapter.BypassInjectionManager()
    for key, [patch] in merged.patches.items():
        manager.add_adapter(key, patch[1], strength=patch[0])
    bypassing = model.clone()
    bypassing.set_injections("bypass", manager.create_injections(bypassing.model))
    comfy.model_management.load_models_gpu([bypassing])
    bypassing.inject_model()
    found["by_bypass"] = bypassing.model.apply_model(latent, sigma, c_crossattn=context)
    bypassing.eject_model()
    found["by_base"] = model.model.apply_model(latent, sigma, c_crossattn=context)
    back_to_base()

    # Two clones at once, a picture from each, a merge that fails, a merge on top of a merge.
    noise = nodes.EmptyLatentImage().generate(32, 32)[0]
    for strength in (1.0, -0.5):
        loud, loud_clip = patching.merge_into(model, clip, [(stacks["tom"][0][0], strength)])
        positive = encode(loud_clip, "a <tom> man")[0]
        (drawn,) = nodes.KSampler().sample(loud, 3, 2, 2.0, "euler", "normal", positive, positive, noise)
        found[f"drawn|{strength}"] = drawn["samples"]
    back_to_base()
    facts["refused"] = {}
    for title, attempt in {
        "twice": lambda: patching.merge_into(loud, loud_clip, [stacks["tom"][0]]),
        "other word": lambda: clip_module.with_tokens(at_once, {"<tom>": tokens["<tom>"] + 1}),
        "other case": lambda: clip_module.with_tokens(at_once, {"<Tom>": tokens["<tom>"] + 1}),
        "two cases": lambda: clip_module.with_tokens(clip, {"<New>": tokens["<tom>"], "<nEw>": tokens["<tom>"] + 1}),
        "narrow word": lambda: clip_module.with_tokens(clip, {"<new>": torch.zeros(1, 768)}),
        "nothing": lambda: patching.merge_into(model, clip, [], "block"),
    }.items():
        try:
            attempt()
            facts["refused"][title] = ""
        except ValueError as error:
            facts["refused"][title] = f"{type(error).__name__}: {error}"
    back_to_base()
    facts["patches_per_layer"] = sorted(facts["patches_per_layer"])
    return found, facts
