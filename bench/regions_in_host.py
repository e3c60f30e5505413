"""In the host's interpreter: steps of one picture with N regions, by our two modes and by core's masks and LoRA hooks.

    python regions_in_host.py HOST CHECKPOINT run '{"pixels": 512, "counts": [1, 3, 8], ...}'

Every way draws with the host's own sampler: a region for each of N concepts side by side, some background between and
above them, a global prompt, one negative prompt.  Ways take turns (a round is each of them once).  Steps are timed from
the first call of the network on, with all weights in place; of core's hooks the first step, in which it loads and keeps
their weights, is left out.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from in_host import ARGUMENT, CHECKPOINT, pack_module, start

start(on_cpu=json.loads(ARGUMENT).get("device", "cpu") == "cpu")

import comfy.hooks
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_hooks as core_hooks
import comfyui_version
import torch
from probe import Probe, Task, forget_peak, peak_memory

import nodes as core

SCENE = "in a garden by the sea"
SPARE_GB = 3.0
WORD_WIDTHS = {"sd15": 768, "sdxl": 2048, "sd2": 1024, "sd3": 2048}


@dataclass(frozen=True)
class Asked:
    """counts: of regions, for ours; core_counts: for core.  rounds, core_rounds: how often; steps: timed ones."""

    pixels: int = 512
    counts: tuple[int, ...] = (1, 2, 3, 5, 8)
    core_counts: tuple[int, ...] = (1, 2, 3, 5, 8)
    rounds: int = 2
    core_rounds: int = 1
    steps: int = 1
    rank: int = 20
    cfg: float = 7.0
    device: str = "cpu"


class Bench:
    """loaded: (MODEL, CLIP, VAE)."""

    def __init__(self, asked: Asked, loaded: tuple):
        self.asked = asked
        self.regions, self.patching = pack_module("host.regions.sampling"), pack_module("host.merging.weights")
        self.geometry = pack_module("modular_concepts.regions.geometry")
        self.model, self.clip, _ = loaded
        side = asked.pixels // 8
        self.latent = torch.zeros(1, 4, side, side)
        self.noise = torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(0))
        self.stack = [
            (made_concept(self.model, number, asked.rank), 1.0)
            for number in range(max(asked.counts + asked.core_counts))
        ]
        self.loras = [kohya(concept) for concept, _ in self.stack]
        self.drawn: dict[tuple[str, int], torch.Tensor] = {}

    # -- the ways: each gives MODEL, positive, negative

    def plain(self, _count: int):
        return self.model, self.says(self.clip, f"people {SCENE}"), self.says(self.clip, "blurry")

    def merged(self, count: int):
        return self.ours(count, "merged")

    def gated(self, count: int):
        return self.ours(count, "gated")

    def ours(self, count: int, mode: str):
        regions = [
            self.geometry.Region(f"a <c{number}> person {SCENE}", box, concepts=(f"c{number}",))
            for number, box in enumerate(boxes(count))
        ]
        prompts = (f"people {SCENE}", "blurry")
        return self.regions.with_regions(
            self.regions.HostModel(self.model, self.clip),
            self.regions.Scene(self.stack[:count], regions, prompts, mode),
        )

    def core_masks(self, count: int):
        """All concepts in the weights by a chain of loaders; a masked prompt for each, the global one as default."""
        model, clip = self.model, self.clip
        for lora in self.loras[:count]:
            model, clip = comfy_load(model, clip, lora)
        positive = []
        for mask in self.masks(count):
            said = self.says(clip, f"a person {SCENE}")
            positive += core.ConditioningSetMask().append(said, mask, "default", 1.0)[0]
        everywhere = [self.says(clip, f"people {SCENE}")]
        (positive,) = comfy.hooks.set_default_conds_and_combine(conds=[positive], new_conds=everywhere)
        return model, positive, self.says(clip, "blurry")

    def core_hooks(self, count: int):
        """A LoRA hook, a mask and a pair of prompts for each concept, as core's own nodes make them."""
        pairs = None
        for lora, mask in zip(self.loras, self.masks(count), strict=False):
            hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=1.0)
            own = self.says(self.clip, f"a person {SCENE}"), self.says(self.clip, "blurry")
            if pairs is None:
                pairs = core_hooks.PairConditioningSetProperties().set_properties(
                    *own, 1.0, "default", mask=mask, hooks=hooks
                )
            else:
                pairs = core_hooks.PairConditioningSetPropertiesAndCombine().set_properties(
                    *pairs, *own, 1.0, "default", mask=mask, hooks=hooks
                )
        everywhere = self.says(self.clip, f"people {SCENE}"), self.says(self.clip, "blurry")
        pairs = core_hooks.PairConditioningSetDefaultAndCombine().set_default_and_combine(*pairs, *everywhere)
        return self.model, *pairs

    def masks(self, count: int) -> list[torch.Tensor]:
        side, found = self.asked.pixels, []
        for box in boxes(count):
            left, top, right, bottom = (round(edge * side) for edge in box)
            mask = torch.zeros(1, side, side)
            mask[:, top:bottom, left:right] = 1.0
            found.append(mask)
        return found

    @staticmethod
    def says(clip, text: str) -> list:
        return core.CLIPTextEncode().encode(clip, text)[0]

    # -- what is timed

    def measure(self, way: str, count: int) -> dict:
        model, positive, negative = getattr(self, way)(count)
        extra = way == "core_hooks"
        whole = not forget_peak()
        probe = Probe(Task(way, pixels=self.asked.pixels), model.load_device)
        probe.marks.clear()
        network = model.model.diffusion_model

        def begun(*_) -> None:
            handle.remove()
            probe.step_done()

        handle = network.register_forward_pre_hook(begun)
        result = comfy.sample.sample(
            model,
            self.noise,
            self.asked.steps + extra,
            self.asked.cfg,
            "euler",
            "normal",
            positive,
            negative,
            self.latent,
            disable_pbar=True,
            callback=lambda *_: probe.step_done(),
            seed=0,
        )
        if not torch.isfinite(result).all():
            raise RuntimeError(f"{way} with {count} regions gave numbers that are not finite")
        self.drawn[way, count] = result
        pairs = list(zip(probe.marks, probe.marks[1:], strict=False))[extra:]
        return {
            "way": way,
            "regions": count,
            "seconds": [round(after[0] - before[0], 4) for before, after in pairs],
            "processor_seconds": [round(after[1] - before[1], 4) for before, after in pairs],
            "peak_gb": round(peak_memory(), 4),
            "peak_is_of_whole_process": whole,
            **probe.of_device(),
        }

    def run(self) -> dict:
        runs, left_out = [], []
        self.measure("plain", 0)  # so that nobody's first step is the process's first
        for number in range(max(self.asked.rounds, self.asked.core_rounds)):
            turns: list[tuple[str, int]] = []
            if number < self.asked.rounds:
                turns += [("plain", 0)]
                turns += [(way, count) for count in self.asked.counts for way in ("merged", "gated")]
            if number < self.asked.core_rounds:
                turns += [(way, count) for count in self.asked.core_counts for way in ("core_masks", "core_hooks")]
            for way, count in turns:
                began = time.monotonic()
                if way == "core_hooks" and self.weights_gb() * (count + 1) > free_gb() - SPARE_GB:
                    left_out.append(f"core_hooks with {count} regions: too little memory for its copies of weights")
                    print(left_out[-1], file=sys.stderr, flush=True)
                    continue
                runs.append({"round": number, **self.measure(way, count)})
                print(json.dumps(runs[-1]), round(time.monotonic() - began), "s", file=sys.stderr, flush=True)
        self.check()
        about = {"host": comfyui_version.__version__, "torch": torch.__version__, "left_out": left_out}
        return {"runs": runs, **about, "moved": self.moved()}

    def weights_gb(self) -> float:
        """What core keeps of one concept's layers with its LoRA in them, and once without any."""
        layers = pack_module("host.layers").host_layers(self.model, None)
        return sum(layers[name].module.weight.nbytes for name in self.stack[0][0].layers) / 1e9

    def check(self) -> None:
        """What is timed does something: regions change the picture, and the two modes differ."""
        for count in self.asked.counts:
            if self.moved()[f"merged {count}"] < 1e-3 or self.moved()[f"gated {count}"] < 1e-3:
                raise RuntimeError(f"{count} regions left the picture as it was")

    def moved(self) -> dict[str, float]:
        plain = self.drawn["plain", 0]
        return {
            f"{way} {count}": round(float((own - plain).norm() / plain.norm()), 4)
            for (way, count), own in self.drawn.items()
            if way != "plain"
        }


def free_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable")), math.inf)


def boxes(count: int) -> list[tuple[float, float, float, float]]:
    return [((number + 0.1) / count, 0.25, (number + 0.9) / count, 1.0) for number in range(count)]


def made_concept(model, seed: int, rank: int):
    """Random adapters on every Linear layer of the attention blocks, as training makes them, and one learned word."""
    concepts, adapters = pack_module("modular_concepts.concept"), pack_module("modular_concepts.adapters.low_rank")
    host_layers = pack_module("host.layers")
    architecture = host_layers.architecture_of(model)
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name, layer in host_layers.host_layers(model, None).items():
        if isinstance(layer.module, torch.nn.Linear) and ("attn" in name or ".ff." in name):
            out, inp = layer.module.weight.shape
            up = torch.randn(out, rank, generator=generator) * 0.1 / math.sqrt(rank)
            down = torch.randn(rank, inp, generator=generator) / math.sqrt(inp)
            layers[name] = adapters.LowRank(up, down, float(rank), "lora", None, out)
    word = f"<c{seed}>"
    recipe = concepts.Recipe(architecture=architecture, triggers=(word,), class_word="person", rank=rank)
    rows = torch.randn(1, WORD_WIDTHS[architecture], generator=generator) * 0.02
    return concepts.Concept(f"c{seed}", layers, {word: rows}, recipe)


def kohya(concept) -> dict[str, torch.Tensor]:
    names, lora = pack_module("modular_concepts.models.layers"), {}
    for name, adapter in concept.layers.items():
        key = names.file_key(name)
        lora[f"{key}.lora_up.weight"], lora[f"{key}.lora_down.weight"] = adapter.full_up(), adapter.lora_down
        lora[f"{key}.alpha"] = torch.tensor(adapter.alpha)
    return lora


def comfy_load(model, clip, lora: dict[str, torch.Tensor]):
    return comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)


def asked_of(text: str) -> Asked:
    values = json.loads(text)
    return Asked(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


if __name__ == "__main__":
    with torch.inference_mode():
        checkpoint = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]
        measured: Callable[[], dict] = Bench(asked_of(ARGUMENT), checkpoint).run
        print(json.dumps(measured()))
