"""In the host's interpreter: run one trainer on the host's own loaded model, or write the checkpoint that they load.

ours     our training in the host, with its progress seen by a callback
core     the host's TrainLoraNode; core_bypass: in bypass mode.  Steps are seen by the host's progress hook
frozen   the loaded model's forward and backward to its inputs alone

    python in_host.py HOST CHECKPOINT write LAYOUT
    python in_host.py HOST CHECKPOINT run '{"trainer": "ours", ...}'
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

HOST, CHECKPOINT, WHAT, ARGUMENT = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
PACK = Path(__file__).resolve().parents[1]


def start(on_cpu: bool) -> None:
    """With torch's attention for everyone: what the host takes on a GPU, and its training's faster one on a CPU."""
    sys.argv = [str(HOST / "main.py"), "--use-pytorch-cross-attention", *(["--cpu"] if on_cpu else [])]
    sys.path.insert(0, str(HOST))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # noqa: F401
    import utils.extra_config  # noqa: F401  (as main.py does: later `utils` could be another module)


def pack_module(name: str):
    """A module of the pack under a package name of its own, as the host imports it."""
    if "modular_concepts_pack" not in sys.modules:
        package = types.ModuleType("modular_concepts_pack")
        package.__path__ = [str(PACK)]
        sys.modules["modular_concepts_pack"] = package
    return importlib.import_module(f"modular_concepts_pack.{name}")


def loaded():
    import comfy.sd

    return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]


def run_ours(task: Task) -> dict:
    base_module, problems = pack_module("host.base"), pack_module("modular_concepts.training.problem")
    training = pack_module("modular_concepts.training")
    with torch.inference_mode():  # as the host runs its nodes
        model, clip, vae = loaded()
        # The hash of 3.4 GB of weights is no part of a step.
        base = base_module.HostBase(model, clip, vae, "sd15", "", base_module._schedule(model))
        latents, contexts = (value.to(base.device) for value in task.examples())
        probe = Probe(task, base.device)
        chosen, _, plain = task.layers.partition(" as ")
        method = plain or "orthogonal"
        layers = every_layer(base, task.rank) if chosen == "every" else base.layers((chosen,), None)
        with base.trainable():
            problem = problems.Problem(
                predict=base.predict,
                encode=lambda captions, _: contexts[[int(caption) for caption in captions]].clone(),
                schedule=base.schedule,
                layers=layers,
                examples=problems.Examples(latents.clone(), [str(index) for index in range(len(latents))], None, "-"),
                modules=base.modules,
                denoiser=model.model.diffusion_model,
            )
            settings = training.TrainSettings(
                method=method,
                rank=task.rank,
                slot=None if method == "lora" else 0,
                steps=task.all_steps,
                batch=task.batch,
                precision=task.precision,
                gradient_checkpointing=task.checkpointing,
            )
            result = training.train(problem, settings, probe.step_done)
    trained = sum(factor.numel() for one in result.layers.values() for factor in one.trainable().values())
    return probe.report(method=method, adapters=len(layers), trained=trained, losses=result.losses)


def every_layer(base, rank: int) -> dict:
    """What core trains: every Linear and convolution, but for those with fewer outputs than the rank."""
    layers = pack_module("host.layers").host_layers(base.model, None)
    return {name: layer.module for name, layer in layers.items() if len(layer.module.weight) >= rank}


def run_core(task: Task) -> dict:
    import comfy.utils
    from comfy_extras.nodes_train import TrainLoraNode

    with torch.inference_mode():
        model, *kept = loaded()
        latents, contexts = task.examples()
        probe = Probe(task, model.load_device)
        comfy.utils.set_progress_bar_global_hook(probe.step_done)
        chosen = dict(
            model=model,
            latents={"samples": latents},
            positive=[[context[None], {}] for context in contexts],
            batch_size=task.batch,
            grad_accumulation_steps=1,
            steps=task.all_steps,
            learning_rate=1e-4,
            rank=task.rank,
            optimizer="AdamW",
            loss_function="MSE",
            seed=0,
            training_dtype=task.precision,
            lora_dtype="fp32",
            quantized_backward=False,
            algorithm="LoRA",
            gradient_checkpointing=task.checkpointing,
            checkpoint_depth=2,
            offloading=False,
            existing_lora="[None]",
            bucket_mode=False,
            bypass_mode=task.trainer == "core_bypass",
        )
        known = {parameter.id for parameter in TrainLoraNode.define_schema().inputs}
        chosen = {name: [value] for name, value in chosen.items() if name in known}
        lora, losses, _ = TrainLoraNode.execute(**chosen).args
    adapters = sum(name.endswith("lora_up.weight") for name in lora)
    trained = sum(value.numel() for value in lora.values())
    del kept
    return probe.report(method="lora", adapters=adapters, trained=trained, losses=losses["loss"])


def run_frozen(task: Task) -> dict:
    base_module = pack_module("host.base")
    model, clip, vae = loaded()  # outside of inference mode, whose weights plain autograd cannot save
    base = base_module.HostBase(model, clip, vae, "sd15", "", base_module._schedule(model))
    model.model.requires_grad_(False)
    latents, contexts = (value[: task.batch].to(base.device) for value in task.examples())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents)
    probe, losses = Probe(task, base.device), []
    for step in range(task.all_steps):
        noisy = (latents + noise).requires_grad_()
        timesteps = torch.full((task.batch,), 100 * (step + 1), device=base.device)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
            predicted = base.predict(noisy, timesteps, contexts)
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        losses.append(loss.item())
        probe.step_done()
    return probe.report(method="none", adapters=0, trained=0, losses=losses)


RUN = {"ours": run_ours, "core": run_core, "core_bypass": run_core, "frozen": run_frozen}


if __name__ == "__main__":
    asked = json.loads(ARGUMENT) if WHAT == "run" else {}
    start(on_cpu=asked.pop("device", "cpu") == "cpu")
    import torch
    from layouts import LAYOUTS, write_checkpoint
    from probe import Probe, Task

    if WHAT == "write":
        write_checkpoint(LAYOUTS[ARGUMENT], CHECKPOINT)
    else:
        import comfyui_version

        task = Task(**asked)
        print(json.dumps(RUN[task.trainer](task) | {"host": comfyui_version.__version__}))
