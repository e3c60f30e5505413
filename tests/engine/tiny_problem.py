"""A real but tiny base to train on: one conv, one cross-attention, a text model of six words.

As a script it trains in a process of its own:
tiny_problem.py FOLDER [--sleep SECONDS] [--die-in-save STEP] [--everything].
It goes on from the newest checkpoint in FOLDER, or starts anew, and leaves final.safetensors there.
"""

import argparse
import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from laws import SHIFT, seeded
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.given_base import GivenBase, with_base
from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.models.cross_attention import CrossAttention, first_positions
from modular_concepts.models.schedules import NoiseSchedule
from modular_concepts.text.words import caption_ids, learned_tokens
from modular_concepts.training.loop import Keeping, Listeners, train
from modular_concepts.training.problem import Examples, Problem
from modular_concepts.training.settings import TrainSettings

WORDS = ("<pad>", "a", "man", "on", "the", "beach")
KINDS = ("lora", "orthogonal", "block", "block_orthogonal", "custom_diffusion")
RESUME_SETTINGS = TrainSettings(
    method="block_orthogonal",
    rank=2,
    slot=1,
    blocks=3,
    erasure=0.2,
    steps=20,
    batch=3,
    adapter_lr=1e-2,
    token_lr=1e-2,
    warmup=3,
    schedule="cosine",
    noise_offset=0.1,
    checkpoint_every=1,
)
EVERYTHING = replace(
    RESUME_SETTINGS,
    flip=True,
    caption_dropout=0.2,
    shuffle_tags=True,
    attention_regularisation=0.1,
    min_snr=2.0,
    token_norm=0.9,
    precision="fp16",
    gradient_checkpointing=True,
)


class TinyText(nn.Module):
    """ids (B, T) -> context (B, T, 8)."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(len(WORDS), 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.token_embedding(ids)))


class TinyDenoiser(nn.Module):
    """(noisy (B, 4, H, W), timesteps, context (B, T, 8)) -> (B, 4, H, W), by one cross-attention 12 wide."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1)
        self.to_q, self.to_out = nn.Linear(12, 12), nn.Linear(12, 4)
        self.to_k, self.to_v = nn.Linear(8, 12), nn.Linear(8, 12)
        self.dropout = nn.Dropout(0.5)

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        hidden = self.conv(noisy) + (timesteps.to(noisy) / 1000)[:, None, None, None]
        hidden = self.dropout(rearrange(hidden, "b c h w -> b (h w) c"))
        mixed = F.scaled_dot_product_attention(self.to_q(hidden), self.to_k(context), self.to_v(context))
        return rearrange(self.to_out(hidden + mixed), "b (h w) c -> b c h w", h=noisy.shape[2])


class ResBlock(TinyDenoiser):
    """Named as one of the blocks that gradient checkpointing knows."""


def tiny_basis() -> OrthogonalBasis:
    return OrthogonalBasis(seed=7)


def token_ids(captions: Sequence[str]) -> Tensor:
    """(B, 12), the word's two vectors behind the vocabulary; commas are not words."""
    rows = []
    for caption in captions:
        row = []
        for word in caption.replace(",", " ").split():
            row += [len(WORDS), len(WORDS) + 1] if word == "<x>" else [WORDS.index(word)]
        rows.append(row + [0] * (12 - len(row)))
    return torch.tensor(rows)


def tiny_problem(dtype: torch.dtype = torch.float32, denoiser: type[nn.Module] = TinyDenoiser, **changed) -> Problem:
    """Five pictures, two captions, one trigger word; the same weights and pictures at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SHIFT)
        unet, text = denoiser().to(dtype), TinyText().to(dtype)
    generator = seeded(1)
    examples = Examples(
        torch.randn(5, 4, 6, 5, generator=generator).to(dtype),
        ("a <x> man", "a <x> man on the beach", "a <x> man", "a <x> man", "the <x>"),
        (torch.rand(5, 1, 6, 5, generator=generator) > 0.3).to(dtype),
    )
    layers = {
        "unet.conv": unet.conv,
        "unet.to_q": unet.to_q,
        "unet.to_k": unet.to_k,
        "unet.to_v": unet.to_v,
        "text_encoder.mix": text.mix,
    }

    def context(captions: list[str], tokens: dict[str, Tensor]) -> Tensor:
        def words(part: str) -> list[int]:
            return [WORDS.index(word) for word in part.replace(",", " ").split()]

        length = 12 if any("," in caption for caption in captions) else 8
        ids = [caption_ids(caption, tokens, len(WORDS), words) for caption in captions]
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=text.mix.weight.device)
        with learned_tokens(text.token_embedding, tokens):
            return text(padded)

    schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 1000, dtype=dtype), "v_prediction")
    start = text.token_embedding.weight.detach()[WORDS.index("man")][None]
    base = GivenBase(
        predict=unet,
        context=context,
        schedule=schedule,
        modules=(unet, text),
        hash="tiny",
        attentions=[CrossAttention(unet.to_q, unet.to_k, 1)],
        trigger_positions=lambda captions, tokens: first_positions(token_ids(captions), [len(WORDS), len(WORDS) + 1]),
    )
    return with_base(Problem(base, layers, examples, {"<x>": start}), **changed)


def problem_with_everything() -> Problem:
    """Pictures of two sizes with masks, mirrored, some repeated; class pictures of a third; captions with parts."""
    generator = seeded(2)
    sizes = [(6, 5), (4, 8), (6, 5), (4, 8), (6, 5)]
    latents, mirrored = ([torch.randn(4, *size, generator=generator) for size in sizes] for _ in range(2))
    masks = [(torch.rand(1, *size, generator=generator) > 0.3).float() for size in sizes]
    captions = ("a <x> man, on, the beach", "<x> man, the beach", "a <x>", "the man, a <x>, man, beach", "<x>, man")
    prior = Examples(torch.randn(4, 4, 3, 3, generator=generator), ("a man", "the man", "man", "a man on the beach"))
    examples = Examples(latents, captions, masks, "", mirrored, (1, 2, 1, 1, 3))
    problem = tiny_problem(denoiser=ResBlock, examples=examples, prior=prior)
    # Adapters on the text model would leave no caption to be read only once.
    layers = {name: layer for name, layer in problem.layers.items() if not name.startswith("text")}
    return replace(problem, layers=layers)


def weights_hash(problem: Problem) -> str:
    """sha256 over all weights of the base."""
    digest = hashlib.sha256()
    for module in problem.base.modules:
        for name, value in module.state_dict().items():
            digest.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hook_count(problem: Problem) -> int:
    """Hooks on all parts of the base."""
    parts = [part for module in problem.base.modules for part in module.modules()]
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)


def learned(result) -> dict[str, Tensor]:
    """All learned tensors and the losses of a result, by name."""
    tensors = {f"{name}.up": adapter.lora_up for name, adapter in result.layers.items()}
    tensors |= {f"{name}.down": adapter.lora_down for name, adapter in result.layers.items()}
    tensors |= {f"token.{trigger}": rows for trigger, rows in result.tokens.items()}
    return tensors | {"losses": torch.tensor(result.losses, dtype=torch.float64)}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """To the last bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--die-in-save", type=int, default=0)
    parser.add_argument("--everything", action="store_true")
    options = parser.parse_args()
    sync, writes = os.fsync, []

    def sync_or_die(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) == options.die_in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = sync_or_die
    result = train(
        problem_with_everything() if options.everything else tiny_problem(),
        EVERYTHING if options.everything else RESUME_SETTINGS,
        Listeners(lambda progress: time.sleep(options.sleep)),
        Keeping(options.folder, resume=options.folder if list(options.folder.glob("step-*")) else None),
        basis=tiny_basis(),
    )
    save_file(learned(result), options.folder / "final.safetensors")


if __name__ == "__main__":
    main()
