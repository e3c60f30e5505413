"""What concepts do to each other when they are merged, pair by pair, as figures, as JSON and in plain words.

Everything is read from the adapters themselves, so it holds for files of other programs too; with second moments
of what a concept's layers read (`merging/moments.py`) it also tells how loudly the others answer what is meant for it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank, at_least_float32, narrowed, together
from ..adapters.sites import aligned, layer_of
from ..concept import Concept
from ..errors import AdapterError, listed
from ..merging.compatibility import trained_for_words
from ..merging.moments import Moment
from ..merging.own_words import words_of
from ..models.fingerprint import same_weights
from ..models.layers import block_of
from .measures import CrosstalkTable, crosstalk_table, distinct_names, share_no_text, shared_layers

SAME_DIRECTION = 0.999  # cosine from which on two rows of lora_down are one column of a basis
# Mean crosstalk up to which a pair is called so; LoRAs that never heard of each other lie at 0.02 to 0.2.
VERDICTS = (
    (1e-4, "kept apart exactly"),
    (0.03, "nearly apart"),
    (0.12, "expect some bleed"),
    (1.0, "expect them to mix"),
)


@dataclass(frozen=True)
class Pair:
    """Two concepts.  columns: layer width -> (shared basis columns, the rank), where any are shared.

    rows: share of the output rows that both write.  answers: |delta_second x| / |delta_first x| on the first one's
    own inputs and the other way round, or None without moments.  by_word: whether both act at their own words alone.
    """

    first: str
    second: str
    crosstalk: float
    cosine: float
    sign_conflicts: float | None
    columns: Mapping[int, tuple[int, int]]
    rows: float
    answers: tuple[float | None, float | None]
    blocks: Mapping[str, float] = field(default_factory=dict)
    by_word: bool = False

    def verdict(self) -> str:
        """One sentence: how much they step on each other, and by which columns."""
        words = next(words for top, words in VERDICTS if self.crosstalk <= top or top == 1.0)
        sentence = f"{self.first} and {self.second}: crosstalk {self.crosstalk:.4f}, {words}"
        if self.by_word:
            return f"{sentence}: each acts at its own words alone, and they share nothing but the picture's attention"
        if self.columns:
            width, (shared, rank) = max(self.columns.items(), key=lambda item: item[1][0])
            sentence += f"; they share {shared} of {rank} columns in {width}-wide layers"
        return sentence


@dataclass(frozen=True)
class Explanation:
    """pairs, loudest first; warnings: what does not belong together, each with the way out; table: see crosstalk."""

    names: tuple[str, ...]
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]
    table: CrosstalkTable

    def text(self) -> str:
        """For a person: the mean, the warnings, a sentence for every pair, the parts of the model."""
        mean = self.table["mean"]
        lines = [f"mean crosstalk {mean:.4f} over {len(self.pairs)} pairs (0 none, 1 the most there can be)"]
        lines += [*self.warnings, *(pair.verdict() for pair in self.pairs)]
        for pair in self.pairs:
            for one, other, loud in zip(
                (pair.first, pair.second), (pair.second, pair.first), pair.answers, strict=True
            ):
                if loud is not None:
                    lines.append(
                        f"on what is meant for {one}, {other} answers {loud:.2f} times as loudly as {one} itself"
                    )
        blocks: dict[str, list[float]] = {}
        for pair in self.pairs:
            for block, value in pair.blocks.items():
                blocks.setdefault(block, []).append(value)
        lines += [f"{block}: {sum(values) / len(values):.4f}" for block, values in blocks.items()]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same for scripts: {"mean", "pairs": [...], "warnings": [...], "layers": {layer: {"a x b": {...}}}}."""
        layers = {
            layer: {f"{a} x {b}": figures for (a, b), figures in pairs.items()}
            for layer, pairs in self.table["layers"].items()
        }
        pairs = [asdict(pair) for pair in self.pairs]
        return json.dumps({"mean": self.table["mean"], "pairs": pairs, "warnings": self.warnings, "layers": layers})


@torch.no_grad()
def explained(
    concepts: Sequence[Concept], moments: Sequence[Mapping[str, Moment] | None] = (), signs: bool = False
) -> Explanation:
    """Compare concepts with each other; moments: one mapping for each concept, or None where there are none.

    signs: also count weights that two concepts move in opposite directions, which costs a delta for each layer.
    Raises AdapterError for fewer than two concepts, or when no two of them share a layer.
    """
    if len(concepts) < 2:
        raise AdapterError("a crosstalk report compares concepts with each other; connect at least two")
    parts = aligned([concept.layers for concept in concepts])
    concepts = [replace(concept, layers=layers) for concept, layers in zip(concepts, parts, strict=True)]
    table = crosstalk_table(concepts, signs)
    if not table["pairs"]:
        raise AdapterError("no two of these concepts have a layer in common, so there is nothing to compare")
    names = distinct_names(concepts)
    recorded = list(moments) or [None] * len(concepts)
    loudness = []
    for (first, a, x), (second, b, y) in itertools.combinations(zip(names, concepts, recorded, strict=True), 2):
        if (first, second) in table["pairs"]:
            answers = (_answer(b, a, x), _answer(a, b, y))
            loudness.append(_pair(first, second, a, b, table, answers))
    loudness.sort(key=lambda pair: -pair.crosstalk)
    return Explanation(tuple(names), tuple(loudness), tuple(_warnings(names, concepts)), table)


def _pair(first: str, second: str, a: Concept, b: Concept, table: Mapping, answers: tuple) -> Pair:
    common = shared_layers(a.layers, b.layers)
    columns: dict[int, tuple[int, int]] = {}
    shared_rows = all_rows = 0
    blocks: dict[str, list[float]] = {}
    for layer in common:
        one, other = a.layers[layer], b.layers[layer]
        width, shared = one.lora_down[0].numel(), shared_columns(one, other)
        if shared > columns.get(width, (0, 0))[0]:
            columns[width] = (shared, min(one.rank, other.rank))
        shared_rows += len(_rows(one) & _rows(other))
        all_rows += one.out_features
        blocks.setdefault(block_of(layer), []).append(table["layers"][layer][first, second]["crosstalk"])
    figures = table["pairs"][first, second]
    return Pair(
        first,
        second,
        figures["crosstalk"],
        figures["cosine"],
        figures.get("sign_conflicts"),
        columns,
        shared_rows / all_rows,
        answers,
        {block: sum(values) / len(values) for block, values in blocks.items()},
        share_no_text(a, b),
    )


def shared_columns(a: LowRank, b: LowRank) -> int:
    """How many rows of lora_down two adapters of one layer have in common, in either direction.

    0 where a rank is beyond what the layer reads: such rows are no columns of anything.
    """
    if max(a.rank, b.rank) > a.lora_down[0].numel():
        return 0
    one, other = (_unit(adapter.lora_down.detach().flatten(1)) for adapter in together((a, b)))
    dtype = torch.promote_types(one.dtype, other.dtype)
    return int(((one.to(dtype) @ other.to(dtype).mT).abs() > SAME_DIRECTION).any(1).sum())


def _unit(rows: Tensor) -> Tensor:
    rows = at_least_float32(rows)
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _rows(adapter: LowRank) -> set[int]:
    return set(range(adapter.out_features)) if adapter.rows is None else set(adapter.rows.tolist())


def _answer(loud: Concept, own: Concept, moments: Mapping[str, Moment] | None) -> float | None:
    """Mean over layers of |delta_loud x| / |delta_own x| on the own concept's inputs x, from their moments."""
    if moments is not None and trained_for_words(loud) and not set(words_of(loud)) & set(words_of(own)):
        return 0.0
    ratios = []
    recorded = moments or {}
    for layer in shared_layers(own.layers, loud.layers):
        adapter, moment = own.layers[layer], recorded.get(layer, recorded.get(layer_of(layer)))
        if moment is not None and adapter.lora_down[0].numel() == moment.factor.shape[1]:
            size = _size_on(adapter, moment)
            if size > 0:
                ratios.append(_size_on(loud.layers[layer], moment) / size)
    return sum(ratios) / len(ratios) if ratios else None


def _size_on(adapter: LowRank, moment: Moment) -> float:
    """Root mean square of |delta x|: sqrt(tr(delta C delta^T)), from the factors."""
    up, down = narrowed(adapter.lora_up, adapter.lora_down)
    seen = down @ moment.factor.to(down).mT
    inner = seen @ seen.mT + moment.rest * (down @ down.mT)
    return abs(adapter.scale) * ((up.mT @ up) * inner).sum().clamp(min=0).sqrt().item()


# --- what does not belong together --------------------------------------------------------------------------


def warnings_between(concepts: Sequence[Concept]) -> list[str]:
    """Sentences for a person about concepts that can be merged, but should not be without knowing."""
    return _pairwise(distinct_names(concepts), concepts)


def warnings_on_base(
    concepts: Sequence[Concept], base_hash: str, base_sample: str = "", architecture: str = ""
) -> list[str]:
    """A sentence for each concept that was trained on another checkpoint than the one that it is merged into.

    base_hash, base_sample: the checkpoint's (`models/base.py`, `models/fingerprint.py`); either may be "", unknown.
    architecture: the checkpoint's family; a concept of another one does not fit, which is said where it is refused.
    """
    return [
        f"{concept.name} was trained on another checkpoint of this family: it acts less well here; load the one that "
        "it was trained on, or expect it to be less like its pictures"
        for concept in concepts
        if _trained_elsewhere(concept, base_hash, base_sample) and architecture in ("", concept.recipe.architecture)
    ]


def _trained_elsewhere(concept: Concept, base_hash: str, base_sample: str) -> bool:
    if base_hash and base_hash == concept.recipe.base_hash:
        return False
    same = same_weights(concept.recipe.origin.get("base_sample"), base_sample)
    if same is None:
        return bool(base_hash and concept.recipe.base_hash)
    return not same


def _pairwise(names: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    return [
        sentence
        for (first, a), (second, b) in itertools.combinations(zip(names, concepts, strict=True), 2)
        for sentence in _between(first, a, second, b, concepts)
    ]


def _warnings(names: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    sentences = _pairwise(names, concepts)
    layers = {layer for concept in concepts for layer in concept.layers}
    for name, concept in zip(names, concepts, strict=True):
        odd = sorted(layer for layer in concept.layers if block_of(layer) == "other")
        if odd and len(odd) < len(layers):
            sentences.append(f"{name}: layers in no block that we know: {listed(odd)}")
    return sentences


def _between(first: str, a: Concept, second: str, b: Concept, everyone: Sequence[Concept]) -> list[str]:
    one, other = a.recipe, b.recipe
    if one.architecture and other.architecture and one.architecture != other.architecture:
        return [f"{first} is for {one.architecture}, {second} for {other.architecture}: they cannot be merged"]
    sentences = []
    if one.base_hash and other.base_hash and one.base_hash != other.base_hash:
        sentences.append(
            f"{first} and {second} were trained on different models of one family: each acts less well on the other's"
        )
    if share_no_text(a, b):
        return sentences
    by_word = [trained_for_words(a), trained_for_words(b)]
    if any(by_word) and not all(by_word) and a.layers and b.layers:
        loud, quiet = (second, first) if by_word[0] else (first, second)
        sentences.append(
            f"{loud} acts everywhere, on the words of {quiet} too; draw it at its own words alone to keep {quiet} as "
            "it is"
        )
        return sentences
    if one.basis and other.basis and one.basis != other.basis:
        sentences.append(
            f"{first} and {second} were trained on different orthogonal bases, so slots do not keep them apart; "
            "train one again on the other's basis"
        )
    elif one.basis and one.basis == other.basis and None not in (one.slot, other.slot) and one.slot == other.slot:
        free = _free(everyone, one)
        sentences.append(f"{first} and {second} were trained in the same slot, {one.slot}; retrain one in slot {free}")
    elif one.blocks and one.slot is not None and (one.blocks, one.layout, one.slot) == _block(other):
        free = _free(everyone, one)
        way_out = f"retrain one in slot {free}" if free < one.blocks else "retrain all with more blocks"
        sentences.append(f"{first} and {second} were trained in the same block of rows, {one.slot}; {way_out}")
    if one.blocks and other.blocks and (one.blocks, one.layout) != (other.blocks, other.layout):
        sentences.append(
            f"{first} was trained in {one.blocks} {one.layout} blocks, {second} in {other.blocks} {other.layout}: "
            "merge them by sum, a block merge needs one partition"
        )
    return sentences


def _block(recipe) -> tuple:
    return recipe.blocks, recipe.layout, recipe.slot


def _free(everyone: Sequence[Concept], like) -> int:
    """The first slot of that basis that none of the concepts has."""
    taken = {concept.recipe.slot for concept in everyone if concept.recipe.basis == like.basis}
    return next(slot for slot in itertools.count() if slot not in taken)
