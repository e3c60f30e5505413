"""A base model: the networks, how prompts become context and pictures become latents.

The toy base and a diffusers folder both come as one `BaseModel`; sampling and merging see nothing else.
Training asks for less, a `Base`, which a host's loaded models are too (`host/training/base.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapters.low_rank import at_least_float32
from ..adapters.sites import Layer
from ..errors import AdapterError
from ..families import find_family
from ..text.company import subjects_beside
from ..text.contexts import Context, hidden_states, text_of
from ..text.layerwise import cross_attention_transformers, routed
from ..text.ordinary import CAPTIONS
from ..text.triggers import heard
from ..text.words import check_layer_count, layer_count, token_ids
from .cross_attention import CrossAttention, cross_attentions_of, first_positions, word_places
from .fingerprint import base_mark, weights_sample
from .layers import find_layers
from .library import LibraryNetwork
from .schedules import NoiseSchedule, Schedule


class Base(Protocol):
    """What training needs; shapes and meanings are those of `BaseModel`.

    context: a tensor, or a named tuple of tensors of the base's own kind, with the batch first.
    modules: whole networks, to be frozen while a training lasts.
    denoiser: the network that `predict` runs.  multiple: pictures' height and width must be multiples of it.
    cross_attentions: those that learned words are read by; empty where there are none, as in a diffusion transformer.
    trigger_positions: where each row of `tokens` stands in the context of each prompt, (B, all rows); -1 for nowhere.
    word_places: for each of `tokens` that a prompt says, where its rows stand in the context, however often.
    cross_attention_layers: how many a layer-wise word has rows for; 0 where there are none, as in a DiT.
    size: (height, width) in pixels that it was trained on.
    sample: a few numbers of the denoiser's weights (`models/fingerprint.py`).
    lean: whether its layers run as `training/frozen.py` does, in less time and memory, rounded otherwise.
    device: where the networks compute; latents, noisy and timesteps are there.
    """

    @property
    def architecture(self) -> str: ...

    @property
    def hash(self) -> str: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def modules(self) -> Sequence[nn.Module]: ...

    @property
    def denoiser(self) -> nn.Module | None: ...

    @property
    def multiple(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def cross_attention_layers(self) -> int: ...

    @property
    def sample(self) -> str: ...

    @property
    def lean(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def layers(self, targets: Sequence[str], text_encoder_targets: Sequence[str] | None) -> dict[str, Layer]: ...

    def encode(self, pictures: Tensor, /) -> Tensor: ...

    def context(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Any: ...

    def predict(self, noisy: Tensor, timesteps: Tensor, context: Any) -> Tensor: ...

    def cross_attentions(self) -> list[CrossAttention]: ...

    def trigger_positions(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor: ...

    def word_places(self, prompt: str, tokens: Mapping[str, Tensor], /) -> dict[str, list[int]]: ...

    def word_rows(self, words: str) -> Tensor: ...

    def unknown_words(self, prompt: str, triggers: Sequence[str], /) -> list[str]: ...

    def prior_prompts(self, class_word: str, count: int, /) -> list[str]: ...

    def company(self, class_word: str, count: int, /) -> list[str]: ...


@dataclass(frozen=True, eq=False)
class BaseModel:
    """tokenize(prompts, ids of trigger words) -> (B, T) int64.

    encode, decode: pictures (N, 3, H, W) in 0..1 to latents and back.
    multiple: pictures' height and width must be multiples of it; size: (height, width) it was trained on.
    prior_prompts(class word, count): what the base is asked for by itself to keep its prior while a concept is learned.
    company(class word, count): phrases of who stands beside a concept on a wide picture, for the base to draw.
    betas: what diffusers' schedulers need to know of the noise schedule.
    ordinary: captions as people write them for it, without any concept.
    """

    architecture: str
    unet: LibraryNetwork
    text_encoder: LibraryNetwork
    tokenize: Callable[[Sequence[str], Mapping[str, Sequence[int]]], Tensor]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    schedule: NoiseSchedule
    betas: Mapping
    latent_channels: int
    downscale: int
    multiple: int
    size: tuple[int, int]
    hash: str
    prior_prompts: Callable[[str, int], list[str]] = lambda word, count: [f"a photo of a {word}"] * count
    unknown_words: Callable[[str, Sequence[str]], list[str]] = lambda prompt, triggers: []
    ordinary: Sequence[str] = CAPTIONS
    company: Callable[[str, int], list[str]] = subjects_beside

    @property
    def modules(self) -> tuple[LibraryNetwork, ...]:
        return self.unet, self.text_encoder

    @property
    def sample(self) -> str:
        return weights_sample(self.unet.state_dict())

    @property
    def lean(self) -> bool:
        family = find_family(self.architecture)
        return family is None or family.lean

    @property
    def mark(self) -> str:
        """Tells this base from others, text encoders too: see `fingerprint.base_mark`."""
        return base_mark([_table(network) for network in self.modules], lambda: self.hash)

    @property
    def cross_attention_layers(self) -> int:
        return len(cross_attention_transformers(self.unet))

    def layers(self, targets: Sequence[str], text_encoder_targets: Sequence[str] | None) -> dict[str, Layer]:
        """Canonical layer name -> module: see `layers.chosen_layers`."""
        return find_layers(self.unet, self.text_encoder, targets, text_encoder_targets)

    @property
    def embedding(self) -> nn.Embedding:
        """The text encoder's token table."""
        return self.text_encoder.get_input_embeddings()

    def context(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Context:
        """(B, T, D): last hidden state of the text encoder, trigger words standing for their learned rows.

        (B, L, T, D) when any of `tokens` is layer-wise: one for each cross-attention layer, in running order.
        Raises AdapterError for a prompt so long that a trigger word in it is cut off.
        """
        check_layer_count(tokens, self.cross_attention_layers if layer_count(tokens) else 0)
        extra = token_ids(tokens, self.embedding.num_embeddings)
        ids = self.tokenize(prompts, extra)
        check_reach(prompts, extra, ids)
        ids = ids.to(self.embedding.weight.device)
        return hidden_states(ids, tokens, self.embedding, lambda ids: self.text_encoder(ids).last_hidden_state)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.embedding.weight.device

    @property
    def precision(self) -> torch.dtype:
        """Of the denoiser's weights: not every network says it of itself, as diffusers' do."""
        return next(self.unet.parameters()).dtype

    def predict(self, noisy: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """context: (B, T, D), or (B, L, T, D) with one for each cross-attention layer."""
        text = text_of(context)
        with routed(self.unet, text) if text.dim() == 4 else nullcontext():
            return self.unet(noisy.to(self.precision), timesteps, text, return_dict=False)[0].to(noisy.dtype)

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    def cross_attentions(self) -> list[CrossAttention]:
        return cross_attentions_of(self.unet)

    def trigger_positions(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
        """(B, all rows of tokens) int64: where each stands first in the context of each prompt, -1 for nowhere."""
        extra = token_ids(tokens, self.embedding.num_embeddings)
        return first_positions(
            self.tokenize(prompts, extra), [number for numbers in extra.values() for number in numbers]
        )

    def word_places(self, prompt: str, tokens: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Trigger word -> where its rows stand in the context of a prompt, for those of `tokens` that it says."""
        extra = token_ids(tokens, self.embedding.num_embeddings)
        return word_places(self.tokenize([prompt], extra)[0].tolist(), extra)

    def word_rows(self, words: str) -> Tensor:
        """(k, width) rows of the token table for some words, without start, end and padding."""
        ids, bare = self.tokenize([words, ""], {})
        return self.embedding.weight[[int(i) for i, b in zip(ids, bare, strict=True) if i != b and i not in bare]]


def check_reach(prompts: Sequence[str], extra: Mapping[str, Sequence[int]], ids: Tensor) -> None:
    """Raise AdapterError for a prompt so long that a trigger word in it is cut off its ids (B, T)."""
    for prompt, row in zip(prompts, ids.tolist(), strict=True):
        for trigger in dict.fromkeys(place.word for place in heard(prompt, extra)):
            if extra[trigger][-1] not in row:
                raise AdapterError(
                    f"{prompt!r}: {trigger} stands beyond the {len(row)} tokens that the text model reads; "
                    "shorten the text, or say it earlier"
                )


def weights_hash(*networks: nn.Module) -> str:
    """`tables_hash` of the networks' weights, without the level `text_model.` that some transformers have."""
    return tables_hash(*map(_table, networks))


def _table(network: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): value for name, value in network.state_dict().items()}


def tables_hash(*tables: Mapping[str, Tensor]) -> str:
    """sha256 over the names, shapes and bytes of all weights, in order of name; 16 hexadecimal digits.

    Half precision counts as the float32 that it widens to, so a model is the same however it is stored.
    """
    digest = hashlib.sha256()
    for table in tables:
        for name, value in sorted(table.items(), key=lambda item: item[0]):
            if value.is_floating_point():
                value = at_least_float32(value.detach())
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
