"""What a folder with a base model in diffusers' layout comes to when one thing in it is not what it should be.

`cases` is every entry of every JSON in it with every odd value; `swept(one_in, seed, folder)` tries them, or a part of
them drawn from the seed, on the tiny folders.  The other functions are the folders as kinds of file of mutations.py:
a kind's one file is all texts of a folder together, or the weights of one of its networks.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from modular_concepts.errors import AdapterError
from modular_concepts.models.base import BaseModel
from modular_concepts.models.diffusers_folder import load_diffusers_base
from modular_concepts.sampling import SampleSettings, sample

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))  # for the tiny folders
FAMILIES = ("sd", "xl")
ODD = [None, "x", [1], True, 0, -1, 1e308, 10**9]
QUICK = SampleSettings(steps=1, cfg=1.0)
PROMPT = "a photo of a dog"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def tiny_folder(family: str, place: Path) -> Path:
    from tiny_sd import write_tiny_sd
    from tiny_xl import write_tiny_xl

    return {"sd": write_tiny_sd, "xl": write_tiny_xl}[family](place / family)


def texts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".txt"))


def cases(folder: Path) -> list[tuple[str, str, object]]:
    """(file, entry, odd value) of every JSON whose entries say something; a vocabulary's are words."""
    return [
        (str(path.relative_to(folder)), name, value)
        for path in texts(folder)
        if path.suffix == ".json" and path.name != "vocab.json"
        for name in json.loads(path.read_text(encoding="utf-8"))
        for value in ODD
    ]


@contextlib.contextmanager
def replaced(path: Path, name: str, value: object) -> Iterator[None]:
    """Within the block one entry of a JSON file is another."""
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(before) | {name: value}), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def use_base(base: BaseModel, path: Path, out: Path) -> None:
    """Draw a picture and read it back; AdapterError is an answer."""
    with contextlib.suppress(AdapterError):
        picture = sample(base, [PROMPT], [0], settings=QUICK)
        if not bool(torch.isfinite(picture).all()) or not bool(torch.isfinite(base.encode(picture)).all()):
            raise ArithmeticError("the picture is not finite")


def swept(one_in: int, seed: int, folder: Path) -> list:
    """An outcome for each family, as `mutations.run` has it; one of `one_in` cases is tried."""
    from mutations import Outcome, answered, peak_memory

    outcomes = []
    for family in FAMILIES:
        place, outcome = tiny_folder(family, folder), Outcome(f"entries of base folder {family}")
        some = random.Random(f"{seed} {family}").sample(every := cases(place), len(every) // one_in)  # noqa: S311 - a sample, no secret
        use_base(load_diffusers_base(place), place, folder)  # everything is warm
        before = peak_memory(reset=True)
        for file, name, value in some:
            with replaced(place / file, name, value):
                answered(load_diffusers_base, use_base, place, folder, outcome, f"{file} {name} {value!r}")
        outcome.growth = max(0, peak_memory() - before)
        outcomes.append(outcome)
    return outcomes


# --- as kinds of file ---------------------------------------------------------------------------------------


def write_texts(family: str) -> Callable[[Path], Path]:
    """All texts of a folder in one JSON file beside it."""

    def write(place: Path) -> Path:
        folder = tiny_folder(family, place)
        together = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in texts(folder)}
        (place / f"{family}.json").write_text(json.dumps(together), encoding="utf-8")
        return place / f"{family}.json"

    return write


def read_texts(path: Path) -> BaseModel:
    folder = path.with_suffix("")
    for name, text in json.loads(path.read_bytes()).items():
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    return load_diffusers_base(folder)


def changed_texts(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: other entries, other values deep in them, other bytes."""
    from mutations import mutate_bytes, mutate_json

    together = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(together))
        content = json.loads(together[name]) if name.endswith(".json") and together[name].startswith("{") else None
        if content is None or rng.random() < 0.2:
            raw = mutate_bytes(together[name].encode(errors="surrogateescape"), rng)
            together[name] = raw.decode(errors="surrogateescape")
            return json.dumps(together).encode()
        if rng.random() < 0.5:
            mutate_json(content, rng)
        else:
            content[rng.choice(sorted(content))] = rng.choice(ODD)
        together[name] = json.dumps(content)
    return json.dumps(together).encode()


def write_weights(place: Path) -> Path:
    return tiny_folder("sd", place) / VAE_WEIGHTS


def read_weights(path: Path) -> BaseModel:
    return load_diffusers_base(path.parents[1])
