"""Without a host: run one trainer on the same layout as diffusers builds it.

ours_lora, ours_orthogonal   our training
peft                         peft's LoraConfig on the same modules, AdamW, the same loss
frozen_diffusers             the network's forward and backward to its inputs alone

    python headless.py '{"trainer": "peft", ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from layouts import LAYOUTS, diffusers_unet
from probe import Probe, Task

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.given_base import GivenBase
from modular_concepts.models.layers import find_layers
from modular_concepts.models.schedules import NoiseSchedule
from modular_concepts.training.loop import Listeners, train
from modular_concepts.training.problem import Examples, Problem
from modular_concepts.training.settings import TrainSettings

SCHEDULE = NoiseSchedule((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()).cumprod(0))


def run_ours(task: Task) -> dict:
    unet = diffusers_unet(LAYOUTS[task.layout])
    layers = find_layers(unet, None, task.layers)
    latents, contexts, _ = task.examples()
    method = task.trainer.removeprefix("ours_")
    probe = Probe(task)
    base = GivenBase(
        predict=lambda noisy, timesteps, context: unet(noisy, timesteps, context, return_dict=False)[0],
        context=lambda captions, _: contexts[[int(caption) for caption in captions]],
        schedule=SCHEDULE,
        modules=(unet,),
        lean=True,
    )
    problem = Problem(base, layers, Examples(latents, [str(index) for index in range(len(latents))], None, "-"))
    settings = TrainSettings(
        method=method,
        rank=task.rank,
        slot=None if method == "lora" else 0,
        steps=task.all_steps,
        batch=task.batch,
        precision=task.precision,
        gradient_checkpointing=task.checkpointing,
    )
    result = train(problem, settings, Listeners(probe.step_done))
    trained = sum(factor.numel() for one in result.layers.values() for factor in one.trainable().values())
    return probe.report(method=method, adapters=len(layers), trained=trained, losses=result.losses)


def run_peft(task: Task) -> dict:
    """The step as diffusers' own LoRA training does it."""
    import peft

    unet = diffusers_unet(LAYOUTS[task.layout])
    names = [name.removeprefix("unet.") for name in find_layers(unet, None, task.layers)]
    latents, contexts, _ = task.examples()
    probe = Probe(task)
    torch.manual_seed(0)
    model = peft.get_peft_model(unet, peft.LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=names))
    if task.checkpointing:
        unet.enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    losses, order = [], torch.Generator().manual_seed(0)
    for _ in range(task.all_steps):
        indices = torch.randperm(len(latents), generator=order)[: task.batch]
        noise = torch.randn(latents[indices].shape, generator=order)
        timesteps = torch.randint(len(SCHEDULE), (task.batch,), generator=order)
        signal = SCHEDULE.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents[indices] + (1 - signal).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16"):
            predicted = model(noisy, timesteps, contexts[indices], return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        probe.step_done()
    adapters = sum(name.endswith("lora_B.default.weight") for name, _ in model.named_parameters())
    counted = sum(parameter.numel() for parameter in trained)
    return probe.report(method="lora", adapters=adapters, trained=counted, losses=losses, peft=peft.__version__)


def run_frozen(task: Task) -> dict:
    unet = diffusers_unet(LAYOUTS[task.layout])
    latents, contexts = (value[: task.batch] for value in task.examples()[:2])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    probe, losses = Probe(task), []
    for step in range(task.all_steps):
        noisy = (latents + noise).requires_grad_()
        predicted = unet(noisy, torch.full((task.batch,), 100 * (step + 1)), contexts, return_dict=False)[0]
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        losses.append(loss.item())
        probe.step_done()
    return probe.report(method="none", adapters=0, trained=0, losses=losses)


RUN = {"ours_lora": run_ours, "ours_orthogonal": run_ours, "peft": run_peft, "frozen_diffusers": run_frozen}

if __name__ == "__main__":
    task = Task(**json.loads(sys.argv[1]))
    print(json.dumps(RUN[task.trainer](task)))
