"""In the host: prompts with layer-wise words on the toy base and, where there is one, on FOLDER's tiny checkpoint."""

from __future__ import annotations

import asyncio
import json

from in_host import FOLDER, pack_module, start

start()

import comfy.model_management
import comfy.sd
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import nodes

torch.set_num_threads(1)
plan = json.loads((FOLDER / "plan.json").read_text())
found: dict = {}
facts: dict = {"refused": {}}


def said(attempt) -> str:
    try:
        attempt()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@torch.inference_mode()
def look(prefix: str, model, clip) -> None:
    """Draw with words of each kind; prefix: of the concepts' files and of what is found."""
    layerwise, patching = pack_module("host.text.layerwise"), pack_module("host.merging.weights")
    regions, concepts_node = pack_module("nodes.regions"), pack_module("nodes.concepts")
    load_concept = pack_module("modular_concepts.files.concept").load_concept
    concept = {kind: load_concept(FOLDER / f"{prefix}{kind}.safetensors") for kind in ("flat", "even", "varied")}
    merged = {kind: patching.merged(model, clip, [(own, 1.0)]) for kind, own in concept.items()}
    side = plan["sides"][prefix]
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
    facts[f"{prefix}plain keys"] = sorted(prompt("varied", "a dog")[0][1]) == sorted(encode(clip, "a dog")[0][0][1])

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
        latent = load_file(FOLDER / "asked.safetensors")["noisy"]
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


@torch.inference_mode()
def look_at_sdxl() -> None:
    """Two text models and fewer layers; the words are those of `words`, made for as many layers as there are."""
    tiny_models.write("vega")
    model, clip, _ = tiny_models.load("vega")
    layerwise, patching = pack_module("host.text.layerwise"), pack_module("host.merging.weights")
    encode_prompt = pack_module("host.text.words").encode_prompt
    layers = layerwise.cross_attention_layers(model)
    rows = 0.3 * torch.randn(layers, 2, 768 + 1280, generator=torch.Generator().manual_seed(4))
    noise = nodes.EmptyLatentImage().generate(64, 64)[0]
    for kind, own in (("flat", rows[0]), ("even", rows[:1].repeat(layers, 1, 1)), ("varied", rows)):
        changed, knowing = patching.merged(model, clip, [(word_alone(kind, own, "sdxl"), 1.0)])
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


def word_alone(name: str, rows: torch.Tensor, architecture: str):
    concept = pack_module("modular_concepts.concept")
    recipe = concept.Recipe(method="words", architecture=architecture, triggers=(f"<{name}>",), class_word="dog")
    return concept.Concept(name, {}, {f"<{name}>": rows}, recipe)


def look_at_sd3() -> None:
    """A diffusion transformer has no layers that a word could be learned for."""
    tiny_models.write("sd3")
    model, clip, vae = tiny_models.load("sd3")
    customisation, training = (
        pack_module("modular_concepts.training.teach"),
        pack_module("modular_concepts.training.settings"),
    )
    merged = pack_module("host.merging.weights").merged
    rows = torch.zeros(4, 2, 768 + 1280)
    facts["refused"]["sd3_merged"] = said(lambda: merged(model, clip, [(word_alone("varied", rows, "sd3"), 1.0)]))
    base = pack_module("host.training.base").host_base(model, clip, vae)
    subject = customisation.Subject("new", torch.zeros(2, 3, 64, 64), ["a <new>"] * 2, "dog")
    for kind, layerwise in (("trained", True), ("trained flat", False)):
        settings = training.TrainSettings(method="words", layerwise=layerwise)
        facts["refused"][f"sd3_{kind}"] = said(
            lambda settings=settings: customisation.check_training(base, subject, settings)
        )


def main() -> None:
    asyncio.run(pack_module("nodes").ModularConcepts().on_load())
    look("", *pack_module("host.toy_base").load_toy_base()[:2])
    checkpoint = FOLDER / "tiny_sd15.safetensors"
    if checkpoint.is_file():
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
        look("sd_", model, clip)
    look_at_sdxl()
    look_at_sd3()
    save_file({key: value.float().contiguous().clone() for key, value in found.items()}, FOLDER / "found.safetensors")
    (FOLDER / "found.json").write_text(json.dumps(facts))


main()
