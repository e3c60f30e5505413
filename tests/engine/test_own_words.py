"""Promise 10 without regions: what acts at its own words alone changes nothing else, and no sum mixes."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from laws import EFFECT, filled_adapter, relative_error, seeded
from torch import nn
from untrained_toy import QUICK, filled_concept, traces, untrained_base

from bench.given_base import GivenBase
from modular_concepts.adapters.low_rank import new_lora
from modular_concepts.adapters.own_words import NOTHING_SAID, Said, WordResidual, at_own_words, reads_text
from modular_concepts.adapters.sites import Site
from modular_concepts.concept import Concept
from modular_concepts.crosstalk.report import explained
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.files.kohya import export_kohya
from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.merging.orthogonalize import orthogonal_concepts
from modular_concepts.merging.own_words import residuals_of, split, spoken, words_of
from modular_concepts.models.schedules import NoiseSchedule
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.regions.geometry import Region
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.training.loop import Keeping, Listeners, train
from modular_concepts.training.problem import Examples, Problem
from modular_concepts.training.run import Run
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.step import on_base
from modular_concepts.training.teach import Subject, problem_for, train_concept

NAMES = ("tom", "tim", "ted", "ada", "ida")
KEYS_AND_VALUES = Targets(("cross_attention_kv",))


@cache
def whole(name: str) -> Concept:
    """A concept in all attention layers, so loud that an untrained base shows what its text says."""
    concept = filled_concept(name, 1 + NAMES.index(name))
    layers = {layer: adapter.replace(lora_up=30 * adapter.lora_up) for layer, adapter in concept.layers.items()}
    return replace(concept, layers=layers)


@cache
def worded(name: str) -> Concept:
    """A concept as a training for its own words leaves it, with a word of two rows."""
    concept = whole(name)
    layers = {layer: adapter for layer, adapter in concept.layers.items() if reads_text(layer)}
    return replace(concept, layers=layers, recipe=replace(concept.recipe, method="own_words"))


def drawn(names, prompt, strengths=None, settings=QUICK, act_on="everywhere", regions=(), concepts=None, **more):
    concepts = [worded(name) for name in names] if concepts is None else concepts
    strengths = [1.0] * len(concepts) if strengths is None else strengths
    prompts = [prompt] if isinstance(prompt, str) else prompt
    base = untrained_base()
    with customised(base, concepts, strengths, act_on=act_on) as tokens:
        pictures = sample(base, prompts, range(len(prompts)), tokens, settings, regions, **more)
    return pictures[0] if isinstance(prompt, str) else pictures


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_sum_of_any_number_is_the_concept_alone_bit_for_bit(cfg):
    settings, prompt = SampleSettings(steps=2, cfg=cfg), "a <tom> on the beach"
    alone = drawn(["tom"], prompt, settings=settings)
    assert torch.equal(drawn(NAMES, prompt, settings=settings), alone)
    assert torch.equal(drawn(NAMES[::-1], prompt, settings=settings), alone)
    word = {"<tom>": worded("tom").tokens["<tom>"]}
    assert relative_error(sample(untrained_base(), [prompt], [0], word, settings)[0], alone) > EFFECT / 10


def test_two_words_in_one_prompt_do_not_depend_on_the_order_of_the_concepts():
    prompt = "a <tom> and a <ida> at night"
    both = drawn(["tom", "ida"], prompt)
    assert torch.equal(drawn(["ida", "tim", "tom"], prompt), both)
    assert relative_error(drawn(["tom", "ida"], prompt, [1.0, 0.999]), both) > 0


def test_without_a_trigger_the_base_draws_bit_for_bit():
    assert torch.equal(drawn(NAMES, "a man in the snow"), drawn([], "a man in the snow"))


def test_at_strength_zero_nothing_but_the_class_word_is_left():
    prompt, rows = "a <tom> on the beach", untrained_base().word_rows("man").repeat(2, 1)
    silent = sample(untrained_base(), [prompt], [0], {"<tom>": rows}, QUICK)[0]
    assert torch.equal(drawn(NAMES, prompt, [0.0, 1.0, 1.0, 1.0, 1.0]), silent)


def test_a_word_said_twice_and_in_the_negative_prompt_acts_at_each_place():
    base, tom = untrained_base(), worded("tom")
    places = base.word_places("a <tom> and a <TOM>", tom.tokens)["<tom>"]
    assert len(places) == 4 and places == sorted(places)
    against = SampleSettings(steps=2, cfg=4.0, negative="a <tom>")
    without = drawn([], "a man", settings=against)
    assert relative_error(drawn(["tom"], "a man", settings=against), without) > EFFECT / 10


def test_a_batch_of_prompts_is_its_pictures_one_by_one():
    prompts = ["a <tom> on the beach", "a <ida> and a <tom> at night", "a man", "a <tim>"]
    together = drawn(NAMES, prompts)
    for number, prompt in enumerate(prompts):
        with customised(untrained_base(), [worded(name) for name in NAMES], [1.0] * 5) as tokens:
            alone = sample(untrained_base(), [prompt], [number], tokens, QUICK)[0]
        assert relative_error(together[number], alone) < 1e-5


def test_hooks_end_also_by_an_exception_and_the_base_stays():
    before = traces(untrained_base())

    def stop(done, total):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        drawn(NAMES, "a <tom>", callback=stop)
    drawn(NAMES, "a <tom>")
    assert traces(untrained_base()) == before


def test_words_that_differ_in_capitals_alone_are_two_words():
    loud = replace(worded("tim"), name="TOM", tokens={"<TOM>": worded("tim").tokens["<tim>"]})
    loud = replace(loud, recipe=replace(loud.recipe, triggers=("<TOM>",)))
    alone = drawn(["tom"], "a <tom> on the beach")
    assert torch.equal(drawn((), "a <tom> on the beach", concepts=[worded("tom"), loud]), alone)
    both = drawn((), "a <TOM> and a <tom>", concepts=[worded("tom"), loud])
    assert relative_error(both, drawn((), "a <TOM> and a <tom>", [1.0, 0.5], concepts=[worded("tom"), loud])) > 0
    # A trigger that is noted in capitals is the learned word all the same.
    noted = replace(worded("tom"), recipe=replace(worded("tom").recipe, triggers=("<TOM>",)))
    assert words_of(noted) == ("<tom>",)
    assert torch.equal(drawn((), "a <tom> on the beach", concepts=[noted]), alone)


@pytest.mark.parametrize("parts", [False, True])
def test_a_file_of_more_words_than_anyone_says_is_refused_at_once(tmp_path, parts):
    triggers = tuple(f"word{number}" for number in range(20_000))
    origin = {"own_words": [[list(triggers), 2]]} if parts else {}
    broken = replace(worded("tom"), recipe=replace(worded("tom").recipe, triggers=triggers, origin=origin))
    with pytest.raises(AdapterError, match="20001 trigger words; at own words a concept has at most 200"):
        save_concept(broken, tmp_path / "b.safetensors")


def test_parts_of_whole_weights_act_as_their_columns_do():
    wide = {name: filled_adapter("full", *one.weight_shape, 1) for name, one in worded("tom").layers.items()}
    rank = next(iter(wide.values())).rank
    parts = [[["<tom>"], rank // 2], [["<ann>"], rank - rank // 2]]
    recipe = replace(worded("tom").recipe, triggers=("<tom>", "<ann>"), origin={"own_words": parts})
    both = replace(worded("tom"), layers=wide, recipe=recipe)
    first, second = residuals_of(both, 1.0)
    text = torch.randn(1, 3, 128, generator=seeded(9))
    for name, adapter in wide.items():
        summed = sum(
            F.linear(F.linear(text, down), up) for down, up in (one.factors(name, text) for one in (first, second))
        )
        assert relative_error(summed, adapter.residual(text)) < 1e-4


# --- others at their own words ------------------------------------------------------------------------------


def test_a_concept_that_was_trained_everywhere_acts_at_its_own_words_where_that_is_chosen():
    everyone = [whole(name) for name in NAMES]
    prompt = "a <tom> on the beach"
    assert torch.equal(drawn((), prompt, act_on="own words", concepts=everyone), drawn(["tom"], prompt))
    assert torch.equal(drawn((), "a man", act_on="own words", concepts=everyone), drawn([], "a man"))
    (sentence,) = split([(whole("tom"), 1.0)], "own words").notes
    assert "tom" in sentence and "%" in sentence and "left out" in sentence
    assert split([(worded("tom"), 1.0)], "own words").notes == ()


def test_an_ordinary_word_calls_a_lora_that_learned_none():
    lora = replace(worded("tom"), tokens={}, recipe=replace(worded("tom").recipe, method="lora", triggers=("man",)))
    prompt = "a man on the beach"
    found = drawn((), prompt, act_on="own words", concepts=[lora])
    assert relative_error(found, drawn([], prompt)) > EFFECT / 10
    assert torch.equal(drawn((), "a cat at night", act_on="own words", concepts=[lora]), drawn([], "a cat at night"))
    with pytest.raises(AdapterError, match="tom: the base does not know its trigger word man"):
        spoken([], split([(lora, 1.0)], "own words").by_word, lambda words: torch.empty(0, 128))


def test_a_concept_without_a_trigger_acts_everywhere_and_that_is_said():
    style = replace(whole("tom"), tokens={})
    style = replace(style, recipe=replace(style.recipe, triggers=()))
    divided = split([(style, 1.0), (worded("tim"), 1.0)], "own words")
    assert divided.everywhere.concepts == [style] and [one.name for one in divided.by_word] == ["tim"]
    assert divided.notes == ("tom has no trigger word, so it acts everywhere",)
    mixed = drawn((), "a man", act_on="own words", concepts=[style, worded("tim")])
    assert torch.equal(mixed, drawn((), "a man", concepts=[style]))


def test_a_concept_that_reads_no_text_is_refused_by_name():
    layers = {name: adapter for name, adapter in whole("tom").layers.items() if not reads_text(name)}
    picture = replace(whole("tom"), layers=layers)
    with pytest.raises(AdapterError, match="tom changes no layer that reads the text alone"):
        split([(picture, 1.0)], "own words")


@pytest.mark.parametrize("how", ["mean", "average", "ties", "svd", "fusion"])
def test_only_a_sum_leaves_concepts_at_their_own_words(how):
    with (
        pytest.raises(AdapterError, match=f"tom acts at its own words alone, where nothing is merged; {how}"),
        customised(untrained_base(), [worded("tom")], [1.0], how),
    ):
        pass


def test_what_would_let_it_act_everywhere_is_refused(tmp_path):
    for refused in (
        lambda: export_kohya(worded("tom"), tmp_path / "a.safetensors"),
        lambda: export_diffusers(worded("tom"), tmp_path / "a.safetensors"),
        lambda: orthogonal_concepts([worded("tom"), worded("tim")]),
        lambda: merged_concept("both", [worded("tom"), whole("tim")], [1.0, 1.0]),
    ):
        with pytest.raises(AdapterError, match="own words alone"):
            refused()
    assert not list(tmp_path.iterdir())


# --- regions ------------------------------------------------------------------------------------------------


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def test_by_word_in_every_regions_text():
    regions = [Region("a <tom> at night", LEFT), Region("a <tim> at night", RIGHT)]
    merged = drawn(["tom", "tim", "ada"], "a man and a man", regions=regions)
    assert torch.equal(merged, drawn(["tim", "tom"], "a man and a man", regions=regions))
    assert relative_error(merged, drawn(["tom", "tim"], "a man and a man", [1.0, 0.5], regions=regions)) > 1e-4
    stack = [(worded("tom"), 1.0), (worded("tim"), 1.0)]
    gated = sample(untrained_base(), ["a man and a man"], [0], None, QUICK, regions, mode="gated", stack=stack)[0]
    assert relative_error(gated, merged) < 1e-5


def test_gated_by_word_in_the_text_and_by_place_in_the_picture():
    stack = [(whole("tom"), 1.0), (whole("tim"), 1.0)]
    regions = [Region("a <tom> at night", LEFT), Region("a <tim> at night", RIGHT)]

    def gated(act_on, prompt="a man and a man", stack=stack):
        return sample(untrained_base(), [prompt], [0], None, QUICK, regions, mode="gated", stack=stack, act_on=act_on)[
            0
        ]

    assert relative_error(gated("own words"), gated("everywhere")) > EFFECT / 10
    only_text = [(worded("tom"), 1.0), (worded("tim"), 1.0)]
    assert relative_error(gated("own words"), gated("own words", stack=only_text)) > EFFECT / 10
    # Every place is a region's here, so the global prompt is not heard, nor a word in it.
    assert torch.equal(gated("own words", "a <tom> and a man"), gated("own words"))


# --- the hook itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "orthogonal", "block", "full"])
def test_the_residual_is_the_formula_at_its_places_and_nothing_elsewhere(kind):
    layer, generator = nn.Linear(12, 8).requires_grad_(False), seeded(3)
    adapter, text = filled_adapter(kind, 8, 12, 2), torch.randn(3, 5, 12, generator=generator)
    places = [[1, 2], [], [4]]
    gate = torch.zeros(3, 5, 1)
    for row, mine in enumerate(places):
        gate[row, mine] = 1.0
    plain = layer(text)
    residual = WordResidual("tom", ("<tom>",), {"unet.x": adapter}, 0.7)
    with at_own_words({"unet.x": layer}, [residual], Said({0: places})), torch.no_grad():
        found = layer(text)
    wanted = plain.double() + 0.7 * gate.double() * F.linear(text.double(), adapter.delta().double())
    assert relative_error(found, wanted) < 1e-6
    assert torch.equal(found[gate.expand_as(found) == 0], plain[gate.expand_as(plain) == 0])
    assert torch.equal(layer(text), plain)
    with at_own_words({"unet.x": layer}, [residual], NOTHING_SAID):
        assert torch.equal(layer(text), plain)


def test_a_site_of_a_fused_layer_has_the_residual_in_its_own_rows():
    layer, text = nn.Linear(12, 8).requires_grad_(False), torch.randn(2, 5, 12, generator=seeded(4))
    adapter = new_lora(3, 12, 2, None, seeded(6)).replace(lora_up=torch.ones(3, 2))
    with at_own_words(
        {"unet.x.k": Site(layer, 4, 3)}, [WordResidual("tom", (), {"unet.x.k": adapter})], Said({0: [[1], []]})
    ):
        found = layer(text)
    plain = layer(text)
    changed = plain.clone()
    changed[0, 1, 4:7] += F.linear(text[0, 1], adapter.delta())
    assert relative_error(found, changed) < 1e-6 and torch.equal(found[1], plain[1])


def test_gradients_are_those_of_plain_autograd():
    layer, text = nn.Linear(12, 8).requires_grad_(False), torch.randn(2, 5, 12, generator=seeded(5))
    adapter = filled_adapter("lora", 8, 12, 2)
    gate = torch.zeros(2, 5, 1)
    gate[0, 1], gate[1, 3] = 1.0, 1.0
    grads = []
    for way in range(2):
        up, down, x = (one.clone().requires_grad_() for one in (adapter.lora_up, adapter.lora_down, text))
        moved = adapter.replace(lora_up=up, lora_down=down)
        if way:
            out = layer(x) + gate * moved.residual(x)
        else:
            with at_own_words({"unet.x": layer}, [WordResidual("tom", (), {"unet.x": moved})], Said({0: [[1], [3]]})):
                out = layer(x)
        out.square().sum().backward()
        grads.append((up.grad, down.grad, x.grad))
    for mine, plain in zip(*grads, strict=True):
        assert relative_error(mine, plain) < 1e-5


# --- training -----------------------------------------------------------------------------------------------


def lesson(**changed):
    base = untrained_base()
    pictures = torch.rand(3, 3, 32, 32, generator=seeded(8))
    subject = Subject("tom", pictures, ["a <tom>", "a <tom> at night", "a man beside a <tom>"], "man")
    settings = TrainSettings(method="own_words", rank=4, steps=4, batch=2, adapter_lr=1e-2, token_vectors=2)
    return base, subject, replace(settings, **changed)


def test_training_moves_the_factors_and_the_word_and_leaves_the_base():
    base, subject, settings = lesson()
    before = traces(base)
    previews = []

    def preview(at):
        previews.append(sample(base, ["a <tom>", "a man"], [0, 0], at.tokens, QUICK))

    concept, result = train_concept(base, subject, settings, KEYS_AND_VALUES, Listeners(preview))
    assert result.finished and concept.recipe.method == "own_words" and concept.recipe.basis is None
    assert all(adapter.lora_up.any() and adapter.kind == "lora" for adapter in concept.layers.values())
    assert traces(base) == before
    # What a preview shows is what the concept draws; without its word the base draws as ever.
    with customised(base, [concept], [1.0]) as tokens:
        assert torch.equal(sample(base, ["a <tom>", "a man"], [0, 0], tokens, QUICK), previews[-1])
    assert relative_error(previews[-1][1], sample(base, ["a man"], [0], None, QUICK)[0]) < 1e-5
    again, _ = train_concept(base, subject, settings, KEYS_AND_VALUES)
    for name, adapter in concept.layers.items():
        assert torch.equal(adapter.lora_up, again.layers[name].lora_up)


def test_a_slot_takes_its_columns_of_the_shared_basis():
    base, subject, settings = lesson(slot=3, steps=1)
    concept, _ = train_concept(base, subject, settings, KEYS_AND_VALUES)
    assert {adapter.kind for adapter in concept.layers.values()} == {"orthogonal"}
    assert concept.recipe.slot == 3 and concept.recipe.basis is not None


@pytest.mark.parametrize("targets", [Targets(("attention",)), Targets(("cross_attention_kv",), ("attention",))])
def test_layers_that_read_more_than_text_are_refused(targets):
    base, subject, settings = lesson()
    with pytest.raises(AdapterError, match="targets cross_attention_kv, without the text encoder"):
        train_concept(base, subject, settings, targets)


def test_erasure_has_nothing_to_erase():
    with pytest.raises(AdapterError, match="erasure"):
        TrainSettings(method="own_words", erasure=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_target_is_learned_through_the_gate(seed):
    """Base + planted at the word's tokens = exact; anywhere else the base is right as it is."""
    generator, count, name = seeded(seed), 24, "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    layer, alphas = nn.Linear(12, 6, bias=False), torch.linspace(0.9, 0.1, 1000)
    texts = torch.randn(count, 5, 12, generator=generator)
    planted = torch.randn(6, 2, generator=generator) @ torch.randn(2, 12, generator=generator) / 4
    places = {f"<x> {number}": [number % 5, (number + 2) % 5] for number in range(count)}
    gate = torch.zeros(count, 5, 1)
    for row, mine in enumerate(places.values()):
        gate[row, mine] = 1.0
    wanted = (layer(texts) + gate * (texts @ planted.mT)).detach()

    def predict(noisy, timesteps, rows):
        noise = noisy / (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        return noise + (layer(texts[rows]) - wanted[rows])[:, None]

    base = GivenBase(
        predict,
        lambda captions, tokens: torch.tensor([list(places).index(caption) for caption in captions]),
        NoiseSchedule(alphas),
        (layer,),
        word_places=lambda caption, tokens: {"<x>": places[caption]},
    )
    problem = Problem(
        base, {name: layer}, Examples(torch.zeros(count, 1, 5, 6), list(places)), {"<x>": torch.ones(1, 12)}
    )
    settings = TrainSettings(
        method="own_words", rank=2, steps=400, batch=8, seed=seed, adapter_lr=0.05, schedule="cosine", weight_decay=0.0
    )
    result = train(problem, settings)
    assert max(result.losses[-5:]) <= 1e-4 * result.losses[0]
    assert (result.layers[name].delta() - planted).norm() <= 0.02 * planted.norm()


def test_the_gradients_of_a_step_are_those_of_a_plain_mask():
    """The same loss by masked products, in float64, on the toy base's own layers."""
    base, subject, settings = lesson(adapter_lr=1e-2)
    problem, before = problem_for(base, subject, KEYS_AND_VALUES), traces(base)
    grads = []
    for way in range(2):
        run = Run(problem, settings)
        with torch.no_grad():
            for number, adapter in enumerate(run.adapters.values()):
                adapter.lora_up.copy_(torch.randn(adapter.lora_up.shape, generator=seeded(number)))
        with on_base(problem, run) as step, by_mask(problem, run, step) if way else nullcontext():
            step.gradients()
        grads.append({name: value.grad.clone() for name, value in run.parameters().items()})
    assert traces(base) == before
    for name, gradient in grads[0].items():
        assert gradient.any() and relative_error(gradient, grads[1][name]) < 1e-4, name


@contextmanager
def by_mask(problem, run, step):
    """Within the block a mask over the whole residual is in the place of the step's own hooks."""
    places = {caption: problem.base.word_places(caption, run.tokens)["<tom>"] for caption in problem.examples.captions}
    drawn = {}
    find = step._find_words

    def note(captions):
        find(captions)
        drawn["captions"] = list(captions)

    step._find_words = note
    handles, before = [], {name: dict(problem.layers[name]._forward_hooks) for name in run.adapters}
    for name, adapter in run.adapters.items():
        problem.layers[name]._forward_hooks.clear()

        def masked(_module, args, output, adapter=adapter):
            gate = torch.zeros(*args[0].shape[:2], 1)
            for row, caption in enumerate(drawn["captions"]):
                gate[row, places[caption]] = 1.0
            return output + gate * adapter.residual(args[0])

        handles.append(problem.layers[name].register_forward_hook(masked))
    yield
    for handle in handles:
        handle.remove()
    for name, hooks in before.items():
        problem.layers[name]._forward_hooks.update(hooks)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_resumed_training_is_the_whole_one_bit_for_bit(tmp_path, layerwise):
    base, subject, settings = lesson(layerwise=layerwise, steps=4)
    whole_way, _ = train_concept(base, subject, settings, KEYS_AND_VALUES)
    stopped = Listeners(lambda at: at.step == 2)
    train_concept(base, subject, settings, KEYS_AND_VALUES, stopped, Keeping(tmp_path))
    resumed, result = train_concept(base, subject, settings, KEYS_AND_VALUES, keeping=Keeping(tmp_path, tmp_path))
    assert result.finished
    for name, adapter in whole_way.layers.items():
        assert torch.equal(adapter.lora_up, resumed.layers[name].lora_up)
        assert torch.equal(adapter.lora_down, resumed.layers[name].lora_down)
    assert torch.equal(whole_way.tokens["<tom>"], resumed.tokens["<tom>"])
    alone = drawn((), "a <tom> at night", concepts=[resumed])
    assert torch.equal(drawn((), "a <tom> at night", concepts=[resumed, worded("tim")]), alone)


# --- files, merges of several, reports ----------------------------------------------------------------------


def test_a_file_keeps_it_and_offers_stock_loaders_no_key(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "tom.safetensors"
    save_concept(worded("tom"), path)
    with safe_open(path, "pt") as file:
        assert all(key.startswith("own_words.lora_unet_") for key in file.keys())  # noqa: SIM118  (safetensors' own)
        assert "networks.lora" not in str(file.metadata())
    read = load_concept(path)
    assert torch.equal(drawn((), "a <tom>", concepts=[read]), drawn(["tom"], "a <tom>"))


def test_several_in_one_file_act_each_at_its_own_words_still(tmp_path):
    path, prompt = tmp_path / "all.safetensors", "a <tom> and a <ida>"
    together = merged_concept("all", [worded(name) for name in NAMES], [1.0, 0.5, 1.0, 1.0, 0.8])
    save_concept(together, path)
    read = load_concept(path)
    assert read.recipe.method == "own_words" and len(read.recipe.triggers) == len(NAMES)
    apart = drawn(NAMES, prompt, [1.0, 0.5, 1.0, 1.0, 0.8])
    assert relative_error(drawn((), prompt, concepts=[read]), apart) < 1e-5
    jim = replace(worded("tim"), name="jim", tokens={"<jim>": torch.ones(1, 128)})
    jim = replace(jim, recipe=replace(jim.recipe, triggers=("<jim>",)))
    nested = merged_concept("more", [read, jim], [1.0, 1.0])
    assert relative_error(drawn((), prompt, concepts=[nested]), apart) < 1e-5


@pytest.mark.parametrize(
    "parts",
    [
        "nonsense",
        [],
        [["<tom>", 2]],
        [[["<tom>"], 3], [["<tim>"], 1]],
        [[["<tom>"], "2"]],
        [[["<eve>"], 4]],
        [[[], 4]],
        [[["<tom>"], -1], [["<tim>"], 5]],
        [[["<tom>"], True]],
        [[[{}], 4]],
    ],
)
def test_a_file_whose_parts_do_not_make_up_its_layers_is_refused(tmp_path, parts):
    both = merged_concept("both", [worded("tom"), worded("tim")], [1.0, 1.0])
    broken = replace(both, recipe=replace(both.recipe, origin={"own_words": parts}))
    fits = parts == [[["<tom>"], 3], [["<tim>"], 1]]  # other columns than it was made of, but all of them
    if fits:
        save_concept(broken, tmp_path / "b.safetensors")
        return
    with pytest.raises(AdapterError, match="both"):
        save_concept(broken, tmp_path / "b.safetensors")


def test_a_file_with_a_layer_that_no_word_can_hold_is_refused(tmp_path):
    broken = replace(worded("tom"), layers=whole("tom").layers)
    with pytest.raises(AdapterError, match="reads? the text alone"):
        save_concept(broken, tmp_path / "b.safetensors")


def test_the_report_reads_nothing_where_nothing_is_and_says_what_is_shared():
    report = explained([worded("tom"), worded("tim"), worded("ida")])
    assert report.table["mean"] == 0.0 and all(pair.crosstalk == 0.0 for pair in report.pairs)
    assert "share nothing but the picture's attention" in report.text() and not report.warnings
    mixed = explained([worded("tom"), whole("tim")])
    assert mixed.table["mean"] > 0 and "tim acts everywhere, on the words of tom too" in mixed.warnings[0]
    twins = explained([worded("tom"), replace(worded("tim"), tokens=worded("tom").tokens, recipe=worded("tom").recipe)])
    assert twins.table["mean"] > 0


def test_all_layers_that_it_trains_read_text():
    assert all(map(reads_text, concept_layers(untrained_base(), KEYS_AND_VALUES)))
    assert not any(map(reads_text, concept_layers(untrained_base(), Targets(("feed_forward",), ("attention",)))))


def test_tokens_of_a_joint_attention_have_heard_the_picture():
    layers = ("context_block.attn.qkv.k", "context_block.mlp.fc1", "x_block.attn.qkv.q")
    assert not any(reads_text(f"unet.joint_blocks.0.{layer}") for layer in layers)
    concept = replace(whole("tom"), layers={f"unet.joint_blocks.0.{layers[1]}": new_lora(8, 8, 2, 2.0, seeded(1))})
    with pytest.raises(AdapterError, match="tom changes no layer that reads the text alone"):
        split([(concept, 1.0)], "own words")
