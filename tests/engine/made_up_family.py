"""A model family that nobody has: a transformer of two blocks that reads text and then picture in one row.

Its queries, keys and values are one layer, its latents have a dimension for frames, and its text encoder learns words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from laws import SHIFT
from torch import Tensor, nn

from modular_concepts.families import forget, register
from modular_concepts.families.clip_text import CLIP_TEXT
from modular_concepts.families.family import (
    JOINT,
    NEITHER,
    POSITIONS,
    TEXTS,
    Family,
    Fused,
    Network,
    TextEncoder,
    equal_parts,
)
from modular_concepts.models.cross_attention import CrossAttention, first_positions
from modular_concepts.models.fingerprint import weights_sample
from modular_concepts.models.layers import canonical_name, chosen_layers
from modular_concepts.models.schedules import FlowSchedule
from modular_concepts.text.words import caption_ids, learned_tokens, token_ids

WORDS = ("<pad>", "a", "man", "on", "the", "beach")
WIDTH, TEXT_WIDTH, CHANNELS, TOKENS = 12, 8, 4, 10

NETWORK = Network(
    layers=re.compile(r"stream_blocks\.\d+\.|(picture|text|time)_in$|picture_out$"),
    targets={
        "attention": re.compile(r"\.attn\.(qkv|proj)$"),
        "feed_forward": re.compile(r"\.mlp\.[02]$"),
        "all_linear": re.compile(r"^stream_blocks\."),
    },
    refusal="one attention reads text and picture; choose attention",
    blocks=((re.compile(r"stream_blocks\.(\d+)\."), "stream {}"),),
    tokens=(
        (re.compile(r"\.modulation$|^time_in$"), NEITHER),
        (re.compile(r"^stream_blocks\."), JOINT),
        (re.compile(r"^text_in$"), TEXTS),
        (re.compile(r""), POSITIONS),
    ),
    words=("stream_blocks", "picture_in", "text_in", "time_in", "picture_out"),
    checkpointed=("StreamBlock",),
    joint=True,
    in_diffusers=False,
    fused=(Fused(re.compile(r"stream_blocks\.\d+\.attn\.qkv"), equal_parts("q", "k", "v")),),
    apart=True,
)
MADE_UP = Family(
    name="made-up",
    title="Made-Up 1",
    modelspec="made-up-v1",
    kohya_versions=("made_up",),
    side=16,
    denoiser=NETWORK,
    text_encoders=(TextEncoder("text_encoder", "made_up_text", TEXT_WIDTH, CLIP_TEXT),),
)


@contextmanager
def made_up_family() -> Iterator[Family]:
    """Within the block the engine knows the family."""
    register(MADE_UP)
    try:
        yield MADE_UP
    finally:
        forget(MADE_UP)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (n h d) -> n b h t d", n=3, h=2)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class StreamBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.modulation = Attention(), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self.attn(x) * torch.tanh(self.modulation(time))[:, None]
        return x + self.mlp(x)


class Transformer(nn.Module):
    """(noisy (B, 4, frames, H, W), times (B,), text (B, T, 8)) -> (B, 4, frames, H, W)."""

    def __init__(self):
        super().__init__()
        self.picture_in, self.text_in = nn.Linear(CHANNELS, WIDTH), nn.Linear(TEXT_WIDTH, WIDTH)
        self.time_in, self.picture_out = nn.Linear(1, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.stream_blocks = nn.ModuleList([StreamBlock(), StreamBlock()])

    def forward(self, noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        picture = self.picture_in(rearrange(noisy, "b c f h w -> b (f h w) c"))
        x, time = torch.cat([self.text_in(text), picture], dim=1), self.time_in(times[:, None].to(noisy))
        for block in self.stream_blocks:
            x = block(x, time)
        out = self.picture_out(x[:, text.shape[1] :])
        _, _, frames, height, width = noisy.shape
        return rearrange(out, "b (f h w) c -> b c f h w", f=frames, h=height, w=width)


class TextModel(nn.Module):
    """ids (B, T) -> (B, T, 8), with the level `text_model` that canonical names have."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(len(WORDS), TEXT_WIDTH)
        self.text_model = nn.Module()
        self.text_model.mlp = nn.Module()
        self.text_model.mlp.fc1 = nn.Linear(TEXT_WIDTH, TEXT_WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.text_model.mlp.fc1(self.table(ids)))


class MadeUpBase:
    """A `Base` (`models/base.py`) of the family; pictures are its latents, one frame each."""

    architecture, hash, multiple, cross_attention_layers, lean = MADE_UP.name, "made-up", 1, 0, True
    device = torch.device("cpu")

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SHIFT + 3)
            self.denoiser, self.text = Transformer(), TextModel()
        sigmas = torch.linspace(0.001, 1, 1000)
        self.schedule = FlowSchedule(sigmas, sigmas)
        self.modules = (self.denoiser, self.text)

    @property
    def sample(self) -> str:
        return weights_sample(self.denoiser.state_dict())

    def every_layer(self) -> dict[str, nn.Module]:
        parts = (("unet", self.denoiser), ("text_encoder", self.text))
        return {
            canonical_name(part, path): module for part, network in parts for path, module in network.named_modules()
        }

    def layers(self, targets: Sequence[str], text_targets: Sequence[str] | None) -> dict[str, nn.Module]:
        return chosen_layers(self.every_layer(), targets, text_targets)

    def encode(self, pictures: Tensor) -> Tensor:
        return torch.cat([pictures, pictures.mean(1, keepdim=True)], dim=1)[:, :, None] * 2 - 1

    def ids(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
        def words(part: str) -> list[int]:
            return [WORDS.index(word) for word in part.split()]

        rows = [caption_ids(prompt, tokens, len(WORDS), words) for prompt in prompts]
        return torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])

    def context(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
        with learned_tokens(self.text.table, tokens):
            return self.text(self.ids(prompts, tokens))

    def predict(self, noisy: Tensor, times: Tensor, context: Tensor) -> Tensor:
        return self.denoiser(noisy, times, context)

    def cross_attentions(self) -> list[CrossAttention]:
        return []

    def trigger_positions(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
        extra = token_ids(tokens, len(WORDS))
        return first_positions(self.ids(prompts, tokens), [number for rows in extra.values() for number in rows])

    def word_rows(self, words: str) -> Tensor:
        return self.text.table.weight[[WORDS.index(word) for word in words.split() if word in WORDS]].detach()

    def unknown_words(self, prompt: str, triggers: Sequence[str]) -> list[str]:
        return [word for word in prompt.split() if word not in (*WORDS, *triggers)]

    def prior_prompts(self, class_word: str, count: int) -> list[str]:
        return [f"a {class_word}"] * count
