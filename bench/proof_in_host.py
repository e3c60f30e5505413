"""In the host's interpreter: pictures of several concepts by core's own means and with places that are found.

core_masks   all concepts in the weights, a masked prompt for each region, the global prompt where there is none
automatic    ours, gated, regions without a place; the global prompt calls everyone
core_hooks   a LoRA hook and a mask for each region, on its prompt and on its negative prompt

    python proof_in_host.py HOST - run '{"plan": PATH}'

Learned words come by our CLIP and our prompt node in both, since core cannot say layer-wise ones; weights are core's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from in_host import ARGUMENT, pack_module, start

start(on_cpu=True)

import comfy.hooks
import comfy.sample
import comfy.sd
import comfy_extras.nodes_hooks as core_hooks
import torch
from safetensors.torch import save_file

import nodes as core


class Proof:
    def __init__(self, plan: dict):
        self.plan = plan
        self.model, self.clip, self.vae = pack_module("host.toy_base").load_toy_base()
        files, self.patching = pack_module("modular_concepts.files.concept"), pack_module("host.merging.weights")
        self.encode = pack_module("host.text.words").encode_prompt
        self.layers = pack_module("modular_concepts.models.layers")
        names = {name for group in plan["groups"] for name in group["names"]}
        self.concepts = {name: files.load_concept(Path(plan["concepts"]) / f"{name}.safetensors") for name in names}

    def run(self) -> None:
        for number, group in enumerate(self.plan["groups"], 1):
            if self.plan["mode"] == "automatic":
                pictures = torch.cat([self.automatic(group, seed) for seed in group["seeds"]])
            else:
                model, positive, negative = getattr(self, self.plan["mode"])(group)
                pictures = torch.cat([self.draw(model, positive, negative, group, seed) for seed in group["seeds"]])
            save_file({"pictures": pictures.contiguous()}, Path(self.plan["out"]) / f"{group['key']}.safetensors")
            print(f"{self.plan['mode']}: {number} of {len(self.plan['groups'])}", file=sys.stderr, flush=True)

    def automatic(self, group: dict, seed: int) -> torch.Tensor:
        regional = pack_module("host.regions.sampling")
        region = pack_module("modular_concepts.regions.geometry").Region
        latent = {"samples": torch.zeros(1, 12, 16, 16 * len(group["names"]))}
        how = regional.Sampling("dpmpp_2m", "normal", self.plan["steps"], self.plan["cfg"], seed)
        stack = [(self.concepts[name], 1.0) for name in group["names"]]
        regions = [region(prompt, concepts=(n,)) for prompt, n in zip(group["prompts"], group["names"], strict=True)]
        drawn = regional.sample_regions(
            regional.HostModel(self.model, self.clip),
            regional.Scene(stack, regions, (group["called"], ""), "gated"),
            latent,
            how,
        )
        return self.vae.decode(drawn["samples"]).movedim(-1, 1)

    def core_masks(self, group: dict):
        model, clip = self.words(group)
        for name in group["names"]:
            model, _ = comfy.sd.load_lora_for_models(model, clip, self.lora(name), 1.0, 0.0)
        positive = []
        for prompt, mask in zip(group["prompts"], self.masks(group), strict=True):
            positive += core.ConditioningSetMask().append(self.says(clip, prompt), mask, "default", 1.0)[0]
        everywhere = [self.says(clip, group["prompt"])]
        (positive,) = comfy.hooks.set_default_conds_and_combine(conds=[positive], new_conds=everywhere)
        return model, positive, self.says(clip, "")

    def core_hooks(self, group: dict):
        (model, clip), pairs = self.words(group), ([], [])
        for name, prompt, mask in zip(group["names"], group["prompts"], self.masks(group), strict=True):
            hooks = comfy.hooks.create_hook_lora(lora=self.lora(name), strength_model=1.0, strength_clip=0.0)
            own = self.says(clip, prompt), self.says(clip, "")
            pairs = core_hooks.PairConditioningSetPropertiesAndCombine().set_properties(
                *pairs, *own, 1.0, "default", mask=mask, hooks=hooks
            )
        everywhere = self.says(clip, group["prompt"]), self.says(clip, "")
        return model, *core_hooks.PairConditioningSetDefaultAndCombine().set_default_and_combine(*pairs, *everywhere)

    def draw(self, model, positive, negative, group: dict, seed: int) -> torch.Tensor:
        latent = torch.zeros(1, 12, 16, 16 * len(group["names"]))
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        steps, cfg = self.plan["steps"], self.plan["cfg"]
        said = (positive, negative)
        drawn = comfy.sample.sample(
            model, noise, steps, cfg, "dpmpp_2m", "normal", *said, latent, disable_pbar=True, seed=seed
        )
        return self.vae.decode(drawn).movedim(-1, 1)

    def words(self, group: dict):
        """MODEL and CLIP with the concepts' learned words; their adapters are left to core."""
        bare = [(replace(self.concepts[name], layers={}), 1.0) for name in group["names"]]
        return self.patching.merge_into(self.model, self.clip, bare)

    def lora(self, name: str) -> dict[str, torch.Tensor]:
        """As a plain LoRA file would hold it."""
        tensors = {}
        for layer, adapter in self.concepts[name].layers.items():
            key = self.layers.file_key(layer, "toy")
            stock = adapter.stock()
            tensors |= {f"{key}.lora_up.weight": stock.lora_up, f"{key}.lora_down.weight": stock.lora_down}
            tensors[f"{key}.alpha"] = torch.tensor(stock.alpha)
        return tensors

    @staticmethod
    def masks(group: dict) -> list[torch.Tensor]:
        width, found = 32 * len(group["names"]), []
        for left, top, right, bottom in group["boxes"]:
            mask = torch.zeros(1, 32, width)
            mask[:, round(top * 32) : round(bottom * 32), round(left * width) : round(right * width)] = 1.0
            found.append(mask)
        return found

    def says(self, clip, text: str) -> list:
        return self.encode(clip, text)


if __name__ == "__main__":
    with torch.inference_mode():
        Proof(json.loads(Path(json.loads(ARGUMENT)["plan"]).read_text())).run()
