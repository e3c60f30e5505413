"""A learned word's attention is pulled inside the masks, and is measured as the network itself attends."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_problem import tiny_problem
from untrained_toy import traces, untrained_base

from modular_concepts.errors import AdapterError
from modular_concepts.models.cross_attention import first_positions
from modular_concepts.models.targets import Targets
from modular_concepts.training.attention_regularisation import attention_outside, watched
from modular_concepts.training.loop import train
from modular_concepts.training.run import Run
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.step import on_base
from modular_concepts.training.teach import Subject, check_training, problem_for

SETTINGS = TrainSettings(
    method="lora", rank=2, batch=4, steps=12, adapter_lr=1e-2, token_lr=1e-2, weight_decay=0.0, seed=3
)


def subject(size):
    """Pictures whose mask is the upper left quarter."""
    pictures = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(3))
    masks = torch.zeros(4, 1, *size)
    masks[..., : size[0] // 2, : size[1] // 2] = 1
    return Subject("x", pictures, ["a <x> on the beach"] * 4, "man", masks)


@pytest.fixture(scope="module")
def problem():
    return problem_for(untrained_base(), subject(untrained_base().size), Targets(("cross_attention",)))


def test_a_map_is_what_the_network_attends_to(problem):
    base = untrained_base()
    attentions, prompts = base.cross_attentions(), ["a man on the beach", "two men"]
    assert len(attentions) == base.cross_attention_layers
    context = base.context(prompts, {})
    noisy = torch.randn(2, base.latent_channels, 16, 8, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[1, 4], [2, -1]])
    asked = {}

    def note(module, args, _output):
        asked[module] = args[0]

    with torch.no_grad(), watched(attentions) as watch, watch.listening():
        handles = [attention.to_q.register_forward_hook(note) for attention in attentions]
        base.predict(noisy, torch.tensor([10, 900]), context)
    for handle in handles:
        handle.remove()
    expected = {}
    for attention in attentions:
        hidden = asked[attention.to_q]
        q, k = attention.to_q(hidden).double(), attention.to_k(context).double()
        width = q.shape[-1] // attention.heads
        for head in range(attention.heads):
            columns = slice(head * width, (head + 1) * width)
            scores = (q[..., columns] @ k[..., columns].mT / math.sqrt(width)).softmax(dim=-1)
            expected.setdefault(hidden.shape[1], []).append(scores)
    maps = watch.take_maps(positions)
    assert maps.keys() == expected.keys() == {32}
    for places, scores in expected.items():
        mean = torch.stack(scores).mean(dim=0)
        for row, vector in ((0, 0), (0, 1), (1, 0)):
            assert torch.allclose(maps[places][row, vector].double(), mean[row, :, positions[row, vector]], rtol=1e-4)


def test_the_cost_is_the_relative_attention_outside():
    masks = torch.ones(3, 1, 4, 8)
    masks[0, :, :, 4:] = 0
    masks[2, :, :, 4:] = 0
    map = torch.zeros(3, 2, 32)
    map[0, 0] = torch.tensor([[0.4] * 4 + [0.1] * 4] * 4).flatten()  # a quarter of its maximum outside
    map[0, 1] = 0.3  # the same everywhere
    map[1] = 0.5  # a full mask has no outside
    map[2] = 0.9  # its caption lacks the word
    positions = torch.tensor([[1, 2], [1, 2], [-1, -1]])
    assert attention_outside({32: map}, positions, masks).item() == pytest.approx((0.25 + 1.0) / 2)
    halves = map.reshape(3, 2, 2, 2, 4, 2).amax(dim=(3, 5)).reshape(3, 2, 8)
    assert attention_outside({8: halves}, positions, masks).item() == pytest.approx((0.25 + 1.0) / 2)
    both = attention_outside({32: map, 8: halves}, positions, masks)
    assert both.item() == pytest.approx(0.25 + 1.0)


def test_positions_are_where_the_word_stands():
    base = untrained_base()
    tokens = {"<x>": torch.zeros(2, base.embedding.embedding_dim)}
    positions = base.trigger_positions(["a <x> on the beach", "a man", "a man and a <x>"], tokens)
    assert positions[0].tolist() == [2, 3] and positions[1].tolist() == [-1, -1]
    assert positions[2].tolist() == [positions[2, 0].item(), positions[2, 0].item() + 1] and positions[2, 0] > 3
    layered = {"<x>": torch.zeros(base.cross_attention_layers, 2, base.embedding.embedding_dim)}
    assert torch.equal(base.trigger_positions(["a <x> on the beach"], layered), positions[:1])
    assert first_positions(torch.tensor([[5, 7, 7]]), [7, 5, 6]).tolist() == [[1, 0, -1]]


@pytest.mark.parametrize("layerwise", [False, True])
def test_training_with_it_pulls_attention_inside(problem, layerwise):
    settings = replace(SETTINGS, layerwise=layerwise)

    def outside_after(weight):
        result = train(problem, replace(settings, attention_regularisation=weight))
        run = Run(problem, replace(settings, attention_regularisation=1.0))
        with torch.no_grad():
            for name, adapter in result.layers.items():
                run.adapters[name].lora_up.copy_(adapter.lora_up)
                run.adapters[name].lora_down.copy_(adapter.lora_down)
            run.tokens["<x>"].copy_(result.tokens["<x>"])
        with on_base(problem, run) as step, step.watch.listening():
            problem.base.predict(
                torch.randn(4, *problem.examples.latents.shape[1:], generator=torch.Generator().manual_seed(9)),
                torch.tensor([100, 400, 600, 900]),
                step.context(problem.examples.captions),
            )
        positions = problem.base.trigger_positions(problem.examples.captions, run.tokens)
        return attention_outside(step.watch.take_maps(positions), positions, problem.examples.masks).item()

    assert outside_after(1.0) < 0.95 * outside_after(0.0)
    assert traces(untrained_base())[1] == 0


def test_without_masks_or_cross_attention_it_is_refused():
    asked = TrainSettings(rank=2, slot=1, attention_regularisation=0.01)
    bare = tiny_problem()
    bare = replace(bare, examples=replace(bare.examples, masks=None))
    with pytest.raises(AdapterError, match="these pictures have none; give a mask for each, or set it to 0"):
        train(bare, asked)
    with pytest.raises(AdapterError, match="diffusion transformers lack; set it to 0"):
        train(tiny_problem(attentions=()), asked)


def test_it_is_refused_before_class_pictures_are_drawn():
    base = untrained_base()
    bare = replace(subject(base.size), masks=None)
    with pytest.raises(AdapterError, match="these pictures have none"):
        check_training(base, bare, replace(SETTINGS, attention_regularisation=0.1))
    check_training(base, subject(base.size), replace(SETTINGS, attention_regularisation=0.1))
