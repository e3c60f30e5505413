"""In the host: what prompts and regions are given is used or said, whatever guider, node or second pass follows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from modular_concepts_pack.host.merging import notices as merging
from modular_concepts_pack.host.regions import sampling as regional
from modular_concepts_pack.host.regions.cross_attention import blocks_of
from modular_concepts_pack.host.toy_base import load_toy_base
from modular_concepts_pack.host.training import train as training
from modular_concepts_pack.host.training.base import host_base
from modular_concepts_pack.modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts_pack.modular_concepts.files.concept import load_concept
from modular_concepts_pack.modular_concepts.merging import MergeOptions as options
from modular_concepts_pack.modular_concepts.training import teach as custom_plan
from modular_concepts_pack.modular_concepts.training.settings import TrainSettings
from modular_concepts_pack.nodes import automatic, baselines, bases, concepts, region_json
from modular_concepts_pack.nodes import regions as node
from modular_concepts_pack.nodes import training as training_nodes
from modular_concepts_pack.nodes.unused import unused

import nodes

PROMPT, NEGATIVE, INSIDE = "a man on the beach", "tree", "a cat in the snow"


def refused(attempt) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@torch.inference_mode()
def heard(folder: Path, replaced: pytest.MonkeyPatch) -> dict:
    """Title -> what was said, or how far pictures are apart; the concept tom lies in `folder`."""
    model, clip, _ = load_toy_base()
    tom = load_concept(folder / "tom.safetensors")
    lora = dataclasses.replace(tom, name="sketch", tokens={}, recipe=dataclasses.replace(tom.recipe, triggers=()))
    said, facts = [], {}
    for module in (regional, concepts, merging, bases, node, region_json, automatic):
        replaced.setattr(module, "show_text", said.append)

    def latent(width: int, height: int) -> dict:
        empty = nodes.EmptyLatentImage().generate(width, height, 1)[0]
        space = empty.get("downscale_ratio_spacial")
        return {"samples": comfy.sample.fix_empty_latent_channels(model, empty["samples"], space)}

    noise = latent(64, 64)

    def region(prompt: str = INSIDE, units: str = "fractions", box=(0.0, 0.0, 0.5, 1.0), names: str = ""):
        return node.ConceptRegion.execute(prompt, units, *box, 0.0, 1.0, "", None, (), names)[0]

    def with_regions(regions, mode="merged", stack=()):
        texts = (PROMPT, NEGATIVE, mode, "average")
        return node.RegionalConcepts.execute(model, clip, regions, *texts, concepts=stack).args

    def draw(parts, latent=noise, denoise=1.0):
        settings = (5, 2, 3.0, "euler", "normal", parts[1], parts[2])
        return nodes.common_ksampler(parts[0], *settings, latent, denoise=denoise)[0]["samples"]

    # Concepts that nobody calls.
    for title, stack, names, mode in (
        ("lora", ((lora, 1.0),), "", "gated"),
        ("lora named", ((lora, 1.0),), "sketch", "gated"),
        ("tom", ((tom, 1.0),), "", "gated"),
        ("tom merged", ((tom, 1.0),), "tom", "merged"),
        ("tom at 0", ((tom, 0.0),), "", "gated"),
    ):
        said.clear()
        with_regions(region(names=names), mode, stack)
        facts[title] = " ".join(said)
    # Regions that hardly draw.
    small, twice = region(box=(0.0, 0.0, 0.001, 0.001)), (*region(), *region("a dog"))
    for title, regions in (("too small", small), ("one place", twice)):
        said.clear()
        with_regions(regions)
        facts[title] = " ".join(said)
    for title, text in (("called", "photo of<tom>"), ("uncalled", "a man"), ("unknown", "a <tim>, <tom>s hat")):
        said.clear()
        concepts.ConceptTextEncode.execute(clip, text, ((tom, 1.0),))
        facts[f"prompt {title}"] = " ".join(said)
    spaced, close = (concepts.ConceptTextEncode.execute(clip, t, tom)[0][0][0] for t in ("a <tom> man", "a<Tom>man"))
    facts["the same with and without spaces"] = torch.equal(spaced, close)

    # Options that nothing reads.
    for method in ("sum", "ties"):
        said.clear()
        asked = merging.Merge(method, options=options(density=0.3))
        merging.merge_by(merging.HostModel(model, clip), ((tom, 1.0),), asked)
        facts[f"density in {method}"] = " ".join(said)
    base = host_base(model, clip, load_toy_base()[2])
    settings = TrainSettings(method="words")
    subject = SimpleNamespace(name="nobody", captions=["a <nobody>"], trigger="<nobody>")
    plan = training.Plan(
        subject,
        settings,
        custom_plan.Targets(),
        None,
        chosen=("weight_decay", "prior_weight", "text_encoder_lr", "min_snr", "keep_checkpoints"),
        accept_changes=True,
        notes=("slot changes nothing",),
    )
    facts["training"] = training._notes(base, plan)
    anew = dataclasses.replace(plan, accept_changes=False, resume=True)
    facts["nothing to resume"] = training._notes(base, anew)[1]

    # Inputs that mean nothing beside others, by each node itself.
    def mean_nothing(attempt) -> str:
        said.clear()
        attempt()
        return "\n".join(said)

    place, box = node.ConceptRegion.execute, (0.0, 0.0, 0.5, 1.0)
    mask, bounds = torch.ones(1, 8, 8), {"x": 0, "y": 0, "width": 8, "height": 8}
    whole = (0.0, 0.0, 1.0, 1.0)
    drawing = (noise, "euler", "normal", 1)
    preview = node.RegionPreview.execute
    picture = torch.ones(1, 32, 32, 3)
    json_node = region_json.RegionsFromJSON.execute
    sampler, finder = node.RegionalConceptSampler.execute, automatic.FindRegions.execute
    loader = bases.OrthoBasisLoader.execute
    replaced.setattr(bases, "load_basis_named", lambda name: OrthogonalBasis())
    lora_node = concepts.LoRAToConcept.execute
    high = (dataclasses.replace(region()[0], priority=3),)
    facts["idle"] = {
        title: mean_nothing(attempt)
        for title, attempt in {
            "basis": lambda: loader("x.npy", "haar", 3, "orthogonal", 8, "slot"),
            "basis as it starts": lambda: loader("x.npy", "hadamard", 0, "orthogonal", 8, "slot"),
            "basis generated": lambda: loader("generated", "haar", 3, "orthogonal", 8, "slot"),
            "mask": lambda: place("a dog", "fractions", *box, 0.1, 1.0, mask=mask),
            "mask and bounding box": lambda: place("a dog", "pixels", *whole, 0.1, 1.0, mask=mask, bounding_box=bounds),
            "mask alone": lambda: place("a dog", "fractions", *whole, 0.1, 1.0, mask=mask),
            "bounding box": lambda: place("a dog", "fractions", *box, 0.1, 1.0, bounding_box=bounds),
            "automatic": lambda: place("a dog", "automatic", *box, 0.1, 1.0),
            "automatic as it starts": lambda: place("a dog", "automatic", *whole, 0.0, 1.0),
            "box": lambda: place("a dog", "fractions", *box, 0.1, 1.0),
            "preview": lambda: preview(region(), 64, 512, "average", picture),
            "preview as it starts": lambda: preview(region(), 512, 512, "average", picture),
            "masks": lambda: json_node('[{"prompt": "a dog", "mask": 1}]', torch.ones(3, 8, 8)),
            "masks named": lambda: json_node('[{"prompt": "a dog", "mask": 0}]', mask),
            "no guidance": lambda: sampler(model, clip, PROMPT, NEGATIVE, region(), *drawing, 1.0, 0, 1.0),
            "guidance": lambda: sampler(model, clip, PROMPT, NEGATIVE, region(), *drawing, 2.0, 0, 1.0),
            "finding": lambda: finder(model, clip, tom, region(), PROMPT, NEGATIVE, *drawing, 1.0, 0, 1.0, "average"),
            "priority": lambda: node.RegionalConcepts.execute(model, clip, high, PROMPT, "", "merged", "average"),
            "priority used": lambda: node.RegionalConcepts.execute(model, clip, high, PROMPT, "", "merged", "priority"),
            "name": lambda: lora_node([], "my lora"),
            "name as it starts": lambda: lora_node([], "lora"),
        }.items()
    }
    facts["trainers"], common = {}, {"preview_every": 0, "preview_prompt": "a {concept} hat"}
    idle, trainers = unused, (training_nodes, baselines)
    choice = bases.OrthoChoice(OrthogonalBasis(), "", 8, "hashed")
    for name in ("OrthoLoRATrainer", "BlockLoRATrainer", "LoRATrainer", "WordTrainer", "EDLoRATrainer"):
        trainer = next(getattr(module, name) for module in trainers if hasattr(module, name))
        with_basis = {"ortho_basis": choice} if "Ortho" in name or "Block" in name else {}
        facts["trainers"][name] = [
            idle(trainer, {**common, **with_basis, "slot": 3, "rank": 7}),
            idle(trainer, {**with_basis, "preview_every": 50, "preview_prompt": "x", "slot": 0, "rank": 16}),
        ]
    facts["without basis"] = idle(trainers[0].BlockLoRATrainer, {"rank": 7, "ortho_basis": None})

    # Guiders in another order.
    def guided(guider, set_up, parts):
        set_up(guider)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
        start, sampler = comfy.sample.prepare_noise(noise["samples"], 5), comfy.samplers.sampler_object("euler")
        return guider.sample(start, noise["samples"], sampler, sigmas, disable_pbar=True, seed=5)

    def once(model, positive, negative):
        guider = comfy.samplers.CFGGuider(model)
        return guided(guider, lambda g: (g.set_conds(positive, negative), g.set_cfg(3.0)), None)

    def twice(model, positive, negative, middle=None):
        guider, middle = custom.Guider_DualCFG(model), middle or positive
        return guided(guider, lambda g: (g.set_conds(positive, middle, negative), g.set_cfg(2.0, 3.0)), None)

    plain = (model, *(nodes.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPT, NEGATIVE)))
    facts["guiders"], facts["effect"] = {}, {}
    stack = ((dataclasses.replace(tom, tokens={}), 1.0),)
    for title, parts in (
        ("plain", plain),
        ("merged", with_regions(region())),
        ("gated", with_regions(region(names="tom"), "gated", stack)),
    ):
        facts["guiders"][title] = (once(*parts) - twice(*parts)).abs().max().item()
        facts["effect"][title] = (once(*parts) - once(*plain)).abs().max().item()
    parts = with_regions(region())
    facts["unmarked"] = refused(lambda: twice(*parts, middle=plain[1]))
    facts["own negative"] = refused(lambda: once(parts[0], parts[1], plain[2]))

    # Another node behind.
    def replaced(places):
        other = parts[0].clone()
        for name, number in places:
            other.set_model_attn2_replace(lambda q, k, v, options: q, name, number)
        return other

    def added():
        attending = next(iter(parts[0].model_options["transformer_options"]["patches_replace"]["attn2"].values()))
        attending.add(lambda q, k, v, options: q, weight=1.0)

    def patched():
        other = parts[0].clone()
        other.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
        return other

    every = blocks_of(model.model.diffusion_model)
    facts["displaced"] = {
        "all": refused(lambda: draw((replaced(every), *parts[1:]))),
        "one": refused(lambda: draw((replaced(every[-1:]), *parts[1:]))),
        "added": refused(added),
        "patched": refused(lambda: draw((patched(), *parts[1:]))),
        "none": refused(lambda: draw(parts)),
    }

    # A second pass at twice the size, and a new picture of another size from the same MODEL.
    pixels, fractions = with_regions(region(units="pixels", box=(0.0, 0.0, 32.0, 64.0))), with_regions(region())
    passes = {}
    for title, parts in (("pixels", pixels), ("fractions", fractions)):
        first = draw(parts)
        larger = {"samples": torch.nn.functional.interpolate(first, scale_factor=2.0, mode="nearest")}
        passes[title] = first, draw(parts, larger, 0.5)
    facts["passes"] = [(a - b).abs().max().item() for a, b in zip(*passes.values(), strict=True)]
    facts["not first"] = (passes["pixels"][1] - draw(plain, larger, 0.5)).abs().max().item()
    return facts
