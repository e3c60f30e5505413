"""Does the toy base draw what it is asked for?  `python -m modular_concepts.toy.evaluate [WEIGHTS]`.

Prints one JSON line: shares of samples in which the reader finds the asked class, scene and attributes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..models.base import BaseModel
from ..sampling import SampleSettings, sample
from .base import load_toy_base
from .captions import features, scene_phrase, subject_phrase
from .judges import Judges, load_judges
from .vocabulary import CLASSES, SCENE_PHRASES, SCENES
from .world import TILE, random_scenes, random_subjects

QUESTIONS = ("pattern", "primary", "secondary", "accessory", "accent")


def single_subjects(base: BaseModel, judges: Judges, settings: SampleSettings, each: int) -> dict[str, float]:
    """Shares of right classes and scenes over `each` samples of all 48 pairs."""
    pairs = [(kind, scene) for kind in range(len(CLASSES)) for scene in range(len(SCENES)) for _ in range(each)]
    prompts = [f"a {CLASSES[kind]} {SCENE_PHRASES[SCENES[scene]]}" for kind, scene in pairs]
    answer = judges.read(sample(base, prompts, list(range(len(prompts))), settings=settings))
    kinds, scenes = torch.tensor(pairs).unbind(1)
    return {
        "class": (answer["class"] == kinds).float().mean().item(),
        "scene": (answer["scene"] == scenes).float().mean().item(),
    }


def two_subjects(base: BaseModel, judges: Judges, settings: SampleSettings, count: int) -> dict[str, float]:
    """Share of pictures in which both classes stand where the caption puts them."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randint(len(CLASSES), (count, 2), generator=generator)
    scenes = torch.randint(len(SCENES), (count,), generator=generator)
    prompts = [
        f"a {CLASSES[left]} and a {CLASSES[right]} {SCENE_PHRASES[SCENES[scene]]}"
        for (left, right), scene in zip(kinds.tolist(), scenes.tolist(), strict=True)
    ]
    wide = SampleSettings(settings.steps, settings.cfg, width=2 * TILE, batch=settings.batch)
    pictures = sample(base, prompts, list(range(count)), settings=wide)
    classes = torch.stack([judges.read(tile)["class"] for tile in pictures.split(TILE, dim=3)], 1)
    return {"both_classes": (classes == kinds).all(1).float().mean().item()}


def named_attributes(base: BaseModel, judges: Judges, settings: SampleSettings, count: int) -> dict[str, float]:
    """Share of named attributes that are drawn as named, over all and for each question."""
    generator = torch.Generator().manual_seed(2)
    subjects, scenes = random_subjects(count, generator), random_scenes(count, generator)
    prompts = [f"{subject_phrase(subjects, i, features(subjects, i))} {scene_phrase(scenes, i)}" for i in range(count)]
    answer = judges.read(sample(base, prompts, list(range(count)), settings=settings))
    wanted = {
        "pattern": subjects.pattern,
        "primary": subjects.primary_name,
        "secondary": subjects.secondary_name,
        "accessory": subjects.accessory,
        "accent": subjects.accent_name,
    }
    right = {name: (answer[name] == wanted[name]).float() for name in QUESTIONS}
    right["accent"] = right["accent"][subjects.accessory > 0]
    right["accessory"] = right["accessory"][subjects.accessory > 0]  # its absence is never named
    report = {name: values.mean().item() for name, values in right.items()}
    return {"attributes": torch.cat(list(right.values())).mean().item(), **report}


def evaluate(base: BaseModel, judges: Judges, settings: SampleSettings, effort: int = 4) -> dict[str, float]:
    """All three, with 48·effort, 24·effort and 48·effort pictures."""
    return {
        **single_subjects(base, judges, settings, effort),
        **two_subjects(base, judges, settings, 24 * effort),
        **named_attributes(base, judges, settings, 48 * effort),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, nargs="?")
    parser.add_argument("--judges", type=Path)
    parser.add_argument("--effort", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=5.0)
    args = parser.parse_args()
    settings = SampleSettings(steps=args.steps, cfg=args.cfg, batch=48)
    base, judges = load_toy_base(args.weights), load_judges(args.judges)
    print(json.dumps({k: round(v, 3) for k, v in evaluate(base, judges, settings, args.effort).items()}))


if __name__ == "__main__":
    main()
