"""In the host's interpreter: run one trainer on the host's own loaded model.

ours     our training in the host, with its progress seen by a callback
core     the host's TrainLoraNode; core_bypass: in bypass mode.  Steps are seen by the host's progress hook
frozen   the loaded model's forward and backward to its inputs alone

    python train_in_host.py HOST CHECKPOINT run '{"trainer": "ours", ...}'
"""

from __future__ import annotations

import json

from in_host import ARGUMENT, CHECKPOINT, pack_module, start

if __name__ == "__main__":
    asked = json.loads(ARGUMENT)
    start(on_cpu=asked.pop("device", "cpu") == "cpu")

import comfy.model_management
import comfy.sd
import comfy.utils
import comfyui_version
import torch
from comfy_extras.nodes_train import TrainLoraNode
from probe import Probe, Task


def loaded():
    """(MODEL, CLIP, VAE) of the checkpoint."""
    return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT))[:3]


def base_of(model, clip, vae):
    """A `HostBase` without the hash of gigabytes of weights, which is no part of a step."""
    base_module = pack_module("host.training.base")
    return base_module.HostBase(model, clip, vae, "", base_module._schedule(model))


def contexts_of(task: Task, device):
    """(latents, what the network is told of each), on a device."""
    latents, texts, pooled = (None if value is None else value.to(device) for value in task.examples())
    return latents, texts if pooled is None else pack_module("host.text.encode").HostContext(texts, pooled)


def picked(contexts, indices):
    parts = (contexts,) if isinstance(contexts, torch.Tensor) else contexts
    parts = [part[indices].clone() for part in parts]
    return parts[0] if len(parts) == 1 else type(contexts)(*parts)


def run_ours(task: Task, load=loaded, **more) -> dict:
    """more: goes to `training.Keeping`, `resume` or `checkpoints` for instance."""
    with torch.inference_mode():  # as the host runs its nodes
        base = base_of(*load())
        latents, contexts = contexts_of(task, base.device)
        probe = Probe(task, base.device)
        result, adapters = trained(task, base, latents, contexts, probe.step_done, **more)
    counted = sum(factor.numel() for one in result.layers.values() for factor in one.trainable().values())
    return probe.report(method=method_of(task), adapters=adapters, trained=counted, losses=result.losses)


class Encoded:
    """A base whose texts are encoded already; captions are their numbers."""

    def __init__(self, base, contexts):
        self._base, self._contexts = base, contexts

    def __getattr__(self, name: str):
        return getattr(self._base, name)

    def context(self, captions, _tokens):
        return picked(self._contexts, [int(caption) for caption in captions])


def method_of(task: Task) -> str:
    return task.layers.partition(" as ")[2] or "orthogonal"


def trained(task: Task, base, latents, contexts, callback=None, **more):
    """(TrainResult, how many layers) of one training on latents and contexts that are there already."""
    problems, training = pack_module("modular_concepts.training.problem"), pack_module("modular_concepts.training.loop")
    chosen = task.layers.partition(" as ")[0]
    layers = every_layer(base, task.rank) if chosen == "every" else base.layers((chosen,), None)
    with base.trainable():
        examples = problems.Examples(latents.clone(), [str(index) for index in range(len(latents))], None, "-")
        problem = problems.Problem(Encoded(base, contexts), layers, examples)
        settings = training.TrainSettings(
            method=method_of(task),
            rank=task.rank,
            slot=None if method_of(task) == "lora" else 0,
            steps=task.all_steps,
            batch=task.batch,
            precision=task.precision,
            gradient_checkpointing=task.checkpointing,
        )
        listeners, keeping = training.Listeners(callback), training.Keeping(**more)
        return training.train(problem, settings, listeners, keeping), len(layers)


def every_layer(base, rank: int) -> dict:
    """What core trains: every Linear and convolution, but for those with fewer outputs than the rank."""
    layers = pack_module("host.layers").host_layers(base.model, None)
    return {name: layer.module for name, layer in layers.items() if len(layer.module.weight) >= rank}


def run_core(task: Task, load=loaded) -> dict:
    with torch.inference_mode():
        model, *kept = load()
        latents, texts, pooled = task.examples()
        about = [{}] * len(texts) if pooled is None else [{"pooled_output": row[None]} for row in pooled]
        probe = Probe(task, model.load_device)
        comfy.utils.set_progress_bar_global_hook(probe.step_done)
        chosen = dict(
            model=model,
            latents={"samples": latents},
            positive=[[text[None], dict(more)] for text, more in zip(texts, about, strict=True)],
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


def run_frozen(task: Task, load=loaded) -> dict:
    base = base_of(*load())  # outside of inference mode, whose weights plain autograd cannot save
    base.model.model.requires_grad_(False)
    comfy.model_management.load_models_gpu([base.model], force_full_load=True)
    latents, contexts = contexts_of(task, base.device)
    latents, contexts = latents[: task.batch], picked(contexts, slice(task.batch))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents)
    probe, losses = Probe(task, base.device), []
    for step in range(task.all_steps):
        noisy = (latents + noise).requires_grad_()
        timesteps = torch.full((task.batch,), 100 * (step + 1), device=base.device)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(task.precision)
        with torch.autocast(base.device.type, half, enabled=half is not None):
            predicted = base.predict(noisy, timesteps, contexts)
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        losses.append(loss.item())
        probe.step_done()
    return probe.report(method="none", adapters=0, trained=0, losses=losses)


RUN = {"ours": run_ours, "core": run_core, "core_bypass": run_core, "frozen": run_frozen}


if __name__ == "__main__":
    task = Task(**asked)
    print(json.dumps(RUN[task.trainer](task) | {"host": comfyui_version.__version__}))
