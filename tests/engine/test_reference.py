"""Loss and gradients of a step are those of the formulas, written out in float64 without the training code."""

from dataclasses import replace

import plain_training
import pytest
import torch
from laws import seeded
from tiny_problem import KINDS, tiny_basis, tiny_problem, token_ids

from modular_concepts.models.schedules import FlowSchedule, NoiseSchedule
from modular_concepts.training.problem import Examples
from modular_concepts.training.run import Run
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.step import on_base

SETTINGS = TrainSettings(rank=2, slot=1, blocks=3, batch=3, alpha=3.0, seed=5, clip_norm=0.0)
ALPHAS = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
SIGMAS = torch.linspace(0.001, 1.0, 1000, dtype=torch.float64)
SCHEDULES = {
    "epsilon": NoiseSchedule(ALPHAS),
    "v": NoiseSchedule(ALPHAS, "v_prediction"),
    "flow": FlowSchedule(SIGMAS, 1000 * SIGMAS),
}
OPTIONS = {
    "plain": {},
    "min-SNR": {"min_snr": 0.3},
    "noise offset": {"noise_offset": 0.3},
    "attention regularisation": {"attention_regularisation": 0.5},
    "prior": {"prior_weight": 0.7},
}


def problem_for(schedule, masked, prior):
    problem = tiny_problem(torch.float64, schedule=SCHEDULES[schedule])
    if not masked:
        problem = replace(problem, examples=replace(problem.examples, masks=None))
    if prior:
        latents = torch.randn(4, 4, 6, 5, generator=seeded(5)).double()
        problem = replace(problem, prior=Examples(latents, ("a man", "the man", "a man", "man")))
    return problem


def batch_of(problem, settings):
    """The first batch in the data order, put together by hand."""
    orders = Run(problem, settings, tiny_basis()).orders
    latents, captions, masks, weights = [], [], [], []
    for name, part, weight in (("examples", problem.examples, 1.0), ("prior", problem.prior, settings.prior_weight)):
        for index in orders[name].take(settings.batch).tolist() if part is not None else ():
            latents.append(part.latents[index])
            captions.append(part.captions[index])
            masks.append(torch.ones(1, 6, 5).double() if part.masks is None else part.masks[index])
            weights.append(weight / settings.batch)
    return torch.stack(latents), token_ids(captions)[:, :8], torch.stack(masks), weights


def started(problem, settings):
    """A run whose adapters are not zero any more, so that all factors have a gradient."""
    run = Run(problem, settings, tiny_basis())
    generator = seeded(11)
    with torch.no_grad():
        for adapter in run.adapters.values():
            adapter.lora_up.copy_(0.3 * torch.randn(adapter.lora_up.shape, generator=generator).double())
    return run


@pytest.mark.parametrize(
    ("option", "masked"),
    [(option, masked) for option in OPTIONS for masked in (True, False) if masked or "attention" not in option],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", KINDS)
def test_loss_and_gradients_are_the_formulas(method, schedule, masked, option):
    settings = replace(SETTINGS, method=method, **OPTIONS[option])
    problem = problem_for(schedule, masked, prior=option in ("prior", "attention regularisation"))
    run = started(problem, settings)
    with on_base(problem, run) as step:
        loss, norm = step.gradients()
    ours = {name: parameter.grad.clone() for name, parameter in run.parameters().items()}

    batch = batch_of(problem, settings)
    run.optimizer.zero_grad()
    plain = plain_training.plain_loss(problem, run.adapters, run.tokens["<x>"], batch, settings)
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-9)
    for name, parameter in run.parameters().items():
        assert parameter.grad.norm() > 1e-6, name
        assert (ours[name] - parameter.grad).norm() <= 1e-9 * parameter.grad.norm(), name
    assert norm == pytest.approx(torch.cat([grad.flatten() for grad in ours.values()]).norm().item())


@pytest.mark.parametrize("option", ["min-SNR", "noise offset", "attention regularisation"])
def test_every_option_of_the_loss_changes_it(option):
    def loss(**changed):
        problem = problem_for("epsilon", masked=True, prior=False)
        with on_base(problem, run := started(problem, replace(SETTINGS, **changed))) as step:
            assert run.step == 0
            return step.gradients()[0]

    assert abs(loss(**OPTIONS[option]) - loss()) > 1e-2 * loss()
