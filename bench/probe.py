"""What one trainer, alone in its process, took: seconds of each step and the most memory that it held."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from layouts import CONTEXT
from torch import Tensor

EXAMPLES = 4
GB = 1e9


@dataclass(frozen=True)
class Task:
    """One run of one trainer.  layers: a target of ours, or "every", both orthogonal but for
    "... as lora"; steps: timed ones, after one that is not."""

    trainer: str
    layout: str = "full"
    pixels: int = 256
    batch: int = 1
    rank: int = 20
    layers: str = "all_linear"
    steps: int = 3
    precision: str = "fp32"
    checkpointing: bool = False

    @property
    def all_steps(self) -> int:
        return self.steps + 1

    def examples(self) -> tuple[Tensor, Tensor]:
        """The same latents (N, 4, h, w) and contexts (N, T, D) for everyone."""
        generator = torch.Generator().manual_seed(0)
        side = self.pixels // 8
        latents = torch.randn(EXAMPLES, 4, side, side, generator=generator)
        return latents, torch.randn(EXAMPLES, *CONTEXT, generator=generator)


class Probe:
    """Made when the model is loaded; `step_done` is called after each step."""

    def __init__(self, task: Task, device: torch.device | str = "cpu"):
        self.task, self.device = task, torch.device(device)
        self.loading, self.resident = peak_memory(), resident_memory()
        self.whole_process = not forget_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.marks = [self._now()]

    def step_done(self, *_, **__) -> None:
        self.marks.append(self._now())

    def report(self, **more) -> dict:
        """The first step is left out of the times, since it also fills caches."""
        pairs = list(zip(self.marks[1:], self.marks[2:], strict=False))[: self.task.steps]
        found = {
            **asdict(self.task),
            "seconds": [round(after[0] - before[0], 4) for before, after in pairs],
            "processor_seconds": [round(after[1] - before[1], 4) for before, after in pairs],
            "peak_gb": round(peak_memory(), 3),
            "loaded_gb": round(self.resident, 3),
            "loading_peak_gb": round(self.loading, 3),
            "peak_is_of_whole_process": self.whole_process,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            **more,
        }
        if self.device.type == "cuda":
            found["device_peak_gb"] = round(torch.cuda.max_memory_allocated(self.device) / GB, 3)
        return found

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


def resident_memory() -> float:
    """GB that the process holds just now; 0 where the system does not say."""
    return _status("VmRSS")


def peak_memory() -> float:
    """The most GB that the process has held, since `forget_peak` where that worked."""
    if peak := _status("VmHWM"):
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def forget_peak() -> bool:
    """Let the peak start anew; False where the system cannot, so that it counts loading too."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> float:
    path = Path("/proc/self/status")
    if not path.is_file():
        return 0.0
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) * 1024 / GB for line in lines if line and line[0] == f"{name}:"), 0.0)
