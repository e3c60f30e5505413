"""In the host's interpreter: its start, the pack beside it, and the checkpoint that benchmarks load.

python in_host.py HOST CHECKPOINT write LAYOUT
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

HOST, CHECKPOINT, WHAT, ARGUMENT = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
PACK = Path(__file__).resolve().parents[1]


def start(on_cpu: bool, dynamic: bool = False) -> None:
    """With torch's attention for everyone: what the host takes on a GPU, and its training's faster one on a CPU.

    dynamic: with the host's dynamic memory, which needs a GPU and comfy-aimdo; otherwise its older way.
    """
    if "comfy.options" in sys.modules:
        return
    memory = ["--cpu"] if on_cpu else ["--enable-dynamic-vram" if dynamic else "--disable-dynamic-vram"]
    sys.argv = [str(HOST / "main.py"), "--use-pytorch-cross-attention", *memory]
    sys.path.insert(0, str(HOST))
    import comfy.options

    comfy.options.enable_args_parsing()
    if dynamic:
        import comfy_aimdo.control

        comfy_aimdo.control.init()  # before torch, as main.py does
    import comfy.model_management  # (logging is set up here)
    import utils.extra_config  # noqa: F401  (as main.py does: later `utils` could be another module)

    if dynamic:
        import comfy.memory_management
        import comfy.model_patcher

        devices = [(device.index, 0) for device in comfy.model_management.get_all_torch_devices()]
        if not comfy_aimdo.control.init_devices(devices):
            raise RuntimeError("comfy-aimdo found no device for dynamic memory")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def pack_module(name: str):
    """A module of the pack under a package name of its own, as the host imports it."""
    if "modular_concepts_pack" not in sys.modules:
        package = types.ModuleType("modular_concepts_pack")
        package.__path__ = [str(PACK)]
        sys.modules["modular_concepts_pack"] = package
    return importlib.import_module(f"modular_concepts_pack.{name}")


if __name__ == "__main__":
    start(on_cpu=True)
    from layouts import LAYOUTS, write_checkpoint

    if WHAT != "write":
        sys.exit(f"{WHAT} is nothing that this script does; write is")
    write_checkpoint(LAYOUTS[ARGUMENT], CHECKPOINT)
