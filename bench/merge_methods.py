"""The same five toy concepts merged by every method, then each drawn from the merged model and judged.

    python -m bench.merge_methods                            everything: three quarters of an hour on two cores
    python -m bench.merge_methods --only "orthogonal, sum"   these rows alone; what is finished stays in --out

Writes OUT/concepts/METHOD/NAME.safetensors with moments beside, OUT/rows/*.json and .safetensors (the pictures),
OUT/methods.md (the table) and OUT/methods.png (the sheet); prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.fusion import SAID, descended, recorded_inputs
from bench.merge_sheet import merge_sheet
from bench.methods import Method
from modular_concepts.adapters.attach import attached
from modular_concepts.concept import Concept
from modular_concepts.crosstalk.measures import crosstalk_table
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.moments import Recorded, load_moments, moments_path, save_moments
from modular_concepts.merging import NOTHING, Evidence, Merged, MergeOptions, merge_concepts
from modular_concepts.merging.compatibility import faded_words
from modular_concepts.merging.orthogonalize import orthogonal_concepts
from modular_concepts.merging.truncation import share_kept
from modular_concepts.models.base import BaseModel
from modular_concepts.models.fingerprint import concept_mark
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.recording import recorded, text_features, usual_text
from modular_concepts.sampling import sample
from modular_concepts.storage.atomic import replacing
from modular_concepts.storage.names import safe_name
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.demo import SAMPLING, prompts_for
from modular_concepts.toy.judges import Judges, load_judges
from modular_concepts.toy.standard import BY_NAME, pictures_of
from modular_concepts.training.teach import Subject, train_concept

CONCEPTS = ("tom", "tim", "rex", "minka", "ada")
PICTURES = 8
DRAWN = replace(SAMPLING, steps=12)
STEPS = 300
TRAINED = {
    "lora": Method("lora", {"layerwise": True}),
    "orthogonal": Method("orthogonal", {"method": "orthogonal", "layerwise": True}),
    "block": Method("block", {"method": "block", "blocks": 8, "erasure": 0.2, "layerwise": True}),
    "custom_diffusion": Method("custom diffusion", {"method": "custom_diffusion"}, Targets(("cross_attention_kv",))),
}
COLUMNS = ("method", "merge, s", "energy lost", "disturbed", "identity", "bleed", "mistaken", "image", "moved")
GROUPS = {"lora": "LoRA", "orthogonal": "orthogonal", "block": "block", "custom_diffusion": "Custom Diffusion"}


@dataclass(frozen=True)
class Row:
    """A row.  how: "alone", "descent" (fusion by L-BFGS) or one of `settings.merging.METHOD_HELP`.

    first: how the concepts are made orthogonal before, see `merging/orthogonalize.py`.
    """

    name: str
    trained: str
    how: str = "sum"
    strength: float = 1.0
    literal: bool = False
    options: MergeOptions = MergeOptions()
    first: str = ""


ROWS = (
    Row("LoRA, each alone", "lora", "alone"),
    Row("LoRA, sum (task arithmetic)", "lora"),
    Row("LoRA, sum at 0.6", "lora", strength=0.6),
    Row("LoRA, mean = average", "lora", "mean"),
    Row("LoRA, fusion, closed form", "lora", "fusion"),
    Row("LoRA, fusion, damping 0.001", "lora", "fusion", options=MergeOptions(ridge=1e-3)),
    Row("LoRA, fusion, L-BFGS", "lora", "descent"),
    Row("LoRA, TIES, density 0.5", "lora", "ties"),
    Row("LoRA, DARE, density 0.5", "lora", "dare"),
    Row("LoRA, magnitude, density 0.5", "lora", "magnitude"),
    Row("LoRA, SVD to rank 8 of 40", "lora", "svd", options=MergeOptions(rank=8)),
    Row("LoRA, made orthogonal, sum", "lora", first="symmetric"),
    Row("LoRA, one after another, sum", "lora", first="sequential"),
    Row("orthogonal, each alone", "orthogonal", "alone"),
    Row("orthogonal, sum", "orthogonal"),
    Row("orthogonal, sum at 0.6", "orthogonal", strength=0.6),
    Row("orthogonal, fusion", "orthogonal", "fusion"),
    Row("orthogonal, TIES", "orthogonal", "ties"),
    Row("orthogonal, SVD to rank 8 of 40", "orthogonal", "svd", options=MergeOptions(rank=8)),
    Row("block, each alone", "block", "alone"),
    Row("block", "block", "block"),
    Row("block, strengths sum to 1", "block", "block", literal=True),
    Row("Custom Diffusion, each alone", "custom_diffusion", "alone"),
    Row("Custom Diffusion, constrained", "custom_diffusion", "custom_diffusion"),
    Row("Custom Diffusion, sum", "custom_diffusion"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_output/merge_methods"))
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(arguments)
    base, judges = load_toy_base(), load_judges()
    (args.out / "rows").mkdir(parents=True, exist_ok=True)
    chosen = [row for row in ROWS if not args.only or row.name in args.only]
    found, shown = {}, {}
    for row in chosen:
        path = args.out / "rows" / f"{safe_name(row.name)}.json"
        if not path.exists():
            print(row.name, file=sys.stderr, flush=True)
            concepts = concepts_of(base, row.trained, args.out / "concepts", args.steps)
            figures, pictures = run(base, judges, row, concepts, args.out / "concepts")
            save_file(pictures, path.with_suffix(".safetensors"))
            with replacing(path) as file:
                file.write(json.dumps(figures).encode())
        found[row.name] = json.loads(path.read_text())
        shown[row.name] = load_file(path.with_suffix(".safetensors"))
    for row in chosen:
        alone = shown.get(f"{GROUPS[row.trained]}, each alone")
        found[row.name]["moved"] = None if alone is None else moved(shown[row.name], alone)
    with replacing(args.out / "methods.md") as file:
        file.write(markdown(found).encode())
    references = {name: pictures_of(BY_NAME[name])[0] for name in CONCEPTS}
    merge_sheet(args.out / "methods.png", references, shown)
    print(json.dumps({"concepts": CONCEPTS, "steps": args.steps, "pictures": PICTURES, "methods": found}))
    return 0


def concepts_of(base: BaseModel, trained: str, folder: Path, steps: int) -> list[Concept]:
    """The five concepts by one method, from their files, or trained now and kept there with their moments.

    A concept's number is its seed and its slot: LoRAs of one seed would all start from one lora_down.
    """
    (folder / trained).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(CONCEPTS):
        path = folder / trained / f"{name}.safetensors"
        if not path.exists():
            print(f"train {name} ({trained})", file=sys.stderr, flush=True)
            concept, (pictures, captions) = BY_NAME[name], pictures_of(BY_NAME[name])
            subject = Subject(name, pictures, captions, concept.class_word, fingerprint=f"standard-{name}")
            method = TRAINED[trained]
            own, _ = train_concept(base, subject, method.settings(steps, number), method.targets)
            origin = Recorded(concept_mark(own), base.mark, str(SAID))
            save_moments(recorded(base, own, SAID).moments(), moments_path(path), origin)
            save_concept(own, path)
    return [load_concept(folder / trained / f"{name}.safetensors") for name in CONCEPTS]


def run(
    base: BaseModel, judges: Judges, row: Row, concepts: Sequence[Concept], folder: Path
) -> tuple[dict, dict[str, Tensor]]:
    """A row's figures and its pictures, (PICTURES, 3, 32, 32) for each concept; same prompts and noise in all rows."""
    evidence = evidence_of(base, row, concepts, folder)
    words = [faded_words([concept], [row.strength], base.word_rows) for concept in concepts]
    if row.how == "alone":
        seconds, lost, merged = None, None, None
    else:
        merged, seconds, lost = timed_merge(base, row, concepts, evidence)
    layers = concept_layers(base, Targets(("all_linear",), ("all_linear",)))
    pictures = {}
    for concept, word in zip(concepts, words, strict=True):
        own = merge_concepts([concept], [1.0]) if merged is None else merged
        prompts, _ = prompts_for(BY_NAME[concept.name].trigger, PICTURES)
        with attached(layers, own):
            pictures[concept.name] = sample(base, prompts, range(PICTURES), word, DRAWN)
    figures = judged(judges, pictures)
    if row.first:
        figures |= given_way(concepts, row.first)
    told = row.trained != "custom_diffusion" and row.how not in ("alone", "descent")
    apart = disturbance(base, row, folder) if told else None
    return figures | {"seconds": seconds, "lost": lost, "disturbed": apart}, pictures


def given_way(concepts: Sequence[Concept], way: str) -> dict:
    """What each concept keeps of its energy, and mean crosstalk before and after."""
    after, kept = orthogonal_concepts(concepts, way)
    shares = {concept.name: share for concept, share in zip(concepts, kept, strict=True)}
    return {"kept": shares, "crosstalk": [crosstalk_table(own)["mean"] for own in (concepts, after)]}


def evidence_of(base: BaseModel, row: Row, concepts: Sequence[Concept], folder: Path) -> Evidence | list[Mapping]:
    """What the method must know beside adapters: moments from the files, text features, or whole inputs."""
    if row.how == "fusion":
        return Evidence([load_moments(moments_path(folder / row.trained / f"{c.name}.safetensors")) for c in concepts])
    if row.how == "custom_diffusion":
        texts = [text_features(base, concept, ("a {concept}",)) for concept in concepts]
        return Evidence(texts=texts, usual=usual_text(base))
    if row.how == "descent":
        return [recorded_inputs(base, concept) for concept in concepts]
    return NOTHING


def timed_merge(
    base: BaseModel, row: Row, concepts: Sequence[Concept], evidence
) -> tuple[dict[str, Merged], float, float | None]:
    """(merged layers, processor seconds until they are in copies of the weights, share of energy lost where it is)."""
    modules = concept_layers(base, Targets(("all_linear",), ("all_linear",)))
    weights = {name: modules[name].weight.detach().clone() for concept in concepts for name in concept.layers}
    began = time.process_time()
    merged, lost = merge(row, concepts, evidence)
    for name, layer in merged.items():
        layer.add_to(weights[name])
    seconds = time.process_time() - began
    if row.how == "svd":
        lost = 1 - share_kept(merged, merge_concepts(concepts, [row.strength] * len(concepts)))
    return merged, seconds, lost


def merge(row: Row, concepts: Sequence[Concept], evidence) -> tuple[dict[str, Merged], float | None]:
    """(merged layers, share of energy that making orthogonal lost)."""
    strengths, lost = [row.strength] * len(concepts), None
    if row.how == "descent":
        return descended(concepts, evidence, row.strength), None
    if row.first:
        concepts, kept = orthogonal_concepts(concepts, row.first)
        lost = 1 - mean(kept)
    return merge_concepts(concepts, strengths, row.how, row.literal, row.options, evidence), lost


def disturbance(base: BaseModel, row: Row, folder: Path) -> float:
    """How much this method changes each concept where it is alone by right: its own directions, or its own rows.

    Measured on orthogonal concepts (on block ones for a block merge): |M P_i - s_i delta_i| / |s_i delta_i|, mean over
    concepts, M the merged delta, P_i the projection, s_i the strength at which M has the concept.  0: the method keeps
    orthogonal concepts apart.
    """
    kind = "block" if row.trained == "block" else "orthogonal"
    concepts = [load_concept(folder / kind / f"{name}.safetensors") for name in CONCEPTS]
    own = replace(row, trained=kind)
    merged, _ = merge(own, concepts, evidence_of(base, own, concepts, folder))
    strength = row.strength / len(concepts) if row.how == "mean" or row.literal else row.strength
    shares = []
    for concept in concepts:
        off = size = 0.0
        for name, adapter in concept.layers.items():
            found, wanted = merged[name].delta().double(), strength * adapter.delta().double()
            if kind == "block":
                found, wanted = found[adapter.rows], wanted[adapter.rows]
            else:
                rows = torch.linalg.qr(adapter.lora_down.double().mT)[0].mT
                found = found @ rows.mT @ rows
            off, size = off + float((found - wanted).square().sum()), size + float(wanted.square().sum())
        shares.append((off / size) ** 0.5)
    return mean(shares)


def judged(judges: Judges, pictures: Mapping[str, Tensor]) -> dict:
    """identity: own accepted; bleed: accepted as another of the five; mistaken: nearer to another than to its own."""
    references = {name: pictures_of(BY_NAME[name])[0] for name in pictures}
    identity, bleed, mistaken, image = {}, {}, {}, {}
    for name, own in pictures.items():
        others = [other for other in references if other != name]
        identity[name] = judges.identity(own, references[name])
        bleed[name] = mean(judges.identity(own, references[other]) for other in others)
        image[name] = judges.image_alignment(own, references[name])
        likeness = torch.stack([judges.similarity(own, references[other]) for other in (name, *others)])
        mistaken[name] = (likeness.argmax(0) > 0).float().mean().item()
    return {"identity": identity, "bleed": bleed, "mistaken": mistaken, "image": image}


def moved(pictures: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean change of a pixel from what the concept draws alone with the same words and noise, in parts of 255."""
    return {name: (own - alone[name]).abs().mean().item() * 255 for name, own in pictures.items()}


def markdown(found: Mapping[str, Mapping]) -> str:
    """The table, one row a method."""
    lines = [
        f"{len(CONCEPTS)} concepts, {PICTURES} pictures each.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for name, row in found.items():
        cells = [
            "" if row["seconds"] is None else f"{row['seconds']:.2g}",
            "" if row["lost"] is None else f"{row['lost']:.0%}",
            "" if row["disturbed"] is None else f"{row['disturbed']:.2f}",
            *(f"{mean(row[key].values()):.2f}" for key in ("identity", "bleed", "mistaken", "image")),
            "" if row["moved"] is None else f"{mean(row['moved'].values()):.0f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
