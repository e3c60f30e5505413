"""A base small enough to be written out by hand: three cross-attentions, one linear text layer, six words.

The module tree lists up before mid, as diffusers' does, and runs down, mid, up.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from laws import SHIFT, seeded
from torch import Tensor, nn

from bench.given_base import GivenBase, with_base
from modular_concepts.models.base import BaseModel
from modular_concepts.models.schedules import NoiseSchedule
from modular_concepts.text.words import spelled
from modular_concepts.training.problem import Examples, Problem

WORDS = ("<pad>", "a", "man", "on", "the", "beach")
CAPTIONS = ("a <x> man", "the beach", "on the <x>")
LENGTH, WIDTH, HIDDEN = 6, 4, 5
ORDER = ("down_blocks.0", "mid_block", "up_blocks.0")


class TinyTransformer(nn.Module):
    """hidden (B, places, 5) + attention over a text (B, T, 4)."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(HIDDEN, HIDDEN)
        self.to_k, self.to_v = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.transformer_blocks = nn.ModuleList()

    def forward(self, hidden: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text = encoder_hidden_states
        return hidden + F.scaled_dot_product_attention(self.to_q(hidden), self.to_k(text), self.to_v(text))


class TinyUnet(nn.Module):
    """(noisy (B, 2, H, W), timesteps, context) -> (B, 2, H, W)."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(2, HIDDEN, 3, padding=1)
        self.down_blocks = nn.ModuleList([TinyTransformer()])
        self.up_blocks = nn.ModuleList([TinyTransformer()])
        self.mid_block = TinyTransformer()
        self.conv_out = nn.Linear(HIDDEN, 2)

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor, return_dict: bool) -> tuple[Tensor]:
        hidden = self.conv_in(noisy) + (timesteps.to(noisy) / 1000)[:, None, None, None]
        hidden = rearrange(hidden, "b c h w -> b (h w) c")
        for block in (self.down_blocks[0], self.mid_block, self.up_blocks[0]):
            hidden = block(hidden, encoder_hidden_states=context)
        return (rearrange(self.conv_out(hidden), "b (h w) c -> b c h w", h=noisy.shape[2]),)


class TinyTextModel(nn.Module):
    """ids (B, T) -> last_hidden_state (B, T, 4), every word mixed with the mean of all."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(len(WORDS), WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def forward(self, ids: Tensor) -> SimpleNamespace:
        words = self.token_embedding(ids)
        return SimpleNamespace(last_hidden_state=torch.tanh(self.mix(words + words.mean(1, keepdim=True))))


def tokenize(prompts, extra) -> Tensor:
    def words(text: str) -> list[int]:
        return [WORDS.index(word) for word in text.split()]

    rows = [spelled(prompt, extra, words) for prompt in prompts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def tiny_base(dtype: torch.dtype = torch.float64) -> BaseModel:
    """The same weights at every call, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3 + SHIFT)
        unet, text = TinyUnet().to(dtype), TinyTextModel().to(dtype)
    for network in (unet, text):
        network.requires_grad_(False)
    return BaseModel(
        architecture="tiny",
        unet=unet,
        text_encoder=text,
        tokenize=tokenize,
        encode=lambda pictures: pictures,
        decode=lambda latents: latents,
        schedule=NoiseSchedule(torch.linspace(0.99, 0.05, 1000, dtype=dtype), "v_prediction"),
        betas={},
        latent_channels=2,
        downscale=1,
        multiple=1,
        size=(4, 3),
        hash="tiny",
    )


def layers_of(base: BaseModel) -> dict[str, nn.Module]:
    """Linear layers of every block, the convolution before them, and the text model's layer."""
    unet = dict(base.unet.named_modules())
    named = {f"unet.{block}.{part}": unet[f"{block}.{part}"] for block in ORDER for part in ("to_q", "to_k", "to_v")}
    return named | {"unet.conv_in": base.unet.conv_in, "text_encoder.mix": base.text_encoder.mix}


def tiny_problem(base: BaseModel, **changed) -> Problem:
    generator = seeded(1)
    dtype = base.embedding.weight.dtype
    examples = Examples(
        torch.randn(3, 2, 4, 3, generator=generator).to(dtype),
        CAPTIONS,
        (torch.rand(3, 1, 4, 3, generator=generator) > 0.3).to(dtype),
    )
    start = base.embedding.weight[WORDS.index("man")][None]
    # The same parts, but for what would change the rounding of what these tests compare with.
    parts = GivenBase(base.predict, base.context, base.schedule, base.modules, "tiny", base.cross_attention_layers)
    return with_base(Problem(parts, layers_of(base), examples, {"<x>": start}), **changed)
