"""Put what `gpu.py` needs of a ComfyUI into a folder that can be carried to a machine without a network.

    python bench/gpu_carry.py COMFYUI FOLDER [WHEEL ...]

FOLDER/ComfyUI: its sources, without environment, models, templates and the vocabularies of text models that are not
used.  FOLDER/site.zip: what the wheels hold, for packages that the machine lacks (comfy-aimdo, comfy-kitchen, torchsde,
trampoline and what else its Python does not have); `gpu.py` finds both, and unpacks the second into FOLDER/site.
"""

from __future__ import annotations

import argparse
import shutil
import zipfile
from pathlib import Path

PARTS = (
    "comfy",
    "comfy_api",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "app",
    "api_server",
    "middleware",
    "utils",
)
VOCABULARIES = {"sd1_tokenizer", "t5_tokenizer"}


def left_out(folder: str, names: list[str]) -> set[str]:
    """Compiled modules, and vocabularies that nothing here reads."""
    found = {name for name in names if name == "__pycache__" or name.endswith((".pyc", ".mp4", ".png", ".jpg"))}
    if Path(folder).name == "text_encoders":
        found |= {name for name in names if (Path(folder) / name).is_dir() and "tokenizer" in name} - VOCABULARIES
        found |= {name for name in names if name.endswith(("vocab.json", ".model"))}
    return found


def carry(host: Path, folder: Path, wheels: list[Path]) -> int:
    """Copy anew; how many bytes lie in the folder then."""
    target = folder / "ComfyUI"
    for old in (target, folder / "site"):
        shutil.rmtree(old, ignore_errors=True)
    target.mkdir(parents=True)
    for part in PARTS:
        if (host / part).is_dir():
            shutil.copytree(host / part, target / part, ignore=left_out)
    for module in host.glob("*.py"):
        shutil.copy2(module, target / module.name)
    with zipfile.ZipFile(folder / "site.zip", "w", zipfile.ZIP_DEFLATED) as site:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as packed:
                for name in packed.namelist():
                    site.writestr(name, packed.read(name))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("wheels", type=Path, nargs="*")
    args = parser.parse_args()
    if not (args.host / "comfy").is_dir():
        parser.error(f"{args.host} is no ComfyUI: it has no folder comfy")
    size = carry(args.host, args.folder, args.wheels)
    print(f"{args.folder}: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
