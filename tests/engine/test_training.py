"""Training learns only what it should, leaves the base alone, and is the same every time."""

from dataclasses import replace

import pytest
import torch
from laws import seeded
from tiny_problem import KINDS, hook_count, learned, tiny_basis, tiny_problem, weights_hash
from torch import nn

from bench.given_base import GivenBase, with_base
from modular_concepts.adapters.attach import attached, frozen_networks
from modular_concepts.adapters.low_rank import ConvGeometry
from modular_concepts.errors import AdapterError
from modular_concepts.models.schedules import NoiseSchedule
from modular_concepts.training.loop import Cancelled, Diverged, Listeners, train
from modular_concepts.training.methods import new_adapters
from modular_concepts.training.problem import Examples, Problem
from modular_concepts.training.run import Run
from modular_concepts.training.settings import TrainSettings, learning_rate_factor

SETTINGS = TrainSettings(rank=2, slot=1, blocks=3, steps=8, batch=3, adapter_lr=1e-2, token_lr=1e-2)
WIDTH = 16


def settings_of(method, **changed):
    return replace(SETTINGS, method=method, **changed)


def run(settings=SETTINGS, callback=None, problem=None):
    return train(problem or tiny_problem(), settings, Listeners(callback), basis=tiny_basis())


# --- a planted target is found, in the concept's own subspace and rows ---


def planted_problem(method, seed):
    """Base = identity - planted, where planted is an adapter's delta: with it the prediction is exact."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    settings = settings_of(
        method,
        rank=4,
        slot=1,
        blocks=2,
        steps=200,
        batch=8,
        seed=seed,
        adapter_lr=0.1,
        schedule="cosine",
        weight_decay=0,
    )
    generator = seeded(seed)
    adapter = new_adapters({"layer": layer}, settings, tiny_basis())["layer"]
    planted = adapter.replace(lora_up=0.3 * torch.randn(adapter.lora_up.shape, generator=generator)).delta().detach()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(WIDTH) - planted)
    alphas = torch.linspace(0.9, 0.1, 1000)

    def predict(noisy, timesteps, _context):
        noise = noisy / (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        return layer(noise.movedim(1, -1)).movedim(-1, 1)

    base = GivenBase(predict, lambda captions, tokens: None, NoiseSchedule(alphas), (layer,))
    problem = Problem(base, {"layer": layer}, Examples(torch.zeros(3, WIDTH, 4, 4), ("", "", "")))
    return problem, settings, planted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", KINDS)
def test_planted_target_is_learned_and_nothing_else(method, seed):
    problem, settings, planted = planted_problem(method, seed)
    result = run(settings, problem=problem)
    adapter = result.layers["layer"]
    assert max(result.losses[-5:]) <= 1e-4 * result.losses[0]
    assert (adapter.delta() - planted).norm() <= 0.02 * planted.norm()
    if adapter.rows is not None:
        others = torch.ones(WIDTH, dtype=torch.bool).index_fill(0, adapter.rows, False)
        assert adapter.delta()[others].abs().max() == 0
    if adapter.frozen:
        inside = adapter.lora_down.mT @ adapter.lora_down
        assert (adapter.delta() - adapter.delta() @ inside).norm() <= 1e-5 * adapter.delta().norm()


@pytest.mark.parametrize("method", KINDS)
def test_exactly_the_trainable_factors_move(method):
    settings = settings_of(method)
    before = Run(tiny_problem(), settings, tiny_basis())
    optimized = {id(tensor) for group in before.optimizer.param_groups for tensor in group["params"]}
    after = run(settings).layers
    for name, adapter in before.adapters.items():
        for part in ("lora_up", "lora_down"):
            same = torch.equal(getattr(adapter, part), getattr(after[name], part))
            trains = part == "lora_up" or method in ("lora", "block")
            assert same is not trains
            assert (id(getattr(adapter, part)) in optimized) is trains
            assert getattr(adapter, part).requires_grad is trains


# --- the hooked residual ---


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("name", ["unet.to_k", "unet.conv"])
@pytest.mark.parametrize("method", KINDS)
def test_hooked_residual_has_the_right_gradient(method, name, strength):
    problem = tiny_problem(torch.float64)
    layers = {name: problem.layers[name].requires_grad_(False)}
    adapter = new_adapters(layers, settings_of(method, alpha=3.0), tiny_basis())[name]
    generator = seeded(0)
    shape = (2, 4, 3, 3) if name == "unet.conv" else (2, 3, 8)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    factors = {
        part: torch.randn(factor.shape, generator=generator, dtype=torch.float64).requires_grad_()
        for part, factor in adapter.trainable().items()
    }
    masks = {name: (torch.rand(len(adapter.lora_up), generator=generator) > 0.3).double()}

    def output(x, *tensors):
        trained = adapter.replace(**dict(zip(factors, tensors, strict=True)))
        with attached(layers, {name: trained}, strength, masks):
            return layers[name](x)

    assert torch.autograd.gradcheck(output, (x, *factors.values()))
    trained = adapter.replace(**factors)
    conv = ConvGeometry.of(layers[name]) if name == "unet.conv" else None
    plain = layers[name](x) + strength * trained.residual(x, conv, masks[name])
    assert torch.allclose(output(x, *factors.values()), plain, rtol=1e-12)
    assert (plain - layers[name](x)).abs().max() > 1e-2


def test_strength_zero_is_the_base_and_unknown_layers_are_named():
    problem = tiny_problem()
    adapters = new_adapters(problem.layers, SETTINGS, tiny_basis())
    with attached(problem.layers, adapters, strength=0.0):
        assert hook_count(problem) == 0
    with (
        pytest.raises(AdapterError, match="unet.other.*no layer of this name"),
        attached(problem.layers, adapters | {"unet.other": adapters["unet.to_k"]}),
    ):
        pass
    assert hook_count(problem) == 0


# --- the base is never touched ---


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("way_out", ["end", "cancel", "cancelled inside", "exception"])
def test_base_is_as_before_after_training(method, way_out):
    base, calls = tiny_problem(), []
    for module in base.base.modules:
        module.train()

    def predict(*inputs):
        calls.append(torch.is_grad_enabled())
        if len(calls) == 3 and way_out == "cancelled inside":
            raise Cancelled
        if len(calls) == 3 and way_out == "exception":
            raise RuntimeError("the machine stumbled")
        return base.base.predict(*inputs)

    problem = with_base(base, predict=predict)
    before, state = weights_hash(base), torch.get_rng_state()
    callback = (lambda progress: progress.step == 3) if way_out == "cancel" else None
    if way_out == "exception":
        with pytest.raises(RuntimeError, match="stumbled"):
            run(settings_of(method), callback, problem)
    else:
        result = run(settings_of(method), callback, problem)
        assert result.finished is (way_out == "end")
        assert result.step == {"end": 8, "cancel": 3, "cancelled inside": 2}[way_out]
        assert len(result.losses) == result.step
        assert max(adapter.delta().abs().max() for adapter in result.layers.values()) > 1e-4
    assert weights_hash(base) == before
    assert hook_count(base) == 0
    assert all(p.requires_grad and p.grad is None for module in base.base.modules for p in module.parameters())
    assert all(part.training for module in base.base.modules for part in module.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_restores_a_mixed_state():
    layer, dropout = nn.Linear(2, 2), nn.Dropout()
    layer.bias.requires_grad_(False)
    layer.eval()
    with frozen_networks([layer, dropout]):
        assert not layer.weight.requires_grad and not dropout.training
    assert layer.weight.requires_grad and not layer.bias.requires_grad
    assert dropout.training and not layer.training


# --- seeds cover everything ---


def test_same_seed_same_bits_other_seed_other_bits():
    settings = settings_of("block", erasure=0.2, noise_offset=0.1)
    first = learned(run(settings))
    torch.manual_seed(99)
    again = learned(run(settings))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = learned(run(replace(settings, seed=1)))
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_layers_start_does_not_depend_on_other_layers():
    layers = tiny_problem().layers
    whole = new_adapters(layers, settings_of("lora"))
    alone = new_adapters({"unet.to_v": layers["unet.to_v"]}, settings_of("lora"))
    assert torch.equal(whole["unet.to_v"].lora_down, alone["unet.to_v"].lora_down)
    assert not torch.equal(whole["unet.to_v"].lora_down, whole["unet.to_k"].lora_down)
    reseeded = new_adapters(layers, settings_of("lora", seed=1))
    assert not torch.equal(whole["unet.to_v"].lora_down, reseeded["unet.to_v"].lora_down)


# --- tokens, prior, options ---


def test_tokens_learn_within_their_bound():
    base = tiny_problem()
    result = run(settings_of("lora", token_norm=0.5), problem=base)
    start = Run(base, settings_of("lora"), tiny_basis()).tokens["<x>"]
    assert result.tokens["<x>"].shape == (2, 8)
    assert result.tokens["<x>"].norm(dim=-1).max() <= 0.5 + 1e-6
    assert start.norm(dim=-1).min() > 0.5
    alone = run(settings_of("lora"), problem=replace(base, layers={}))
    assert not alone.layers and (alone.tokens["<x>"] - start).abs().min() > 1e-5


def test_only_adapters_decay():
    plain = run(settings_of("lora", steps=1, weight_decay=0.0))
    decayed = run(settings_of("lora", steps=1, weight_decay=10.0))
    assert torch.equal(plain.tokens["<x>"], decayed.tokens["<x>"])
    assert decayed.layers["unet.to_v"].lora_down.norm() < 0.95 * plain.layers["unet.to_v"].lora_down.norm()


def test_class_pictures_weigh_in():
    latents = torch.randn(4, 4, 6, 5, generator=seeded(5))
    problem = tiny_problem(prior=Examples(latents, ("a man",) * 4))
    ignored = run(settings_of("lora", prior_weight=0.0), problem=problem)
    heard = run(settings_of("lora", prior_weight=1.0), problem=problem)
    assert heard.losses[0] > 1.2 * ignored.losses[0]


def test_a_word_alone_learns_beside_class_pictures_of_another_size_which_never_say_it():
    latents = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(5))
    problem = tiny_problem(prior=Examples(latents, ("a man",) * 4))
    start = Run(problem, settings_of("words"), tiny_basis()).tokens["<x>"]
    result = run(settings_of("words"), problem=problem)
    assert result.finished and (result.tokens["<x>"] - start).abs().min() > 1e-5


@pytest.mark.parametrize(
    "changed",
    [
        {"min_snr": 5.0},
        {"noise_offset": 0.5},
        {"erasure": 0.5},
        {"clip_norm": 1e-3},
        {"schedule": "linear"},
        {"warmup": 4},
        {"precision": "bf16"},
    ],
)
def test_every_option_changes_what_is_learned(changed):
    plain, other = learned(run()), learned(run(replace(SETTINGS, **changed)))
    assert not torch.equal(plain["unet.to_v.up"], other["unet.to_v.up"])
    assert torch.isfinite(other["losses"]).all()


def test_learning_rate_warms_up_and_falls():
    def factors(**changed):
        settings = TrainSettings(steps=10, slot=0, **changed)
        return [learning_rate_factor(step, settings) for step in range(10)]

    assert factors() == [1.0] * 10
    assert factors(warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear, cosine = factors(warmup=2, schedule="linear"), factors(warmup=2, schedule="cosine")
    assert linear[2] == cosine[2] == 1.0 and linear[6] == pytest.approx(0.5) and cosine[6] == pytest.approx(0.5)
    assert linear == sorted(linear[:2]) + sorted(linear[2:], reverse=True) and 0 < cosine[9] < linear[9] < 0.2


def test_progress_tells_what_happened():
    told = []
    result = run(replace(SETTINGS, schedule="linear"), lambda progress: told.append(progress))
    assert [progress.step for progress in told] == list(range(1, 9))
    assert [progress.loss for progress in told] == result.losses
    assert told[0].smoothed_loss == told[0].loss
    assert told[1].smoothed_loss == pytest.approx(0.95 * told[0].loss + 0.05 * told[1].loss)
    assert told[4].lr == pytest.approx(0.5e-2)
    assert told[-1].steps == 8 and told[-1].seconds >= told[0].seconds > 0


def test_every_picture_is_seen_once_an_epoch():
    order = Run(tiny_problem(), SETTINGS, tiny_basis()).orders["examples"]
    drawn = torch.cat([order.take(3) for _ in range(5)]).reshape(3, 5)
    assert all(sorted(epoch.tolist()) == [0, 1, 2, 3, 4] for epoch in drawn)
    assert not torch.equal(drawn[0], drawn[1])


# --- what goes wrong says so ---


def test_divergence_keeps_the_last_good_state():
    base, seen = tiny_problem(), []

    def predict(*inputs):
        prediction = base.base.predict(*inputs)
        seen.append(prediction)
        return prediction * float("nan") if len(seen) == 5 else prediction

    with pytest.raises(Diverged, match="step 5.*lower learning rate of the layers .now 0.01") as caught:
        run(problem=with_base(base, predict=predict))
    kept = caught.value.result
    expected = run(callback=lambda progress: progress.step == kept.step)
    assert kept.step == 3 and not kept.finished and len(kept.losses) == 4
    assert torch.equal(kept.layers["unet.to_v"].lora_up, expected.layers["unet.to_v"].lora_up)
    assert torch.equal(kept.tokens["<x>"], expected.tokens["<x>"])
    assert hook_count(base) == 0


def test_an_absurd_learning_rate_diverges_with_a_finite_result():
    with pytest.raises(Diverged) as caught:
        run(replace(SETTINGS, adapter_lr=1e30, clip_norm=0.0))
    assert all(torch.isfinite(tensor).all() for tensor in learned(caught.value.result).values())


@pytest.mark.parametrize("method", KINDS[:4])
def test_too_large_a_rank_names_layer_rank_and_the_largest(method):
    largest = 8 if method in ("lora", "orthogonal") else 2
    layers = {name: tiny_problem().layers[name] for name in ("unet.to_q", "unet.to_k")}
    with pytest.raises(AdapterError, match=rf"unet\.to_.: rank 50 .* is {largest}$"):
        new_adapters(layers, settings_of(method, rank=50, blocks=5, slot=2), tiny_basis())


def test_settings_that_cannot_work_are_refused_by_name():
    for changed in (
        {"method": "dora"},
        {"steps": 0},
        {"batch": 0},
        {"adapter_lr": -1.0},
        {"token_lr": float("nan")},
        {"erasure": 1.0},
        {"min_snr": 0.0},
        {"schedule": "square"},
        {"precision": "int4"},
        {"optimizer": "sgd"},
        {"token_start": "zeros"},
        {"caption_dropout": 1.0},
        {"attention_regularisation": -0.1},
        {"flip": "yes"},
    ):
        with pytest.raises(AdapterError, match=next(iter(changed))):
            TrainSettings(**changed)
    with pytest.raises(AdapterError, match="needs a slot.*or a name"):
        run(TrainSettings(method="orthogonal", rank=2))
    with pytest.raises(AdapterError, match="needs a slot"):
        run(TrainSettings(method="block", rank=2, name="anna"))


def test_nothing_to_train_says_so():
    with pytest.raises(AdapterError, match="nothing to train"):
        run(problem=tiny_problem(layers={}, triggers={}))
    aside = {"unet.aside": nn.Linear(8, 8)}
    with pytest.raises(AdapterError, match="nothing can be learned"):
        run(problem=tiny_problem(layers=aside, triggers={}, examples=Examples(torch.zeros(1, 4, 6, 5), ("a man",))))


def test_examples_that_do_not_fit_together_are_refused():
    latents = torch.zeros(2, 4, 6, 5)
    with pytest.raises(AdapterError, match="no picture"):
        Examples(latents[:0], ())
    with pytest.raises(AdapterError, match="2 pictures but 1 captions"):
        Examples(latents, ("a",))
    with pytest.raises(AdapterError, match="masks have shape"):
        Examples(latents, ("a", "b"), torch.ones(2, 6, 5))
