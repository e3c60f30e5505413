"""Train the toy base from nothing: `python -m modular_concepts.toy.train_base OUT --steps N`.

Pictures are drawn as they are needed; nothing is downloaded or stored.  The run saves as it goes and picks up
where it stopped.  The weights that are written are the exponential moving average in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .captions import captions, tokenize
from .model import alphas_cumprod, build_text_encoder, build_unet, encode_pictures
from .vocabulary import STYLES
from .world import Subjects, draw, random_poses, random_scenes, random_subjects

WIDTHS = ((1, 32, 0.65), (2, 16, 0.22), (3, 10, 0.13))  # subjects, batch, share of steps


def random_batch(tiles: int, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Pictures (N, 3, 32, 32·tiles) in 0..1 and their captions; a tenth of the captions is empty."""
    subjects: list[Subjects] = [random_subjects(count, generator) for _ in range(tiles)]
    poses = [random_poses(count, generator) for _ in range(tiles)]
    scenes = random_scenes(count, generator)
    style = torch.where(
        torch.rand(count, generator=generator) < 0.12,
        torch.randint(1, len(STYLES), (count,), generator=generator),
        0,
    )
    pictures = draw(subjects, poses, scenes, style)
    texts = captions(subjects, scenes, style, generator)
    dropped = torch.rand(count, generator=generator) < 0.1
    return pictures, ["" if drop else text for drop, text in zip(dropped.tolist(), texts, strict=True)]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(part, 1.0))))


def train(out: Path, steps: int, peak: float, seed: int, save_every: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    unet, text = build_unet(), build_text_encoder()
    named = {f"unet.{k}": p for k, p in unet.named_parameters()} | {
        f"text_encoder.{k}": p for k, p in text.named_parameters()
    }
    average = {k: p.detach().clone() for k, p in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    kept = alphas_cumprod().float()
    out.mkdir(parents=True, exist_ok=True)
    state_file, first = out / "state.safetensors", 0
    if state_file.exists():
        state = load_file(state_file)
        with torch.no_grad():
            for key, parameter in named.items():
                parameter.copy_(state["model." + key])
                average[key].copy_(state["average." + key])
                optimizer.state[parameter] = {
                    name: state[f"{name}.{key}"] for name in ("step", "exp_avg", "exp_avg_sq")
                }
        first = int(state["steps"])
    shares = torch.tensor([share for _, _, share in WIDTHS])
    started, window = time.time(), []
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        tiles, count, _ = WIDTHS[int(torch.multinomial(shares, 1, generator=generator))]
        pictures, texts = random_batch(tiles, count, generator)
        latents = encode_pictures(pictures)
        timesteps = torch.randint(1000, (count,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        signal = kept[timesteps][:, None, None, None].sqrt()
        level = (1 - kept[timesteps])[:, None, None, None].sqrt()
        context = text(tokenize(texts)).last_hidden_state
        predicted = unet(signal * latents + level * noise, timesteps, context).sample
        loss = torch.mean((predicted - (signal * noise - level * latents)) ** 2)
        rate = learning_rate(step, steps, peak)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        keep = min(0.9985, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in named.values()], 1 - keep)
        window.append(loss.item())
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "loss": sum(window) / len(window), "lr": rate, "seconds": time.time() - started}
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            window.clear()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"steps": torch.tensor(step + 1)}
            for key, parameter in named.items():
                state["model." + key] = parameter.detach()
                state["average." + key] = average[key]
                for name, value in optimizer.state[parameter].items():
                    state[f"{name}.{key}"] = value
            save_file(state, out / "state.tmp")
            (out / "state.tmp").rename(state_file)
            for part in ("unet", "text_encoder"):
                half = {k[len(part) + 1 :]: v.half().contiguous() for k, v in average.items() if k.startswith(part)}
                save_file(half, out / f"{part}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    train(args.out, args.steps, args.lr, args.seed, args.save_every, args.threads)


if __name__ == "__main__":
    main()
