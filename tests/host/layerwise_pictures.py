"""In the host: prompts with layer-wise words, on the toy base and on tiny checkpoints; what was drawn and refused."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import tiny_models
import torch
from modular_concepts_pack.host.merging import weights as patching
from modular_concepts_pack.host.text import layerwise
from modular_concepts_pack.host.text.words import encode_prompt
from modular_concepts_pack.host.training.base import host_base
from modular_concepts_pack.modular_concepts.concept import Concept, Recipe
from modular_concepts_pack.modular_concepts.files.concept import load_concept
from modular_concepts_pack.modular_concepts.training import teach
from modular_concepts_pack.modular_concepts.training.settings import TrainSettings
from modular_concepts_pack.nodes import concepts as concepts_node
from modular_concepts_pack.nodes import regions

import nodes

Findings = tuple[dict[str, torch.Tensor], dict]


def said(attempt) -> str:
    try:
        attempt()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@torch.inference_mode()
def look(prefix: str, loaded: tuple, folder: Path, side: int, noisy: torch.Tensor) -> Findings:
    """Draw with words of each kind; prefix: of the concepts' files and of what is found.

    side: pixels of a picture.  noisy: (N, C, H, W), on which the toy base's network itself is asked.
    """
    model, clip = loaded
    found, facts = {}, {"refused": {}}
    concept = {kind: load_concept(folder / f"{prefix}{kind}.safetensors") for kind in ("flat", "even", "varied")}
    merged = {kind: patching.merge_into(model, clip, [(own, 1.0)]) for kind, own in concept.items()}
    noise = nodes.EmptyLatentImage().generate(side, side)[0]
    word, encode = concept["varied"].recipe.class_word, nodes.CLIPTextEncode().encode
    facts[f"{prefix}layers"] = layerwise.cross_attention_layers(model)

    def prompt(kind: str, text: str) -> list:
        return concepts_node.ConceptTextEncode.execute(merged[kind][1], text.replace("{}", f"<{kind}>"))[0]

    def draw(kind: str, positive: str, negative: str = "a car", title: str | None = None, sampler="euler"):
        """A picture; with a title, the batch size of every call of the U-Net is noted."""
        asked, calls = merged[kind][0], []
        if title is not None:
            asked = asked.clone()

            def counted(apply, about):
                calls.append(len(about["input"]))
                return apply(about["input"], about["timestep"], **about["c"])

            asked.set_model_unet_function_wrapper(counted)
            facts[f"{prefix}calls {title}"] = calls
        said, unsaid = prompt(kind, positive), prompt(kind, negative)
        return nodes.common_ksampler(asked, 5, 3, 3.0, sampler, "normal", said, unsaid, noise)[0]["samples"]

    for sampler in ("euler", "dpmpp_2m_sde"):
        for kind in merged:
            found[f"{prefix}{kind}|{sampler}"] = draw(kind, "a {} in the snow", sampler=sampler)
    found[f"{prefix}plain"] = draw("flat", f"a {word} in the snow")
    found[f"{prefix}plain beside layers"] = draw("varied", f"a {word} in the snow", title="plain")
    draw("varied", "a {} in the snow", title="varied")
    found[f"{prefix}long|even"] = draw("even", "a {} in the snow", " ".join(["a car and a dog"] * 30), title="long")
    found[f"{prefix}long|flat"] = draw("flat", "a {} in the snow", " ".join(["a car and a dog"] * 30))
    for kind in ("even", "flat"):
        found[f"{prefix}negative|{kind}"] = draw(kind, "a dog", "a {} in the snow")
        found[f"{prefix}weighted|{kind}"] = draw(kind, "a ({}:1.3) in the snow")
    (context, about) = prompt("varied", "a {} in the snow")[0]
    found[f"{prefix}context"], found[f"{prefix}contexts"] = context, about[layerwise.LAYERS]
    facts[f"{prefix}plain keys"] = sorted(prompt("varied", "a dog")[0][1]) == sorted(
        encode(merged["varied"][1], "a dog")[0][0][1]
    )

    # By region: everywhere, in one half beside a plain global prompt, and with equal rows.
    def regional(kind: str, text: str, box: tuple, region: str, negative: str = ""):
        entries = regions.ConceptRegion.execute(
            region.replace("{}", f"<{kind}>"), "fractions", *box, 0.0, 1.0, negative
        )
        return regions.RegionalConceptSampler.execute(
            *merged[kind], text.replace("{}", f"<{kind}>"), "a car", entries[0], noise, "euler",
            scheduler="normal", steps=3, cfg=3.0, seed=5, denoise=1.0,
        )[0]["samples"]  # fmt: skip

    everywhere, half = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)
    for kind in merged:
        found[f"{prefix}everywhere|{kind}"] = regional(kind, f"a {word}", everywhere, "a {} in the snow")
        found[f"{prefix}half|{kind}"] = regional(kind, f"a {word}", half, "a {} in the snow", "a {}")
        found[f"{prefix}around|{kind}"] = regional(kind, "a {} in the snow", half, f"a {word}")

    # The network itself, on one noisy latent: what each layer hears, against the headless U-Net.
    latent = torch.randn(noise["samples"].shape, generator=torch.Generator().manual_seed(3))
    if not prefix:
        latent = noisy
        comfy.model_management.load_models_gpu([merged["varied"][0]])
        contexts = about[layerwise.LAYERS].expand(len(latent), -1, -1, -1)
        options = {"patches": {"attn2_patch": [layerwise.PickLayer(contexts.shape[1])]}}
        timesteps = torch.full((len(latent),), 500.0)
        unet = merged["varied"][0].model.diffusion_model
        stacked = layerwise.stacked(contexts)
        found["predicted"] = unet(latent, timesteps, context=stacked, transformer_options=options)

    facts["refused"][f"{prefix}core"] = said(lambda: encode(merged["varied"][1], "a <varied> man"))
    facts["refused"][f"{prefix}core without it"] = said(lambda: encode(merged["varied"][1], "a man"))
    words = [layerwise.LearnedWord("<odd>", concept["varied"].tokens["<varied>"][:3])]
    facts["refused"][f"{prefix}layers"] = said(lambda: layerwise.refuse_other_layers(words, facts[f"{prefix}layers"]))
    facts["refused"][f"{prefix}none"] = said(lambda: layerwise.refuse_other_layers(words, 0))
    facts[f"{prefix}left"] = [
        "attn2_patch" in options.model_options["transformer_options"].get("patches", {})
        for options, _ in merged.values()
    ]
    facts[f"{prefix}wrapped"] = {kind: len(one[0].wrappers.get("outer_sample", {})) for kind, one in merged.items()}
    return found, facts


@torch.inference_mode()
def look_at_sdxl(path: Path) -> Findings:
    """Two text models and fewer layers; the words are those of `words`, made for as many layers as there are."""
    found, facts = {}, {}
    model, clip, _ = tiny_models.load(path)
    layers = layerwise.cross_attention_layers(model)
    rows = 0.3 * torch.randn(layers, 2, 768 + 1280, generator=torch.Generator().manual_seed(4))
    noise = nodes.EmptyLatentImage().generate(64, 64)[0]
    for kind, own in (("flat", rows[0]), ("even", rows[:1].repeat(layers, 1, 1)), ("varied", rows)):
        changed, knowing = patching.merge_into(model, clip, [(word_alone(kind, own, "sdxl"), 1.0)])
        prompt, negative = encode_prompt(knowing, f"a <{kind}> in the snow"), encode_prompt(knowing, "a car")
        calls = facts[f"sdxl_calls {kind}"] = []

        def counted(apply, about, calls=calls):
            calls.append(len(about["input"]))
            return apply(about["input"], about["timestep"], **about["c"])

        changed.set_model_unet_function_wrapper(counted)
        found[f"sdxl_{kind}"] = nodes.common_ksampler(changed, 5, 2, 3.0, "euler", "normal", prompt, negative, noise)[
            0
        ]["samples"]
    facts["sdxl_layers"], facts["sdxl_contexts"] = layers, list(prompt[0][1][layerwise.LAYERS].shape)
    return found, facts


def word_alone(name: str, rows: torch.Tensor, architecture: str):
    recipe = Recipe(method="words", architecture=architecture, triggers=(f"<{name}>",), class_word="dog")
    return Concept(name, {}, {f"<{name}>": rows}, recipe)


def refused_by_sd3(path: Path) -> dict[str, str]:
    """A diffusion transformer has no layers that a word could be learned for."""
    model, clip, vae = tiny_models.load(path)
    rows, refused = torch.zeros(4, 2, 768 + 1280), {}
    word = word_alone("varied", rows, "sd3")
    refused["sd3_merged"] = said(lambda: patching.merge_into(model, clip, [(word, 1.0)]))
    base = host_base(model, clip, vae)
    subject = teach.Subject("new", torch.zeros(2, 3, 64, 64), ["a <new>"] * 2, "dog")
    for kind, by_layer in (("trained", True), ("trained flat", False)):
        settings = TrainSettings(method="words", layerwise=by_layer)
        refused[f"sd3_{kind}"] = said(lambda settings=settings: teach.check_training(base, subject, settings))
    return refused
