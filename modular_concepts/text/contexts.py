"""What a denoiser is told of prompts: one tensor of text, or text and pooled text where there are two text encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .words import layer_count, layered_ids, layered_rows, learned_tokens, says_layer_wise


class PooledContext(NamedTuple):
    """text (B, T, D), or layer-wise (B, L, T, D); pooled (B, P)."""

    text: Tensor
    pooled: Tensor


Context = Tensor | PooledContext


def text_of(context: Context) -> Tensor:
    return context if isinstance(context, Tensor) else context.text


def joined(contexts: Sequence[Context]) -> Context:
    """Several batches as one."""
    if isinstance(contexts[0], Tensor):
        return torch.cat([text_of(context) for context in contexts])
    return PooledContext(*(torch.cat(parts) for parts in zip(*contexts, strict=True)))


def hidden_states(
    ids: Tensor, tokens: Mapping[str, Tensor], embedding: nn.Embedding, read: Callable[[Tensor], Tensor]
) -> Tensor:
    """(B, T, D) that a text model `read`s from ids (B, T), extra ids standing for their rows of `tokens`.

    (B, L, T, D) when any of them is layer-wise.  Prompts without a layer-wise word are then read once, the same for
    all layers.
    """
    layers, vocab_size = layer_count(tokens), embedding.num_embeddings
    if not layers:
        with learned_tokens(embedding, tokens):
            return read(ids)
    apart = says_layer_wise(ids, tokens, vocab_size)
    parts = []
    if not apart.all():
        with learned_tokens(embedding, tokens, layer=0):
            parts.append(read(ids[~apart])[:, None].expand(-1, layers, -1, -1))
    if apart.any():
        with learned_tokens(embedding, {"every layer": layered_rows(tokens)}):
            parts.append(rearrange(read(layered_ids(ids[apart], tokens, vocab_size)), "(b l) t d -> b l t d", l=layers))
    # Back into the prompts' order: those that are alike come first in `parts`.
    return torch.cat(parts)[apart.int().argsort(stable=True).argsort()]
