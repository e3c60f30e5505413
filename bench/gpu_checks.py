"""In the host's interpreter: one family's model in one precision and one way of keeping it in memory, held to promises.

Every check gives a number or a word and whether it holds.  What a layer adds is compared with a formula in float64 by
asking the layer itself, so that it does not matter whether a weight was patched, is patched when it is used, or is left
alone while a hook adds to the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.ops
import comfy.sample
import host_models
import torch
from in_host import pack_module
from torch import Tensor, nn

from nodes import CLIPTextEncode

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EFFECT = 1e-2
STRENGTHS = (0.8, -0.5)
PROMPT, NEGATIVE = "a <one> in a garden", "blurry"
STEPS = 2


class Stopped(Exception):
    """A fault of somebody else's, in the middle of a step."""


@dataclass(frozen=True)
class Case:
    """family, size: as `host_models.load`.  memory: "normal", "low" (weights stay on the CPU) or "dynamic"."""

    family: str
    size: str
    dtype: str
    memory: str = "normal"

    @property
    def stored(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Checks:
    """One case's model, concepts, and what was found; `run` does all."""

    def __init__(self, case: Case):
        self.case, self.found = case, {}
        self.model, self.clip, _ = host_models.load(case.family, case.size, case.stored)
        self.layers_module = pack_module("host.layers")
        self.layers = {
            name: layer
            for name, layer in self.layers_module.host_layers(self.model, None).items()
            if isinstance(layer.module, nn.Linear) and "adaLN" not in name and "embedd" not in name
        }
        self.stack = [(self._concept(number, word), strength) for number, (word, strength) in enumerate(_words())]
        side = {"sd15": 64, "sdxl": 128}[case.family] if case.size == "full" else 8
        channels = self.model.get_model_object("latent_format").latent_channels
        self.latent = torch.zeros(1, channels, side, side)
        self.noise = torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(5))

    def _concept(self, seed: int, word: str):
        concepts, adapters = pack_module("modular_concepts.concept"), pack_module("modular_concepts.adapters.low_rank")
        generator, made = torch.Generator().manual_seed(seed), {}
        for name, layer in self.layers.items():
            out, inp = layer.module.weight.shape
            rank = min(8, out, inp)
            up = torch.randn(out, rank, generator=generator) * 0.3 / math.sqrt(rank)
            down = torch.randn(rank, inp, generator=generator) / math.sqrt(inp)
            made[name] = adapters.LowRank(up, down, float(rank), "lora", None, out)
        architecture = self.layers_module.architecture_of(self.model)
        recipe = concepts.Recipe(architecture=architecture, triggers=(word,), class_word="man", rank=8)
        return concepts.Concept(word.strip("<>"), made, {}, recipe)

    # -- what is asked of the host

    def merged(self, apply: str = "weights", strengths=STRENGTHS):
        stack = [(concept, own) for (concept, _), own in zip(self.stack, strengths, strict=True)]
        return pack_module("host.merging.weights").merge_into(
            self.model, self.clip, stack, beside=apply == "activations"
        )[0]

    def drawn(self, model, conditioning=None, steps: int = STEPS) -> Tensor:
        positive, negative = conditioning or (self._says(PROMPT), self._says(NEGATIVE))
        return comfy.sample.sample(
            model, self.noise, steps, 3.0, "euler", "normal", positive, negative, self.latent, disable_pbar=True, seed=0
        ).float()

    def _says(self, text: str) -> list:
        return CLIPTextEncode().encode(self.clip, text)[0]

    @contextmanager
    def loaded(self, model) -> Iterator[dict[str, nn.Module]]:
        """Some layers of a MODEL that is ready to be asked, with its hooks, as in a sampling."""
        comfy.model_management.load_models_gpu([model], force_full_load=False)
        model.pre_run()
        try:
            yield {name: model.model.get_submodule(self.layers[name].key.removesuffix(".weight")) for name in self.some}
        finally:
            model.cleanup()

    @property
    def some(self) -> list[str]:
        """Up to eight layers spread over the network."""
        names = sorted(self.layers)
        return names[:: max(1, len(names) // 8)]

    # -- checks

    def run(self) -> dict:
        with low_memory(self.case.memory == "low"):
            for check in (self.layer_by_layer, self.nothing_at_zero, self.reload, self.regions, self.untouched):
                check()
        comfy.model_management.unload_all_models()
        return self.found

    def note(self, name: str, value, holds: bool) -> None:
        self.found[name] = {"found": value, "holds": bool(holds)}

    def layer_by_layer(self) -> None:
        """Promise 3: merged = activations = W x + sum of strength * up (down x), in float64."""
        compute = self.model.model.manual_cast_dtype or self.model.model_dtype()
        eight_bit = self.case.stored.itemsize < 2
        # A patched weight is rounded as the weight is stored, and as the host computes patches: in float16 on a GPU.
        patches = comfy.model_management.lora_compute_dtype(self.model.load_device)
        allowed = {"activations": TOLERANCE[compute]}
        allowed["weights"] = max(TOLERANCE.get(dtype, 0.0) for dtype in (compute, patches, self.case.stored))
        base, inputs = {}, {}
        with self.loaded(self.model) as modules:
            for number, (name, module) in enumerate(modules.items()):
                generator = torch.Generator().manual_seed(100 + number)
                x = torch.randn(2, 7, self.layers[name].module.weight.shape[1], generator=generator)
                inputs[name] = x.to(self.model.load_device, compute)
                weight, bias = weight_of(module, inputs[name])
                product = inputs[name].double() @ weight.double().mT
                base[name] = product if bias is None else product + bias.double()
        for apply in ("weights", "activations"):
            worst, least = 0.0, math.inf
            with self.loaded(self.merged(apply)) as modules:
                for name, module in modules.items():
                    added = sum(
                        strength * concept.layers[name].to(inputs[name].device, torch.float64).residual(
                            inputs[name].double()
                        )
                        for (concept, _), strength in zip(self.stack, STRENGTHS, strict=True)
                    )  # fmt: skip
                    wanted = base[name] + added
                    worst = max(worst, relative(module(inputs[name]).double(), wanted))
                    least = min(least, float(added.norm() / wanted.norm()))
            # Weights of eight bits round what is added to them as much as they round themselves; the loss is stated.
            loses = eight_bit and apply == "weights" and self.case.memory != "low"
            self.note(f"{apply} = formula", worst, loses or worst <= allowed[apply])
            self.note(f"{apply}: effect", least, least >= EFFECT)

    def nothing_at_zero(self) -> None:
        """Strength 0 is the base bit for bit; 1 is not."""
        self.plain = self.drawn(self.model)
        self.note("finite", "yes" if self.plain.isfinite().all() else "no", self.plain.isfinite().all())
        for apply in ("weights", "activations"):
            same = torch.equal(self.drawn(self.merged(apply, (0.0, 0.0))), self.plain)
            self.note(f"{apply}: strength 0 = base", "bit for bit" if same else "differs", same)
        moved = relative(self.drawn(self.merged()), self.plain)
        self.note("picture moved", moved, math.isfinite(moved) and moved >= 1e-3)

    def reload(self) -> None:
        """Unloaded and loaded again, base and merge give the same bits as before."""
        changed = self.merged()
        before = self.drawn(changed)
        comfy.model_management.unload_all_models()
        same = torch.equal(self.drawn(changed), before) and torch.equal(self.drawn(self.model), self.plain)
        self.note("unload and reload", "same bits" if same else "differs", same)

    def regions(self) -> None:
        """One region over everything is plain sampling; halves are drawn in both modes, finite and different."""
        geometry, regions = pack_module("modular_concepts.regions.geometry"), pack_module("host.regions.sampling")
        concept = self.stack[0][0]
        whole = [geometry.Region(PROMPT, (0.0, 0.0, 1.0, 1.0))]
        left = [geometry.Region(PROMPT, (0.0, 0.0, 0.5, 1.0), concepts=(concept.name,))]

        def draw(places, stack, mode: str) -> Tensor:
            found = regions.with_regions(
                regions.HostModel(self.model, self.clip), regions.Scene(stack, places, (PROMPT, NEGATIVE), mode)
            )
            return self.drawn(found.model, found[1:])

        apart = relative(draw(whole, [], "merged"), self.plain)
        # In float32 a GPU's product of a longer text rounds the shorter one's rows otherwise.
        exact = self.case.stored != torch.float32 or self.model.load_device.type == "cpu"
        self.note("one full region = plain", apart, apart <= (0.0 if exact else 1e-5))
        for mode in ("merged", "gated"):
            moved = relative(draw(left, [(concept, 1.0)], mode), self.plain)
            self.note(f"{mode} region moved", moved, math.isfinite(moved) and moved >= 1e-3)

    def untouched(self) -> None:
        """A fault in mid-step leaves no hook, no patch, and every weight as it was."""
        before = prints(self.model)
        geometry, regions = pack_module("modular_concepts.regions.geometry"), pack_module("host.regions.sampling")
        concept = self.stack[0][0]
        left = [geometry.Region(PROMPT, (0.0, 0.0, 0.5, 1.0), concepts=(concept.name,))]
        scene = regions.Scene([(concept, 1.0)], left, (PROMPT, NEGATIVE), "gated")
        ways: dict[str, Callable] = {
            "weights": lambda: (self.merged(), None),
            "activations": lambda: (self.merged("activations"), None),
            "gated": lambda: (
                lambda found: (found.model, found[1:])
            )(regions.with_regions(regions.HostModel(self.model, self.clip), scene)),
        }  # fmt: skip
        for way, make in ways.items():
            model, conditioning = make()
            last = self.model.model.get_submodule(self.layers[sorted(self.layers)[-1]].key.removesuffix(".weight"))
            handle = last.register_forward_pre_hook(_fail)
            try:
                self.drawn(model, conditioning)
                raised = False
            except Stopped:
                raised = True
            finally:
                handle.remove()
            comfy.model_management.unload_all_models()
            hooks = [name for name, module in self.model.model.named_modules() if module._forward_hooks]
            same = raised and not hooks and prints(self.model) == before
            same = same and torch.equal(self.drawn(self.model), self.plain)
            self.note(f"untouched after a fault, {way}", "yes" if same else f"no ({len(hooks)} hooks)", same)


def _words():
    return ((word, strength) for word, strength in zip(("<one>", "<two>"), STRENGTHS, strict=True))


def _fail(*_) -> None:
    raise Stopped


@torch.no_grad()
def weight_of(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a layer as it computes with them on x's device, wherever and however they are kept."""
    with pack_module("host.training.base").cast_weights(module, like) as (weight, bias):
        return weight.clone(), None if bias is None else bias.clone()


@contextmanager
def low_memory(on: bool) -> Iterator[None]:
    """The host's way with a card that holds no weights: each is fetched, and patched, when it is used."""
    management = comfy.model_management
    before, management.vram_state = management.vram_state, management.VRAMState.NO_VRAM if on else management.vram_state
    try:
        yield
    finally:
        management.vram_state = before


def prints(model) -> dict[str, int]:
    """A number for each weight, the sum of its bits as whole numbers, which any one changed bit changes."""
    found = {}
    for name, value in model.model.state_dict().items():
        plain = getattr(value, "_qdata", value).detach().contiguous().reshape(-1)
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.itemsize]
        found[name] = int(plain.view(whole).sum(dtype=torch.int64))
    return found


def relative(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def check(case: Case) -> dict:
    """{name: {"found", "holds"}} of everything; an exception is a finding too."""
    checks = None
    try:
        checks = Checks(case)
        return checks.run()
    except Exception as error:  # noqa: BLE001  (whatever it is, it belongs into the report)
        found = checks.found if checks is not None else {}
        return found | {"ended": {"found": f"{type(error).__name__}: {error}"[:500], "holds": False}}


def cases(families: dict[str, str], dtypes: list[str], memories: list[str]) -> list[Case]:
    made = [
        Case(family, size, dtype, memory)
        for family, size in families.items()
        for dtype in dtypes
        for memory in memories
    ]
    return [replace(case, dtype="float32") if case.family == "toy" else case for case in made]
