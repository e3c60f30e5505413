"""In the host: every path on the CPU or on the stand-in for a GPU, concepts from files and models offloaded.

`engine/stand_in_device.py` is that device.  What the host asks of the machine, how much memory a device has and which
kinds of numbers it takes, is answered here; everything else is the host's own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace

from in_host import FOLDER, PACK, pack_module, start

start()
sys.path[:0] = [str(PACK / "tests" / room) for room in ("engine", "host")]

import comfy.hooks
import comfy.model_management as management
import comfy.sample
import folder_paths
import stand_in_device
import tiny_models
import torch
from safetensors.torch import save_file

import nodes

torch.set_num_threads(1)
for name in ("concepts", "output"):
    (FOLDER / name).mkdir(exist_ok=True)
folder_paths.set_output_directory(str(FOLDER / "output"))
folder_paths.add_model_folder_path("concepts", str(FOLDER / "concepts"))

asyncio.run(pack_module("nodes").ModularConcepts().on_load())
host = {
    "base": pack_module("host.training.base"),
    "fusion": pack_module("host.merging.fusion"),
    "hooks": pack_module("host.merging.hook"),
    "layers": pack_module("host.layers"),
    "layerwise": pack_module("host.text.layerwise"),
    "merging": pack_module("host.merging.notices"),
    "patching": pack_module("host.merging.weights"),
    "regions": pack_module("host.regions.sampling"),
    "toy": pack_module("host.toy_base"),
    "training": pack_module("host.training.train"),
}
adapters, concept_of, files = (
    pack_module("modular_concepts.adapters.low_rank"),
    pack_module("modular_concepts.concept"),
    pack_module("modular_concepts.files.concept"),
)
customisation, sampling, merge, training = (
    pack_module("modular_concepts.training.teach"),
    pack_module("modular_concepts.sampling"),
    pack_module("modular_concepts.merging"),
    pack_module("modular_concepts.training.settings"),
)
encode_prompt, Region = (
    pack_module("host.text.words").encode_prompt,
    pack_module("modular_concepts.regions.geometry").Region,
)
Sampling = host["regions"].Sampling

found: dict[str, torch.Tensor] = {}
faults: dict[str, str] = {}
GIB = 2**30


def use(device: torch.device) -> None:
    """Let the host compute on a device, and keep what is not needed on the CPU."""
    management.get_torch_device = management.text_encoder_device = management.vae_device = lambda *_: device
    management.unet_offload_device = management.vae_offload_device = lambda *_: torch.device("cpu")
    management.text_encoder_offload_device = management.intermediate_device = lambda *_: torch.device("cpu")
    management.get_free_memory = lambda dev=None, torch_free_too=False: (4 * GIB, GIB) if torch_free_too else 4 * GIB
    management.get_total_memory = lambda dev=None, torch_total_too=False: (8 * GIB, GIB) if torch_total_too else 8 * GIB
    management.should_use_fp16 = management.should_use_bf16 = lambda *_, **__: False


class Look:
    """One family's models on one device."""

    def __init__(self, family: str, place: str):
        self.family, self.place = family, place
        self.model, self.clip, self.vae = (
            host["toy"].load_toy_base()
            if family == "toy"
            else tiny_models.load(FOLDER / f"{family}.safetensors", "float32")
        )
        self.stack = concepts_for(family, self.model, self.clip)
        form = self.model.get_model_object("latent_format")
        self.latent = {"samples": torch.zeros(1, form.latent_channels, *[8 if family == "sd3" else 16] * 2)}
        self.word = "man" if family == "toy" else "dog"

    def draw(self, model, clip, text: str, steps: int = 1, stack=()) -> torch.Tensor:
        said, unsaid = (encode_prompt(clip, one, stack) for one in (text, "a house"))
        return self.sample(model, said, unsaid, steps)

    def sample(self, model, said, unsaid, steps: int = 1) -> torch.Tensor:
        (result,) = nodes.common_ksampler(model, 5, steps, 3.0, "euler", "normal", said, unsaid, self.latent)
        return result["samples"]

    def merged(self, beside: bool = False):
        return host["patching"].merge_into(self.model, self.clip, self.stack, beside=beside)


def concepts_for(family: str, model, clip) -> list:
    """Two concepts on every layer, with words, as they come from files; the second with a word for each layer."""
    stack, every = [], host["layers"].host_layers(model, clip)
    layers_of_words = host["layerwise"].cross_attention_layers(model)
    width = pack_module("host.text.words").word_rows(clip, "dog").shape[1]
    for number, name in enumerate(("tom", "rex")):
        path = FOLDER / "concepts" / f"{family}_{name}.safetensors"
        if not path.is_file():
            generator, made = torch.Generator().manual_seed(number), {}
            for layer, own in every.items():
                out, inp, *kernel = own.module.weight.shape
                if "time" in layer or "embed" in layer or min(out, inp) < 4:
                    continue
                lora = adapters.new_lora(out, inp, 2, None, generator, kernel or None)
                made[layer] = lora.replace(lora_up=0.05 * torch.randn(out, 2, generator=generator))
            shape = (layers_of_words, 1, width) if number and layers_of_words else (1, width)
            words = {f"<{name}>": 0.05 * torch.randn(shape, generator=generator)}
            architecture = host["layers"].architecture_of(model)
            recipe = concept_of.Recipe(architecture=architecture, triggers=(f"<{name}>",), class_word="dog")
            files.save_concept(concept_of.Concept(f"{family}_{name}", made, words, recipe), path)
        stack.append((files.load_concept(path), 0.7 + number / 2))
    return stack


# --- the paths ---


def merging(look: Look):
    for family in ("sum", "custom_diffusion", "ties", "svd"):
        stack = [(replace(c, tokens={w: r.reshape(-1, r.shape[-1])[:1] for w, r in c.tokens.items()}), s)
                 for c, s in look.stack]  # fmt: skip
        options = merge.MergeOptions(rank=2, density=0.5)
        for apply in ("weights", "activations"):
            ready = host["merging"].merge_by(
                host["merging"].HostModel(look.model, look.clip),
                stack,
                host["merging"].Merge(family, False, options),
                apply,
            )
            yield f"{family} as {apply}", lambda ready=ready: look.draw(*ready, "a <tom> dog")


def partly_loaded(look: Look):
    for apply in ("weights", "activations"):
        model, clip = look.merged(beside=apply == "activations")

        def offloaded(model=model, clip=clip):
            said = encode_prompt(clip, "a <tom> dog")[0]
            management.unload_all_models()
            model.patch_model(model.load_device, lowvram_model_memory=1)
            model.inject_model()
            try:
                latent = torch.randn(look.latent["samples"].shape, generator=torch.Generator().manual_seed(3))
                more = {"c_crossattn": said[0].to(model.load_device)}
                if look.family != "toy":
                    width = model.model.model_config.unet_config["adm_in_channels"]
                    more["y"] = torch.zeros(1, width).to(model.load_device)
                return model.model.apply_model(
                    latent.to(model.load_device), torch.tensor([0.5]).to(model.load_device), **more
                )
            finally:
                model.eject_model()
                model.unpatch_model(torch.device("cpu"))

        yield f"offloaded as {apply}", offloaded


def hooks(look: Look):
    stack = look.stack[:1]

    def hooked():
        group = host["hooks"].make_hook(host["hooks"].HostModel(look.model, look.clip), stack)
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start_percent in ((1.0, 0.0), (0.4, 0.5)):
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start_percent))
        group.set_keyframes_on_hooks(frames)
        said, unsaid = (encode_prompt(look.clip, text, stack) for text in ("a <tom> dog", "a house"))
        both = [comfy.hooks.set_hooks_for_conditioning(one, group) for one in (said, unsaid)]
        return look.sample(look.model, *both)

    yield "hooks", hooked


def regions(look: Look):
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(4))
    several = [Region("a <tom> dog", left), Region("a <rex> dog", mask=mask, strength=0.8, negative="a car")]
    stack = look.stack if look.family != "sd3" else look.stack[:1]
    for mode in ("merged", "gated"):
        for title, entries in {
            "two": several[: len(stack)],
            "full": [Region("a <tom> dog", (0.0, 0.0, 1.0, 1.0))],
            "late": [replace(several[0], start=0.5)],
        }.items():

            def by_region(mode=mode, entries=entries):
                ready = host["regions"].with_regions(
                    host["regions"].HostModel(look.model, look.clip),
                    host["regions"].Scene(stack, entries, ("a house", "a car"), mode),
                )
                return look.sample(*ready)

            yield f"regions, {title}, {mode}", by_region
    if look.family == "sd3":
        return

    def automatic():
        entries = [Region("a <tom> dog"), Region("a <rex> dog", right)]
        prompts = ("a <tom> dog and a <rex> dog", "a car")
        how = Sampling("euler", "normal", 4, 3.0, 5)
        return host["regions"].sample_regions(
            host["regions"].HostModel(look.model, look.clip),
            host["regions"].Scene(stack, entries, prompts, "gated"),
            look.latent,
            how,
        )["samples"]

    yield "regions, found", automatic


def layerwise(look: Look):
    if host["layerwise"].cross_attention_layers(look.model):
        yield "layer-wise words", lambda: look.draw(*look.merged(), "a <rex> dog")


METHODS = {
    "orthogonal": {"slot": 1},
    "lora": {"gradient_checkpointing": True, "min_snr": 5.0},
    "block": {"slot": 1, "blocks": 4, "erasure": 0.2, "precision": "bf16"},
    "block_orthogonal": {"slot": 1, "blocks": 4, "precision": "fp16"},
    "custom_diffusion": {"attention_regularisation": 0.1},
    "words": {"layerwise": True},
}


def trainings(look: Look):
    base = host["base"].host_base(look.model, look.clip, look.vae)
    side = 2 * base.multiple
    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    masks = (torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(4)) > 0.4).float()
    subject = customisation.Subject("x", pictures, ["a photo of <x>"] * 2, "dog", masks)
    if look.family == "toy":
        subject = replace(subject, captions=["a <x> on the beach"] * 2)
    for method, changes in METHODS.items():
        if look.family == "sd3":
            changes = {
                key: value for key, value in changes.items() if key not in ("attention_regularisation", "layerwise")
            }
        if look.family != "toy" and method != "orthogonal":
            continue
        settings = training.TrainSettings(method=method, rank=2, steps=2, batch=1, flip=True, **changes)

        def train(settings=settings, method=method):
            with base.trainable():
                drawn = sampling.SampleSettings(steps=1, height=side, width=side)
                asked = customisation.Prior("dog", 1, settings=drawn, draw=host["base"].draw)
                prior = customisation.prior_examples(base, asked) if method == "orthogonal" else None
                seen = []
                concept, result = customisation.train_concept(
                    base,
                    replace(subject, prior=prior),
                    settings,
                    customisation.Targets(("attention",), None),
                    customisation.Listeners(seen.append, estimate=seen.append),
                )
                shown = host["base"].draw(
                    base,
                    ["a <x>"],
                    [1],
                    seen[-1].tokens,
                    sampling.SampleSettings(steps=1, height=side, width=side),
                )
            assert all(own.lora_up.device.type == "cpu" for own in concept.layers.values())
            learned = [own.delta().flatten() for own in concept.layers.values()]
            return {"losses": torch.tensor(result.losses), "learned": torch.cat([*learned, *(
                rows.flatten() for rows in concept.tokens.values())]), "shown": shown}  # fmt: skip

        yield f"training, {method}", train


def resumed(look: Look):
    base = host["base"].host_base(look.model, look.clip, look.vae)
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    subject = customisation.Subject("x", pictures, ["a <x> on the beach"] * 2, "dog")
    settings = training.TrainSettings(rank=2, slot=1, steps=4, batch=1, precision="fp16", adapter_lr=1e-2)

    def run():
        folder = FOLDER / f"checkpoints-{look.place}"
        targets = customisation.Targets(("attention",))
        with base.trainable():
            straight, _ = customisation.train_concept(base, subject, settings, targets)
            customisation.train_concept(
                base,
                subject,
                settings,
                targets,
                customisation.Listeners(lambda at: at.step == 2),
                customisation.Keeping(folder),
            )
            again, _ = customisation.train_concept(
                base, subject, settings, targets, keeping=customisation.Keeping(resume=folder)
            )
        assert all(torch.equal(again.layers[name].lora_up, own.lora_up) for name, own in straight.layers.items())
        return torch.cat([own.lora_up.flatten() for own in again.layers.values()])

    yield "training, resumed", run


def fusion(look: Look):
    def fuse():
        stack = [(replace(c, tokens={w: r.reshape(-1, r.shape[-1])[:1] for w, r in c.tokens.items()}), s)
                 for c, s in look.stack]  # fmt: skip
        drawing = host["fusion"].Drawing(["a {concept} dog"], 1, 1, 32)
        model, clip, _ = host["fusion"].fuse(host["fusion"].HostModel(look.model, look.clip), stack, drawing, 0.3)
        return look.draw(model, clip, "a <tom> dog")

    yield "fusion", fuse


PATHS = {
    "toy": [merging, partly_loaded, hooks, regions, layerwise, trainings, resumed, fusion],
    "sd3": [partly_loaded, regions, trainings],
}


def look_at(family: str, place: str) -> None:
    look = Look(family, place)
    for path in PATHS[family]:
        for title, attempt in path(look):
            try:
                result = attempt()
            except Exception as error:  # every path is tried, and told of
                where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
                faults[f"{place}|{family}|{title}"] = f"{type(error).__name__}: {error} {where[-6:]}"
                continue
            for part, tensor in (result if isinstance(result, dict) else {"": result}).items():
                found[f"{place}|{family}|{title}|{part}"] = tensor.detach().float().cpu().contiguous().clone()
        management.unload_all_models()


@torch.inference_mode()
def main() -> None:
    plan = json.loads((FOLDER / "plan.json").read_text())
    for family in plan["families"]:
        if family != "toy":
            tiny_models.write(family, FOLDER)
        for place in plan["places"]:
            with nullcontext() if place == "cpu" else stand_in_device.elsewhere():
                use(torch.device("cpu") if place == "cpu" else torch.device(place, 0))
                look_at(family, place)
    save_file(found, FOLDER / "found.safetensors")
    (FOLDER / "faults.json").write_text(json.dumps(faults, indent=1))


main()
