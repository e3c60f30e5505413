"""Fusion in Mix-of-Show's order beside fusion at once, for toy concepts that change the text encoder too.

    python -m bench.fusion_order --concepts DIR --names tom tim

The paper fuses the text encoder first, records what keys and values read on the fused text, fuses them, and records the
rest while each concept is drawn over both; so every new set of concepts is recorded anew.  At once: everything is
recorded while each concept is alone, and kept beside its file.  Figures: keys and values of new prompts in the merged
model, mean square distance from those of each concept alone, as a share of what the concept changes there ("keys and
values", 0 is perfect, 1 the base); and the same for the text itself.  No picture is drawn.  Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.fusion import NEW, SAID
from modular_concepts.adapters.attach import attached
from modular_concepts.concept import Concept
from modular_concepts.files.concept import load_concept
from modular_concepts.merging import Evidence, Merged, merge_concepts
from modular_concepts.merging.moments import Moment, recording
from modular_concepts.models.base import BaseModel
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.recording import trigger_of
from modular_concepts.toy.base import load_toy_base

Chosen = Callable[[str], bool]


def of_text(name: str) -> bool:
    return name.startswith("text_encoder.")


def reads_text(name: str) -> bool:
    return ".attn2.to_k" in name or ".attn2.to_v" in name


def part(concept: Concept, chosen: Chosen) -> Concept:
    return Concept(concept.name, {n: a for n, a in concept.layers.items() if chosen(n)}, {}, concept.recipe)


def text(base: BaseModel, concept: Concept, adapters: Mapping, prompts: Sequence[str]) -> Tensor:
    """(rows, width) of prompts with the concept, its text encoder changed by `adapters`."""
    layers = concept_layers(base, Targets(("all_linear",), ("all_linear",)))
    said = [prompt.replace("{concept}", trigger_of(concept)) for prompt in prompts]
    with attached(layers, {name: own for name, own in adapters.items() if of_text(name)}):
        return base.context(said, concept.tokens).flatten(0, 1).double()


def text_moments(base: BaseModel, concept: Concept) -> Mapping[str, Moment]:
    layers = concept_layers(base, Targets(("all_linear",), ("all_linear",)))
    with recording({name: layers[name] for name in concept.layers if of_text(name)}) as recorder:
        text(base, concept, concept.layers, SAID)
    return recorder.moments()


def read_moments(concept: Concept, rows: Tensor) -> Mapping[str, Moment]:
    """Of keys and values, which all read the same text."""
    moment = Moment.of(rows.mT @ rows / len(rows))
    return {name: moment for name in concept.layers if reads_text(name)}


def fused(concepts: Sequence[Concept], moments, chosen: Chosen) -> dict[str, Merged]:
    parts = [part(concept, chosen) for concept in concepts]
    return merge_concepts(parts, [1.0] * len(parts), "fusion", evidence=Evidence(moments))


def missed(base: BaseModel, concepts: Sequence[Concept], merged: Mapping) -> dict[str, float]:
    """Of the text and of keys and values, by new prompts: |merged - alone|^2 / |alone - base|^2."""
    modules = concept_layers(base, Targets(("all_linear",), ("all_linear",)))
    off = {"text": [0.0, 0.0], "keys and values": [0.0, 0.0]}
    for concept in concepts:
        alone, now, plain = (text(base, concept, layers, NEW) for layers in (concept.layers, merged, {}))
        off["text"][0] += float((now - alone).square().sum())
        off["text"][1] += float((plain - alone).square().sum())
        for name in concept.layers:
            if not reads_text(name):
                continue
            weight = modules[name].weight.double()
            wanted = alone @ (weight + concept.layers[name].delta().double()).mT
            off["keys and values"][0] += float(
                (now @ (weight + merged[name].delta().double()).mT - wanted).square().sum()
            )
            off["keys and values"][1] += float((plain @ weight.mT - wanted).square().sum())
    return {what: wrong / whole for what, (wrong, whole) in off.items()}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=Path, required=True, help="folder of concepts with text encoder layers")
    parser.add_argument("--names", nargs="+", default=["tom", "tim"])
    args = parser.parse_args(arguments)
    base = load_toy_base()
    concepts = [load_concept(args.concepts / f"{name}.safetensors") for name in args.names]
    words = fused(concepts, [text_moments(base, concept) for concept in concepts], of_text)
    alone = [read_moments(c, text(base, c, c.layers, SAID)) for c in concepts]
    over = [read_moments(c, text(base, c, words, SAID)) for c in concepts]
    ways = {
        "sum": merge_concepts(concepts, [1.0] * len(concepts)),
        "at once": words | fused(concepts, alone, reads_text),
        "in order": words | fused(concepts, over, reads_text),
    }
    rows = {title: missed(base, concepts, merged) for title, merged in ways.items()}
    for title, figures in rows.items():
        print(f"{title:12}" + "".join(f"  {k} {v:.4f}" for k, v in figures.items()), file=sys.stderr)
    print(json.dumps({"concepts": args.names, "missed": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
