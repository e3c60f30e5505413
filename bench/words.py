"""Fifteen concepts in one model, no regions: what stays of each and of two in one picture, by how they were trained.

    python -m bench.words                    all rows, then the table, a sheet of pictures and one line of JSON
    python -m bench.words --only lora block  these rows alone; what is finished in --out is not done again

Rows share concepts, pictures, captions, seeds and steps; words learn, from a description where there is one.  Of each
concept, from its trigger word in six scenes: `alone` (the share of pictures that the judge takes for it), `kept` (the
same with all fifteen merged, as a share of alone) and `drift` (how much more often its class word draws it than
before).  Of two in one wide picture, each in its half: `pair` (the share of halves that are who the prompt says) and
`mistaken` (that are the other).  Toy base, toy judges: places and styles have no judge of identity, and are told by
their colours (`Palette`).
Writes OUT/ROW/CONCEPT.safetensors, OUT/ROW.json, OUT/ROW.pictures.safetensors, OUT/words.md, OUT/words.png
and OUT/first.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.methods import _keep
from bench.word_sheet import first_picture, word_sheet
from modular_concepts.adapters.own_words import Said, at_own_words
from modular_concepts.concept import Concept
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.models.base import BaseModel
from modular_concepts.models.targets import Targets
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.demo import prompts_for
from modular_concepts.toy.judges import Judges, load_judges
from modular_concepts.toy.presets import SETTINGS
from modular_concepts.toy.standard import BY_NAME, STANDARD, StandardConcept, pictures_of
from modular_concepts.toy.vocabulary import CLASSES, SCENE_PHRASES, SCENES
from modular_concepts.training.drawn import Prior
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, company_examples, train_concept

EVERYWHERE, TEXT = Targets(("attention", "feed_forward")), Targets(("cross_attention_kv",))
PICTURES, COMPANY = 12, 96
DRAWING = SampleSettings(steps=12, cfg=4.0, batch=24)
WIDE = replace(DRAWING, width=64, batch=12)
LOOK_ALIKES = (("tom", "tim"), ("ada", "ida"))
MIXED = (("tom", "minka"), ("ada", "rex"), ("nia", "bolt"), ("omar", "fleck"))


@dataclass(frozen=True)
class Row:
    """A way of training: what differs from the settings that all rows share."""

    name: str
    changes: Mapping[str, object]
    targets: Targets = EVERYWHERE
    company: float = 0.0

    def settings(self, steps: int, slot: int, company: bool = False) -> TrainSettings:
        """The concept's number is its seed, and its slot where the method has slots.

        company: whether there is any, which places and styles have not.
        """
        slotted = {"slot": slot} if self.changes["method"] in ("orthogonal", "block") else {}
        share = self.company if company else 0.0
        return replace(SETTINGS, steps=steps, seed=slot, company=share, **self.changes, **slotted)


ROWS = (
    Row("lora", {"method": "lora"}),
    Row("orthogonal", {"method": "orthogonal"}),
    Row("block", {"method": "block", "blocks": 15, "erasure": 0.2}),
    Row("own words", {"method": "own_words", "adapter_lr": 5e-4}, TEXT),
    Row("own words, in company", {"method": "own_words", "adapter_lr": 5e-4}, TEXT, 0.5),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_output/words"))
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS])
    parser.add_argument("--concepts", nargs="+", default=list(BY_NAME), choices=list(BY_NAME))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--train", action="store_true", help="only train, and judge another time")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if not args.only or row.name in args.only]
    for row in rows:
        trained = [taught(row, BY_NAME[name], args.steps, args.out) for name in args.concepts]
        path = args.out / f"{row.name}.json"
        if not args.train and not path.exists():
            print(f"{row.name}: judge", file=sys.stderr, flush=True)
            _keep(path, judged(load_toy_base(), load_judges(), trained, args.out / f"{row.name}.pictures.safetensors"))
    if args.train:
        return 0
    table = {row.name: json.loads((args.out / f"{row.name}.json").read_text()) for row in rows}
    costs = {**sampling_cost(args.out, rows, args.concepts), **training_cost()}
    _keep(args.out / "words.md", markdown(table, args.steps, len(args.concepts), costs))
    word_sheet(args.out / "words.png", args.out, [row.name for row in rows], (*LOOK_ALIKES, MIXED[0]))
    asked = {f"{left} {right}": f"a <{left}> and a <{right}>" for left, right in (*LOOK_ALIKES, *MIXED[:2])}
    first_picture(args.out / "first.png", load_file(args.out / f"{rows[-1].name}.pictures.safetensors"), asked)
    sys.stdout.write((args.out / "words.md").read_text())
    last = rows[-1].name
    print(json.dumps({**{key: table[last][key] for key in FIGURES}, **costs, "rows": table}))
    return 0


def taught(row: Row, concept: StandardConcept, steps: int, out: Path) -> Concept:
    """The concept, trained unless its file is there."""
    file = out / row.name / f"{concept.name}.safetensors"
    if not file.exists():
        print(f"{row.name}: train {concept.name}", file=sys.stderr, flush=True)
        file.parent.mkdir(exist_ok=True)
        pictures, captions = pictures_of(concept)
        subject = Subject(
            concept.name,
            pictures,
            captions,
            concept.class_word or "style",
            fingerprint=f"standard-{concept.name}",
            description=concept.description,
        )
        base, company = load_toy_base(), row.company > 0 and concept.family in ("person", "subject")
        if company:
            drawing = Prior(concept.class_word, COMPANY, 1000, DRAWING)
            subject = replace(subject, company=company_examples(base, subject, drawing, cache=out / "company"))
        slot = list(BY_NAME).index(concept.name)
        trained, _ = train_concept(base, subject, row.settings(steps, slot, company), row.targets)
        save_concept(trained, file)
    return load_concept(file)


# --- judging ------------------------------------------------------------------------------------------------

FIGURES = ("alone", "alone_least", "kept15", "drift", "pair", "pair_least", "mistaken")


class Palette:
    """Judge of a place or style: is a picture nearer to the concept's than to what the base draws of the same prompt?

    Near in colours: the means over a grid of 4 x 4 places.
    """

    def __init__(self, references: Tensor, usual: Tensor):
        self.templates = torch.stack([_grid(each).mean(0) for each in (references, usual)])

    def share(self, pictures: Tensor) -> float:
        return (torch.cdist(_grid(pictures), self.templates).argmin(1) == 0).float().mean().item()


def _grid(pictures: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(1)


def prompts_of(concept: StandardConcept, word: str, count: int = PICTURES) -> list[str]:
    """Prompts that say a word of a concept, its trigger or its class word, as its captions do."""
    if concept.family in ("person", "subject"):
        return prompts_for(word, count)[0]
    nouns = [CLASSES[number % len(CLASSES)] for number in range(count)]
    if concept.family == "scene":
        preposition = SCENE_PHRASES[concept.class_word].rsplit(" ", 1)[0]
        return [f"a {noun} {preposition} {'the ' * (word == concept.class_word)}{word}" for noun in nouns]
    where = [SCENE_PHRASES[SCENES[number % len(SCENES)]] for number in range(count)]
    return [f"a {noun} {place}{f', {word} style' if word else ''}" for noun, place in zip(nouns, where, strict=True)]


class Jury:
    """Who says whether a picture shows a concept: the toy's recogniser, or a palette for places and styles."""

    def __init__(self, base: BaseModel, judges: Judges):
        self.judges, self.references = judges, {one.name: pictures_of(one)[0] for one in STANDARD}
        self.palettes = {
            one.name: Palette(
                self.references[one.name], sample(base, prompts_of(one, one.class_word), range(PICTURES), None, DRAWING)
            )
            for one in STANDARD
            if one.family in ("scene", "style")
        }

    def share(self, name: str, pictures: Tensor) -> float:
        if name in self.palettes:
            return self.palettes[name].share(pictures)
        return self.judges.identity(pictures, self.references[name])


@torch.no_grad()
def judged(base: BaseModel, judges: Judges, trained: Sequence[Concept], pictures: Path) -> dict:
    """Figures of a row; some of what was drawn goes to a file for the sheet."""
    jury, everyone = Jury(base, judges), [BY_NAME[concept.name] for concept in trained]
    shown, each, same = {}, {}, []
    for standard, concept in zip(everyone, trained, strict=True):
        prompts = prompts_of(standard, standard.trigger)
        alone = drawn(base, [concept], prompts)
        together = drawn(base, trained, prompts)
        same.append(torch.equal(alone, together))
        each[standard.name] = {
            "alone": jury.share(standard.name, alone),
            "kept": jury.share(standard.name, together),
        }
        shown[f"alone {standard.name}"], shown[f"all {standard.name}"] = alone[:6], together[:6]
    names, pairs = [one.name for one in everyone], {}
    for left, right in (pair for pair in LOOK_ALIKES + MIXED if set(pair) <= set(names)):
        prompts, _ = prompts_for(f"<{left}> and a <{right}>", PICTURES)
        halves = drawn(base, trained, prompts, WIDE).split(32, dim=3)
        pairs[f"{left} + {right}"] = {
            "left": jury.share(left, halves[0]),
            "right": jury.share(right, halves[1]),
            "left mistaken": jury.share(right, halves[0]),
            "right mistaken": jury.share(left, halves[1]),
        }
        shown[f"pair {left} {right}"] = torch.cat(halves, dim=3)[:6]
    write_pictures(pictures, shown)
    alone, kept = ([figures[key] for figures in each.values()] for key in ("alone", "kept"))
    selves = [figures[side] for figures in pairs.values() for side in ("left", "right")]
    others = [figures[f"{side} mistaken"] for figures in pairs.values() for side in ("left", "right")]
    return {
        "alone": mean(alone),
        "alone_least": min(alone),
        "kept15": sum(kept) / max(sum(alone), 1e-9),
        "same_bits": mean(map(float, same)),
        "drift": drift(base, jury, trained, everyone),
        "pair": mean(selves) if selves else 0.0,
        "pair_least": min(selves, default=0.0),
        "mistaken": mean(others) if others else 0.0,
        "concepts": each,
        "pairs": pairs,
    }


def drawn(
    base: BaseModel, concepts: Sequence[Concept], prompts: Sequence[str], how: SampleSettings = DRAWING
) -> Tensor:
    with customised(base, concepts, [1.0] * len(concepts)) as tokens:
        return sample(base, prompts, range(len(prompts)), tokens, how)


def drift(base: BaseModel, jury: Jury, trained: Sequence[Concept], everyone: Sequence[StandardConcept]) -> float:
    """How much more often a class word alone draws one of its concepts than before, mean over class words."""
    changes = []
    for word in dict.fromkeys(one.class_word for one in everyone if one.family in ("person", "subject")):
        prompts, _ = prompts_for(word, PICTURES)
        shares = []
        for concepts in ([], trained):
            pictures = drawn(base, concepts, prompts)
            shares.append(max(jury.share(one.name, pictures) for one in everyone if one.class_word == word))
        changes.append(shares[1] - shares[0])
    return mean(changes)


def write_pictures(path: Path, shown: Mapping[str, Tensor]) -> None:
    save_file({name: pictures.contiguous() for name, pictures in shown.items()}, path)


# --- costs --------------------------------------------------------------------------------------------------


def sampling_cost(out: Path, rows: Sequence[Row], names: Sequence[str], rounds: int = 9) -> dict[str, float]:
    """A step of drawing with all concepts, two of which the prompt says, as a share of the plain one.

    What the layers that read the text take more, each asked many times, beside the time of a whole step: the machine's
    own unrest is larger than the difference of two steps.
    """
    row = next((row for row in rows if row.targets is TEXT), None)
    if row is None:
        return {}
    base = load_toy_base()
    trained = [load_concept(out / row.name / f"{name}.safetensors") for name in names]
    layers, prompts = base.layers(TEXT.unet, None), ["", "a <tom> and a <ida> on the beach"]
    with customised(base, trained, [1.0] * len(trained)) as tokens, torch.no_grad():
        context, places = base.context(prompts, tokens), [base.word_places(prompt, tokens) for prompt in prompts]
        said = Said({n: [one.places(each, True) for each in places] for n, one in enumerate(tokens.by_word)})
        noisy, times = torch.randn(2, base.latent_channels, 16, 16), torch.tensor([500, 500])

        def read() -> None:
            for layer in layers.values():
                layer(context)

        extra = []
        for _ in range(rounds):
            plain = _seconds(read, 200)
            with at_own_words(layers, tokens.by_word, said):
                extra.append(_seconds(read, 200) - plain)
        step = median(_seconds(lambda: base.predict(noisy, times, context), 3) for _ in range(rounds))
    return {"step": 1 + median(extra) / step}


def _seconds(action: Callable[[], object], times: int) -> float:
    """Processor seconds of one of several."""
    began = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - began) / times


def training_cost(rounds: int = 5) -> dict[str, float]:
    """A training step at own words, in a plain LoRA's of all attention and feed-forward layers."""
    pictures, captions = pictures_of(BY_NAME["tom"])
    subject, base, ratios = Subject("tom", pictures, captions, "man"), load_toy_base(), []
    lora, own = ROWS[0], next(row for row in ROWS if row.targets is TEXT)
    for _ in range(rounds):
        times = []
        for row in (lora, own):
            began = time.process_time()
            train_concept(base, subject, row.settings(8, 0), row.targets)
            times.append(time.process_time() - began)
        ratios.append(times[1] / times[0])
    return {"training_step": median(ratios)}


def markdown(table: Mapping[str, Mapping], steps: int, concepts: int, costs: Mapping[str, float]) -> str:
    """The table, one row a way of training."""
    heads = ("alone", "worst alone", "kept of 15", "class drift", "pair", "worst of a pair", "mistaken")
    lines = [
        f"{concepts} concepts of the toy base, {PICTURES} pictures for each figure; {steps} steps of batch "
        f"{SETTINGS.batch}; words learn in every row, from a description where there is one.",
        "",
        f"| trained as | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
        *(f"| {name} | {' | '.join(f'{row[key]:.2f}' for key in FIGURES)} |" for name, row in table.items()),
        "",
        *(f"- {name.replace('_', ' ')}: {value:.3f} times" for name, value in costs.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
