"""Train the judges from nothing: `python -m modular_concepts.toy.train_judges OUT`.

They see drawn pictures only, roughened with noise and blur so that they also read generated ones, and never the
standard concepts.  The identity threshold is set at 1 % false accepts among impostors of the same class, half of
which are look-alikes that differ in two attributes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from .judges import HEADS, NOTHING, Reader, Recogniser
from .vocabulary import STYLES
from .world import PALETTE, Subjects, draw, random_poses, random_scenes, random_subjects


def roughen(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, blur and contrast of the size that a sampler leaves behind."""
    count = len(pictures)
    blur = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.rand(count, 1, 1, 1, generator=generator) * 0.6
    noise = torch.randn(pictures.shape, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 0.06
    contrast = 1 + 0.15 * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
    pictures = pictures + amount * (blur - pictures) + noise
    return ((pictures - 0.5) * contrast + 0.5).clamp(0, 1)


def look_alikes(subjects: Subjects, generator: torch.Generator, changes: int = 2) -> Subjects:
    """The same subjects with some of hue of both areas, pattern, accessory and its colour drawn anew."""
    other = random_subjects(len(subjects), generator, subjects.kind)
    chosen = torch.rand(len(subjects), 4, generator=generator).argsort(1) < changes
    values = {}
    for column, names in enumerate(
        (("primary_name", "primary"), ("secondary_name", "secondary"), ("pattern",), ("accessory",))
    ):
        for name in names:
            old, new = getattr(subjects, name), getattr(other, name)
            take = chosen[:, column].reshape(-1, *([1] * (old.ndim - 1)))
            values[name] = torch.where(take, new, old)
    # A change must be one: a colour or state that came out the same moves on to the next.
    for column, name, size in ((2, "pattern", 3), (3, "accessory", 3)):
        same = chosen[:, column] & (values[name] == getattr(subjects, name))
        values[name] = torch.where(same, (values[name] + 1) % size, values[name])
    for column, name in ((0, "primary"), (1, "secondary")):
        names = values[f"{name}_name"]
        same = chosen[:, column] & (names == getattr(subjects, f"{name}_name"))
        moved = torch.where(same, (names + 4) % len(PALETTE), names)
        values[f"{name}_name"] = moved
        values[name] = torch.where(same[:, None], PALETTE[moved], values[name])
    return replace(subjects, **values)


def views(subjects: Subjects, generator: torch.Generator, rough: bool = True) -> Tensor:
    """One picture of each subject in a scene, pose and light of its own; a quarter is cut from a wider picture."""
    count = len(subjects)
    scenes, poses = random_scenes(count, generator), random_poses(count, generator)
    pictures = draw([subjects], [poses], scenes)
    return roughen(pictures, generator) if rough else pictures


def train_reader(steps: int, batch: int, seed: int) -> tuple[Reader, dict]:
    torch.manual_seed(seed)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        pictures, answers = reader_batch(batch, torch.Generator().manual_seed(seed + 7919 * (step + 1)))
        logits = reader(pictures)
        losses = (F.cross_entropy(logits[name], answers[name], ignore_index=-100) for name in HEADS)
        loss = sum(losses, torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"reader {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    reader.eval()
    right: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    with torch.no_grad():
        for part in range(8):
            pictures, answers = reader_batch(512, torch.Generator().manual_seed(10**9 + part))
            for name, logits in reader(pictures).items():
                answered = answers[name] >= 0
                right[name].append((logits.argmax(1) == answers[name])[answered].float())
    return reader, {name: torch.cat(values).mean().item() for name, values in right.items()}


def reader_batch(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Roughened tiles and the right answers; -100 where a question makes no sense."""
    subjects, poses = random_subjects(count, generator), random_poses(count, generator)
    scenes = random_scenes(count, generator)
    style = torch.where(
        torch.rand(count, generator=generator) < 0.2,
        torch.randint(1, len(STYLES), (count,), generator=generator),
        0,
    )
    empty = torch.rand(count, generator=generator) < 0.08
    filled = draw([subjects], [poses], scenes, style)
    bare = draw([], [], scenes, style)
    pictures = torch.where(empty[:, None, None, None], bare, filled)
    plain = (style == 0) & ~empty
    answers = {
        "class": torch.where(empty, NOTHING, subjects.kind),
        "scene": scenes.kind,
        "style": style,
        "pattern": torch.where(plain, subjects.pattern, -100),
        "primary": torch.where(plain, subjects.primary_name, -100),
        "secondary": torch.where(plain, subjects.secondary_name, -100),
        "accessory": torch.where(plain, subjects.accessory, -100),
        "accent": torch.where(plain & (subjects.accessory > 0), subjects.accent_name, -100),
    }
    return roughen(pictures, generator), answers


def train_recogniser(steps: int, batch: int, seed: int) -> tuple[Recogniser, dict]:
    """Contrastive: two views of each identity agree; look-alikes and strangers in the batch do not."""
    torch.manual_seed(seed)
    recogniser = Recogniser()
    temperature = 0.08
    optimizer = torch.optim.AdamW(recogniser.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed + 104729 * (step + 1))
        # Few classes a batch, and each identity with a look-alike: the easy way, telling classes apart, is shut.
        kinds = torch.randint(8, (2,), generator=generator)[torch.randint(2, (batch // 2,), generator=generator)]
        base = random_subjects(batch // 2, generator, kinds)
        subjects = Subjects.cat([base, look_alikes(base, generator, 1 + step % 2)])
        left = recogniser(views(subjects, generator))
        right = recogniser(views(subjects, generator))
        logits = left @ right.mT / temperature
        target = torch.arange(len(subjects))
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"recogniser {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    recogniser.eval()
    return recogniser, calibrate(recogniser)


@torch.no_grad()
def calibrate(recogniser: Recogniser, identities: int = 1024, references: int = 16) -> dict:
    """Threshold at 1 % false accepts for a template of 16 pictures against one picture, and what it accepts."""
    generator = torch.Generator().manual_seed(2**31)
    owners = random_subjects(identities, generator)
    template = torch.zeros(identities, 64)
    for _ in range(references):
        template += recogniser(views(owners, generator, rough=False))
    template = F.normalize(template, dim=-1)

    def scores(subjects: Subjects) -> Tensor:
        return torch.cat([(recogniser(views(subjects, generator)) * template).sum(1) for _ in range(4)])

    owned = scores(owners)
    strangers = scores(random_subjects(identities, generator, owners.kind))
    alike = scores(look_alikes(owners, generator))
    threshold = torch.cat([strangers, alike]).quantile(0.99).item()
    return {
        "threshold": threshold,
        "true_accepts": (owned > threshold).float().mean().item(),
        "false_accepts_strangers": (strangers > threshold).float().mean().item(),
        "false_accepts_look_alikes": (alike > threshold).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    reader, reads = train_reader(args.steps, args.batch, args.seed)
    recogniser, recognises = train_recogniser(args.steps, 2 * args.batch, args.seed)
    for network, name in ((reader, "reader"), (recogniser, "recogniser")):
        half = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
        save_file(half, args.out / f"{name}.safetensors")
    report = {
        "threshold": recognises.pop("threshold"),
        "accuracy": {"reader": reads, "recogniser": recognises},
    }
    (args.out / "judges.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report), f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
