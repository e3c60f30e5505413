"""In the host: load the toy base, put it through the host's own nodes, write down what they give."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfyui_version
import folder_paths
import latent_preview
import torch
from modular_concepts_pack.host import toy_base as toy
from modular_concepts_pack.host.text import words as clip_module

import nodes


def velocity(model, noisy, timesteps, context):
    """The model's v at (noisy, timesteps), solved from the denoised latent that the host's samplers see."""
    comfy.model_management.load_models_gpu([model])
    sigma = model.model.model_sampling.sigmas[timesteps]
    wide = sigma[:, None, None, None]
    latent = noisy * (wide**2 + 1) ** 0.5  # the host's noisy latent is signal + sigma * noise
    denoised = model.model.apply_model(latent, sigma, c_crossattn=context)
    return (latent / (wide**2 + 1) - denoised) * (wide**2 + 1) ** 0.5 / wide


@torch.inference_mode()
def looked_at(asked: dict[str, torch.Tensor], plan: dict, folder: Path, replaced, warnings) -> tuple[dict, dict]:
    """(tensors, facts); `folder` is the host's, with a stock LoRA and a learned embedding."""
    model, clip, vae = toy.load_toy_base(Path(plan["weights"]), [str(folder)])
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    found, facts = {}, {"version": comfyui_version.__version__}
    facts["real"] = [
        isinstance(model, comfy.model_patcher.ModelPatcher),
        isinstance(clip, comfy.sd.CLIP),
        isinstance(vae, comfy.sd.VAE),
    ]
    found["sigmas"] = model.model.model_sampling.sigmas

    for size in plan["sizes"]:
        key = f"{size[0]}x{size[1]}"
        found[f"velocity.{key}"] = velocity(
            model, asked[f"noisy.{key}"], asked["timesteps"], asked["context"][: len(asked["timesteps"])]
        )
        (empty,) = nodes.EmptyLatentImage().generate(*size)
        fixed = comfy.sample.fix_empty_latent_channels(model, empty["samples"], empty.get("downscale_ratio_spacial"))
        facts[f"empty.{key}"] = list(fixed.shape)

    encoder = nodes.CLIPTextEncode()
    for index, prompt in enumerate(plan["prompts"]):
        ((found[f"context.{index}"], _),) = encoder.encode(clip, prompt)[0]
    triggered = clip_module.with_tokens(clip, {plan["trigger"]: asked["token"]})
    ((found["context.trigger"], _),) = encoder.encode(triggered, plan["trigger_prompt"])[0]
    ((found["context.embedding"], _),) = encoder.encode(clip, plan["embedding_prompt"])[0]
    ((found["context.trigger_weighted"], _),) = encoder.encode(triggered, plan["trigger_weighted"])[0]
    ((found["context.long"], _),) = encoder.encode(clip, "man " * 60)[0]

    (encoded,) = nodes.VAEEncode().encode(vae, asked["picture"].movedim(1, -1))
    (decoded,) = nodes.VAEDecode().decode(vae, encoded)
    (odd,) = nodes.VAEEncode().encode(vae, asked["picture"][:, :, :31, :29].movedim(1, -1))
    found |= {"latent": encoded["samples"], "decoded": decoded.movedim(-1, 1), "latent_odd": odd["samples"]}
    tiled = vae.decode_tiled(encoded["samples"], tile_x=8, tile_y=8, overlap=2)
    found["decoded_tiled"] = tiled.movedim(-1, 1)
    preview = latent_preview.Latent2RGBPreviewer(
        model.model.latent_format.latent_rgb_factors,
        model.model.latent_format.latent_rgb_factors_bias,
        model.model.latent_format.latent_rgb_factors_reshape,
    )
    facts["preview"] = list(preview.decode_latent_to_preview(encoded["samples"]).size)

    positive, negative = encoder.encode(clip, plan["prompts"][0])[0], encoder.encode(clip, "")[0]
    previews = []
    replaced.setattr(latent_preview, "get_previewer", lambda *_: preview)
    stock = preview.decode_latent_to_preview_image
    preview.decode_latent_to_preview_image = lambda *args: previews.append(stock(*args)) or previews[-1]
    (empty,) = nodes.EmptyLatentImage().generate(32, 32)
    sampler = nodes.KSampler()
    settings = (plan["seed"], plan["steps"], plan["cfg"], "euler", "normal", positive, negative, empty, 1.0)
    (sampled,) = sampler.sample(model, *settings)
    found["sampled"] = sampled["samples"]
    found["picture"] = nodes.VAEDecode().decode(vae, sampled)[0].movedim(-1, 1)
    facts["previews"] = len(previews)
    found["sampler_sigmas"] = comfy.samplers.KSampler(
        model, steps=plan["steps"], device="cpu", sampler="euler", scheduler="normal", denoise=1.0
    ).sigmas
    for name in plan["samplers"]:
        (other,) = sampler.sample(model, *settings[:3], name, "karras", *settings[5:])
        found[f"picture.{name}"] = nodes.VAEDecode().decode(vae, other)[0].movedim(-1, 1)

    folder_paths.add_model_folder_path("loras", str(folder))
    warned = len(warnings)
    patched, patched_clip = nodes.LoraLoader().load_lora(model, clip, "stock_lora.safetensors", 0.7, 0.7)
    facts["lora_warnings"] = warnings[warned:]
    facts["lora_layers"] = [len(patched.patches), len(patched_clip.patcher.patches)]
    ((found["context.lora"], _),) = encoder.encode(patched_clip, plan["prompts"][0])[0]
    key = f"{plan['sizes'][0][0]}x{plan['sizes'][0][1]}"
    found["velocity.lora"] = velocity(
        patched, asked[f"noisy.{key}"], asked["timesteps"], asked["context"][: len(asked["timesteps"])]
    )
    comfy.model_management.unload_all_models()
    patched.unpatch_model()
    after = model.model.state_dict()
    facts["untouched"] = all(torch.equal(before[name], after[name]) for name in before)
    second = toy.load_model(*model.cached_patcher_init[1], disable_dynamic=True)
    facts["second"] = all(torch.equal(second.model.state_dict()[name], before[name]) for name in before)
    facts["warnings"] = warnings
    return found, facts
