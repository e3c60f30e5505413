"""Train the toy base from nothing: `python -m modular_concepts.toy.train_base OUT --steps N`.

Pictures are drawn as they are needed; nothing is downloaded or stored.  The run saves as it goes and picks up
where it stopped.  The weights that are written are the exponential moving average in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .base import load_toy_base
from .captions import captions, tokenize
from .model import PATCH, alphas_cumprod, build_text_encoder, build_unet, encode_pictures
from .vocabulary import STYLES
from .world import Poses, Subjects, draw, draw_subjects, random_poses, random_scenes, random_subjects

OUTER = re.compile(r"embedding|conv_in|conv_out")
# (subjects, batch, share of steps): single subjects alone until the classes are learned, then wider pictures too.
EARLY = ((1, 24, 1.0),)
LATE = ((1, 24, 0.50), (2, 12, 0.28), (3, 8, 0.22))
SUBJECT_WEIGHT = 3.0  # of a subject's pixels in the loss, against 1 for the scene's
NOISY = 0.6  # half of the timesteps are drawn from this share of the schedule on, where the words decide


def random_batch(tiles: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Pictures (N, 3, 32, 32·tiles) in 0..1, where the subjects are (N, 1, 32, 32·tiles), and captions.

    A tenth of the captions is empty.
    """
    subjects: list[Subjects] = [random_subjects(count, generator) for _ in range(tiles)]
    poses = [random_poses(count, generator) for _ in range(tiles)]
    scenes = random_scenes(count, generator)
    style = torch.where(
        torch.rand(count, generator=generator) < 0.12,
        torch.randint(1, len(STYLES), (count,), generator=generator),
        0,
    )
    pictures = draw(subjects, poses, scenes, style)
    shapes = draw_subjects(Subjects.cat(subjects), Poses.cat(poses))[:, 3:]
    texts = captions(subjects, scenes, style, generator)
    dropped = torch.rand(count, generator=generator) < 0.1
    texts = ["" if drop else text for drop, text in zip(dropped.tolist(), texts, strict=True)]
    return pictures, torch.cat(shapes.chunk(tiles), dim=-1), texts


def random_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """(N,) timesteps, spread evenly over a batch: half over the whole schedule, half over its noisy part."""
    place = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    place = torch.where(place < 0.5, 2 * place, NOISY + (1 - NOISY) * (2 * place - 1))
    return (1000 * place).long().clamp(max=999)


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    part = (step - warmup) / max(steps - warmup, 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))


class Optimizer:
    """Muon for the matrices inside the networks (convolutions flattened), AdamW for the rest.

    Muon (Jordan et al. 2024): momentum, orthogonalised, at 0.2 root mean square per entry as AdamW's steps have.
    Written here because torch's own works in bfloat16, which most CPUs only emulate.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], peak: float):
        self.inner = {k: p for k, p in named.items() if p.ndim >= 2 and not OUTER.search(k)}
        self.momentum = {k: torch.zeros_like(p) for k, p in self.inner.items()}
        self.rest = {k: p for k, p in named.items() if k not in self.inner}
        self.adamw = torch.optim.AdamW(self.rest.values(), lr=peak / 2, betas=(0.9, 0.99), weight_decay=0, fused=True)
        self.peak = peak

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = self.peak / 2 * factor
        self.adamw.step()
        shapes: dict[tuple, list[str]] = {}
        gradients = {key: parameter.grad for key, parameter in self.inner.items() if parameter.grad is not None}
        for key, gradient in gradients.items():
            self.momentum[key].lerp_(gradient, 0.05)
            shapes.setdefault(gradient.flatten(1).shape, []).append(key)
        rate = self.peak * factor
        for shape, keys in shapes.items():
            nesterov = torch.stack([gradients[k].lerp(self.momentum[k], 0.95).flatten(1) for k in keys])
            for key, update in zip(keys, orthogonalised(nesterov), strict=True):
                parameter = self.inner[key]
                parameter.mul_(1 - 0.01 * rate)
                parameter.add_(update.view_as(parameter), alpha=-0.2 * rate * max(shape) ** 0.5)

    def tensors(self) -> dict[str, Tensor]:
        """All state under the parameters' names."""
        state = {f"momentum.{key}": value for key, value in self.momentum.items()}
        for key, parameter in self.rest.items():
            state |= {f"{name}.{key}": value for name, value in self.adamw.state[parameter].items()}
        return state

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.momentum = {key: tensors[f"momentum.{key}"] for key in self.inner}
        for key, parameter in self.rest.items():
            self.adamw.state[parameter] = {name: tensors[f"{name}.{key}"] for name in ("step", "exp_avg", "exp_avg_sq")}


def orthogonalised(matrices: Tensor) -> Tensor:
    """(N, m, n): singular values brought near 1 by five quintic Newton-Schulz steps, without a decomposition.

    Every step multiplies by a polynomial of the Gram matrix, so the steps are taken on the small side alone and
    the long side is touched twice.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).contiguous()
    gram = x @ x.mT
    whole = None
    for _ in range(5):
        factor = 2.0315 * (gram @ gram) - 4.7750 * gram
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        gram = factor @ gram @ factor
        whole = factor if whole is None else factor @ whole
    x = whole @ x
    return x.mT if tall else x


@dataclass(frozen=True)
class Plan:
    """How the base is trained: how many steps at which peak learning rate, on what, from which weights.

    early: share of steps on single subjects alone.  start: weights to begin from instead of chance.
    device: where the networks are; pictures are drawn on the CPU.
    """

    steps: int
    peak: float
    early: float
    seed: int
    save_every: int
    start: Path | None = None
    device: str = "cpu"


class Run:
    """The networks in training, the average of their weights, the optimizer, and how many steps are behind them."""

    def __init__(self, plan: Plan):
        torch.manual_seed(plan.seed)
        self.plan, self.step = plan, 0
        if plan.start is None:
            self.unet, self.text = build_unet(), build_text_encoder()
        else:
            base = load_toy_base(plan.start)
            self.unet, self.text = (
                base.unet.requires_grad_(True).train(),
                base.text_encoder.requires_grad_(True).train(),
            )
        self.unet.to(plan.device)
        self.text.to(plan.device)
        self.named = {f"unet.{k}": p for k, p in self.unet.named_parameters()} | {
            f"text_encoder.{k}": p for k, p in self.text.named_parameters()
        }
        self.average = {k: p.detach().clone() for k, p in self.named.items()}
        self.optimizer = Optimizer(self.named, plan.peak)
        self.signal_shares = alphas_cumprod().float().to(plan.device)

    def load(self, file: Path) -> None:
        """Go on from a saved state."""
        state = load_file(file, device=self.plan.device)
        with torch.no_grad():
            for key, parameter in self.named.items():
                parameter.copy_(state["model." + key])
                self.average[key].copy_(state["average." + key])
        self.optimizer.load(state)
        self.step = int(state["steps"])

    def loss(self) -> Tensor:
        """Of this step's batch, which follows from the seed and the step alone."""
        plan = self.plan
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
        widths = EARLY if self.step < plan.early * plan.steps else LATE
        shares = torch.tensor([share for _, _, share in widths])
        tiles, count, _ = widths[int(torch.multinomial(shares, 1, generator=generator))]
        pictures, shapes, texts = random_batch(tiles, count, generator)
        latents = encode_pictures(pictures).to(plan.device)
        weight = 1 + (SUBJECT_WEIGHT - 1) * F.pixel_unshuffle(shapes, PATCH).repeat(1, 3, 1, 1).to(plan.device)
        timesteps = random_timesteps(count, generator).to(plan.device)
        noise = torch.randn(latents.shape, generator=generator).to(plan.device)
        signal = self.signal_shares[timesteps][:, None, None, None].sqrt()
        level = (1 - self.signal_shares[timesteps])[:, None, None, None].sqrt()
        context = self.text(tokenize(texts).to(plan.device)).last_hidden_state
        predicted = self.unet(signal * latents + level * noise, timesteps, context).sample
        error = (predicted - (signal * noise - level * latents)) ** 2
        return (weight * error).sum() / weight.sum()

    def take_step(self) -> tuple[float, float]:
        """One step of all networks and their average: (loss, learning rate)."""
        loss = self.loss()
        self.unet.zero_grad()
        self.text.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        factor = learning_rate_factor(self.step, self.plan.steps)
        self.optimizer.step(factor)
        keep = min(0.9985, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.named.values()], 1 - keep)
        self.step += 1
        return loss.item(), self.plan.peak * factor

    def save(self, out: Path) -> None:
        """The run as it stands, to go on from, and the weights that it has come to."""
        state = {"steps": torch.tensor(self.step)}
        for key, parameter in self.named.items():
            state["model." + key] = parameter.detach()
            state["average." + key] = self.average[key]
        save_file(state | self.optimizer.tensors(), out / "state.tmp")
        (out / "state.tmp").rename(out / "state.safetensors")
        for part in ("unet", "text_encoder"):
            half = {k[len(part) + 1 :]: v.half().contiguous() for k, v in self.average.items() if k.startswith(part)}
            save_file(half, out / f"{part}.safetensors")


def train(out: Path, plan: Plan, until: Callable[[], bool] | None = None) -> int:
    """Train and save to `out`; a run that is there goes on.  How many steps it has behind it then.

    until: asked before each step whether to stop there.
    """
    run = Run(plan)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "state.safetensors").exists():
        run.load(out / "state.safetensors")
    started, window = time.time(), []
    while run.step < plan.steps and not (until is not None and until()):
        loss, rate = run.take_step()
        window.append(loss)
        if run.step % 50 == 0:
            mean, seconds = sum(window) / len(window), time.time() - started
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": run.step, "loss": mean, "lr": rate, "seconds": seconds}) + "\n")
            window.clear()
        if run.step % plan.save_every == 0:
            run.save(out)
    run.save(out)
    return run.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--early", type=float, default=0.4, help="share of steps on single subjects alone")
    parser.add_argument("--start", type=Path, help="folder of weights to begin from, such as toy/weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, Plan(args.steps, args.lr, args.early, args.seed, args.save_every, args.start))


if __name__ == "__main__":
    main()
