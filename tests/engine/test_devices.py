"""Concepts come from files, on the CPU, and meet models on another device: no tensor is in the wrong place.

`stand_in_device.py` is that device where there is no GPU; it refuses what a GPU refuses, and its values are real.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from laws import filled_adapter, relative_error, seeded
from stand_in_device import Elsewhere, elsewhere
from tiny_problem import EVERYTHING, learned, problem_with_everything, tiny_basis
from torch import Tensor, nn
from untrained_toy import QUICK, filled_concept, untrained_base, write_untrained

from bench.given_base import with_base
from modular_concepts.adapters.low_rank import ConvGeometry
from modular_concepts.concept import Concept, Recipe
from modular_concepts.crosstalk.measures import crosstalk_table
from modular_concepts.crosstalk.report import explained
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.merging import METHOD_HELP, Evidence, MergeOptions, add_concepts, merge_concepts
from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.merging.moments import Moment
from modular_concepts.merging.orthogonalize import orthogonal_concepts
from modular_concepts.models.base import BaseModel
from modular_concepts.models.diffusers_folder import load_diffusers_base
from modular_concepts.models.targets import Targets
from modular_concepts.recording import recorded, text_features, usual_text
from modular_concepts.regions.find import HeardWords, disjoint_masks
from modular_concepts.regions.geometry import Region
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.toy.base import load_toy_base
from modular_concepts.training.loop import Keeping, Listeners, train
from modular_concepts.training.problem import Problem
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Prior, Subject, company_examples, prior_examples, train_concept

NEAR = 1e-4


@pytest.fixture
def device() -> Iterator[torch.device]:
    with elsewhere() as place:
        yield place


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseModel:
    """The untrained toy base with its networks on the stand-in."""
    made = load_toy_base(write_untrained(tmp_path_factory.mktemp("toy")))
    with elsewhere() as place:
        made.unet.to(place)
        made.text_encoder.to(place)
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list:
    """Two concepts as they come from files."""
    folder, found = tmp_path_factory.mktemp("concepts"), []
    for number, name in enumerate(("tom", "tim")):
        save_concept(filled_concept(name, number + 1), folder / f"{name}.safetensors")
        found.append(load_concept(folder / f"{name}.safetensors"))
    return found


# --- the stand-in itself ---


FAULTS = {
    "sum": lambda here, there: there + here,
    "sum in place": lambda here, there: here.add_(there),
    "product": lambda here, there: F.linear(there, here),
    "convolution": lambda here, there: F.conv2d(there[None, None], here[None, None]),
    "joined": lambda here, there: torch.cat([there, here]),
    "chosen": lambda here, there: torch.where(there > 0, here, there),
    "rows": lambda here, there: there.index_add(0, torch.arange(4), there),
    "index on the GPU": lambda here, there: here[there.argmax(0)],
    "word": lambda here, there: F.embedding(torch.tensor([1]), there),
    "number in a product": lambda here, there: torch.cat([there.flatten(), here.sum()[None]]),
    "bytes": lambda here, there: there.numpy(),
    "generator": lambda here, there: torch.rand(3, device=there.device, generator=torch.Generator()),
    "hook": lambda here, there: hooked(here)(there),
    "gradient": lambda here, there: (there.clone().requires_grad_() * here.requires_grad_()).sum().backward(),
}


def hooked(here) -> nn.Module:
    module = nn.Linear(4, 4).to("elsewhere")
    module.register_forward_hook(lambda _module, args, output: output + F.linear(args[0], here))
    return module


@pytest.mark.parametrize("fault", FAULTS)
def test_the_stand_in_refuses_what_a_gpu_refuses(device, fault):
    here, there = torch.rand(4, 4), torch.rand(4, 4).to(device)
    with pytest.raises((RuntimeError, TypeError)):
        FAULTS[fault](here, there)


def test_the_stand_in_computes_and_allows_what_a_gpu_allows(device):
    here = torch.rand(4, 4)
    there = here.to(device)
    assert isinstance(there, Elsewhere) and there.device == device and there.cpu().device.type == "cpu"
    for made in (
        there + torch.tensor(2.0),
        there[torch.tensor([1])],
        torch.zeros(2, device=device),
        there.new_zeros(2),
    ):
        assert made.device == device
    assert torch.equal((2 * there).cpu(), 2 * here) and there.sum().item() == here.sum().item()
    for made, own in zip(torch._foreach_mul([here, there], 2.0), (here, there), strict=True):
        assert made.device == own.device and torch.equal(made.cpu(), 2 * here)
    assert here.copy_(there).device.type == "cpu" and there.copy_(here).device == device
    module = nn.Linear(4, 4).to(device)
    module(there).sum().backward()
    assert torch.allclose(module.weight.grad.cpu(), here.sum(0).expand(4, 4))
    with torch.autocast(device.type, torch.bfloat16):
        assert module(there).dtype == torch.bfloat16 and F.layer_norm(module(there), [4]).dtype == torch.float32


# --- training ---


def moved(problem: Problem, place: torch.device) -> Problem:
    """The networks, the pictures and the words' first rows on the stand-in, as a base there gives them."""
    for module in problem.base.modules:
        module.to(place)
    changed = {}
    for name in ("examples", "prior"):
        part = getattr(problem, name)
        if part is not None:
            there = {
                kind: None if (own := getattr(part, kind)) is None else [one.to(place) for one in own]
                for kind in ("latents", "mirrored")
            }
            changed[name] = replace(part, **there)
    return replace(problem, triggers={word: rows.to(place) for word, rows in problem.triggers.items()}, **changed)


METHODS = {
    "lora": {},
    "orthogonal": {},
    "block": {"erasure": 0.3},
    "block_orthogonal": {"erasure": 0.3, "precision": "bf16"},
    "custom_diffusion": {"attention_regularisation": 0.1, "min_snr": 2.0},
    "words": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_another_device_as_on_the_cpu(device, method, lean):
    settings = replace(EVERYTHING, method=method, rank=2, slot=1, blocks=3, steps=3, erasure=0.0, precision="fp32")
    settings = replace(settings, **METHODS[method])
    here = train(with_base(problem_with_everything(), lean=lean), settings, basis=tiny_basis())
    problem = moved(with_base(problem_with_everything(), lean=lean), device)
    there = train(problem, settings, basis=tiny_basis())
    assert all(adapter.lora_up.device == device for adapter in there.layers.values())
    near = 2e-2 if settings.precision == "bf16" else NEAR
    for name, own in learned(here).items():
        assert relative_error(learned(there)[name].cpu(), own) < near, name


def test_the_loss_scaler_and_a_resumed_training_work_on_another_device(device, tmp_path):
    problem, settings = moved(problem_with_everything(), device), replace(EVERYTHING, steps=6)
    assert settings.precision == "fp16" and problem.prior is not None
    straight = train(problem, settings, Listeners(estimate=lambda _: None), basis=tiny_basis())
    train(problem, settings, Listeners(lambda at: at.step == 3), Keeping(tmp_path), basis=tiny_basis())
    resumed = train(problem, settings, keeping=Keeping(resume=tmp_path), basis=tiny_basis())
    for name, own in learned(straight).items():
        assert torch.equal(learned(resumed)[name].cpu(), own.cpu()), name


@pytest.mark.parametrize("company", [0.0, 1.0])
def test_a_base_on_another_device_trains_a_concept_that_is_as_from_a_file(device, base, pair, company):
    """Pictures on the CPU, class pictures that the base draws, layer-wise words, rehearsal: as on the CPU."""
    pictures = torch.rand(2, 3, *base.size, generator=seeded(3))
    masks = (torch.rand(2, 1, *base.size, generator=seeded(4)) > 0.4).float()
    subject = Subject("x", pictures, ["a <x> on the beach"] * 2, "man", masks, description="a man")
    settings = TrainSettings(
        "lora", 2, steps=2, batch=1, layerwise=True, flip=True, attention_regularisation=0.1, adapter_lr=1e-2
    )

    def trained(base: BaseModel, company: float):
        prior = prior_examples(base, Prior("man", 1, settings=QUICK))
        taught = replace(subject, prior=prior)
        if company:
            taught = replace(taught, company=company_examples(base, subject, Prior("man", 2, settings=QUICK)))
        chosen = replace(settings, company=company)
        return train_concept(base, taught, chosen, Targets(("attention",), ("attention",)))

    (here, losses), (there, others) = trained(untrained_base(), company), trained(base, company)
    tensors = [one for own in there.layers.values() for one in (own.lora_up, own.lora_down)]
    assert all(tensor.device.type == "cpu" for tensor in (*tensors, *there.tokens.values()))
    assert torch.allclose(torch.tensor(others.losses), torch.tensor(losses.losses), rtol=NEAR)
    for name, own in here.layers.items():
        assert relative_error(there.layers[name].delta(), own.delta()) < 0.05, name
    assert crosstalk_table([there, *pair])["mean"] > 0


# --- merging and looking at concepts ---


def concepts_on(places, kind: str = "lora") -> list:
    """One made concept on each place, each with a linear layer, text keys and, where there are such, a convolution."""
    made = []
    for number, place in enumerate(places):
        layers = {
            f"{PART}.attn2.to_k": filled_adapter(kind, 16, 12, 3, number),
            f"{PART}.attn1.to_q": filled_adapter(kind, 24, 16, 3, number),
            "unet.down_blocks.0.resnets.0.conv1": filled_adapter(kind, 16, 4, 3, number, (3, 3)),
        }
        recipe = Recipe(rank=3, alpha=6.0, triggers=(f"<{number}>",))
        made.append(Concept(f"c{number}", {name: own.to(place) for name, own in layers.items()}, {}, recipe))
    return made


PART = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def evidence_for(concepts, place) -> Evidence:
    """Moments and texts from files, as `Moment` and as whole matrices, on one place."""
    moments = [
        {
            name: (Moment.of if number else Tensor.clone)(torch.cov(torch.randn(width, 40, generator=seeded(number))))
            for name, own in concept.layers.items()
            for width in (own.lora_down[0].numel(),)
        }
        for number, concept in enumerate(concepts)
    ]
    moments = [{name: moment.to(place) for name, moment in own.items()} for own in moments]
    texts = [torch.randn(2, 12, generator=seeded(5 + number)).to(place) for number in range(len(concepts))]
    return Evidence(moments, texts, torch.eye(12).to(place))


@pytest.mark.parametrize("how", METHOD_HELP)
def test_every_method_merges_concepts_from_files_into_weights_on_another_device(device, how):
    """And concepts of which one lies on the device: trained just now, the other from a file."""
    options, strengths = MergeOptions(rank=2, density=0.5), [0.7, -0.4]
    kind = "block" if how == "block" else "lora"
    here = concepts_on(["cpu"] * 2, kind)
    wanted = merge_concepts(here, strengths, how, False, options, evidence_for(here, "cpu"))
    for places in (["cpu", "cpu"], ["cpu", device], [device, "cpu"]):
        concepts = concepts_on(places, kind)
        for place in {"cpu", places[0]}:
            evidence = evidence_for(concepts, place)
            weights = {name: torch.zeros(own.weight_shape).to(device) for name, own in concepts[0].layers.items()}
            add_concepts(weights, concepts, strengths, how, False, options, evidence)
            merged = merge_concepts(concepts, strengths, how, False, options, evidence)
            for name, own in wanted.items():
                assert weights[name].device == device
                assert relative_error(weights[name].cpu(), own.delta()) < NEAR
                x = torch.randn(2, *INPUT[name], generator=seeded(9))
                conv = ConvGeometry(padding=(1, 1)) if "conv" in name else None
                added = merged[name].residual(x.to(device), conv)
                assert added.device == device and relative_error(added.cpu(), own.residual(x, conv)) < NEAR
                assert merged[name].as_low_rank().delta().shape == own.delta().shape


INPUT = {
    f"{PART}.attn2.to_k": (5, 12),
    f"{PART}.attn1.to_q": (5, 16),
    "unet.down_blocks.0.resnets.0.conv1": (4, 6, 6),
}


def test_concepts_on_two_devices_are_compared_and_made_orthogonal(device):
    here, mixed = concepts_on(["cpu"] * 2), concepts_on([device, "cpu"])
    moments = evidence_for(here, "cpu").moments
    wanted = explained(here, moments_of(moments), signs=True)
    found = explained(mixed, moments_of(moments), signs=True)
    assert found.pairs[0].crosstalk == pytest.approx(wanted.pairs[0].crosstalk, rel=NEAR)
    assert found.pairs[0].answers == pytest.approx(wanted.pairs[0].answers, rel=NEAR)
    for way in ("symmetric", "sequential"):
        for (before, after), place in zip(
            zip(orthogonal_concepts(here, way)[0], orthogonal_concepts(mixed, way)[0], strict=True), "ab", strict=True
        ):
            for name, own in before.layers.items():
                assert relative_error(after.layers[name].delta().cpu(), own.delta()) < NEAR, place
    whole = merged_concept("both", mixed, [1.0, 0.5])
    assert (
        relative_error(
            whole.layers[f"{PART}.attn1.to_q"].delta().cpu(),
            merged_concept("both", here, [1.0, 0.5]).layers[f"{PART}.attn1.to_q"].delta(),
        )
        < NEAR
    )


def moments_of(moments) -> list[dict]:
    return [{n: Moment.of(m) if isinstance(m, Tensor) else m for n, m in own.items()} for own in moments]


# --- drawing ---

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
REGIONS = [
    Region("a <tom> at night", LEFT),
    Region("a <tim> in the snow", mask=torch.rand(5, 7, generator=seeded(4)), strength=0.8, end=0.5),
]


def draw(own: BaseModel, pair, title: str) -> Tensor:
    stack, prompts, seeds = list(zip(pair, (1.0, 0.7), strict=True)), ["a man on the beach"], [0]
    if title == "gated":
        return sample(own, prompts, seeds, None, QUICK, REGIONS, mode="gated", stack=stack)
    if title == "layer-wise":
        rows = torch.randn(own.cross_attention_layers, 2, own.embedding.embedding_dim, generator=seeded(7))
        stack = [(replace(pair[0], tokens={"<tom>": rows}), 0.5), stack[1]]
        return sample(own, ["a <tom>"], seeds, None, QUICK, REGIONS[1:], mode="gated", stack=stack)
    with customised(own, pair, [1.0, 0.7]) as tokens:
        return sample(own, ["a <tom> man"], seeds, tokens, QUICK, REGIONS if title == "merged" else ())


@pytest.mark.parametrize("title", ["plain", "merged", "gated", "layer-wise"])
def test_a_base_on_another_device_draws_the_same_pictures(device, base, pair, title):
    found = draw(base, pair, title)
    assert found.device.type == "cpu"
    assert relative_error(found, draw(untrained_base(), pair, title)) < NEAR


def test_fusion_is_told_of_a_base_on_another_device(device, base, pair):
    brief = SampleSettings(steps=2, cfg=1.0)
    recorder = recorded(base, pair[0], ("a {concept}",), 1, brief)
    assert all(total.device == device for total in recorder.sums.values())
    moments, other = recorder.moments(), recorded(untrained_base(), pair[0], ("a {concept}",), 1, brief).moments()
    for name, own in other.items():
        assert relative_error(moments[name].matrix(), own.matrix()) < NEAR, name
    texts = [text_features(base, concept, ("a {concept}",)) for concept in pair]
    usual = usual_text(base)
    assert relative_error(usual, usual_text(untrained_base())) < NEAR
    merge_concepts(pair, [1.0, 1.0], "custom_diffusion", evidence=Evidence(texts=texts, usual=usual))


def test_places_are_heard_on_another_device(device):
    query, key = torch.randn(2, 36, 8, generator=seeded(1)), torch.randn(2, 7, 8, generator=seeded(2))
    heard, there = HeardWords([[1], [2, 3]], 7, (6, 6)), HeardWords([[1], [2, 3]], 7, (6, 6))
    heard.hear(query, key, 2)
    there.hear(query.to(device), key.to(device), 2)
    assert torch.allclose(there.maps(), heard.maps(), atol=1e-6)
    assert torch.equal(disjoint_masks(there.maps()), disjoint_masks(heard.maps()))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_folder_s_networks_draw_and_train_on_another_device_and_its_vae_where_it_is(device, tmp_path, family):
    from tiny_sd import write_tiny_sd
    from tiny_xl import write_tiny_xl

    folder = (write_tiny_sd if family == "sd" else write_tiny_xl)(tmp_path / family)
    subject = Subject("kodo", torch.rand(1, 3, 16, 16, generator=seeded(3)), ["a photo of <kodo>"], "dog")
    settings = TrainSettings("orthogonal", 2, slot=0, steps=1, batch=1)
    found = {}
    for place in ("cpu", device):
        own = load_diffusers_base(folder)
        for network in own.modules:
            network.to(place)
        picture = sample(own, ["a photo of a dog"], [0], None, QUICK)
        found[place] = picture, train_concept(own, subject, settings, Targets(("attention",)))[1].losses[0]
    assert relative_error(found[device][0], found["cpu"][0]) < NEAR
    assert found[device][1] == pytest.approx(found["cpu"][1], rel=NEAR)
