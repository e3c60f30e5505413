"""In the host: train, merge, encode and draw on one family's tiny checkpoint; what came out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.model_management
import comfy.sample
import plain_gradients
import tiny_models
import torch
from left_behind import traces
from modular_concepts_pack.host import layers
from modular_concepts_pack.host.merging import weights as patching
from modular_concepts_pack.host.regions import gating
from modular_concepts_pack.host.regions import sampling as regions_host
from modular_concepts_pack.host.text import words as clip_words
from modular_concepts_pack.host.toy_base import load_toy_base
from modular_concepts_pack.host.training import base as base_of
from modular_concepts_pack.host.training import train as training
from modular_concepts_pack.modular_concepts.adapters import attach
from modular_concepts_pack.modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts_pack.modular_concepts.adapters.low_rank import LowRank
from modular_concepts_pack.modular_concepts.data.dataset import of_pictures
from modular_concepts_pack.modular_concepts.errors import AdapterError
from modular_concepts_pack.modular_concepts.files import concept as concept_files
from modular_concepts_pack.modular_concepts.files.embeddings import export_embeddings
from modular_concepts_pack.modular_concepts.files.kohya import export_kohya
from modular_concepts_pack.modular_concepts.models.targets import Targets
from modular_concepts_pack.modular_concepts.regions.geometry import Region

import nodes

SIDE = 64  # pixels
DRAWS = 4
CAPTIONS = ["a photo of {concept}", "a photo of {concept} (outside)", "{concept} at home"]


@dataclass
class Run:
    """One family's plan, its (MODEL, CLIP, VAE), the host's folder and warnings, and what is found out about it."""

    plan: dict
    loaded: tuple
    folder: Path
    warnings: list[str]
    facts: dict = field(default_factory=lambda: {"cases": {}, "refused": {}})
    found: dict[str, torch.Tensor] = field(default_factory=dict)


def said(attempt) -> str:
    try:
        attempt()
    except AdapterError as error:
        return f"AdapterError: {error}"
    return "worked"


def lesson(base, case: dict):
    pictures = [torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    subject = training.subject_of(of_pictures(pictures, CAPTIONS, None, (SIDE, SIDE)), case["name"], "man")
    rates = training.Rates(case.get("learning_rate", 5e-3), case.get("token_learning_rate", 5e-3))
    settings = training.settings_for(
        base.family.family, rates, name=subject.name, **{"rank": 4, "batch": 1, **case["settings"]}
    )
    targets = Targets(tuple(case["targets"]), tuple(case["text"]) if case.get("text") else None)
    preview = case.get("preview_every", 0)
    return training.Plan(subject, settings, targets, OrthogonalBasis(), 0, preview, (f"a {subject.trigger}",))


@torch.no_grad()
def fixed_loss(base, subject, concept=None) -> float:
    """Mean loss on fixed draws of picture, noise and noise level; the class word's own rows without a concept."""
    generator, schedule = torch.Generator().manual_seed(7), base.schedule
    latents = base.encode(subject.pictures)[torch.arange(DRAWS) % 3]
    noise = torch.randn(latents.shape, generator=generator)
    indices = torch.linspace(0, len(schedule) - 1, DRAWS).long()
    tokens = dict(concept.tokens) if concept else {subject.trigger: base.word_rows(subject.class_word)}
    targets = (("all_linear",), ("all_linear",))
    with base.trainable(), attach.attached(base.layers(*targets), concept.layers if concept else {}):
        context = base.context([subject.captions[i % 3] for i in range(DRAWS)], tokens)
        predicted = base.predict(schedule.noisy(latents, noise, indices), schedule.times_of(indices), context)
    return float((predicted - schedule.target(latents, noise, indices)).square().mean())


def train_cases(run: Run) -> dict:
    base, made = base_of.host_base(*run.loaded), {}
    run.facts["base"] = [base.architecture, base.hash, base.multiple, base.cross_attention_layers]
    at_first = None
    for case in run.plan["cases"]:
        own = lesson(base, case)
        at_first = fixed_loss(base, own.subject) if at_first is None else at_first
        concept, result = training.train_in_host(base, own)
        path = run.folder / f"{case['name']}.concept.safetensors"
        concept_files.save_concept(concept, path)
        made[case["name"]] = concept = concept_files.load_concept(path)
        run.facts["cases"][case["name"]] = {
            "losses": result.losses,
            "fixed": [at_first, fixed_loss(base, own.subject, concept)],
            "layers": list(concept.layers),
            "tokens": {word: list(rows.shape) for word, rows in concept.tokens.items()},
            "architecture": concept.recipe.architecture,
        }
    return made


@torch.inference_mode(False)
def gradients(run: Run, _concept) -> None:
    """Of some layers' lora_up and of a learned word, by the frozen host and by plain autograd in float64."""
    base = base_of.host_base(*run.loaded)
    base = replace(base, class_words={"<tom>": "man"})
    generator = torch.Generator().manual_seed(11)
    every = base.layers(("all_linear",), ("all_linear",))
    chosen = {name: every[name] for name in run.plan["gradients"]}
    rows = (0.1 * torch.randn(2, 2048, generator=generator)).requires_grad_()
    made = {}
    for name, module in chosen.items():
        out, inp = module.weight.shape
        up, down = torch.randn(out, 3, generator=generator) * 0.05, torch.randn(3, inp, generator=generator) * 0.05
        made[name] = LowRank(up.requires_grad_(), down, 6.0, "lora", None, out)
    latents, noise = torch.randn(2, 2, base.model.model.latent_format.latent_channels, 8, 8, generator=generator)
    indices, prompts = torch.tensor([300, 700]), ["a photo of <tom>", "<tom> in the snow"]
    noisy, wanted = (make(latents, noise, indices) for make in (base.schedule.noisy, base.schedule.target))
    times = base.schedule.times_of(indices)
    with base.trainable(), attach.attached(every, made):
        error = base.predict(noisy, times, base.context(prompts, {"<tom>": rows})) - wanted
        error.square().mean().backward()
    plain = plain_gradients.gradients(
        run.loaded, {name: (made[name], layers.host_layers(*run.loaded[:2])[name].key) for name in made}, rows,
        clip_words.with_tokens(run.loaded[1], {"<tom>": rows.detach()}), prompts, noisy, times, wanted,
    )  # fmt: skip
    for name, adapter in made.items():
        run.found[f"gradient|{name}"], run.found[f"plain gradient|{name}"] = adapter.lora_up.grad, plain[name]
    run.found["gradient|word"], run.found["plain gradient|word"] = rows.grad, plain["word"]
    run.facts["no gradient on weights"] = all(
        parameter.grad is None
        for net in (run.loaded[0].model, run.loaded[1].cond_stage_model)
        for parameter in net.parameters()
    )


def merge(run: Run, concept) -> None:
    """Our merge and core's LoraLoader with the exported file, weight by weight; and the base after both."""
    model, clip = run.loaded[:2]
    weights = {"unet": model.model, "text_encoder": clip.cond_stage_model}
    where = {name: layer for name, layer in layers.host_layers(model, clip).items() if name in concept.layers}
    before = {name: weights[layer.part].state_dict()[layer.key].clone() for name, layer in where.items()}
    export_kohya(concept, run.folder / "loras" / "exported.safetensors")
    warned = len(run.warnings)
    ways = {
        "ours": patching.merge_into(model, clip, [(concept, 0.7)]),
        "core": nodes.LoraLoader().load_lora(model, clip, "exported.safetensors", 0.7, 0.7),
    }
    run.facts["lora warnings"] = run.warnings[warned:]
    for title, (patched, patched_clip) in ways.items():
        comfy.model_management.load_models_gpu([patched, patched_clip.patcher], force_full_load=True)
        now = {
            part: (patched.model if part == "unet" else patched_clip.cond_stage_model).state_dict() for part in weights
        }
        for name, layer in where.items():
            run.found[f"{title}|{name}"] = now[layer.part][layer.key].clone()
        patched.unpatch_model()
        patched_clip.patcher.unpatch_model()
        comfy.model_management.unload_all_models()
    for name, adapter in concept.layers.items():
        run.found[f"engine|{name}"] = before[name] + 0.7 * adapter.delta()
        run.found[f"base|{name}"] = before[name]
    run.facts["patched keys"] = [sorted(ways[title][0].patches) == sorted(ways["ours"][0].patches) for title in ways]


def texts(run: Run, concept) -> None:
    """What a prompt becomes in training and in the host's own encoding, and which columns of a word it hears."""
    base = base_of.host_base(*run.loaded)
    base = replace(base, class_words={"<tom>": "man"})
    (word, rows), *_ = concept.tokens.items()
    long = " ".join(["a <tom> with a dog, a car and a house"] * 9)
    prompts = [f"a photo of {word}", f"{word} at home, in the snow", "a man"]
    for title, asked in {"short": prompts, "long": [long.replace("<tom>", word)] * 2}.items():
        with base.trainable(), torch.no_grad():
            context = base.context(asked, concept.tokens)
        host = [clip_words.encode_prompt(run.loaded[1], prompt, [(concept, 1.0)])[0] for prompt in asked]
        run.found[f"text|{title}"], run.found[f"pooled|{title}"] = context.text, context.pooled
        run.found[f"host text|{title}"] = torch.cat([text for text, _ in host])
        run.found[f"host pooled|{title}"] = torch.cat([about["pooled_output"] for _, about in host])
    said = clip_words.with_tokens(run.loaded[1], {word: rows}, {word: "man"})
    encoded = clip_words.encode_prompt(said, prompts[0])[0]
    run.found["word|as learned"], run.found["word pooled|as learned"] = encoded[0], encoded[1]["pooled_output"]
    for title, columns in {"first": slice(0, 768), "second": slice(768, 2048)}.items():
        other = rows.clone()
        other[:, columns] += 0.3 * torch.randn(other[:, columns].shape, generator=torch.Generator().manual_seed(2))
        encoded = clip_words.encode_prompt(
            clip_words.with_tokens(run.loaded[1], {word: other}, {word: "man"}), prompts[0]
        )[0]
        run.found[f"word|{title}"], run.found[f"word pooled|{title}"] = encoded[0], encoded[1]["pooled_output"]
    export_embeddings(concept, run.folder / "embeddings")
    stock, about = nodes.CLIPTextEncode().encode(run.loaded[1], f"a photo of embedding:{run.plan['main']}")[0][0]
    run.found["word|stock embedding"], run.found["word pooled|stock embedding"] = stock, about["pooled_output"]
    run.found["word|class word"] = clip_words.encode_prompt(run.loaded[1], "a photo of man")[0][0]


def one_step(run: Run, _concept) -> None:
    """The host's sampler asks the network once, at its highest noise level; training asks it the same."""
    base, model = base_of.host_base(*run.loaded), run.loaded[0]
    prompt, size = "a man in the snow", (1, model.model.latent_format.latent_channels, 12, 8)
    positive = clip_words.encode_prompt(run.loaded[1], prompt)
    latent = {"samples": torch.zeros(size)}
    (drawn,) = nodes.common_ksampler(model, 5, 1, 1.0, "euler", "simple", positive, positive, latent)
    noise = comfy.sample.prepare_noise(latent["samples"], 5)
    last, sigma = torch.tensor([len(base.schedule) - 1]), model.model.model_sampling.sigma_max
    with base.trainable(), torch.no_grad():
        predicted = base.predict(noise, base.schedule.times_of(last), base.context([prompt], {}))
    flow = base.architecture == "sd3"
    start = noise if flow else noise * math.sqrt(1 + float(sigma) ** 2)
    run.found["one step|host"] = model.model.process_latent_in(drawn["samples"])
    run.found["one step|training"] = start - sigma * predicted


def regions(run: Run, concept) -> None:
    """Regions in both modes: over everything they are plain sampling, over a half a picture of its own."""
    (word, _), *_ = concept.tokens.items()
    # What acts through the time embedding alone belongs to no position, and no gate has it.
    concept = replace(concept, layers={name: own for name, own in concept.layers.items() if "adaLN" not in name})
    here, elsewhere, stack = f"a {word} in the snow", "a man on a horse", [(concept, 1.0)]
    latent = {"samples": torch.zeros(1, run.loaded[0].model.latent_format.latent_channels, 8, 8)}
    sampling = regions_host.Sampling("euler", "normal", 1, 3.0, 5)
    whole, left, right = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)

    def draw(title: str, prompt: str, *texts: tuple, mode: str = "merged", **more) -> None:
        places = [Region(text, box=box, **more) for text, box in texts]
        prompts = (prompt, "a car")
        drawn = regions_host.sample_regions(
            regions_host.HostModel(*run.loaded[:2]), regions_host.Scene(stack, places, prompts, mode), latent, sampling
        )
        run.found[f"region|{title}"] = drawn["samples"]

    for mode in ("merged", "gated"):
        draw(f"everywhere, {mode}", here, (here, whole), mode=mode)
        draw(f"halves, {mode}", here, (here, left), (here, right), mode=mode, feather=0.5)
        draw(f"half, {mode}", here, (elsewhere, left), mode=mode)
    draw("concept in a half", elsewhere, (here, left), mode="gated")
    draw("no concept in a half", elsewhere, (here, left), mode="gated", concepts=())
    draw("other text everywhere", here, (elsewhere, whole))
    model, clip = patching.merge_into(*run.loaded[:2], stack)
    said_by = {text: clip_words.encode_prompt(clip, text) for text in (here, elsewhere, "a car")}
    # A region has a text of its own; the pooled one, which is no position's, is the global prompt's, and a gate lets
    # no concept read that which a region has.
    outside = gating.with_words(gating.HostModel(*run.loaded[:2]), gating.Stack(stack)).clip

    def pooled_outside(text: str) -> list:
        return [[said_by[text][0][0], clip_words.encode_prompt(outside, text)[0][1]]]

    for title, said in {
        "plain, merged": (said_by[here], said_by["a car"]),
        "plain, gated": (pooled_outside(here), pooled_outside("a car")),
        "plain other text": ([[said_by[elsewhere][0][0], said_by[here][0][1]]], said_by["a car"]),
    }.items():
        (drawn,) = nodes.common_ksampler(model, 5, 1, 3.0, "euler", "normal", *said, latent)
        run.found[f"region|{title}"] = drawn["samples"]


def refusals(run: Run, made: dict, toy: tuple) -> None:
    base = base_of.host_base(*run.loaded)
    for title, case in run.plan["refused cases"].items():
        run.facts["refused"][title] = said(lambda case=case: training.train_in_host(base, lesson(base, case)))
    run.facts["refused"]["other clip"] = said(lambda: base_of.host_base(run.loaded[0], toy[1], run.loaded[2]))
    run.facts["refused"]["no clip"] = said(lambda: base_of.host_base(run.loaded[0], None, run.loaded[2]))
    run.facts["refused"]["other family"] = said(
        lambda: patching.merge_into(*toy[:2], [(next(iter(made.values())), 1.0)])
    )
    run.facts["refused"]["narrow word"] = said(
        lambda: clip_words.with_tokens(run.loaded[1], {"<new>": torch.zeros(1, 768)})
    )


STEPS = {"gradients": gradients, "merge": merge, "texts": texts, "one step": one_step, "regions": regions}


@torch.inference_mode()
def tried(plan: dict, path: Path, folder: Path, warnings: list[str]) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts) of a plan on the checkpoint in `path`; folder: the host's, for what is written."""
    warned = len(warnings)
    run = Run(plan, tiny_models.load(path, plan["stored"], folder / "embeddings"), folder, warnings)
    run.facts["loaded"] = [type(part).__name__ for part in (run.loaded[0].model.model_config, run.loaded[0].model)]
    run.facts["load warnings"] = warnings[warned:]
    before = [traces(*run.loaded[:2], flags=flags) for flags in (True, False)]
    made = train_cases(run)
    run.facts["untouched"] = [traces(*run.loaded[:2]) == before[0]]
    for step in plan["steps"]:
        STEPS[step](run, made[plan["main"]])
    refusals(run, made, load_toy_base())
    comfy.model_management.unload_all_models()
    run.facts["untouched"].append(traces(*run.loaded[:2], flags=False) == before[1])
    return run.found, run.facts
