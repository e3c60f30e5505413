"""What the merging benchmark merges, and the ways of merging it without a host: ours, core's arithmetic, peft."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

DISTINCT = 15  # concepts beyond these use their factors again, so that a hundred fit into memory
STRENGTH = 0.6


@dataclass(frozen=True)
class Work:
    """weights: layer -> (out, in).  sums, blocks: as many concepts as asked, for each kind of merge."""

    weights: Mapping[str, Tensor]
    sums: Sequence[SimpleNamespace]
    blocks: Sequence[SimpleNamespace]
    rank: int

    @property
    def strengths(self) -> list[float]:
        return [STRENGTH] * len(self.sums)


def made_work(adapters: ModuleType, weights: Mapping[str, Tensor], count: int, rank: int) -> Work:
    """adapters: the engine's module, under whatever name it was imported.  Values follow from seeds."""
    distinct = [_concept(adapters, f"c{number}", weights, number, rank) for number in range(min(count, DISTINCT))]
    sums = [_renamed(distinct[number % DISTINCT], f"c{number}") for number in range(count)]
    blocks = [_in_block(adapters, concept, count, number) for number, concept in enumerate(sums)]
    return Work(weights, sums, blocks, rank)


def _concept(adapters: ModuleType, name: str, weights: Mapping[str, Tensor], seed: int, rank: int) -> SimpleNamespace:
    generator, layers = torch.Generator().manual_seed(seed), {}
    for layer, weight in weights.items():
        out, inp = weight.shape
        up, down = (torch.randn(*shape, generator=generator) * 0.02 for shape in ((out, rank), (rank, inp)))
        layers[layer] = adapters.LowRank(up.to(weight.device), down.to(weight.device), float(rank), "lora", None, out)
    return SimpleNamespace(name=name, layers=layers)


def _renamed(concept: SimpleNamespace, name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, layers=concept.layers)


def _in_block(adapters: ModuleType, concept: SimpleNamespace, blocks: int, slot: int) -> SimpleNamespace:
    layers = {}
    for layer, adapter in concept.layers.items():
        rows = adapters.block_rows(adapter.out_features, blocks, slot).to(adapter.lora_up.device)
        layers[layer] = adapter.replace(kind="block", rows=rows, lora_up=adapter.lora_up[rows])
    return SimpleNamespace(name=concept.name, layers=layers)


# -- the ways


def core_chain(work: Work, concepts: Sequence[SimpleNamespace]) -> None:
    """The arithmetic of a chain of LoraLoaders: what `LoRAAdapter.calculate_weight` of the host does, LoRA by LoRA."""
    for layer, weight in work.weights.items():
        for concept in concepts:
            adapter = concept.layers[layer]
            delta = torch.mm(adapter.lora_up, adapter.lora_down).reshape(weight.shape)
            weight += ((STRENGTH * (adapter.alpha / adapter.rank)) * delta).type(weight.dtype)


class Peft:
    """The same weights and factors in peft: `cat` joins the adapters and fuses them, `fuse` fuses one by one."""

    def __init__(self, work: Work):
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        self.work, self.names = work, [concept.name for concept in work.sums]
        tree, keys = nn.Module(), {layer: f"layer{number}" for number, layer in enumerate(work.weights)}
        for layer, weight in work.weights.items():
            module = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            module.weight = nn.Parameter(weight, requires_grad=False)
            tree.add_module(keys[layer], module)
        config = LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=list(keys.values()))
        self.model = LoraModel(tree, config, self.names[0], low_cpu_mem_usage=True)
        for name in self.names[1:]:
            self.model.peft_config[name] = config
            self.model.inject_adapter(self.model.model, name, low_cpu_mem_usage=True)
        for concept in work.sums:
            for layer, adapter in concept.layers.items():
                own = self.model.model.get_submodule(keys[layer])
                own.lora_A[concept.name].weight = nn.Parameter(adapter.lora_down, requires_grad=False)
                own.lora_B[concept.name].weight = nn.Parameter(adapter.lora_up, requires_grad=False)

    def cat(self) -> None:
        self.model.add_weighted_adapter(self.names, self.work.strengths, "all", combination_type="cat")
        self.model.set_adapter("all")
        self.model.merge_adapter(["all"])

    def fuse(self) -> None:
        self.model.set_adapter(self.names)
        self.model.merge_adapter(self.names)

    def undo(self) -> None:
        self.model.unmerge_adapter()
        if "all" in self.model.peft_config:
            self.model.delete_adapter("all")


# -- measuring


class Spent(NamedTuple):
    """seconds on the clock; processor: of all threads of this process, which others on the machine do not lengthen."""

    seconds: float
    processor: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.processor + other.processor)


def timed(action: Callable[[], object]) -> Spent:
    """With everything done that was asked of a device."""
    _wait()
    began = time.perf_counter(), time.process_time()
    action()
    _wait()
    return Spent(time.perf_counter() - began[0], time.process_time() - began[1])


def medians(turns: Sequence[Spent]) -> Spent:
    return Spent(*(median(values) for values in zip(*turns, strict=True)))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Machine:
    """The machine's own rates, measured in turn with everything else: floating-point operations and bytes a second."""

    def __init__(self, device: str, size: int = 2048, numbers: int = 2**26):
        self.left, self.right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
        self.source = torch.randn(numbers, device=device)
        self.target = torch.empty_like(self.source)
        self.products: list[Spent] = []
        self.copies: list[Spent] = []

    def measure(self) -> None:
        self.products.append(min(timed(lambda: torch.mm(self.left, self.right)) for _ in range(3)))
        self.copies.append(min(timed(lambda: self.target.copy_(self.source)) for _ in range(3)))

    def rates(self) -> dict[str, float]:
        product, copy = medians(self.products), medians(self.copies)
        return {
            "operations_per_second": 2 * len(self.left) ** 3 / product.seconds,
            "bytes_per_second": 2 * self.source.nbytes / copy.seconds,
        }

    def floor(self, work: Work, concepts: Sequence[SimpleNamespace]) -> Spent:
        """What no merge can be quicker than: its arithmetic, or reading and writing what it must."""
        adapters = [adapter for concept in concepts for adapter in concept.layers.values()]
        operations = sum(2 * adapter.lora_up.numel() * adapter.lora_down.shape[1] for adapter in adapters)
        moved = 2 * sum(weight.nbytes for weight in work.weights.values())
        moved += sum(adapter.lora_up.nbytes + adapter.lora_down.nbytes for adapter in adapters)
        product, copy = medians(self.products), medians(self.copies)
        shares = operations / (2 * len(self.left) ** 3), moved / (2 * self.source.nbytes)
        return Spent(*(max(shares[0] * p, shares[1] * c) for p, c in zip(product, copy, strict=True)))


def peak_extra(action: Callable[[], object]) -> float | None:
    """Megabytes that the process grew by while `action` ran, at most; None where the system does not tell."""
    about = Path("/proc/self/status")
    if not about.is_file() or not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    # What was freed before would hide what is taken now.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes(about, "VmRSS")
    action()
    return (_kilobytes(about, "VmHWM") - before) / 1000


def _kilobytes(about: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in about.read_text().splitlines() if line.startswith(f"{name}:"))
