"""Fusion on the toy base: damped least squares beside the papers' descent, and what the damping does.

    python -m bench.fusion --concepts bench_output/merge_methods/concepts/lora

Needs concepts that `make bench-merge-methods` trained.
Residuals are |sum_i (D - delta_i) X_i|^2 / |sum_i delta_i X_i|^2 over all layers, on the rows that the merge was made
from ("seen") and on rows of other prompts and noise ("new").
"own" and "others" are mean changes of a pixel (of 255): of the concepts' own pictures by new prompts from what each
draws alone, and of pictures without any concept from what the base draws.  Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.descent import fused_by_descent
from modular_concepts.adapters.attach import attached
from modular_concepts.concept import Concept
from modular_concepts.files.concept import load_concept
from modular_concepts.merging import Evidence, MergeOptions, merge_concepts
from modular_concepts.merging.dense import MergedDense
from modular_concepts.merging.moments import inputs_of
from modular_concepts.models.base import BaseModel
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.recording import DRAWING, trigger_of
from modular_concepts.sampling import customised, sample
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.vocabulary import CLASSES

# What the moments are recorded with, and what else a concept is then asked for.
SAID = ("a {concept}", "a {concept} on the beach", "a {concept} in the snow", "a {concept} in the city")
NEW = ("a {concept} in the forest", "a {concept} at night", "a {concept} in the desert", "{concept}")
WITHOUT = tuple(f"a {word} {place}" for word in CLASSES for place in ("on the beach", "in the forest"))
RIDGES = (1e-6, 1e-2, 0.03, 0.1, 0.3, 1.0)
DRAWN = replace(DRAWING, cfg=4.0)
Inputs = Mapping[str, Tensor]


@torch.no_grad()
def recorded_inputs(
    base: BaseModel, concept: Concept, prompts: Sequence[str] = SAID, count: int = 8, rows: int = 96, seed: int = 0
) -> Inputs:
    """Layer -> (rows kept, n) of what it reads while the concept is drawn alone, `rows` of every forward pass."""
    texts = [prompts[index % len(prompts)].replace("{concept}", trigger_of(concept)) for index in range(count)]
    layers, kept, handles = concept_layers(base, Targets(("all_linear",), ("all_linear",))), {}, []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = inputs_of(module, args[0])
            kept.setdefault(name, []).append(x[:: max(1, len(x) // rows)].clone())

        return hook

    with customised(base, [concept], [1.0]) as tokens:
        for name in concept.layers:
            handles.append(layers[name].register_forward_pre_hook(watch(name)))
        try:
            sample(base, texts, range(seed, seed + count), tokens, DRAWING)
        finally:
            for handle in handles:
                handle.remove()
    return {name: torch.cat(found) for name, found in kept.items()}


def descended(
    concepts: Sequence[Concept], inputs: Sequence[Inputs], strength: float = 1.0, scale: float = 1.0
) -> dict[str, MergedDense]:
    """Each layer by L-BFGS, with the iterations of Mix-of-Show: 500 for keys and values of the text, 50 for others.

    scale: times these numbers of iterations.
    """
    merged = {}
    for layer in {name: None for concept in concepts for name in concept.layers}:
        owners = [index for index, concept in enumerate(concepts) if layer in concept.layers]
        deltas = [strength * concepts[index].layers[layer].delta().flatten(1) for index in owners]
        iterations = 500 if layer.endswith(("attn2.to_k", "attn2.to_v")) else 50
        found = fused_by_descent(deltas, [inputs[index][layer] for index in owners], round(iterations * scale))
        merged[layer] = MergedDense(found.reshape(concepts[owners[0]].layers[layer].weight_shape))
    return merged


def moments_of(inputs: Inputs) -> dict[str, Tensor]:
    """Second moments of recorded rows, (n, n) float64."""
    return {name: x.double().mT @ x.double() / len(x) for name, x in inputs.items()}


def residual(merged: Mapping, concepts: Sequence[Concept], moments: Sequence[Mapping[str, Tensor]]) -> float:
    """sum |(D - delta_i) X_i|^2 / sum |delta_i X_i|^2 over layers and concepts, from second moments."""
    off = own = 0.0
    for concept, known in zip(concepts, moments, strict=True):
        for layer, adapter in concept.layers.items():
            delta, gram = adapter.delta().flatten(1).double(), known[layer]
            wrong = merged[layer].delta().flatten(1).double() - delta
            off += float(((wrong @ gram) * wrong).sum())
            own += float(((delta @ gram) * delta).sum())
    return off / own


@torch.no_grad()
def pictures(base: BaseModel, concepts: Sequence[Concept], merged: Mapping | None) -> tuple[Tensor, Tensor]:
    """(what each concept draws by new prompts, what is drawn without any); merged None: each alone, and the base."""
    layers, own = concept_layers(base, Targets(("all_linear",), ("all_linear",))), []
    for concept in concepts:
        texts = [prompt.replace("{concept}", trigger_of(concept)) for prompt in NEW]
        with attached(layers, concept.layers if merged is None else merged):
            own.append(sample(base, texts, range(len(texts)), concept.tokens, DRAWN))
    with attached(layers, merged or {}):
        others = sample(base, WITHOUT, range(len(WITHOUT)), {}, DRAWN)
    return torch.cat(own), others


def size(merged: Mapping) -> float:
    return float(sum(layer.delta().double().square().sum() for layer in merged.values())) ** 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=Path, default=Path("bench_output/merge_methods/concepts/lora"))
    parser.add_argument("--names", nargs="+", default=["tom", "tim", "rex", "minka", "ada"])
    args = parser.parse_args(arguments)
    files = [args.concepts / f"{name}.safetensors" for name in args.names]
    if missing := [file.name for file in files if not file.is_file()]:
        parser.error(
            f"{args.concepts} has no {', '.join(missing)}; run `make bench-merge-methods` first, which trains them"
        )
    base, concepts = load_toy_base(), [load_concept(file) for file in files]
    inputs = [recorded_inputs(base, concept) for concept in concepts]
    seen = [moments_of(own) for own in inputs]
    new = [moments_of(recorded_inputs(base, concept, NEW, seed=100)) for concept in concepts]
    ones, evidence, rows = [1.0] * len(concepts), Evidence(seen), {}

    def note(name: str, merged: Mapping, seconds: float) -> None:
        figures = {"seen": residual(merged, concepts, seen), "new": residual(merged, concepts, new)}
        for kind, drawn, still in zip(("own", "others"), pictures(base, concepts, merged), alone, strict=True):
            figures[kind] = float((drawn - still).abs().mean()) * 255
        rows[name] = figures | {"size": size(merged) / whole, "seconds": seconds}
        print(
            f"{name:24}" + "".join(f"{key} {value:9.4f}  " for key, value in rows[name].items()),
            file=sys.stderr,
            flush=True,
        )

    alone = pictures(base, concepts, None)
    summed = merge_concepts(concepts, ones)
    whole = size(summed)
    note("sum", summed, 0.0)
    note("mean", merge_concepts(concepts, ones, "mean"), 0.0)
    for ridge in RIDGES:
        began = time.process_time()
        merged = merge_concepts(concepts, ones, "fusion", options=MergeOptions(ridge=ridge), evidence=evidence)
        note(f"closed form, {ridge:g}", merged, time.process_time() - began)
    began = time.process_time()
    note("L-BFGS", descended(concepts, inputs), time.process_time() - began)
    print(json.dumps({"concepts": args.names, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
