"""The toy base's own training on a device for some seconds, saved.

    python gpu_toy.py '{"device": "cuda", "seconds": 60}'

Needs diffusers and transformers, as the toy base does without a host; says so where they are missing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OUT = ROOT / "build" / "gpu-toy"


def tell(key: str, value) -> None:
    print(json.dumps({"key": key, "value": value}), flush=True)


def main(device: str, seconds: float) -> None:
    missing = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
    if missing:
        tell("left out", f"the toy base needs {' and '.join(missing)}")
        return
    from modular_concepts.toy.train_base import Plan, train

    with tempfile.TemporaryDirectory() as folder:
        out = OUT if device == "cuda" else Path(folder)
        asked: list[float] = []  # when each step began, and when it was too late for another

        def late() -> bool:
            asked.append(time.monotonic())
            return asked[-1] > asked[0] + seconds

        steps = train(out, Plan(7000, 2e-3, 0.4, 0, 500, device=device), late)
        began = asked[0]
        tell("training", {"steps": steps, "steps_per_second": round(steps / (time.monotonic() - began), 2)})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
