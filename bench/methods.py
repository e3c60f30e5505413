"""Every training method on the same toy concepts, with the same steps, pictures, seeds and noise, judged alone.

    python -m bench.methods                 everything, then the table, the curves and one line of JSON
    python -m bench.methods --only lora p+  these methods alone; finished ones are kept in --out and not run again

Writes OUT/runs/METHOD-CONCEPT.json and .safetensors, OUT/methods.md (the table) and OUT/loss.png (the curves).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from modular_concepts.files.concept import save_concept
from modular_concepts.models.base import BaseModel
from modular_concepts.models.targets import Targets
from modular_concepts.pictures import to_image
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.storage.atomic import replacing
from modular_concepts.storage.names import safe_name
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.demo import SAMPLING, prompts_for
from modular_concepts.toy.judges import Judges, load_judges
from modular_concepts.toy.presets import UNDESCRIBED
from modular_concepts.toy.standard import BY_NAME, pictures_of
from modular_concepts.training.loop import train
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Prior, Subject, prior_examples, problem_for, train_concept

CONCEPTS = ("tom", "minka")
PICTURES = 24
PRIOR = 48
WINDOW = 40  # steps that one point of a curve is the mean of


@dataclass(frozen=True)
class Method:
    """A row of the table: what differs from the settings that all rows share."""

    name: str
    changes: dict
    targets: Targets = Targets(("attention", "feed_forward"))
    prior: int = 0

    def settings(self, steps: int, slot: int) -> TrainSettings:
        """The concept's number is its seed, and its slot where the method has slots."""
        own = replace(UNDESCRIBED, steps=steps, seed=slot, method="lora")
        changes = dict(self.changes)
        if changes.get("method") in ("orthogonal", "block", "block_orthogonal"):
            changes["slot"] = slot
        return replace(own, **changes)


METHODS = (
    Method("lora", {}),
    Method("orthogonal", {"method": "orthogonal"}),
    Method("orthogonal, layer-wise word", {"method": "orthogonal", "layerwise": True}),
    Method("block", {"method": "block", "blocks": 8, "erasure": 0.2}),
    Method("block + orthogonal", {"method": "block_orthogonal", "blocks": 8, "erasure": 0.2}),
    Method(
        "ed-lora",
        {"rank": 4, "layerwise": True, "token_start": "random + class"},
        Targets(("attention",), ("attention",)),
    ),
    Method("dreambooth lora", {}, prior=PRIOR),
    Method("textual inversion", {"method": "words"}),
    Method("p+", {"method": "words", "layerwise": True}),
    Method("custom diffusion", {"method": "custom_diffusion"}, Targets(("cross_attention_kv",))),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_output/methods"))
    parser.add_argument("--only", nargs="+", metavar="METHOD", choices=[method.name for method in METHODS])
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=list(BY_NAME))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(arguments)
    base, judges = load_toy_base(), load_judges()
    runs = args.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    chosen = [method for method in METHODS if not args.only or method.name in args.only]
    for method in chosen:
        for slot, name in enumerate(args.concepts):
            path = runs / f"{safe_name(method.name)}-{name}.json"
            if not path.exists():
                print(f"{method.name}: {name}", file=sys.stderr, flush=True)
                _keep(path, run(base, judges, method, name, slot, args.steps, path.with_suffix("")))
    still = _still_losses(base, args.concepts[0], args.steps, runs)
    found = {
        method.name: [
            json.loads((runs / f"{safe_name(method.name)}-{name}.json").read_text()) for name in args.concepts
        ]
        for method in chosen
    }
    table = {name: {key: mean(one[key] for one in own) for key in FIGURES} for name, own in found.items()}
    _keep(args.out / "methods.md", markdown(table, args.steps, len(args.concepts)))
    curves(args.out / "loss.png", {name: own[0]["losses"] for name, own in found.items()}, still, args.concepts[0])
    print(json.dumps({"steps": args.steps, "concepts": args.concepts, "methods": table}))
    return 0


FIGURES = {
    "identity": "identity",
    "image": "image",
    "text": "text",
    "taken": "class word taken over",
    "kilobytes": "file, kB",
    "step_vs_lora": "processor time a step, LoRA = 1",
}


def run(base: BaseModel, judges: Judges, method: Method, name: str, slot: int, steps: int, out: Path) -> dict:
    """Train one concept and judge what it draws alone; pictures and file beside `out`."""
    concept, (pictures, captions) = BY_NAME[name], pictures_of(BY_NAME[name])
    subject, prior = Subject(name, pictures, captions, concept.class_word, fingerprint=f"standard-{name}"), None
    if method.prior:
        settings = SampleSettings(steps=12, height=32, width=32, batch=24)
        prior = prior_examples(base, Prior(concept.class_word, method.prior, 1000, settings))
    subject = replace(subject, prior=prior)
    began = time.process_time()
    trained, result = train_concept(base, subject, method.settings(steps, slot), method.targets)
    seconds = time.process_time() - began
    file = out.with_suffix(".safetensors")
    save_concept(trained, file)
    prompts, scenes = prompts_for(concept.trigger, PICTURES)
    plain, _ = prompts_for(concept.class_word, PICTURES)
    with customised(base, [trained], [1.0]) as tokens:
        shown = sample(base, prompts, range(PICTURES), tokens, SAMPLING)
        after = sample(base, plain, range(PICTURES), tokens, SAMPLING)
    before = sample(base, plain, range(PICTURES), {}, SAMPLING)
    to_image(torch.cat(list(shown[:8]), dim=-1)).save(out.with_suffix(".png"))
    return {
        "identity": judges.identity(shown, pictures),
        "image": judges.image_alignment(shown, pictures),
        "text": judges.text_alignment(shown, concept.class_word, scenes),
        "taken": judges.identity(after, pictures) - judges.identity(before, pictures),
        "kilobytes": file.stat().st_size / 1000,
        "step_vs_lora": seconds / steps / _lora_step(base, subject, slot),
        "losses": result.losses,
    }


def _lora_step(base: BaseModel, subject: Subject, slot: int, steps: int = 8) -> float:
    """Processor seconds of a plain LoRA step just now: machines are slower at some times than at others."""
    began = time.process_time()
    train_concept(base, subject, METHODS[0].settings(steps, slot))
    return (time.process_time() - began) / steps


def _still_losses(base: BaseModel, name: str, steps: int, runs: Path) -> list[float]:
    """Losses of the base as it is, on the very same pictures, timesteps and noise."""
    path = runs / f"still-{name}.json"
    if not path.exists():
        concept, (pictures, captions) = BY_NAME[name], pictures_of(BY_NAME[name])
        subject = Subject(name, pictures, captions, concept.class_word)
        still = replace(METHODS[0].settings(steps, 0), adapter_lr=0.0, token_lr=0.0)
        _keep(path, train(problem_for(base, subject), still).losses)
    return json.loads(path.read_text())


def markdown(table: dict, steps: int, concepts: int) -> str:
    """The table, one row a method."""
    lines = [
        f"Means over {concepts} concepts, {PICTURES} pictures each; {steps} steps of batch {UNDESCRIBED.batch}.",
        "",
        "| method | " + " | ".join(FIGURES.values()) + " |",
        "|---" * (len(FIGURES) + 1) + "|",
    ]
    for name, row in table.items():
        cells = [f"{row[key]:.0f}" if key == "kilobytes" else f"{row[key]:.2f}" for key in FIGURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def curves(path: Path, losses: dict[str, list[float]], still: Sequence[float], name: str) -> None:
    """Loss minus the untrained base's on the same draws; methods with a prior draw other noise and are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with_prior = {method.name for method in METHODS if method.prior}
    figure, axes = pyplot.subplots(figsize=(9.6, 4.6), dpi=110)
    colours = pyplot.get_cmap("tab10").colors
    for colour, (label, own) in zip(colours, losses.items(), strict=False):
        if label in with_prior:
            continue
        gained = torch.tensor(own) - torch.tensor(still[: len(own)])
        line = gained.unfold(0, WINDOW, 1).mean(1) if len(own) > WINDOW else gained
        axes.plot(torch.arange(len(line)) + WINDOW / 2, line, label=label, color=colour, linewidth=1.6)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss minus the untrained base's", title=f"What each method learns of {name}")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines, not on them
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _keep(path: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with replacing(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    raise SystemExit(main())
