"""The noise schedule's arithmetic against the formulas, written out in float64."""

import pytest
import torch
from laws import seeded

from modular_concepts.errors import AdapterError
from modular_concepts.models.schedules import (
    FlowSchedule,
    NoiseSchedule,
    add_noise,
    draw_timesteps,
    min_snr_weight,
    snr,
    target,
)
from modular_concepts.training.losses import draw_noise, masked_mean
from modular_concepts.training.optimizers import limit_gradients

ALPHAS = torch.linspace(0.999, 0.0, 50, dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 20, 49])


def generator(seed=0):
    return seeded(seed)


def pair():
    return torch.randn(2, 3, 4, 5, 6, generator=generator(), dtype=torch.float64)


def test_noise_and_targets_are_the_formulas():
    latents, noise = pair()
    noisy = add_noise(latents, noise, ALPHAS, TIMESTEPS)
    velocity = target(latents, noise, NoiseSchedule(ALPHAS, "v_prediction"), TIMESTEPS)
    for row, timestep in enumerate(TIMESTEPS):
        signal, sigma = ALPHAS[timestep] ** 0.5, (1 - ALPHAS[timestep]) ** 0.5
        assert torch.allclose(noisy[row], signal * latents[row] + sigma * noise[row])
        assert torch.allclose(velocity[row], signal * noise[row] - sigma * latents[row])
        # the pair (noisy, v) gives both latents and noise back
        assert torch.allclose(signal * noisy[row] - sigma * velocity[row], latents[row])
    assert torch.equal(target(latents, noise, NoiseSchedule(ALPHAS), TIMESTEPS), noise)
    assert not torch.allclose(velocity, noise)


def test_flow_is_a_straight_line_from_picture_to_noise():
    latents, noise = pair()
    sigmas = torch.linspace(0.0, 1.0, 50, dtype=torch.float64)
    flow = FlowSchedule(sigmas, 1000 * sigmas)
    noisy, velocity = flow.noisy(latents, noise, TIMESTEPS), flow.target(latents, noise, TIMESTEPS)
    for row, index in enumerate(TIMESTEPS):
        assert torch.allclose(noisy[row], (1 - sigmas[index]) * latents[row] + sigmas[index] * noise[row])
        # along the line back to the picture, and on to the noise
        assert torch.allclose(noisy[row] - sigmas[index] * velocity[row], latents[row])
        assert torch.allclose(noisy[row] + (1 - sigmas[index]) * velocity[row], noise[row])
    assert torch.equal(noisy[0], latents[0]) and not torch.allclose(noisy[1], latents[1])
    assert torch.equal(flow.times_of(TIMESTEPS), 1000 * sigmas[TIMESTEPS])
    assert torch.equal(flow.loss_weight(TIMESTEPS, 5.0), torch.ones(3))
    with pytest.raises(AdapterError, match="one time for each sigma"):
        FlowSchedule(sigmas, sigmas[:-1])


def test_a_noise_schedule_says_what_its_formulas_say():
    latents, noise = pair()
    schedule = NoiseSchedule(ALPHAS, "v_prediction")
    assert torch.equal(schedule.noisy(latents, noise, TIMESTEPS), add_noise(latents, noise, ALPHAS, TIMESTEPS))
    assert torch.equal(schedule.target(latents, noise, TIMESTEPS), target(latents, noise, schedule, TIMESTEPS))
    assert torch.equal(schedule.times_of(TIMESTEPS), TIMESTEPS)
    weights = min_snr_weight(snr(ALPHAS, TIMESTEPS), 5.0, "v_prediction")
    assert torch.equal(schedule.loss_weight(TIMESTEPS, 5.0), weights)


def test_flow_draws_the_middle_most_often_and_no_level_outside():
    flow = FlowSchedule(torch.linspace(0.001, 1, 1000), torch.arange(1000))
    drawn = flow.draw(4000, generator(1))
    assert drawn.min() >= 0 and drawn.max() < 1000 and drawn.dtype == torch.int64
    # sigmoid of a standard Gaussian: half of all between the quartiles 0.337 and 0.663
    assert 0.47 < ((drawn > 337) & (drawn < 663)).float().mean() < 0.53
    assert torch.equal(drawn, flow.draw(4000, generator(1)))
    uniform = NoiseSchedule(ALPHAS).draw(4000, generator(1))
    assert 0.2 < (uniform < len(ALPHAS) // 4).float().mean() < 0.3


def test_min_snr_weight_is_the_formula_and_finite_at_zero_snr():
    ratio = snr(ALPHAS, TIMESTEPS)
    assert torch.allclose(ratio, torch.tensor([999.0, ALPHAS[20] / (1 - ALPHAS[20]), 0.0], dtype=torch.float64))
    clipped = ratio.clamp(max=5.0)
    assert torch.allclose(min_snr_weight(ratio, 5.0, "v_prediction"), clipped / (ratio + 1))
    assert torch.allclose(min_snr_weight(ratio, 5.0, "epsilon")[:2], (clipped / ratio)[:2])
    assert min_snr_weight(ratio, 5.0, "epsilon")[2] == 1


def test_masked_mean_sees_only_the_masked_pixels():
    error = pair()[0].square()
    mask = (torch.rand(3, 1, 5, 6, generator=generator(1)) > 0.5).double()
    mask[2] = 0
    means = masked_mean(error, mask)
    for row in range(2):
        assert torch.allclose(means[row], error[row][:, mask[row, 0] == 1].mean())
    assert means[2] == 0
    assert torch.allclose(masked_mean(error), error.mean(dim=(1, 2, 3)))
    assert torch.allclose(masked_mean(error, torch.ones_like(mask)), masked_mean(error))
    hidden = torch.where(mask.bool(), error, error + 100)
    assert torch.equal(masked_mean(hidden, mask), means)


def test_draws_come_from_the_generator_alone():
    state = torch.get_rng_state()
    first = draw_noise((2, 3, 4, 4), generator(3), 0.5), draw_timesteps(100, 1000, generator(3))
    again = draw_noise((2, 3, 4, 4), generator(3), 0.5), draw_timesteps(100, 1000, generator(3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[1].min() >= 0 and first[1].max() < 1000 and len(first[1].unique()) > 50
    assert torch.equal(torch.get_rng_state(), state)


def test_offset_moves_whole_channels():
    plain, moved = draw_noise((2, 3, 4, 4), generator(3)), draw_noise((2, 3, 4, 4), generator(3), 0.5)
    shift = moved - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    assert shift.abs().min() > 1e-3


def test_unknown_prediction_type_is_named():
    with pytest.raises(AdapterError, match="'sample'.*epsilon, v_prediction"):
        NoiseSchedule(ALPHAS, "sample")


@pytest.mark.parametrize("longest", [0.5, 1e6, float("inf")])
def test_gradients_are_limited_as_torch_does_it(longest):
    pairs = [[torch.nn.Parameter(torch.zeros(size)) for size in ((3, 4), (5,), (2,))] for _ in range(2)]
    for ours, torchs in zip(*pairs, strict=True):
        ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(ours.numel()))
        torchs.grad = ours.grad.clone()
    pairs[0][2].grad = pairs[1][2].grad = None
    norms = limit_gradients(pairs[0], longest), torch.nn.utils.clip_grad_norm_(pairs[1], longest)
    assert torch.equal(*norms) and norms[0] > 1
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*pairs, strict=True) if a.grad is not None)
    assert limit_gradients([], 1.0) == 0
