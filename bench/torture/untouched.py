"""Promise 4: training, merging and drawing over and over, in every precision; is the base still the same?

Looked at after each of them: the sha256 of all weights, all hooks, all processors, what asks for gradients.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from modular_concepts.concept import Concept
from modular_concepts.errors import AdapterError
from modular_concepts.models.base import BaseModel, weights_hash
from modular_concepts.models.targets import Targets
from modular_concepts.regions.geometry import Region
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.standard import BY_NAME, pictures_of
from modular_concepts.training.loop import Keeping, Listeners
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, train_concept

PRECISIONS = ("fp32", "bf16", "fp16")  # of the training; the headless base itself is float32
METHODS = ("lora", "orthogonal", "block", "block_orthogonal", "custom_diffusion")
SETTINGS = TrainSettings(rank=2, steps=2, batch=2, adapter_lr=0.02, token_lr=0.1, warmup=0, blocks=3, slot=0)
DRAWING = SampleSettings(steps=2, cfg=4.0)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class OnPurposeError(Exception):
    """What a fault in the middle of something is here."""


def tried(cycles: int, one_in: int = 1) -> dict:
    """Every action `cycles` times in each precision: how often the base was looked at, and what had changed.

    one_in: of the precisions, for a quick look only the first.
    """
    looked, changed, refused = Counter(), [], Counter()
    base = load_toy_base()
    before = traces(base)
    for precision in PRECISIONS if one_in == 1 else PRECISIONS[:1]:
        for cycle in range(cycles):
            for what, action in actions(base, cycle, precision):
                try:
                    action()
                except AdapterError as error:
                    refused[f"{precision}: {what}: {error}"] += 1
                looked[precision] += 1
                if traces(base) != before:
                    changed.append(f"{precision}, cycle {cycle + 1}: {what}")
                    before = traces(base)
    return {"looked": dict(looked), "changed": changed, "refused": dict(refused)}


def traces(base: BaseModel) -> tuple:
    modules = [module for network in (base.unet, base.text_encoder) for module in network.modules()]
    hooks = sum(len(getattr(module, kind)) for module in modules for kind in HOOKS)
    asking = sum(parameter.requires_grad for module in modules for parameter in module.parameters())
    forwards = sum("forward" in vars(module) for module in modules)
    processors = tuple(id(processor) for processor in base.unet.attn_processors.values())
    return weights_hash(base.unet, base.text_encoder), hooks, asking, forwards, processors


def subject(name: str) -> Subject:
    pictures, captions = pictures_of(BY_NAME[name], 4)
    return Subject(name, pictures, captions, BY_NAME[name].class_word, fingerprint=name)


def actions(base: BaseModel, cycle: int, precision: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is done to the base, by name.  Trained concepts are used by what comes after them."""
    concepts: list[Concept] = []

    def train(name: str, method: str, callback=None, checkpoints: Path | None = None) -> None:
        settings = replace(SETTINGS, name=name, method=method, seed=cycle, slot=len(concepts) % 3, precision=precision)
        targets = Targets(("attention",))
        concept, _ = train_concept(base, subject(name), settings, targets, Listeners(callback), Keeping(checkpoints))
        concepts.append(concept)

    def raises(*_: object) -> None:
        raise OnPurposeError

    def interrupted(action: Callable[[], object]) -> None:
        try:
            action()
        except OnPurposeError:
            return
        raise AssertionError("the fault on purpose did not come")

    def draw(how: str = "sum", strength: float = 1.0, callback=None) -> None:
        with customised(base, concepts[:2], [strength] * 2, how) as tokens:
            sample(base, ["a <tom> and a <tim>"], [cycle], tokens, DRAWING, callback=callback)

    def regions(mode: str, callback=None) -> None:
        places = [Region("a <tom>", (0.0, 0.0, 0.5, 1.0)), Region("a <tim>", (0.5, 0.0, 1.0, 1.0))]
        stack = [(concept, 1.0) for concept in concepts[:2]] if mode == "gated" else ()
        more = {"mode": mode, "stack": stack} if stack else {}
        sample(base, ["a man"], [cycle], None, DRAWING, places, callback=callback, **more)

    for name, method in (("tom", "orthogonal"), ("tim", "orthogonal")):
        yield f"training {name}", lambda name=name, method=method: train(name, method)
    for method in METHODS:
        yield f"training by {method}", lambda method=method: train("minka", method)
    yield "a cancelled training", lambda: train("rex", "lora", lambda at: at.step == 1)
    yield "a training with a fault", lambda: interrupted(lambda: train("rex", "lora", raises))
    for how in ("sum", "mean"):
        yield f"drawing a {how}", lambda how=how: draw(how)
    yield "drawing at strength 0", lambda: draw(strength=0.0)
    yield "drawing with a fault", lambda: interrupted(lambda: draw(callback=raises))
    yield "drawing gated regions", lambda: regions("gated")
    yield "gated regions with a fault", lambda: interrupted(lambda: regions("gated", raises))
    with tempfile.TemporaryDirectory() as folder:
        yield "a training with checkpoints", lambda: train("bolt", "block", checkpoints=Path(folder))
