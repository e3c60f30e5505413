"""The main job in one run: three concepts trained apart, summed, drawn alone and together, and judged.

Every concept is trained twice, as plain LoRA and orthogonally in a slot of its own, with the same pictures,
description, steps, rates and seeds; the two trios then go through the same merge, prompts and noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..concept import Concept
from ..crosstalk.measures import crosstalk_table
from ..files.concept import save_concept
from ..merging import merge_concepts
from ..models.base import BaseModel
from ..models.targets import Targets
from ..regions.geometry import Region
from ..sampling import SampleSettings, customised, sample
from ..storage.atomic import write_atomically
from ..training.loop import Listeners
from ..training.settings import TrainSettings
from ..training.teach import Subject, train_concept
from .judges import Judges
from .presets import SETTINGS
from .report import HEADING, contact_sheet, heat_map, joint_sheet, report_text
from .standard import BY_NAME, StandardConcept, pictures_of
from .vocabulary import CLASSES, SCENE_PHRASES, SCENES
from .world import TILE

TRIO = ("tom", "tim", "minka")
METHODS = ("lora", "orthogonal")
TARGETS = Targets(("attention", "feed_forward"))
SAMPLING = SampleSettings(steps=20, cfg=4.0, batch=24)
PICTURES_EACH = 24
OUTPUTS = (
    *(f"concepts/{name}_{method}.safetensors" for method in METHODS for name in TRIO),
    *("contact_sheet.png", "joint.png", "crosstalk.png", "report.json", "report.md"),
)
JOINT_SCENES = ("beach", "snow", "forest", "city")


@dataclass(frozen=True)
class Steps:
    """How the demo tells what it is doing: `bar(text, total)` gives a function that takes the amount done."""

    say: Callable[[str], None]
    bar: Callable[[str, int], Callable[[int], None]]


def run_demo(base: BaseModel, judges: Judges, out: Path, steps: Steps, settings: TrainSettings = SETTINGS) -> dict:
    """Run everything, write pictures, concept files and reports to `out`, return what report.json holds."""
    started = time.monotonic()
    folder = out / "concepts"
    folder.mkdir(parents=True, exist_ok=True)
    if not (out / "report.md").exists():
        write_atomically(out / "report.md", f"{HEADING}\n\nNothing yet: the demo has not come to its end.\n".encode())
    concepts = [BY_NAME[name] for name in TRIO]
    references = {concept.name: pictures_of(concept) for concept in concepts}
    baseline = _prior_pictures(base, concepts, steps)
    methods, sheets, joints, tables = {}, {}, {}, {}
    for method in METHODS:
        trained = []
        for slot, concept in enumerate(concepts):
            # A seed for each concept, or plain LoRAs would all start from one lora_down: their worst case.
            chosen = replace(settings, method=method, seed=slot, name=concept.name)
            if method == "orthogonal":
                chosen = replace(chosen, slot=slot)
            trained.append(_train(base, concept, references[concept.name], chosen, steps))
            save_concept(trained[-1], folder / f"{concept.name}_{method}.safetensors")
        sheets[method], methods[method] = _judge_trio(base, judges, concepts, trained, references, steps)
        methods[method]["prior_drift"] = _prior_drift(base, judges, concepts, trained, baseline, steps)
        joints[method], methods[method]["joint"] = _draw_together(base, judges, concepts, trained, references, steps)
        tables[method] = crosstalk_table(trained)
        methods[method]["crosstalk"] = tables[method]["mean"]
    report = {
        "methods": methods,
        "settings": {"steps": settings.steps, "batch": settings.batch, "rank": settings.rank}
        | {
            "adapter_lr": settings.adapter_lr,
            "token_lr": settings.token_lr,
            "pictures_per_figure": PICTURES_EACH,
            "joint_pictures": len(JOINT_SCENES),
        },
        "judges": {"threshold": judges.threshold, "accuracy": judges.accuracy},
        "base": base.hash,
        "seconds": time.monotonic() - started,
    }
    contact_sheet(out / "contact_sheet.png", {name: pictures for name, (pictures, _) in references.items()}, sheets)
    joint_sheet(out / "joint.png", joints)
    heat_map(out / "crosstalk.png", TRIO, tables)
    for name, text in (
        ("report.json", json.dumps(report, indent=1) + "\n"),
        ("report.md", report_text(report)),
    ):
        write_atomically(out / name, text.encode())
    return report


def _train(
    base: BaseModel, concept: StandardConcept, reference: tuple[Tensor, Sequence[str]], settings, steps: Steps
) -> Concept:
    advance = steps.bar(f"train {concept.name} ({settings.method})", settings.steps)
    subject = Subject(
        concept.name,
        *reference,
        concept.class_word,
        fingerprint=f"standard-{concept.name}",
        description=concept.description,
    )
    trained, _ = train_concept(base, subject, settings, TARGETS, Listeners(lambda at: advance(at.step)))
    return trained


def prompts_for(word: str, count: int) -> tuple[list[str], list[str]]:
    """`count` prompts for a trigger or class word, over the scenes in turn, and the scenes asked for."""
    scenes = [SCENES[index % len(SCENES)] for index in range(count)]
    return [f"a {word} {SCENE_PHRASES[scene]}" for scene in scenes], scenes


def _draw(base, concepts: Sequence[Concept], word: str, text: str, steps: Steps, how: str = "sum") -> Tensor:
    prompts, _ = prompts_for(word, PICTURES_EACH)
    advance = steps.bar(text, SAMPLING.steps * -(-len(prompts) // SAMPLING.batch))
    with customised(base, concepts, [1.0] * len(concepts), how) as tokens:
        return sample(base, prompts, range(len(prompts)), tokens, SAMPLING, callback=lambda done, total: advance(done))


def _judge_trio(base, judges: Judges, concepts, trained, references, steps: Steps) -> tuple[dict, dict]:
    """Pictures of each concept alone and from the merged model, and what the judges say of them."""
    before = time.monotonic()
    merge_concepts(trained, [1.0] * len(trained))
    merge_ms = (time.monotonic() - before) * 1000
    pictures, figures = {}, {}
    for concept, learned in zip(concepts, trained, strict=True):
        refs, _ = references[concept.name]
        scenes = prompts_for("", PICTURES_EACH)[1]
        alone = _draw(base, [learned], concept.trigger, f"draw {concept.name} alone", steps)
        merged = _draw(base, trained, concept.trigger, f"draw {concept.name} from the merged model", steps)
        pictures[concept.name] = {"alone": alone, "merged": merged}
        figures[concept.name] = {
            f"{name}_{stage}": value
            for stage, shown in (("single", alone), ("merged", merged))
            for name, value in (
                ("identity", judges.identity(shown, refs)),
                ("image", judges.image_alignment(shown, refs)),
                ("text", judges.text_alignment(shown, concept.class_word, scenes)),
                ("mistaken", _mistaken(judges, shown, concept, concepts, references)),
            )
        }
    return pictures, {"concepts": figures, "merge_ms": merge_ms}


def _mistaken(judges: Judges, shown: Tensor, concept, concepts, references) -> float:
    """Share of pictures that look more like another concept of the trio than like the one asked for."""
    likeness = torch.stack([judges.similarity(shown, references[other.name][0]) for other in concepts])
    return (likeness.argmax(0) != concepts.index(concept)).float().mean().item()


def _prior_pictures(base, concepts, steps: Steps) -> dict[str, Tensor]:
    words = dict.fromkeys(concept.class_word for concept in concepts)
    return {word: _draw(base, [], word, f"draw any {word}, before", steps) for word in words}


def _prior_drift(base, judges: Judges, concepts, trained, baseline, steps: Steps) -> dict[str, float]:
    """Share of pictures of the bare class word that the merged model turns into one of its concepts."""
    drift = {}
    for word, before in baseline.items():
        after = _draw(base, trained, word, f"draw any {word}, from the merged model", steps)
        rates = []
        for shown in (before, after):
            of_word = [c for c in concepts if c.class_word == word]
            taken = torch.stack([judges.similarity(shown, pictures_of(c)[0]) > judges.threshold for c in of_word])
            rates.append(taken.any(0).float().mean().item())
        drift[word] = rates[1] - rates[0]
    return drift


def _draw_together(base, judges: Judges, concepts, trained, references, steps: Steps) -> tuple[Tensor, dict]:
    """One picture of all three for each joint scene, every concept asked for in its own third."""
    count = len(concepts)
    settings = replace(SAMPLING, width=count * TILE)
    pictures = []
    advance = steps.bar("draw all three in one picture", SAMPLING.steps * len(JOINT_SCENES))
    with customised(base, trained, [1.0] * count) as tokens:
        for number, scene in enumerate(JOINT_SCENES):
            phrase = SCENE_PHRASES[scene]
            everything = [f"a {concept.class_word}" for concept in concepts]
            # A region's prompt tells of its neighbours too: the base knows wide pictures by captions of all subjects.
            regions = [
                Region(
                    f"{' and '.join([*everything[:tile], f'a {concept.trigger}', *everything[tile + 1 :]])} {phrase}",
                    (tile / count, 0.0, (tile + 1) / count, 1.0),
                )
                for tile, concept in enumerate(concepts)
            ]
            pictures.append(
                sample(
                    base,
                    [f"{' and '.join(everything)} {phrase}"],
                    [number],
                    tokens,
                    settings,
                    regions,
                    lambda done, total, before=number * SAMPLING.steps: advance(before + done),
                )
            )
    joint = torch.cat(pictures)
    figures = {}
    for tile, concept in enumerate(concepts):
        shown = joint[..., tile * TILE : (tile + 1) * TILE]
        figures[concept.name] = {
            "identity": judges.identity(shown, references[concept.name][0]),
            "mistaken": _mistaken(judges, shown, concept, concepts, references),
            "missing": (judges.read(shown)["class"] != CLASSES.index(concept.class_word)).float().mean().item(),
        }
    return joint, figures
