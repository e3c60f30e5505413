"""Noise schedules, as pure functions: which noise levels a base knows, and what it predicts at each.

Notation of Ho et al. 2020: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, abar = `alphas_cumprod`.
Rectified flow (Liu et al. 2022; Esser et al. 2024): x_t = (1 - sigma_t) x_0 + sigma_t noise.
Latents are (B, C, ...) of any number of dimensions, indices into a schedule (B,) int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """What the base was trained with.  alphas_cumprod: (T,), from almost 1 down to almost 0, or 0."""

    alphas_cumprod: Tensor
    prediction: str = "epsilon"

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise AdapterError(f"prediction type is {self.prediction!r}; choose one of {', '.join(PREDICTIONS)}")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices of noise levels, uniform; (count,) int64 on the CPU."""
        return draw_timesteps(count, len(self), generator)

    def noisy(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        return add_noise(latents, noise, self.alphas_cumprod, indices)

    def target(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """What the base has to predict."""
        return target(latents, noise, self, indices)

    def times_of(self, indices: Tensor) -> Tensor:
        """What the base is told of the noise levels; (B,)."""
        return indices

    def loss_weight(self, indices: Tensor, gamma: float) -> Tensor:
        """The min-SNR weight of each sample; (B,)."""
        return min_snr_weight(snr(self.alphas_cumprod, indices), gamma, self.prediction)


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """Rectified flow: x_t = (1 - sigma) x_0 + sigma noise, and the base predicts noise - x_0.

    sigmas: (T,), ascending in 0..1, as the base was trained with them (shifted, where it was).
    times: (T,), what the base is told of each.
    """

    sigmas: Tensor
    times: Tensor

    def __post_init__(self):
        if self.sigmas.shape != self.times.shape or self.sigmas.dim() != 1 or not len(self.sigmas):
            raise AdapterError(
                f"a flow schedule has {tuple(self.sigmas.shape)} sigmas and {tuple(self.times.shape)} times; "
                "we need one time for each sigma"
            )

    def __len__(self) -> int:
        return len(self.sigmas)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices of noise levels, logit-normal, so most often in the middle; (count,) int64 on the CPU.

        Source: Esser et al. 2024, section 3.1, rf/lognorm(0.00, 1.00).
        """
        position = torch.sigmoid(torch.randn(count, generator=generator))
        return (position * len(self)).long().clamp(max=len(self) - 1)

    def noisy(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        sigma = append_dims(self.sigmas.to(latents)[indices.to(latents.device)], latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        return noise - latents

    def times_of(self, indices: Tensor) -> Tensor:
        return self.times.to(indices.device)[indices]

    def loss_weight(self, indices: Tensor, gamma: float) -> Tensor:
        """1: min-SNR weighs the noise levels of diffusion, which flow draws with a weight already."""
        return torch.ones(len(indices), device=indices.device)


Schedule = NoiseSchedule | FlowSchedule


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
    signal, sigma = _signal_and_noise(alphas_cumprod, timesteps, latents)
    return signal * latents + sigma * noise


def target(latents: Tensor, noise: Tensor, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """What the base has to predict: the noise, or v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0.

    Source of v: Salimans and Ho 2022, appendix D.
    """
    if schedule.prediction == "epsilon":
        return noise
    signal, sigma = _signal_and_noise(schedule.alphas_cumprod, timesteps, latents)
    return signal * noise - sigma * latents


def draw_timesteps(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Uniform over 0..length - 1; (count,) int64 on the CPU."""
    return torch.randint(length, (count,), generator=generator)


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio abar_t / (1 - abar_t), (B,)."""
    abar = alphas_cumprod.to(timesteps.device)[timesteps]
    return abar / (1 - abar)


def min_snr_weight(ratio: Tensor, gamma: float, prediction: str) -> Tensor:
    """Weight of a sample's loss: min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v.

    ratio: (B,) of `snr`; at snr = 0 the epsilon weight is its limit 1.
    Source: Hang et al. 2023, Eq. 9.
    """
    clipped = ratio.clamp(max=gamma)
    if prediction == "v_prediction":
        return clipped / (ratio + 1)
    return torch.where(ratio > gamma, clipped / ratio, torch.ones_like(ratio))


def _signal_and_noise(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    abar = append_dims(alphas_cumprod.to(like.device)[timesteps.to(like.device)], like)
    return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)


def append_dims(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) with as many dimensions as `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
