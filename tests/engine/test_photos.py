"""How much memory a folder takes does not depend on how large its photos are, nor on how many wait."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

READ = """
import resource, sys
from modular_concepts.data.dataset import load_folder
data = load_folder(sys.argv[1], (512, 512), ("<tom>",))
print(len(data.pictures), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak(folder: Path, count: int) -> int:
    """MB at the most while a process reads a folder of `count` photos of 12 megapixels, each with a mask."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((4000, 3000)).save(folder / "0.jpg", quality=60)
    Image.new("L", (4000, 3000), 255).save(folder / "0.mask.png")
    for number in range(1, count):
        for ending in ("jpg", "mask.png"):
            shutil.copy(folder / f"0.{ending}", folder / f"{number}.{ending}")
    command = [sys.executable, "-c", READ, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own command
    read, megabytes = map(int, done.stdout.split())
    assert read == count
    return megabytes


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts otherwise elsewhere")
def test_sixteen_photos_with_masks_take_little_more_than_four(tmp_path):
    few, many = peak(tmp_path / "few", 4), peak(tmp_path / "many", 16)
    assert many - few < 100, (few, many)
