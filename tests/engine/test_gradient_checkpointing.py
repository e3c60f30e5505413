"""Blocks that are computed again in backward give the same gradients, bit for bit, and hold less in between."""

from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from tiny_problem import hook_count, tiny_problem
from torch import nn
from untrained_toy import untrained_base

from modular_concepts.errors import AdapterError
from modular_concepts.models.base import BaseModel
from modular_concepts.models.targets import Targets
from modular_concepts.training.estimate import LiveMemory
from modular_concepts.training.frozen import frozen_forward
from modular_concepts.training.gradient_checkpointing import checkpointed, outermost_blocks
from modular_concepts.training.loop import train
from modular_concepts.training.run import Run
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.step import on_base
from modular_concepts.training.teach import Subject, check_training, problem_for

SETTINGS = TrainSettings(method="block", rank=2, slot=1, blocks=4, batch=2, steps=4, erasure=0.3, adapter_lr=1e-2)


@pytest.fixture(scope="module")
def base():
    return untrained_base()


def problem_on(base, masked=False):
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(4, 3, *base.size, generator=generator)
    masks = (torch.rand(4, 1, *base.size, generator=generator) > 0.4).float() if masked else None
    return problem_for(base, Subject("x", pictures, ["a <x> on the beach"] * 4, "man", masks), Targets(("all_linear",)))


def gradients(problem, settings, frozen=False):
    run = Run(problem, settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for adapter in run.adapters.values():
            adapter.lora_up.copy_(0.1 * torch.randn(adapter.lora_up.shape, generator=generator))
    freeze = frozen_forward(problem.base.modules) if frozen else nullcontext()
    with freeze, on_base(problem, run) as step, LiveMemory() as live:
        loss, _ = step.gradients()
    return loss, {name: parameter.grad for name, parameter in run.parameters().items()}, live.peak


@pytest.mark.parametrize("frozen", [False, True], ids=["own forwards", "frozen forwards"])
@pytest.mark.parametrize(
    "changed",
    [{}, {"layerwise": True}, {"attention_regularisation": 0.1}, {"precision": "bf16"}],
    ids=["erasure", "layer-wise", "attention", "bf16"],
)
def test_gradients_are_the_same_bits(base, changed, frozen):
    settings = replace(SETTINGS, **changed)
    problem = problem_on(base, masked="attention_regularisation" in changed)
    kept, again = (gradients(problem, replace(settings, gradient_checkpointing=on), frozen) for on in (False, True))
    assert kept[0] == again[0]
    for name, gradient in kept[1].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, again[1][name]), name
    assert again[2] < 0.8 * kept[2]


def test_the_blocks_own_forwards_come_back(base):
    unet = base.unet
    blocks = outermost_blocks(unet)
    assert {type(block).__name__ for block in blocks} == {"ResnetBlock2D", "BasicTransformerBlock"}
    with checkpointed([unet]):
        assert all("forward" in block.__dict__ for block in blocks)
    assert not any("forward" in block.__dict__ for block in blocks)
    with pytest.raises(RuntimeError, match="stumbled"), checkpointed([unet]):
        raise RuntimeError("the machine stumbled")
    assert not any("forward" in block.__dict__ for block in blocks)


def test_a_training_leaves_nothing_behind(base):
    problem = problem_on(base)
    train(problem, replace(SETTINGS, gradient_checkpointing=True, steps=1))
    assert hook_count(problem) == 0
    assert not any("forward" in part.__dict__ for module in problem.base.modules for part in module.modules())


class Counting(nn.Module):
    """Reads where it is from options that the network goes on changing, as some networks do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, options):
        options["seen"] = options["index"]
        return torch.tanh(self.inner(x)) * (1 + options["index"])


class ResBlock(Counting):
    pass


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock() for _ in range(3))

    def forward(self, x):
        options = {"index": 0}
        for block in self.blocks:
            x = block(x, options)
            options["index"] += 1
        return x


def test_a_block_finds_its_own_place_again():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network()
    x = torch.ones(2, 3)

    def gradient(on):
        network.zero_grad()
        with ExitStack() as stack:
            if on:
                stack.enter_context(checkpointed([network]))
            network(x).sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    for plain, again in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(plain, again)


def test_a_network_without_known_blocks_is_refused():
    with pytest.raises(AdapterError, match="gradient_checkpointing knows none of this network's blocks"):
        train(tiny_problem(), TrainSettings(rank=2, slot=1, gradient_checkpointing=True))


class Unsaid(BaseModel):
    """A base that does not say which of its networks predicts."""

    denoiser = None


def test_a_base_that_names_no_denoiser_is_searched_whole_before_a_training():
    base = Unsaid(**vars(untrained_base()))
    taught = Subject("tom", torch.rand(2, 3, *base.size), ["a photo of <tom>"] * 2, "man")
    check_training(base, taught, TrainSettings(rank=2, slot=1, gradient_checkpointing=True))
