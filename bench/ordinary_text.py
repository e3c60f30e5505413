"""How far Custom Diffusion's merge moves text that it was never shown, beside a concept's own answer.

    python -m bench.ordinary_text                                  three concepts with random changes
    python -m bench.ordinary_text --concepts bench_output/merge_methods/concepts/custom_diffusion

The keys and values of captions that are not among the merge's own, root mean square over rows and layers, as a share of
what a concept's layers answer to its own words.  "text" are the rows from the start to the end mark, "all" with the
padding, which the layers read too.  "words" is the largest relative error of a concept's own answer.  Takes seconds;
prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modular_concepts.adapters.low_rank import new_full
from modular_concepts.concept import Concept, Recipe
from modular_concepts.files.concept import load_concept
from modular_concepts.merging import Evidence, custom_diffusion, merge_concepts
from modular_concepts.models.base import BaseModel
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.recording import length_of, text_features, usual_text
from modular_concepts.seeds import seeded
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.vocabulary import CLASSES, SCENE_PHRASES

CLASS_OF = {"tom": "man", "rex": "dog", "minka": "cat"}
TEN = ("a photo", "a man", "a woman", "a dog", "a cat", "a house", "a car", "a beach", "the sky", "a picture of a city")
RIDGES = (1e-6, 1e-3, 1e-2, 0.1)
VECTORS = 8
HELD_OUT = (
    *(f"a {word} {place}" for word in CLASSES for place in SCENE_PHRASES.values()),
    *("a woman with blue dress and a dog at night", "the forest", "a red car and a green house", "snow"),
)


def held_out(base: BaseModel) -> list[str]:
    """Captions that the merge is never shown on this base."""
    return [text for text in HELD_OUT if text not in base.ordinary]


def made(base: BaseModel, name: str) -> Concept:
    """A concept of random changes to keys and values, whose word has gone its own way from its class word."""
    generator = seeded(1, name)
    layers = {}
    for layer, module in concept_layers(base, Targets(("cross_attention_kv",))).items():
        adapter = new_full(*module.weight.shape, None)
        change = 0.05 * module.weight.std() * torch.randn(adapter.lora_up.shape, generator=generator)
        layers[layer] = adapter.replace(lora_up=change)
    word = base.word_rows(CLASS_OF[name]) + 0.3 * torch.randn(
        VECTORS, base.embedding.embedding_dim, generator=generator
    )
    return Concept(name, layers, {f"<{name}>": word}, Recipe(architecture="toy", triggers=(f"<{name}>",)))


@torch.no_grad()
def rows_of(base: BaseModel, captions: Sequence[str], padding: bool) -> Tensor:
    """(rows, width) float64 text features of captions, with or without what follows their end mark."""
    contexts, ids = base.context(list(captions), {}), base.tokenize(list(captions), {}).tolist()
    end = int(base.tokenize([""], {})[0][1])
    lengths = [len(own) if padding else length_of(own, end) for own in ids]
    return torch.cat([context[:length] for context, length in zip(contexts, lengths, strict=True)]).double()


def answers(merged: Mapping, rows: Tensor) -> float:
    """Root mean square of |delta x| over rows and the layers that read text."""
    found = [(rows @ merged[name].delta().double().mT).square().sum(1).mean() for name in merged if ".attn2." in name]
    return float(torch.stack(found).mean().sqrt())


def wrong_on_words(merged: Mapping, concepts: Sequence[Concept], texts: Sequence[Tensor]) -> float:
    worst = 0.0
    for concept, rows in zip(concepts, texts, strict=True):
        for name, adapter in concept.layers.items():
            wanted = rows.double() @ adapter.delta().double().mT
            found = rows.double() @ merged[name].delta().double().mT
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=Path, help="a folder with trained ones")
    args = parser.parse_args(arguments)
    base = load_toy_base()
    found = [load_concept(args.concepts / f"{n}.safetensors") for n in CLASS_OF] if args.concepts else None
    concepts = found or [made(base, name) for name in CLASS_OF]
    texts, ones, unseen = [text_features(base, c) for c in concepts], [1.0] * len(concepts), held_out(base)
    own = [answers(merge_concepts([c], [1.0]), t.double()) for c, t in zip(concepts, texts, strict=True)]
    size, rows, table = sum(own) / len(own), {p: rows_of(base, unseen, p) for p in (False, True)}, {}

    def note(name: str, merged: Mapping) -> None:
        text, whole = (answers(merged, rows[padding]) / size for padding in (False, True))
        table[name] = {"text": text, "all": whole, "words": wrong_on_words(merged, concepts, texts)}
        print(f"{name:32}" + "".join(f"{k} {v:8.4f}  " for k, v in table[name].items()), file=sys.stderr, flush=True)

    note("sum", merge_concepts(concepts, ones))
    ten = base.context(list(TEN), {}).flatten(0, 1).double().detach()
    sets = {
        "ten captions, all rows": ten.mT @ ten / len(ten),
        **{f"{n} captions": usual_text(base, base.ordinary[:n]) for n in (10, 96, len(base.ordinary))},
    }
    for title, usual in sets.items():
        for ridge in RIDGES:
            custom_diffusion.RIDGE = ridge
            evidence = Evidence(texts=texts, usual=usual)
            note(f"{title}, {ridge:g}", merge_concepts(concepts, ones, "custom_diffusion", evidence=evidence))
    print(json.dumps({"captions": len(unseen), "rows": table}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
