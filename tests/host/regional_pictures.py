"""In the host: predictions and pictures by region on the toy base, and what is refused."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import torch
from modular_concepts_pack.host import toy_base as toy
from modular_concepts_pack.host.merging import weights as patching
from modular_concepts_pack.host.regions import sampling as regional
from modular_concepts_pack.host.regions.cross_attention import Listening
from modular_concepts_pack.modular_concepts.files.concept import load_concept
from modular_concepts_pack.modular_concepts.regions import shares as places
from modular_concepts_pack.nodes import regions as node

import nodes


@torch.inference_mode()
def drawn(asked: dict[str, torch.Tensor], plan: dict, folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts); the concepts of the plan's stack lie in `folder`."""
    encode = nodes.CLIPTextEncode().encode
    model, clip, _ = toy.load_toy_base()
    stack = tuple((load_concept(folder / f"{n}.safetensors"), s) for n, s in plan["stack"])
    merged, merged_clip = patching.merge_into(model, clip, stack)
    found, facts = {}, {"refused": {}}

    def regions(entries):
        chain = ()
        for entry in entries:
            mask = asked[entry["mask"]] if "mask" in entry else None
            box = entry.get("box", [0.0, 0.0, 1.0, 1.0])
            texts = entry["prompt"], entry.get("negative", "")
            chain = node.ConceptRegion.execute(
                texts[0], entry.get("units", "fractions"), *box, entry.get("feather", 0.0),
                entry.get("strength", 1.0), texts[1], mask, chain,
            )[0]  # fmt: skip
        return chain

    # The network itself: rows of the positive prompt, then of the negative one, as the host batches them.
    prompt, negative = plan["prompt"], plan["negative"]
    (context, _), (bare, _) = encode(merged_clip, prompt)[0][0], encode(merged_clip, negative)[0][0]
    size = asked["noisy"].shape[-1] * 2, asked["noisy"].shape[-2] * 2
    placed = [region.placed(*size) for region in regions(plan["regions"])]
    own = [encode(merged_clip, region.prompt)[0][0][0] for region in placed]
    own_negatives = [bare if r.negative is None else encode(merged_clip, r.negative)[0][0][0] for r in placed]
    heard = Listening(places.Places(placed), own, own_negatives, True)
    listening = regional.listen(merged, heard)
    comfy.model_management.load_models_gpu([listening])
    count = len(asked["noisy"])
    for title, patched in (("regional", listening), ("plain", merged)):
        options = {**patched.model_options["transformer_options"], "cond_or_uncond": [0, 1]}
        sigma = patched.model.model_sampling.sigmas[asked["timesteps"]]
        wide = sigma[:, None, None, None].repeat(2, 1, 1, 1)
        latent = asked["noisy"].repeat(2, 1, 1, 1) * (wide**2 + 1) ** 0.5
        texts = torch.cat([context.repeat(count, 1, 1), bare.repeat(count, 1, 1)])
        denoised = patched.model.apply_model(latent, sigma.repeat(2), c_crossattn=texts, transformer_options=options)
        found[title] = (latent / (wide**2 + 1) - denoised) * (wide**2 + 1) ** 0.5 / wide

    # Whole pictures.
    (noise,) = nodes.EmptyLatentImage().generate(*size)
    settings = {"scheduler": "normal", "steps": 3, "cfg": 3.0, "seed": 5, "denoise": 1.0}

    def draw(
        entries, sampler="euler", model=merged, clip=merged_clip, concepts=None, prompt=prompt, latent=noise, **own
    ):
        return node.RegionalConceptSampler.execute(
            model, clip, prompt, negative, regions(entries), latent, sampler, **settings | own, concepts=concepts
        )[0]["samples"]

    def plain(prompt, sampler="euler", cfg=3.0):
        positive, bare = encode(merged_clip, prompt)[0], encode(merged_clip, negative)[0]
        return nodes.KSampler().sample(merged, 5, 3, cfg, sampler, "normal", positive, bare, noise)[0]["samples"]

    for sampler in plan["samplers"]:
        for title, entries in plan["pictures"].items():
            found[f"{title}|{sampler}"] = draw(entries, sampler)
        found[f"plain inside|{sampler}"] = plain(plan["inside"], sampler)
        found[f"plain|{sampler}"] = plain(prompt, sampler)
    found["unguided"] = draw(plan["pictures"]["full"], cfg=1.0)
    found["unguided plain"] = plain(plan["inside"], cfg=1.0)
    found["stack on base"] = draw(plan["pictures"]["two"], model=model, clip=clip, concepts=stack)
    found["stack twice"] = draw(plan["pictures"]["two"], concepts=stack)
    found["long prompt"] = draw(plan["pictures"]["two"], prompt=" ".join([prompt] * 12))
    again = nodes.common_ksampler(
        merged, 5, 3, 3.0, "euler", "normal", *(encode(merged_clip, t)[0] for t in (prompt, negative)), noise
    )
    found["plain afterwards"] = again[0]["samples"]

    changed = model.clone()
    changed.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
    for title, attempt in {
        "none": lambda: draw([]),
        "outside": lambda: draw([{"prompt": "a dog", "units": "pixels", "box": [0.0, 0.0, 500.0, 32.0]}]),
        "fractions": lambda: draw([{"prompt": "a dog", "box": [0.0, 0.0, 1.5, 1.0]}]),
        "crossed": lambda: draw([{"prompt": "a dog", "box": [0.5, 0.0, 0.5, 1.0]}]),
        "nan": lambda: draw([{"prompt": "a dog", "strength": float("nan")}]),
        "cfg": lambda: draw(plan["pictures"]["two"], cfg=float("nan")),
        "masks": lambda: draw([{"prompt": "a dog", "mask": "two masks"}]),
        "patched": lambda: draw(plan["pictures"]["two"], model=changed),
    }.items():
        try:
            attempt()
            facts["refused"][title] = ""
        except ValueError as error:
            facts["refused"][title] = f"{type(error).__name__}: {error}"
    return found, facts
