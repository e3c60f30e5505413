"""In the host: gated regions on the toy base and on a tiny checkpoint in Stable Diffusion 1.5's layout."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.t2i_adapter.adapter
import torch
from comfy_extras import nodes_model_advanced, nodes_pag
from modular_concepts_pack.host import layers as layers_host
from modular_concepts_pack.host.merging import weights as patching
from modular_concepts_pack.host.regions import sampling as regions_host
from modular_concepts_pack.host.text import words as clip_words
from modular_concepts_pack.host.toy_base import load_toy_base
from modular_concepts_pack.modular_concepts import concept
from modular_concepts_pack.modular_concepts.adapters import low_rank as adapters
from modular_concepts_pack.modular_concepts.files.concept import load_concept as load
from modular_concepts_pack.modular_concepts.regions import geometry

import nodes


def digest(model) -> str:
    """Of the weights as they are when no model of the host has patches in them."""
    comfy.model_management.unload_all_models()
    whole = hashlib.sha256()
    for key, value in sorted(model.model.state_dict().items()):
        whole.update(key.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def hooks(model) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.model.modules())


class Look:
    """Pictures of one base, by regions with its stack and plain with concepts merged.

    plan: prompts, regions and pictures to draw.  asked: masks and latents for them.  found, facts: what came of it.
    """

    def __init__(self, prefix: str, loaded: tuple, stack: list, plan: dict, asked: dict[str, torch.Tensor]):
        self.prefix, (self.model, self.clip), self.stack = prefix, loaded, stack
        self.plan, self.asked, self.control = plan, asked, None
        size = (4, 8, 12) if prefix else (12, 16, 48)
        self.latent = {"samples": torch.zeros(1, *size)}
        self.found: dict[str, torch.Tensor] = {}
        self.facts: dict = {"refused": {}, "hooks": {}, "calls": {}}

    def regions(self, entries: list[dict]) -> list:
        made = []
        for entry in entries:
            own = {"box": (0.0, 0.0, 1.0, 1.0), **entry}
            mask = self.asked[own.pop("mask")][0] if "mask" in own else None
            own = {**own, "mask": mask, "box": None if mask is not None or own["box"] is None else tuple(own["box"])}
            made.append(geometry.Region(**own))
        return made

    def regional(self, entries, sampler="euler", model=None, latent=None, stack=None, change=None, **own):
        own = {"cfg": 3.0, "seed": 5, "steps": 2, "denoise": 1.0, "mode": "gated", **own}
        mode, overlap = own.pop("mode"), own.pop("overlap", "average")
        prompts = own.pop("prompt", self.plan["prompt"]), self.plan["negative"]
        placed = [region.placed(96, 32) for region in self.regions(entries)]
        ready = regions_host.with_regions(
            regions_host.HostModel(model or self.model, self.clip),
            regions_host.Scene(self.stack if stack is None else stack, placed, prompts, mode, overlap),
        )
        return self.sample(ready.model if change is None else change(ready.model), *ready[1:], sampler, latent, **own)

    def plain(self, prompt, names, sampler="euler", latent=None, change=None, **own):
        own = {"cfg": 3.0, "seed": 5, "steps": 2, "denoise": 1.0, **own}
        chosen = [pair for pair in self.stack if pair[0].name in names]
        model, clip = patching.merge_into(self.model, self.clip, chosen) if chosen else (self.model, self.clip)
        said = [clip_words.encode_prompt(clip, text) for text in (prompt, self.plan["negative"])]
        return self.sample(model if change is None else change(model), *said, sampler, latent, **own)

    def sample(self, model, positive, negative, sampler, latent, cfg, seed, steps, denoise):
        latent = self.latent if latent is None else latent
        if self.control is not None:
            hint = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
            positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
                positive, negative, self.control, hint, 1.0, 0.0, 1.0
            )
            # A ControlNet hears the global prompts, which are others here and there.
            positive, negative = (
                [[context, {**about, "cross_attn_controlnet": clip_words.encode_prompt(self.clip, text)[0][0]}]]
                for ((context, about),), text in ((positive, self.plan["prompt"]), (negative, self.plan["negative"]))
            )
        return nodes.common_ksampler(model, seed, steps, cfg, sampler, "normal", positive, negative, latent, denoise)[
            0
        ]["samples"]

    def both(self, title: str, **settings) -> None:
        """A region over everything by gate, and the same concept merged."""
        entry = {"prompt": self.plan["inside"]}
        self.found[f"{self.prefix}{title}|full"] = self.regional([entry], **settings)
        self.found[f"{self.prefix}{title}|merged"] = self.plain(self.plan["inside"], ["rex"], **settings)


def patched_by(node, *arguments):
    """A model change by a node of the host, whatever version of nodes it is."""
    way = node.execute if hasattr(node, "execute") else getattr(node(), node.FUNCTION)
    return lambda model: way(model, *arguments)[0]


def counted(look: Look, title: str):
    """Notes how many rows every call of the network has."""

    def change(model):
        model = model.clone()

        def call(apply, about):
            look.facts["calls"].setdefault(title, []).append(len(about["input"]))
            return apply(about["input"], about["timestep"], **about["c"])

        model.set_model_unet_function_wrapper(call)
        return model

    return change


def failing(look: Look, model):
    """Fails in the midst of the second call of the network."""
    model, calls = model.clone(), []

    def fail(options):
        calls.append(1)
        look.facts["hooks"]["inside"] = hooks(model)
        if len(calls) > 1:
            raise RuntimeError("on purpose")
        return options

    model.set_model_input_block_patch(
        lambda hidden, options: (fail(options), hidden)[1] if options["block"][1] == 1 else hidden
    )
    return model


def common(look: Look) -> None:
    """What holds on any U-Net."""
    look.facts["hooks"][f"{look.prefix}before"], before = hooks(look.model), digest(look.model)
    look.both("euler")
    look.found[f"{look.prefix}inside, nothing gated"] = look.plain(look.plan["inside"], [])
    for title in ("two", "two in other order", "one text everywhere"):
        look.found[f"{look.prefix}{title}"] = look.regional(look.plan["pictures"][title])
    look.found[f"{look.prefix}plain text everywhere"] = look.plain(look.plan["everywhere"], ["rex"])
    look.both("odd size", latent={"samples": torch.zeros(1, look.latent["samples"].shape[1], 13, 21)})
    look.facts["hooks"][f"{look.prefix}after"], look.facts[f"{look.prefix}untouched"] = (
        hooks(look.model),
        digest(look.model) == before,
    )


def toy(plan: dict, asked: dict[str, torch.Tensor], folder: Path) -> Look:
    """On the toy base; the concepts of the plan's stack lie in `folder`."""
    stack = [(load(folder / f"{name}.safetensors"), strength) for name, strength in plan["stack"]]
    look = Look("", load_toy_base()[:2], stack, plan, asked)
    model, clip, noise = look.model, look.clip, look.latent
    common(look)

    # The network itself, against the headless sampler: rows of the positive prompt, then of the negative one.
    placed = [region.placed(96, 32) for region in look.regions(look.plan["regions"])]
    prompts = (look.plan["prompt"], look.plan["negative"])
    base = regions_host.HostModel(model, clip)
    ready = regions_host.with_regions(base, regions_host.Scene(stack, placed, prompts, "gated"))
    comfy.model_management.load_models_gpu([ready.model])
    count, patched = len(look.asked["noisy"]), ready.model
    options = {**patched.model_options["transformer_options"], "cond_or_uncond": [0, 1]}
    sigma = patched.model.model_sampling.sigmas[look.asked["timesteps"]]
    wide = sigma[:, None, None, None].repeat(2, 1, 1, 1)
    latent = look.asked["noisy"].repeat(2, 1, 1, 1) * (wide**2 + 1) ** 0.5
    texts = torch.cat([own[0][0].repeat(count, 1, 1) for own in ready[1:]])
    denoised = patched.model.apply_model(latent, sigma.repeat(2), c_crossattn=texts, transformer_options=options)
    look.found["network"] = (latent / (wide**2 + 1) - denoised) * (wide**2 + 1) ** 0.5 / wide

    for sampler in look.plan["samplers"]:
        look.both(sampler, sampler=sampler)
        for title in ("two", "two in other order"):
            look.found[f"{title}|{sampler}"] = look.regional(look.plan["pictures"][title], sampler)
    look.both("unguided", cfg=1.0)
    look.both("rescaled guidance", change=patched_by(nodes_model_advanced.RescaleCFG, 0.7))
    look.both("perturbed attention", change=patched_by(nodes_pag.PerturbedAttentionGuidance, 2.0))
    pair = {"samples": look.asked["start"].clone()}
    look.both("batch", latent=pair)
    look.both("image to image", latent=pair, denoise=0.6)
    look.both("inpainting", latent={**pair, "noise_mask": look.asked["mask"]}, denoise=0.8)

    two = look.plan["pictures"]["two"]
    look.found["batched"] = look.regional(two, change=counted(look, "batched"), latent=pair)
    required, model.model.memory_required = model.model.memory_required, lambda *_args, **_more: 1e30
    look.found["split"] = look.regional(two, change=counted(look, "split"), latent=pair)
    model.model.memory_required = required
    look.found["without concepts"] = look.regional(two, stack=[])
    merged = patching.merge_into(model, clip, stack)
    look.found["merged mode"] = look.regional(two, mode="merged")
    look.found["on top"] = look.regional(look.plan["pictures"]["overlap"], overlap="priority")
    look.found["shared"] = look.regional(look.plan["pictures"]["overlap"])
    look.found["early"], look.found["late"] = (
        look.regional([{**entry, "start": start, "end": end} for entry in two]) for start, end in ((0, 0.5), (0.5, 1))
    )
    sampling = regions_host.Sampling("euler", "normal", 2, 3.0, 5)
    scene = regions_host.Scene(stack, look.regions(two), prompts, "gated")
    look.found["all in one"] = regions_host.sample_regions(base, scene, noise, sampling)["samples"]

    automatic(look, sampling)

    def search(entries, latent=noise):
        scene = regions_host.Scene(stack, unplaced(entries), (look.plan["prompt"], ""))
        return regions_host.place_regions(base, scene, latent, sampling)

    before = digest(model)
    try:
        look.regional(two, change=partial(failing, look))
    except RuntimeError as error:
        look.facts["failed"] = str(error)
    look.facts["hooks"]["after failing"], look.facts["untouched by failing"] = hooks(model), digest(model) == before
    look.found["afterwards"] = look.regional(two)
    for title, attempt in {
        "merged already": lambda: regions_host.with_regions(
            regions_host.HostModel(*merged), regions_host.Scene(stack, look.regions(two), ("a", ""), "gated")
        ),
        "unknown": lambda: look.regional([{"prompt": "a man", "concepts": ["tim"]}]),
        "mode": lambda: look.regional(two, mode="both"),
        "overlap": lambda: look.regional(two, overlap="sum"),
        "twice": lambda: look.regional(two, model=ready.model),
        "no room": lambda: with_total_memory(2**30, lambda: look.regional(two)),
        "unplaced": lambda: look.regional([{"prompt": "a <tom>", "box": None}]),
        "nothing to look for": lambda: search([{"prompt": "a bird"}]),
        "unsaid": lambda: search([{"prompt": "a man", "concepts": ["tom"]}]),
        "two pictures": lambda: search([{"prompt": "a <tom>"}], latent=pair),
    }.items():
        try:
            attempt()
            look.facts["refused"][title] = ""
        except ValueError as error:
            look.facts["refused"][title] = f"{type(error).__name__}: {error}"
    return look


def with_total_memory(size: int, attempt):
    """attempt() on a device of so many bytes, all of which the sampling itself needs."""
    management = comfy.model_management
    before = management.get_total_memory, management.minimum_inference_memory
    management.get_total_memory, management.minimum_inference_memory = lambda *_: size, lambda: size
    try:
        return attempt()
    finally:
        management.get_total_memory, management.minimum_inference_memory = before


def unplaced(entries: list[dict]) -> list:
    return [
        geometry.Region(**{**entry, "concepts": tuple(entry["concepts"])} if "concepts" in entry else entry)
        for entry in entries
    ]


def automatic(look: Look, sampling) -> None:
    """Places are found with the picture's own noise, beside one that is drawn already."""
    wanted = [
        *unplaced([{"prompt": "a <tom> at night"}, {"prompt": "a <rex> at night"}]),
        geometry.Region("a bird", (0.0, 0.0, 0.1, 0.2)),
    ]
    base = regions_host.HostModel(look.model, look.clip)
    for title, prompt in {"": look.plan["prompt"], ", called": "a <tom> and a <rex> at night"}.items():
        scene = regions_host.Scene(look.stack, wanted, (prompt, look.plan["negative"]))
        placed, again = (regions_host.place_regions(base, scene, look.latent, sampling) for _ in range(2))
        look.found[f"found{title}"], look.found[f"found again{title}"] = (
            torch.stack([region.mask for region in made[:2]]) for made in (placed, again)
        )
        look.facts.setdefault("kept", []).append(
            placed[2] is wanted[2] and [region.prompt for region in placed] == [region.prompt for region in wanted]
        )
    prompts = (look.plan["prompt"], look.plan["negative"])
    first = regions_host.place_regions(base, regions_host.Scene(look.stack, wanted, prompts), look.latent, sampling)
    for title, regions in {"found by the sampler": wanted, "found before": first}.items():
        scene = regions_host.Scene(look.stack, regions, prompts, "gated")
        look.found[title] = regions_host.sample_regions(base, scene, look.latent, sampling)["samples"]


def stable_diffusion(plan: dict, asked: dict[str, torch.Tensor], checkpoint: Path) -> Look:
    """Concepts here have convolutions too, and a text encoder of their own."""
    whole = {"dtype": torch.float32}
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
        str(checkpoint), model_options=whole, te_model_options=whole
    )
    every = layers_host.host_layers(model, clip)
    stack = []
    for number, name in enumerate(("tom", "rex")):
        generator, layers = torch.Generator().manual_seed(number), {}
        for layer, own in every.items():
            if ".encoder.layers.0." in layer or (
                ".encoder" not in layer and "time_emb" not in layer and "embeddings" not in layer
            ):
                out, inp, *kernel = own.module.weight.shape
                made = adapters.new_lora(out, inp, 2, None, generator, kernel or None)
                layers[layer] = made.replace(lora_up=0.05 * torch.randn(out, 2, generator=generator))
        recipe = concept.Recipe(architecture="sd15", triggers=(f"<{name}>",), class_word="dog")
        words = {f"<{name}>": 0.05 * torch.randn(1, 768, generator=generator)}
        stack.append((concept.Concept(name, layers, words, recipe), 0.7 + number / 2))
    look = Look("sd15 ", (model, clip), stack, plan, asked)
    look.facts["kinds"] = sorted({len(adapter.lora_down.shape) for adapter in stack[0][0].layers.values()})
    common(look)
    free, left = {"prompt": look.plan["inside"], "control": 0.0}, [0.0, 0.0, 0.5, 1.0]
    for title, control in (("controlled", control_net()), ("adapted", t2i_adapter())):
        look.control = control
        look.both(title)
        look.found[f"sd15 {title}, free"] = look.regional([free])
        look.found[f"sd15 {title}, half free"] = look.regional(
            [{**free, "box": left}, {"prompt": look.plan["inside"], "box": [0.5, 0, 1, 1]}]
        )
    return look


def control_net():
    """A ControlNet for the tiny checkpoint's U-Net, random as that is."""
    shape = dict(
        image_size=32, in_channels=4, hint_channels=3, model_channels=320, channel_mult=[1], num_res_blocks=[1],
        num_heads=8, num_head_channels=-1, context_dim=768, use_spatial_transformer=True, transformer_depth=[1],
        transformer_depth_middle=1,
    )  # fmt: skip
    network = comfy.cldm.cldm.ControlNet(**shape, operations=comfy.ops.disable_weight_init, dtype=torch.float32)
    randomise(network)
    return comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())


class TinyAdapter(comfy.t2i_adapter.adapter.Adapter):
    """The first level of a T2I-Adapter, handed to the second of the tiny U-Net's two input blocks."""

    def forward(self, hint):
        return {"input": [*super().forward(hint)["input"][:1], None]}


def t2i_adapter():
    network = TinyAdapter(channels=[320], nums_rb=2, cin=3 * 64, ksize=1, sk=True, use_conv=False, xl=False)
    randomise(network)
    return comfy.controlnet.T2IAdapter(network, 3, 8, "nearest-exact")


def randomise(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for weight in network.parameters():
        weight.data = 0.03 * torch.randn(weight.shape, generator=generator)


@torch.inference_mode()
def drawn(plan: dict, asked: dict[str, torch.Tensor], folder: Path, checkpoint: Path) -> tuple[dict, dict]:
    """(tensors, facts) of both bases."""
    on_toy, on_sd = toy(plan, asked, folder), stable_diffusion(plan, asked, checkpoint)
    hooked = on_toy.facts["hooks"] | on_sd.facts["hooks"]
    return on_toy.found | on_sd.found, on_sd.facts | on_toy.facts | {"hooks": hooked}
