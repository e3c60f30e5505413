"""What one trainer, alone in its process, took: seconds of each step and the most memory that it held."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

EXAMPLES = 4
# By family: tokens and width of the text, width of the pooled text where there is one.
TEXTS = {"sd15": (77, 768, 0), "sdxl": (77, 2048, 1280)}
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
    family: str = "sd15"

    @property
    def all_steps(self) -> int:
        return self.steps + 1

    def examples(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same latents (N, 4, h, w), texts (N, T, D) and pooled texts (N, P), if any, for everyone."""
        generator, (length, width, pooled) = torch.Generator().manual_seed(0), TEXTS[self.family]
        side = self.pixels // 8
        latents = torch.randn(EXAMPLES, 4, side, side, generator=generator)
        texts = torch.randn(EXAMPLES, length, width, generator=generator)
        return latents, texts, torch.randn(EXAMPLES, pooled, generator=generator) if pooled else None


class Probe:
    """Made when the model is loaded; `step_done` is called after each step."""

    def __init__(self, task: Task, device: torch.device | str = "cpu"):
        self.task, self.device = task, torch.device(device)
        self.loading, self.resident = peak_memory(), resident_memory()
        self.whole_process = not forget_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
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
        return found | self.of_device()

    def of_device(self) -> dict[str, float]:
        """The most that was allocated on a GPU since the probe was made, and what was there then; {} on a CPU."""
        if self.device.type != "cuda":
            return {}
        most = torch.cuda.max_memory_allocated(self.device)
        return {"device_peak_gb": round(most / GB, 3), "device_before_gb": round(self.before / GB, 3)}

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
