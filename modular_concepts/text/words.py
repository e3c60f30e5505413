"""Learned words: extra rows behind a text model's vocabulary, which itself is never written.

A trigger word stands for extra token ids, vocab_size, vocab_size + 1, ... in the order of the mapping.
Learned rows are (vectors, width), or (layers, vectors, width) with rows of their own for each
cross-attention layer (P+, Voynov et al. 2023; ED-LoRA, Gu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterError
from .learned_word import layers_of
from .triggers import heard

RANDOM_START = 0.013


def new_token(
    start: Tensor, vectors: int, noise: float, generator: torch.Generator, layers: int | None = None
) -> Tensor:
    """Rows of a new trigger word: the class word's own rows in turn, plus Gaussian noise.

    start: (k, width) rows of the class word.  noise is relative to the rows' root mean square.
    Returns (vectors, width), or (layers, vectors, width) with all layers equal; float32 or float64.
    """
    if start.dim() != 2 or len(start) == 0:
        raise AdapterError(f"a new token starts from rows of shape {tuple(start.shape)}; we need (count, width)")
    start = start.detach().to(torch.promote_types(start.dtype, torch.float32))
    rows = start[torch.arange(vectors) % len(start)]
    drawn = torch.randn(rows.shape, generator=generator).to(rows)
    rows = rows + noise * start.square().mean().sqrt() * drawn
    return rows if layers is None else rows.repeat(layers, 1, 1)


def random_and_class(start: Tensor, vectors: int, generator: torch.Generator, layers: int | None = None) -> Tensor:
    """Rows of a new trigger word as ED-LoRA starts them: one from N(0, 0.013^2), then the class word's own in turn.

    start, and what is returned: as for `new_token`.  Source: Gu et al. 2023 (Mix-of-Show), `<rand-0.013>`.
    """
    words = new_token(start, vectors - 1, 0.0, generator)
    first = RANDOM_START * torch.randn(1, words.shape[1], generator=generator).to(words)
    rows = torch.cat([first, words])
    return rows if layers is None else rows.repeat(layers, 1, 1)


def token_ids(tokens: Mapping[str, Tensor], vocab_size: int) -> dict[str, list[int]]:
    """Trigger word -> the extra ids that stand for it."""
    ids, first = {}, vocab_size
    for trigger, rows in tokens.items():
        ids[trigger] = list(range(first, first + rows.shape[-2]))
        first += rows.shape[-2]
    return ids


def spelled(caption: str, ids: Mapping[str, Sequence[int]], tokenize: Callable[[str], list[int]]) -> list[int]:
    """Ids of a caption: `ids` of the trigger words in it, `tokenize` for what stands between them.

    tokenize gives ids without start, end and padding.  `text/triggers.py` says where the triggers stand.
    """
    if not ids:
        return list(tokenize(caption))
    spelt, first = [], 0
    for place in [*heard(caption, ids), None]:
        part = caption[first : None if place is None else place.start].strip()
        spelt += tokenize(part) if part else []
        if place is not None:
            spelt += ids[place.word]
            first = place.end
    return spelt


def caption_ids(
    caption: str,
    tokens: Mapping[str, Tensor],
    vocab_size: int,
    tokenize: Callable[[str], list[int]],
) -> list[int]:
    """`spelled` with the extra ids that the learned words `tokens` have behind a vocabulary."""
    return spelled(caption, token_ids(tokens, vocab_size), tokenize)


def learned_rows(tokens: Mapping[str, Tensor], layer: int | None = None) -> Tensor:
    """All rows in id order, (total vectors, width); `layer` chooses among layer-wise rows.

    Raises AdapterError for layer-wise rows without `layer`.
    """
    chosen = []
    for trigger, rows in tokens.items():
        if layers_of(rows):
            if layer is None:
                raise AdapterError(f"{trigger}: the token has rows for {len(rows)} layers; name one")
            rows = rows[layer]
        chosen.append(rows)
    return torch.cat(chosen)


def layer_count(tokens: Mapping[str, Tensor]) -> int:
    """For how many layers layer-wise words have rows; 0 when none is layer-wise.

    Raises AdapterError for words of different numbers of layers: they belong to different bases.
    """
    counts = {trigger: layers for trigger, rows in tokens.items() if (layers := layers_of(rows))}
    if len(set(counts.values())) > 1:
        each = " and ".join(f"{trigger} for {count}" for trigger, count in counts.items())
        raise AdapterError(f"learned words are for different numbers of layers: {each}; they belong to different bases")
    return next(iter(counts.values()), 0)


def check_layer_count(tokens: Mapping[str, Tensor], layers: int) -> None:
    """Raise AdapterError for layer-wise words that were not learned for a base with `layers` cross-attention layers."""
    for trigger, rows in tokens.items():
        if layers_of(rows) not in (0, layers):
            raise AdapterError(
                f"{trigger}: the word was learned for {len(rows)} cross-attention layers, this base has "
                f"{layers or 'none'}; it was trained on another base"
            )


def says_layer_wise(ids: Tensor, tokens: Mapping[str, Tensor], vocab_size: int) -> Tensor:
    """Which prompts (B, T) of extra ids say a layer-wise word: (B,) bool."""
    extra = token_ids(tokens, vocab_size)
    apart = [number for trigger, numbers in extra.items() if layers_of(tokens[trigger]) for number in numbers]
    return torch.isin(ids, torch.tensor(apart, dtype=ids.dtype, device=ids.device)).any(dim=1)


def layered_ids(ids: Tensor, tokens: Mapping[str, Tensor], vocab_size: int) -> Tensor:
    """(B, T) -> (B * layers, T), each layer with extra ids of its own: those of `layered_rows`."""
    layers, vectors = layer_count(tokens), sum(rows.shape[-2] for rows in tokens.values())
    shift = vectors * torch.arange(layers, device=ids.device)[None, :, None]
    ids = ids[:, None]
    return torch.where(ids >= vocab_size, ids + shift, ids).flatten(0, 1)


def layered_rows(tokens: Mapping[str, Tensor]) -> Tensor:
    """The rows of every layer, one layer behind the other: (layers * total vectors, width)."""
    return torch.cat([learned_rows(tokens, layer) for layer in range(layer_count(tokens))])


@contextmanager
def learned_tokens(embedding: nn.Embedding, tokens: Mapping[str, Tensor], layer: int | None = None) -> Generator[None]:
    """Within the block `embedding` looks ids beyond its table up in the learned rows.

    embedding: a text model's token table, (ids) -> (..., width), its output in the table's dtype.
    Hooks are removed on leaving, also by an exception; gradients reach the learned
    rows, and the table only if it asks for them.
    """
    if not tokens:
        yield
        return
    rows, vocab_size = learned_rows(tokens, layer), embedding.num_embeddings
    if rows.shape[1] != embedding.embedding_dim:
        word = next(word for word, mine in tokens.items() if mine.shape[-1] != embedding.embedding_dim)
        raise AdapterError(
            f"{word}: the learned tokens are {rows.shape[1]} wide, the text model's {embedding.embedding_dim}; "
            "they were trained on another base"
        )
    queue = []

    def hide(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (ids,) = args
        queue.append(ids)
        return (ids.masked_fill(ids >= vocab_size, 0),)

    def fill(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = queue.pop()
        extra = F.embedding((ids - vocab_size).clamp(min=0), rows.to(output))
        return torch.where((ids >= vocab_size)[..., None], extra, output)

    handles = [embedding.register_forward_pre_hook(hide), embedding.register_forward_hook(fill)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bounded(rows: Tensor, norm: float) -> Tensor:
    """Rows longer than `norm` scaled back to it, the others as they are."""
    length = rows.norm(dim=-1, keepdim=True)
    return torch.where(length > norm, rows * (norm / length), rows)
