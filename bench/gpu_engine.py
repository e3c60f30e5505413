"""Without a host: what the engine's own mathematics does on a device, against float64 on the CPU.

    python gpu_engine.py '{"device": "cuda"}'

Lines of JSON on stdout as `gpu_steps.py` prints them.  Needs torch, safetensors, numpy and einops alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from merge_work import Machine, made_work, medians, timed

from bench.given_base import GivenBase
from modular_concepts.adapters import low_rank as adapters
from modular_concepts.merging import merge_concepts
from modular_concepts.models.schedules import NoiseSchedule
from modular_concepts.training.loop import train
from modular_concepts.training.problem import Examples, Problem
from modular_concepts.training.settings import TrainSettings

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
WIDTHS = ((320, 768), (640, 640), (1280, 1280), (5120, 1280))


def tell(key: str, value) -> None:
    print(json.dumps({"key": key, "value": value}), flush=True)


def relative(value: Tensor, wanted: Tensor) -> float:
    return float((value.double().cpu() - wanted).norm() / wanted.norm())


def formulas(device: str) -> None:
    """Merged weight and residual of three concepts, adapters from the CPU, weights on the device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype, tolerance in TOLERANCE.items():
        generator = torch.Generator().manual_seed(0)
        weights = {
            f"unet.layer{number}": torch.randn(out, inp, generator=generator) / inp**0.5
            for number, (out, inp) in enumerate(WIDTHS)
        }
        stored = {name: value.to(device, getattr(torch, dtype)) for name, value in weights.items()}
        for how in ("sum", "block"):
            work = made_work(adapters, weights, 3, 20)
            concepts = work.sums if how == "sum" else work.blocks
            merged = merge_concepts(concepts, work.strengths, how)
            worst, least = 0.0, 1.0
            for name, own in merged.items():
                base = stored[name].double().cpu()
                delta = sum(
                    s * c.layers[name].full_up().double() @ c.layers[name].lora_down.double()
                    for c, s in zip(concepts, work.strengths, strict=True)
                )
                x = torch.randn(5, base.shape[1], generator=generator).to(device, getattr(torch, dtype))
                here = own.to(stored[name].device)
                weight = here.add_to(stored[name].float().clone()).to(stored[name].dtype)
                residual = own.to(stored[name].device, x.dtype).residual(x)
                worst = max(worst, relative(weight, base + delta), relative(residual, x.double().cpu() @ delta.mT))
                least = min(least, float(delta.norm() / (base + delta).norm()))
            held = worst <= tolerance and least >= 1e-2
            tell(
                f"engine {how}, {dtype}",
                {"= formula": {"found": worst, "holds": held}, "effect": {"found": least, "holds": held}},
            )


def planted(device: str, steps: int) -> None:
    """A low-rank target is learned on the device, in float32 and with bfloat16 steps."""
    for precision in ("fp32", "bf16"):
        network = nn.Linear(64, 64, bias=False).requires_grad_(False)
        nn.init.normal_(network.weight, std=0.125, generator=torch.Generator().manual_seed(1))
        network = network.to(device)
        generator = torch.Generator().manual_seed(2)
        latents = torch.randn(4, 64, 8, 8, generator=generator).to(device)

        def predict(noisy: Tensor, _timesteps: Tensor, _context: Tensor, network: nn.Module = network) -> Tensor:
            return network(noisy.movedim(1, -1)).movedim(-1, 1)

        base = GivenBase(
            predict=predict,
            context=lambda captions, _: torch.zeros(len(captions), 1, 1, device=device),
            schedule=NoiseSchedule((1 - torch.linspace(0.03, 0.11, 1000)).cumprod(0)),
            modules=(network,),
        )
        problem = Problem(base, {"unet.only": network}, Examples(latents, ["a"] * 4, None, "-"))
        settings = TrainSettings(method="lora", rank=16, steps=steps, batch=4, adapter_lr=1e-2, precision=precision)
        losses = train(problem, settings).losses
        first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
        tell(f"engine training, {precision}", {"loss falls": {"found": last / first, "holds": last < 0.7 * first}})


def speed(device: str, counts: list[int]) -> None:
    machine = Machine(device, *((2048, 2**26) if device == "cuda" else (256, 2**20)))
    generator = torch.Generator().manual_seed(0)
    weights = {f"unet.l{i}": torch.randn(*shape, generator=generator).to(device) for i, shape in enumerate(WIDTHS * 10)}
    for count in counts:
        work = made_work(adapters, weights, count, 20)
        machine.measure()

        def merge(work=work) -> None:
            for name, own in merge_concepts(work.sums, work.strengths).items():
                own.add_to(work.weights[name])

        merge()
        took = medians([timed(merge) for _ in range(5)])
        floor = machine.floor(work, work.sums)
        tell(f"engine sum {count}", {"seconds": took.seconds, "floor_seconds": floor.seconds})


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    formulas(asked["device"])
    planted(asked["device"], asked.get("steps", 200))
    speed(asked["device"], asked.get("counts", [1, 15]))
