"""In the host: one training step of each family with and without gradient checkpointing, and in bfloat16."""

from __future__ import annotations

import json
from dataclasses import replace

from in_host import FOLDER, pack_module, start

start()

import comfy.sd
import tiny_models
import torch
from left_behind import traces

torch.set_num_threads(1)
host_base = pack_module("host.training.base")
customisation = pack_module("modular_concepts.training.teach")
training = pack_module("modular_concepts.training.settings")
run_module, step_module = (pack_module("modular_concepts.training.run"), pack_module("modular_concepts.training.step"))
checkpointing = pack_module("modular_concepts.training.gradient_checkpointing")
LiveMemory = pack_module("modular_concepts.training.estimate").LiveMemory
AdapterError = pack_module("modular_concepts.errors").AdapterError

SETTINGS = training.TrainSettings(method="block", rank=2, slot=1, blocks=4, batch=2, erasure=0.3)
OPTIONS = {
    "plain": {},
    "layer-wise with attention": {"layerwise": True, "attention_regularisation": 0.1},
    "bf16": {"precision": "bf16"},
}
FAMILIES = {"tiny_sd15": list(OPTIONS), "vega": list(OPTIONS)[:2], "sd3": list(OPTIONS)[:2]}


def problem_on(base):
    generator = torch.Generator().manual_seed(3)
    side = 2 * base.multiple
    pictures = torch.rand(3, 3, side, side, generator=generator)
    masks = torch.zeros(3, 1, side, side)
    masks[..., : side // 2] = 1
    subject = customisation.Subject("x", pictures, ["a photo of <x> outside"] * 3, "man", masks)
    targets = customisation.Targets(("all_linear",))
    return customisation.problem_for(base, subject, targets)


def step_of(problem, settings) -> tuple[float, dict, int]:
    """Loss, gradients and the most memory that one step held."""
    run = run_module.Run(problem, settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for adapter in run.adapters.values():
            adapter.lora_up.copy_(0.02 * torch.randn(adapter.lora_up.shape, generator=generator))
    with torch.enable_grad(), step_module.on_base(problem, run) as step, LiveMemory() as live:
        loss, _ = step.gradients()
    return loss, {name: parameter.grad.clone() for name, parameter in run.parameters().items()}, live.peak


def compare(problem, options: dict, plain: dict) -> dict:
    """A step with everything kept beside one whose blocks are computed again, and beside one without options."""
    settings = replace(SETTINGS, **options)
    try:
        kept = step_of(problem, settings)
    except AdapterError as error:
        return {"refused": str(error)}
    again = step_of(problem, replace(settings, gradient_checkpointing=True))
    plain = plain or kept[1]
    whole = torch.cat([gradient.flatten() for gradient in kept[1].values()])
    exact = torch.cat([gradient.flatten() for gradient in plain.values()])
    tokens = run_module.Run(problem, settings).tokens
    return {
        "loss": [kept[0], again[0]],
        "same": all(torch.equal(gradient, again[1][name]) for name, gradient in kept[1].items()),
        "alive": sum(bool(gradient.abs().max() > 0) for gradient in kept[1].values()) / len(kept[1]),
        "finite": bool(whole.isfinite().all()),
        "peak": [kept[2], again[2]],
        "from_plain": ((whole - exact).norm() / exact.norm()).item() if whole.shape == exact.shape else None,
        "positions": problem.base.trigger_positions(["a photo of <x> outside", "a man"], tokens).tolist(),
    }


@torch.inference_mode()
def main() -> None:
    facts = {}
    for name, options in FAMILIES.items():
        if name == "tiny_sd15":
            loaded = comfy.sd.load_checkpoint_guess_config(str(FOLDER / f"{name}.safetensors"))[:3]
        else:
            tiny_models.write(name)
            loaded = tiny_models.load(name)
        base, before = host_base.host_base(*loaded), traces(*loaded[:2])
        with base.trainable():
            problem = problem_on(base)
            plain = {} if len(options) < 3 else step_of(problem, SETTINGS)[1]
            facts[name] = {option: compare(problem, OPTIONS[option], plain) for option in options}
        facts[name]["blocks"] = sorted(
            {type(block).__name__ for block in checkpointing.outermost_blocks(base.denoiser)}
        )
        facts[name]["untouched"] = traces(*loaded[:2]) == before
        del loaded, base, problem, plain
    (FOLDER / "facts.json").write_text(json.dumps(facts))


main()
