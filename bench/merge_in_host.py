"""In the host's interpreter: our merge and a chain of core's LoraLoaders, up to the first step of a sampling.

    python merge_in_host.py HOST - run '{"layout": "full", "counts": [1, 15], "rank": 20, "repeats": 3}'

The U-Net is the host's own in SD 1.5's layout, built in memory; its Linear layers have random weights.  Both sides
share the LoRAs' tensors, and what they make of the weights is compared before it is timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from in_host import ARGUMENT, pack_module, start

start(on_cpu=True)

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.weight_adapter
import comfyui_version
import torch
from layouts import LAYOUTS, WIDTH
from merge_work import STRENGTH, Spent, made_work, medians, timed
from probe import TEXTS

CHANGED = 0.7


class FirstStep(Exception):
    """The network was asked for the first time."""


class Bench:
    """loaded: (MODEL, CLIP), whose Linear layers get random weights.  core_counts: how many LoRAs core loads; all."""

    def __init__(
        self,
        loaded: tuple,
        counts: list[int],
        rank: int,
        repeats: int,
        activations: bool = True,
        core_counts: list[int] | None = None,
    ):
        self.counts, self.rank, self.repeats, self.with_activations = counts, rank, repeats, activations
        self.core_counts = counts if core_counts is None else core_counts
        self.patching, layers = pack_module("host.merging.weights"), pack_module("host.layers")
        self.concept = pack_module("modular_concepts.concept")
        self.merge = pack_module("modular_concepts.merging.compatibility").Merge
        self.adapters, self.names = (
            pack_module("modular_concepts.adapters.low_rank"),
            pack_module("modular_concepts.models.layers"),
        )
        self.model, self.clip = loaded
        linear = {
            name: layer
            for name, layer in layers.host_layers(self.model, None).items()
            if isinstance(layer.module, torch.nn.Linear)
        }
        self.keys = {name: layer.key for name, layer in linear.items()}
        generator = torch.Generator().manual_seed(0)
        for layer in linear.values():
            weight = layer.module.weight.data
            weight.copy_(torch.randn(weight.shape, generator=generator).mul_(weight.shape[1] ** -0.5))
        self.weights = {name: layer.module.weight.data for name, layer in linear.items()}
        self.latent = torch.zeros(1, 4, 8, 8)
        self.architecture = layers.architecture_of(self.model)
        length, width, pooled = TEXTS[self.architecture]
        self.context = torch.randn(1, length, width, generator=generator)
        self.about = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}

    # -- the two ways to a MODEL

    def ours(self, concepts: list, how: str, last: float = STRENGTH, beside: bool = False):
        recipe = self.concept.Recipe(architecture=self.architecture)
        stack = [(self.concept.Concept(c.name, c.layers, {}, recipe), STRENGTH) for c in concepts]
        stack[-1] = (stack[-1][0], last)
        return self.patching.merge_into(self.model, self.clip, stack, self.merge(how), beside)[0]

    def chain(self, loras: list[dict], last: float = STRENGTH, start=None):
        """start: a MODEL with all but the last LoRA, which the host keeps from the run before."""
        model = start or self.model
        for number, lora in enumerate(loras[-1:] if start else loras):
            own = last if start or number == len(loras) - 1 else STRENGTH
            model, _ = comfy.sd.load_lora_for_models(model, self.clip, lora, own, own)
        return model

    def files(self, concepts: list) -> list[dict]:
        """The concepts as LoRA files that core has read."""
        found = []
        for concept in concepts:
            lora = {}
            for name, adapter in concept.layers.items():
                key = self.names.file_key(name)
                lora[f"{key}.lora_up.weight"], lora[f"{key}.lora_down.weight"] = adapter.full_up(), adapter.lora_down
                lora[f"{key}.alpha"] = torch.tensor(adapter.alpha)
            found.append(lora)
        return found

    # -- what is timed

    def first_step(self, model, whole: bool = False) -> None:
        """Sample until the network is first asked; or one whole step."""

        def seen(*_):
            raise FirstStep

        said = [[self.context, self.about]]
        network = model.model.diffusion_model
        handle = network.register_forward_pre_hook(lambda *_: None if whole else seen())
        try:
            comfy.sample.sample(
                model, self.latent, 1, 1.0, "euler", "normal", said, said, self.latent, disable_pbar=True, seed=0
            )
        except FirstStep:
            pass
        finally:
            handle.remove()

    def turn(self, make: Callable[[], object], change: Callable[[object], object]) -> dict[str, Spent]:
        """What the nodes take, and the way to the first step: on the bare base, and after a changed strength."""
        self.first_step(self.model)
        made, found = [], {}
        found["nodes"] = timed(lambda: made.append(make()))
        found["first_step"] = timed(lambda: self.first_step(made[-1]))
        found["changed_nodes"] = timed(lambda: made.append(change(made[-1])))
        found["changed_step"] = timed(lambda: self.first_step(made[-1]))
        found["changed"] = found["changed_nodes"] + found["changed_step"]
        return found

    def compare(self, ours, theirs) -> float:
        """The largest relative difference between what both make of a weight."""
        self.first_step(ours)
        mine = {name: self._weight(key).clone() for name, key in self._some()}
        self.first_step(theirs)
        found = [float((self._weight(key) - mine[name]).norm() / mine[name].norm()) for name, key in self._some()]
        base = {name: self.weights[name].to(mine[name]) for name in mine}
        moved = max(float((mine[name] - base[name]).norm() / base[name].norm()) for name in mine)
        if not moved > 1e-2:
            raise RuntimeError("the merge did not move the weights")
        return max(found)

    def _some(self) -> list[tuple[str, str]]:
        return list(self.keys.items())[::12]

    def _weight(self, key: str) -> torch.Tensor:
        return comfy.utils.get_attr(self.model.model, key)

    # -- everything

    def run(self) -> dict:
        result = {"sum": {}, "block": {}, "host": comfyui_version.__version__, "layers": len(self.weights)}
        for count in self.counts:
            work = made_work(self.adapters, self.weights, count, self.rank)
            for how, concepts in (("sum", work.sums), ("block", work.blocks)):
                result[how][count] = self.pair(how, concepts)
                print(how, count, json.dumps(result[how][count]), file=sys.stderr, flush=True)
            if self.with_activations and count in (1, 3, 15):
                result.setdefault("activations", {})[count] = self.activations(work.sums)
        return result

    def pair(self, how: str, concepts: list) -> dict:
        if len(concepts) not in self.core_counts:
            return self.alone(how, concepts)
        files = self.files(concepts)
        before = self.chain(files[:-1]) if len(files) > 1 else self.model
        difference = self.compare(self.ours(concepts, how), self.chain(files))
        turns: dict[str, list[dict[str, Spent]]] = {"ours": [], "core": []}
        for _ in range(self.repeats):
            make = lambda: self.ours(concepts, how)  # noqa: E731
            turns["ours"].append(self.turn(make, lambda _: self.ours(concepts, how, CHANGED)))
            turns["core"].append(
                self.turn(lambda: self.chain(files), lambda _: self.chain(files, CHANGED, start=before))
            )
        self.first_step(self.model)
        spent = {who: {name: medians([one[name] for one in own]) for name in own[0]} for who, own in turns.items()}
        units, ratios = {}, {}
        for unit in Spent._fields:
            own = {who: {name: getattr(one, unit) for name, one in taken.items()} for who, taken in spent.items()}
            ratios[unit] = {name: own["ours"][name] / own["core"][name] for name in own["ours"]}
            units[unit] = own
        return {**units, "ratios": ratios, "difference": difference}

    def alone(self, how: str, concepts: list) -> dict:
        """Ours without core beside it, for as many concepts as core would take minutes for."""
        turns = []
        for _ in range(self.repeats):
            turns.append(self.turn(lambda: self.ours(concepts, how), lambda _: self.ours(concepts, how, CHANGED)))
        spent = {name: medians([turn[name] for turn in turns]) for name in turns[0]}
        return {unit: {"ours": {name: getattr(one, unit) for name, one in spent.items()}} for unit in Spent._fields}

    def activations(self, concepts: list) -> dict:
        """What activations instead of weights cost: the way to the first step, a changed strength, a whole step."""
        self.latent = torch.zeros(1, 4, 32, 32)
        steps: dict[str, list[Spent]] = {name: [] for name in ("first_step", "changed", "step", "plain_step")}
        for _ in range(self.repeats):
            self.first_step(self.model)
            made = [self.ours(concepts, "sum", beside=True)]
            steps["first_step"].append(timed(lambda: self.first_step(made[-1])))  # noqa: B023
            self.first_step(made[-1], whole=True)  # whatever is prepared at the first step is there
            change = lambda: made.append(self.ours(concepts, "sum", CHANGED, beside=True))  # noqa: E731,B023
            steps["changed"].append(timed(change) + timed(lambda: self.first_step(made[-1])))  # noqa: B023
            steps["step"].append(timed(lambda: self.first_step(made[-1], whole=True)))  # noqa: B023
            self.first_step(self.model)
            steps["plain_step"].append(timed(lambda: self.first_step(self.model, whole=True)))
        self.latent = torch.zeros(1, 4, 8, 8)
        return {name: medians(own)._asdict() for name, own in steps.items()}


def loaded(layout: str):
    """MODEL and CLIP; weights that nobody fills take no memory."""
    form = LAYOUTS[layout]
    config = comfy.supported_models.SD15(
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            use_spatial_transformer=True,
            legacy=False,
            adm_in_channels=None,
            model_channels=WIDTH,
            num_res_blocks=[form.blocks] * len(form.widths),
            channel_mult=list(form.widths),
            transformer_depth=[int(has) for has in form.attends for _ in range(form.blocks)],
            transformer_depth_output=[int(has) for has in form.attends for _ in range(form.blocks + 1)],
            transformer_depth_middle=1,
            use_linear_in_transformer=False,
            use_temporal_attention=False,
            context_dim=768,
            num_heads=8,
            dtype=torch.float32,
        )
    )
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model({}, "", device=torch.device("cpu"))
    network.diffusion_model.eval()
    patcher = comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    return patcher, comfy.sd.CLIP(target)


if __name__ == "__main__":
    with torch.inference_mode():
        asked = json.loads(ARGUMENT)
        print(json.dumps(Bench(loaded(asked.pop("layout")), **asked).run()))
