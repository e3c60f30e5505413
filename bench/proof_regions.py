"""Several concepts in one picture of the toy base, by every way that there is, judged region by region.

    python -m bench.proof_regions CONCEPTS             everything; pictures that OUT holds already are not drawn again
    python -m bench.proof_regions CONCEPTS --each 8    so many pictures of two and of three subjects a way
    python -m bench.proof_regions CONCEPTS --only "gated, orthogonal"

CONCEPTS holds METHOD/NAME.safetensors for the methods lora and orthogonal.  Half of the pictures show look-alikes of
one class.  All ways get the same prompts, boxes, noise and steps; core's own run in the host.  Writes OUT/*.safetensors
(pictures), OUT/regions.md (the table), OUT/regions.png (some pictures of each way); the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modular_concepts.concept import Concept
from modular_concepts.files.concept import load_concept
from modular_concepts.regions.geometry import Region
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.storage.atomic import replacing
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.demo import SAMPLING
from modular_concepts.toy.judges import Judges, load_judges
from modular_concepts.toy.report import _labelled_strips
from modular_concepts.toy.standard import BY_NAME, pictures_of, subjects_of
from modular_concepts.toy.vocabulary import CLASSES, SCENE_PHRASES, SCENES
from modular_concepts.toy.world import TILE, draw, random_poses, random_scenes

HERE = Path(__file__).resolve().parent
ALIKE = (("tom", "tim"), ("ada", "ida"), ("tom", "tim", "omar"))
MIXED = (("tom", "minka"), ("ada", "rex"), ("tom", "ada", "minka"))
BATCH = 4
SHOWN = 4  # groups of which the sheet shows a picture


@dataclass(frozen=True)
class Way:
    """A row of the table.

    mode: merged or gated in this process; described, which is the base alone, told in plain words who is where;
    automatic, core_masks or core_hooks in the host.
    """

    name: str
    method: str
    mode: str


HERE_DRAWN = ("merged", "gated", "described")
WAYS = (
    Way("in words, no concept", "", "described"),
    Way("merged, plain LoRA", "lora", "merged"),
    Way("merged, orthogonal", "orthogonal", "merged"),
    Way("gated, plain LoRA", "lora", "gated"),
    Way("gated, orthogonal", "orthogonal", "gated"),
    Way("gated, automatic regions", "orthogonal", "automatic"),
    Way("core masks, plain LoRA", "lora", "core_masks"),
    Way("core hooks, plain LoRA", "lora", "core_hooks"),
)
REFERENCE = "gated, plain LoRA"


@dataclass(frozen=True)
class Group:
    """Pictures of one cast in one place; names stand from left to right.

    bare: triggers stand alone, without the class word before them.
    """

    names: tuple[str, ...]
    scene: str
    seeds: tuple[int, ...]
    bare: bool = False

    @property
    def key(self) -> str:
        """Of the file that keeps the pictures; other prompts are other pictures."""
        return "-".join([*self.names, self.scene, str(self.seeds[0]), str(len(self.seeds)), *["bare"] * self.bare])

    @property
    def alike(self) -> bool:
        return len({BY_NAME[name].class_word for name in self.names}) == 1

    @property
    def prompt(self) -> str:
        return self._said([BY_NAME[name].class_word for name in self.names])

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        count = len(self.names)
        return [(tile / count, 0.0, (tile + 1) / count, 1.0) for tile in range(count)]

    @property
    def prompts(self) -> list[str]:
        """Each region's: who is there, and what else the picture shows, as the base's captions say it."""
        return self._each_with(self._calls)

    @property
    def described(self) -> list[str]:
        """The same in words that the base knows, instead of triggers."""
        return self._each_with([BY_NAME[name].description for name in self.names])

    @property
    def called(self) -> str:
        """The whole picture with everyone by name."""
        return self._said(self._calls)

    @property
    def _calls(self) -> list[str]:
        known = [BY_NAME[name] for name in self.names]
        return [one.trigger if self.bare else f"{one.class_word} {one.trigger}" for one in known]

    def _each_with(self, nouns: Sequence[str]) -> list[str]:
        words = [BY_NAME[name].class_word for name in self.names]
        return [self._said([*words[:tile], noun, *words[tile + 1 :]]) for tile, noun in enumerate(nouns)]

    def _said(self, nouns: Sequence[str]) -> str:
        return f"{' and '.join(f'a {noun}' for noun in nouns)} {SCENE_PHRASES[self.scene]}"


def groups(each: int, casts: Sequence[tuple[str, ...]] = (*ALIKE, *MIXED), bare: bool = False) -> list[Group]:
    """`each` pictures of every number of subjects, shared out over the casts; places and orders in turn."""
    found = []
    for size in sorted({len(cast) for cast in casts}):
        own = [cast for cast in casts if len(cast) == size]
        for number, cast in enumerate(own):
            count = each // len(own) + (number < each % len(own))
            for index, start in enumerate(range(0, count, BATCH)):
                turned = cast[index % size :] + cast[: index % size]
                seeds = tuple(1000 * number + start + offset for offset in range(min(BATCH, count - start)))
                found.append(Group(turned, SCENES[(index + number) % len(SCENES)], seeds, bare))
    return found


def asked(args: argparse.Namespace) -> list[Group]:
    return groups(args.each, args.casts, args.bare)


# -- drawing


def drawn(args: argparse.Namespace, way: Way, everything: Sequence[Group]) -> dict[str, Tensor]:
    """group key -> pictures, from OUT where it has them."""
    folder = args.out / way.name.replace(", ", "-").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    todo = [group for group in everything if not (folder / f"{group.key}.safetensors").exists()]
    if todo and way.mode not in HERE_DRAWN:
        in_host(args, way, todo, folder)
    elif todo:
        base = load_toy_base()
        for number, group in enumerate(todo, 1):
            pictures = headless(base, way, group, stack_of(args.concepts, way, group), args.steps, args.feather)
            save_file({"pictures": pictures.contiguous()}, folder / f"{group.key}.safetensors")
            print(f"{way.name}: {number} of {len(todo)}", file=sys.stderr, flush=True)
    return {group.key: load_file(folder / f"{group.key}.safetensors")["pictures"] for group in everything}


def stack_of(folder: Path, way: Way, group: Group) -> list[tuple[Concept, float]]:
    if way.mode == "described":
        return []
    return [(load_concept(folder / way.method / f"{name}.safetensors"), 1.0) for name in group.names]


def headless(base, way: Way, group: Group, stack, steps: int, feather: float) -> Tensor:
    settings: SampleSettings = replace(SAMPLING, steps=steps, width=TILE * len(group.names), batch=BATCH)
    prompts = group.described if way.mode == "described" else group.prompts
    regions = [Region(prompt, box, feather=feather) for prompt, box in zip(prompts, group.boxes, strict=True)]
    asked = [group.prompt] * len(group.seeds)
    if way.mode != "gated":
        with customised(base, [concept for concept, _ in stack], [strength for _, strength in stack]) as tokens:
            return sample(base, asked, group.seeds, tokens, settings, regions)
    return sample(base, asked, group.seeds, {}, settings, regions, mode=way.mode, stack=stack)


def in_host(args: argparse.Namespace, way: Way, todo: Sequence[Group], folder: Path) -> None:
    plan = {
        "mode": way.mode,
        "steps": args.steps,
        "cfg": SAMPLING.cfg,
        "concepts": str(args.concepts / way.method),
        "out": str(folder),
        "groups": [
            asdict(group)
            | {"key": group.key, "prompt": group.prompt, "prompts": group.prompts, "boxes": group.boxes}
            | {"called": group.called}
            for group in todo
        ],
    }
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    command = [args.host_python, HERE / "proof_in_host.py", args.host, "-", "run", json.dumps({"plan": str(path)})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([str(part) for part in command], env=environment, check=False)  # noqa: S603 - our own command
    if done.returncode:
        sys.exit(f"the host's part ended with {done.returncode}; see above")


def truth(group: Group) -> Tensor:
    """The same casts and places as the toy world draws them: what the judges can see at best."""
    count = len(group.seeds)
    generator = torch.Generator().manual_seed(group.seeds[0] + 1)
    subjects = [subjects_of(BY_NAME[name], count) for name in group.names]
    poses = [random_poses(count, generator) for _ in subjects]
    return draw(subjects, poses, random_scenes(count, generator, SCENES.index(group.scene)))


# -- judging


def judged(judges: Judges, group: Group, pictures: Tensor) -> list[dict[str, float]]:
    """One row for each region of each picture."""
    rows = []
    for tile, name in enumerate(group.names):
        shown = pictures[..., tile * TILE : (tile + 1) * TILE]
        likeness = torch.stack([judges.similarity(shown, pictures_of(BY_NAME[other])[0]) for other in group.names])
        own = likeness[tile]
        others = torch.cat([likeness[:tile], likeness[tile + 1 :]])
        neighbours = others.amax(0) if len(others) else torch.full_like(own, -1.0)  # alone: less like than anybody
        read = judges.read(shown)
        right = read["class"] == CLASSES.index(BY_NAME[name].class_word)
        place = read["scene"] == SCENES.index(group.scene)
        values = {
            "identity": own > judges.threshold,
            "bleed": (neighbours > judges.threshold) & (neighbours > own),
            "nearer": neighbours > own,
            "missing": ~right,
            "text": (right.float() + place.float()) / 2,
        }
        for index in range(len(shown)):
            rows.append(
                {key: float(value[index]) for key, value in values.items()}
                | {"name": name, "place": tile, "subjects": len(group.names), "alike": group.alike}
            )
    return rows


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


FIGURES = {
    "identity": "identity",
    "bleed": "bleed",
    "nearer": "nearer to a neighbour",
    "missing": "missing",
    "text": "text",
}


def figures(rows: Sequence[dict]) -> dict:
    """Means with 95 % intervals over: all regions, look-alikes, others, pictures of two and of three."""
    parts = {
        "all": rows,
        "look-alikes": [row for row in rows if row["alike"]],
        "mixed company": [row for row in rows if not row["alike"]],
        "two": [row for row in rows if row["subjects"] == 2],
        "three": [row for row in rows if row["subjects"] == 3],
    }
    found = {}
    for part, own in parts.items():
        if own:
            means = {key: sum(row[key] for row in own) / len(own) for key in FIGURES}
            found[part] = {"regions": len(own)} | {
                key: [round(value, 4), *(round(edge, 4) for edge in interval(value, len(own)))]
                for key, value in means.items()
            }
    return found


def by_place(rows: Sequence[dict]) -> dict[str, float]:
    """ "tim, 2 of 3" -> the share of regions with the right identity; places count from the left."""
    found: dict[str, list[float]] = {}
    for row in rows:
        place = f"{row['name']}, {row['place'] + 1} of {row['subjects']}"
        found.setdefault(place, []).append(row["identity"])
    return {place: round(sum(own) / len(own), 4) for place, own in sorted(found.items())}


def alone_right(rows: Sequence[dict], others: Sequence[dict]) -> list[int]:
    """How many of the same regions are right in the first way alone, and in the second alone."""
    pairs = [(one["identity"], other["identity"]) for one, other in zip(rows, others, strict=True)]
    return [sum(one > other for one, other in pairs), sum(one < other for one, other in pairs)]


def markdown(table: dict) -> str:
    lines = []
    for part in ("look-alikes", "mixed company", "all", "two", "three"):
        if not any(part in own for own in table.values()):
            continue
        lines += [f"{part}:", "", "| way | " + " | ".join(FIGURES.values()) + " | regions |"]
        lines += ["|---" * (len(FIGURES) + 2) + "|"]
        for name, own in table.items():
            if part in own:
                cells = [
                    f"{100 * value:.1f} ({100 * low:.1f}–{100 * high:.1f})"
                    for value, low, high in (own[part][key] for key in FIGURES)
                ]
                lines.append(f"| {name} | " + " | ".join(cells) + f" | {own[part]['regions']} |")
        lines.append("")
    return "\n".join(lines)


def sheet(path: Path, shown: dict[str, list[Tensor]]) -> None:
    """shown: way -> pictures, one of each of the groups shown."""
    strips = [
        ("", name, torch.cat([torch.nn.functional.pad(own, (0, 3), value=1.0) for own in pictures], dim=-1))
        for name, pictures in shown.items()
    ]
    _labelled_strips(path, "The same prompts, boxes and noise by every way", strips)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concepts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/proof-regions"))
    parser.add_argument("--each", type=int, default=100, help="pictures of each number of subjects, a way")
    parser.add_argument("--steps", type=int, default=SAMPLING.steps)
    parser.add_argument("--feather", type=float, default=0.0)
    ways = [way.name for way in WAYS]
    parser.add_argument("--bare", action="store_true", help="triggers without the class word before them")
    parser.add_argument("--only", nargs="+", metavar="WAY", choices=ways, help="; ".join(ways))
    parser.add_argument("--casts", nargs="+", metavar="NAME-NAME", help="instead of " + ", ".join(map("-".join, ALIKE)))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--host", type=Path, default=os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
    parser.add_argument("--host-python", type=Path, default=os.environ.get("COMFYUI_PYTHON"))
    args = parser.parse_args(arguments)
    args.host, args.concepts, args.out = Path(args.host), args.concepts.resolve(), args.out.resolve()
    args.host_python = Path(args.host_python or args.host / ".venv" / "bin" / "python")
    args.casts = [tuple(cast.split("-")) for cast in args.casts] if args.casts else (*ALIKE, *MIXED)
    methods = {way.method for way in WAYS if way.method and (not args.only or way.name in args.only)}
    needed = {f"{method}/{name}.safetensors" for method in methods for cast in args.casts for name in cast}
    if missing := sorted(name for name in needed if not (args.concepts / name).is_file()):
        parser.error(
            f"{args.concepts} has no {', '.join(missing)}; train them, or leave them out with --casts and --only"
        )
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    judges = load_judges()
    everything = asked(args)
    pictures = {"drawn by the world itself": {group.key: truth(group) for group in everything}}
    for way in WAYS:
        if not args.only or way.name in args.only:
            pictures[way.name] = drawn(args, way, everything)
    rows = {
        name: [row for group in everything for row in judged(judges, group, own[group.key])]
        for name, own in pictures.items()
    }
    table = {name: figures(own) for name, own in rows.items()}
    chosen = [group for group in everything if group.alike][:SHOWN] or everything[:SHOWN]
    sheet(args.out / "regions.png", {name: [own[group.key][0] for group in chosen] for name, own in pictures.items()})
    with replacing(args.out / "regions.md") as file:
        file.write(markdown(table).encode())
    result = {"each": args.each, "steps": args.steps, "ways": table}
    result["identity_by_place"] = {name: by_place(own) for name, own in rows.items()}
    if REFERENCE in rows:
        others = {name: own for name, own in rows.items() if name in {way.name for way in WAYS} - {REFERENCE}}
        result[f"right alone, and {REFERENCE} alone"] = {
            name: alone_right(own, rows[REFERENCE]) for name, own in others.items()
        }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
