"""What happens to every file that is read when it is damaged, or sound and yet not what it should be.

    from mutations import run            # tests/files must be on the path, and the repository's root
    for outcome in run(400, seed=0, folder=Path("an empty folder")):
        print(outcome.line())
        assert not outcome.faults

`run(count_per_kind, seed, folder, kinds=None)` writes one sound file of each of `KINDS` into `folder`, changes it
`count_per_kind` times, reads what comes out with the product's own reader, and uses whatever that accepts: merged by
by every method, exported, inspected, drawn on the toy base, resumed.  One `Outcome` for each kind.  The same seed gives
the same files.  A fault is any exception but AdapterError, a sentence that is none, a number that is not finite, or a
file outside `folder`; the file that caused it is kept in `folder`/faults under the name that the fault begins with.
It changes the working directory while it runs, needs no network and no graphics card, and costs 10 to 40 processor
milliseconds a file.  A crash of the interpreter ends the process, so who must survive that calls it in one of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from base_folders import changed_texts, read_texts, read_weights, use_base, write_texts, write_weights
from safetensors import SafetensorError
from safetensors.torch import load, save

from modular_concepts.adapters.basis import OrthogonalBasis, load_basis
from modular_concepts.adapters.low_rank import (
    LowRank,
    block_rows,
    new_block,
    new_block_orthogonal,
    new_full,
    new_lora,
    new_orthogonal,
)
from modular_concepts.adapters.own_words import reads_text
from modular_concepts.concept import Concept, Recipe, check_concept
from modular_concepts.crosstalk.measures import crosstalk_table
from modular_concepts.data.dataset import Dataset, load_folder
from modular_concepts.data.latents import kept
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.files.embeddings import export_embedding, export_embeddings, import_embedding
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.lora import read_concept
from modular_concepts.files.moments import load_moments, save_moments
from modular_concepts.merging import METHOD_HELP, Evidence, MergeOptions, merge_concepts
from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.merging.methods import Merge
from modular_concepts.merging.moments import Moment
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.recording import text_features, usual_text
from modular_concepts.regions.parsing import json_problem, regions_from_json
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.toy.base import load_toy_base

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))  # for the tiny training
QUICK = SampleSettings(steps=1, cfg=1.0)
PROMPT = "a <kodo> on the grass"
SUFFIX = ".safetensors"
NUMBERS = [None, True, -1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf")]
TEXTS = ["", "F32", "F64", "BF16", "I64", "../x", "\ud800", "lora", "block", "full", "haar", "file", "x" * 5000, "a\nb"]
LISTS = [[], [0], [1, 2], [[]], [2**40, 4], [{}], ["a"]]
OBJECTS = [{}, {"range": [0, 9, 1]}, {"range": [0, 2**60, 1]}, {"range": [0, 2**20, 1]}, {"a": {"b": 1}}]
NASTY = NUMBERS + TEXTS + LISTS + OBJECTS
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
VALUES = [0.0, -1.0, 1e-40, 65504.0, 1e12, 1e20, 3e38, -3e38, 1e200, 1.7e308]


@dataclass
class Outcome:
    """What came of one kind.  slowest, slowest_use: processor seconds of a reading, and of all that is done after it.

    growth: bytes that the process' peak rose by.  faults: file's name and what was wrong.
    """

    kind: str
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_use: float = 0.0
    growth: int = 0

    def line(self) -> str:
        return (
            f"{self.kind}: {self.tried} tried, {self.refused} refused, {self.accepted} accepted, "
            f"{len(self.faults)} faults, slowest {self.slowest:.2f} s (use {self.slowest_use:.2f} s), "
            f"memory +{self.growth / 2**20:.0f} MiB"
        )


@dataclass(frozen=True)
class Kind:
    """One kind of file.  write: folder -> the sound file in it.  read: as the product does.

    use: (value, file, folder to write to) -> None.  change: (bytes, generator) -> other bytes.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    use: Callable[[object, Path, Path], None]
    change: Callable[[bytes, random.Random], bytes]


def run(count_per_kind: int, seed: int, folder: Path, kinds: Sequence[str] | None = None) -> list[Outcome]:
    """See the top of this file."""
    folder = Path(folder).resolve()
    with _inside(folder):
        return [_tried(name, KINDS[name], count_per_kind, seed, folder) for name in kinds or KINDS]


def _tried(name: str, kind: Kind, count: int, seed: int, folder: Path) -> Outcome:
    place, out = folder / name.replace(" ", "_"), folder / "out"
    place.mkdir(exist_ok=True)
    path = kind.write(place)
    sound, outcome = path.read_bytes(), Outcome(name)
    kind.use(kind.read(path), path, _emptied(out))  # a sound file passes, and everything is warm
    before, there = peak_memory(reset=True), _listed(folder, place, out)
    for case in range(count):
        rng = random.Random(f"{seed} {name} {case}")  # noqa: S311 - a sample, no secret
        path.write_bytes(data := kind.change(sound, rng))
        answered(kind.read, kind.use, path, _emptied(out), outcome, f"{place.name}-{seed}-{case}{path.suffix}")
        strangers = _listed(folder, place, out) - there
        if strangers:
            outcome.faults.append(f"{place.name}-{seed}-{case}{path.suffix}: wrote {sorted(strangers)[0]}")
            there |= strangers
        if outcome.faults and outcome.faults[-1].startswith(f"{place.name}-{seed}-{case}."):
            (folder / "faults").mkdir(exist_ok=True)
            (folder / "faults" / f"{place.name}-{seed}-{case}{path.suffix}").write_bytes(data)
            there |= _listed(folder, place, out)
    outcome.growth = max(0, peak_memory() - before)
    path.write_bytes(sound)
    return outcome


def answered(
    read: Callable[[Path], object],
    use: Callable[[object, Path, Path], None],
    path: Path,
    out: Path,
    outcome: Outcome,
    case: str,
) -> None:
    """Read once, use what is accepted, and write down in `outcome` what came of it."""
    outcome.tried += 1
    started = time.process_time()
    try:
        value = read(path)
    except AdapterError as error:
        outcome.refused += 1
        outcome.faults += [f"{case}: said {str(error)!r}"] if not _is_sentence(str(error)) else []
        return
    except Exception as error:  # whatever it is, it is the fault that is looked for
        outcome.faults.append(f"{case}: {type(error).__name__} when read: {error}")
        return
    finally:
        outcome.slowest = max(outcome.slowest, time.process_time() - started)
    outcome.accepted += 1
    started = time.process_time()
    try:
        use(value, path, out)
    except Exception as error:
        outcome.faults.append(f"{case}: {type(error).__name__} when used: {str(error)[:300]}")
    finally:
        outcome.slowest_use = max(outcome.slowest_use, time.process_time() - started)


def _is_sentence(text: str) -> bool:
    return "\n" not in text and 10 < len(text) < 900 and text.isprintable() and not text.startswith("Traceback")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In a working directory of its own, so that what is written by a relative path is seen too."""
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _listed(folder: Path, *but: Path) -> set[str]:
    """What lies in a folder, beside those of its folders that may change, and beside the folder itself."""
    names = {str(path) for path in folder.parent.iterdir()}
    for path in folder.iterdir():
        names |= {str(path)} if path in but else {str(path), *map(str, path.rglob("*"))}
    return names


def _emptied(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return folder


def peak_memory(reset: bool = False) -> int:
    """Peak resident bytes of this process since the last reset; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


# --- changes --------------------------------------------------------------------------------------------------


def changed_file(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of a safetensors file: of its bytes, its header, or of what a sound file holds."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choices((mutate_header, mutate_bytes, mutate_tensors), (3, 2, 5))[0]
        data = change(data, rng)
    return data


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three changes, of the bytes or of the header's own structure."""
    for _ in range(rng.randint(1, 3)):
        data = mutate_header(data, rng) if rng.random() < 0.6 else mutate_bytes(data, rng)
    return data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    data, at, length = bytearray(data), rng.randrange(len(data)), rng.randint(1, 40)
    match rng.randrange(7):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = rng.randbytes(length)
        case 4:
            data += rng.randbytes(length)
        case 5:
            data[:8] = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data), len(data) + 1]).to_bytes(8, "little")
        case 6:
            data[at : at + 4] = b"\x00\x00\xc0\x7f"
    return bytes(data)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Change one value, key or entry of the JSON header or of the JSON in its metadata; fit the length."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        mutate_json(header, rng)
        raw = json.dumps(header).encode()
    except (ValueError, AttributeError, RecursionError, OverflowError):
        return data
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def mutate_json(node: object, rng: random.Random) -> None:
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        value = node[key]
        if isinstance(value, str) and value.startswith("{") and rng.random() < 0.9:
            inner = json.loads(value)
            mutate_json(inner, rng)
            node[key] = json.dumps(inner)
            return
        if isinstance(value, dict | list) and value and rng.random() < 0.85:
            node = value
            continue
        match rng.randrange(4):
            case 0 | 1:
                node[key] = rng.choice(NASTY)
            case 2:
                del node[key]
            case 3 if isinstance(node, dict):
                node[str(rng.choice(NASTY))] = node.pop(key)
            case 3:
                node.append(value + rng.randint(-2, 2) if isinstance(value, int) else value)
        return


def mutate_tensors(data: bytes, rng: random.Random) -> bytes:
    """A sound file again, of other tensors: another type, shape, name or size, one too few or too many."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, AttributeError):
        return data
    if not tensors:
        return data
    name = rng.choice(sorted(tensors))
    with contextlib.suppress(RuntimeError, IndexError):
        _EDITS[rng.randrange(len(_EDITS))](tensors, name, rng)
    if metadata and rng.random() < 0.2:
        mutate_json(metadata, rng)
    metadata = {str(key): value for key, value in metadata.items() if isinstance(value, str)}
    try:
        return save({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, metadata)
    except (SafetensorError, ValueError, UnicodeError):
        return data


def _recast(tensors, name, rng):
    tensors[name] = tensors[name].to(rng.choice(DTYPES))


def _reshape(tensors, name, rng):
    old = tensors[name]
    shapes = (
        lambda t: t.mT if t.dim() > 1 else t,
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t[..., None],
        lambda t: t[..., None, None],
        lambda t: t[:1],
        lambda t: t[:0],
        lambda t: t[:-1],
        lambda t: t[..., :-1],
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t, t], dim=-1),
        lambda t: t.flatten()[0],
        lambda t: t.flatten()[:1].expand(rng.choice([1, 3, 500]), rng.choice([1, 3, 500])),
        lambda t: t.reshape(-1, 1),
        lambda t: t.flatten()[:1].expand(2**18, 1),
        lambda t: t.flatten()[:1].expand(1, 2**18),
    )
    tensors[name] = rng.choice(shapes)(old)


def _revalue(tensors, name, rng):
    tensor, value = tensors[name].clone(), rng.choice(VALUES)
    match rng.randrange(4):
        case 0:
            tensor.fill_(value)
        case 1:
            tensor.view(-1)[rng.randrange(tensor.numel())] = value
        case 2:
            tensor = tensor * value
        case 3:
            for key in tensors:
                tensors[key] = tensors[key] * value
            return
    tensors[name] = tensor


def _double(tensors, name, rng):
    tensors[name] = (tensors[name].double() + 1) * rng.choice([1.0, 1e100, 1e300])


def _drop(tensors, name, rng):
    del tensors[name]


def _rename(tensors, name, rng):
    other, part = rng.choice(sorted(tensors)), rng.choice((".weight", ".alpha", ".x", "/a", ".dora_scale", "_x", ""))
    tensors[rng.choice((other + part, name.upper(), name + part, name[: rng.randint(1, len(name))]))] = tensors.pop(
        name
    )


def _copy(tensors, name, rng):
    tensors[name + rng.choice((".weight", ".x", ".exp_avg", "2"))] = tensors[name]


def _swap(tensors, name, rng):
    other = rng.choice(sorted(tensors))
    tensors[name], tensors[other] = tensors[other], tensors[name]


_EDITS = (_recast, _reshape, _reshape, _revalue, _revalue, _double, _drop, _rename, _copy, _swap)


def changed_text(data: bytes, rng: random.Random) -> bytes:
    """JSON with other values in it, or with other bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    node = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        mutate_json(node, rng)
    return json.dumps(node).encode()


def changed_caption(data: bytes, rng: random.Random) -> bytes:
    odd = ("\u0000", "\u200b", "\ufeff", "\u202e", "\ud800", "{concept}", "<TOK>", "\n" * 99, "word " * 4000, "(a:1e9)")
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    return data + rng.choice(odd).encode(errors="surrogatepass")


def changed_png(data: bytes, rng: random.Random) -> bytes:
    """Other bytes, or a header that says another size or form, with the right checksum."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    header = list(struct.unpack(">IIBBBBB", data[16:29]))
    at = rng.randrange(len(header))
    header[at] = rng.choice([0, 1, 3, 8, 16, 9000, 2**16, 2**31 - 1] if at < 2 else [0, 1, 2, 3, 4, 6, 8, 16, 255])
    raw = b"IHDR" + struct.pack(">IIBBBBB", *header)
    return data[:12] + raw + struct.pack(">I", zlib.crc32(raw)) + data[33:]


def changed_npy(data: bytes, rng: random.Random) -> bytes:
    """Other bytes, or a header that says something else."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    length = int.from_bytes(data[8:10], "little")
    text = data[10 : 10 + length].decode()
    swaps = [
        ("(8, 8)", s) for s in ("(8,)", "(2**40, 8)", "(-8, 8)", "(8, 8, 1)", "(1099511627776, 1)", "(0, 8)", "()")
    ]
    swaps += [("'<f8'", d) for d in ("'<f4'", "'|O'", "'<i8'", "'>f8'", "'<f2'", "'<c16'", "'<U9'", "'<M8[s]'", "None")]
    swaps += [("False", v) for v in ("True", "1", "__import__('os')", "[[" * 50, "'" * 3, "\x00")]
    swaps += [("descr", v) for v in ("desc", "'", "shape", "\u0660")]
    old, new = rng.choice(swaps)
    raw = text.replace(old, new).encode()
    return data[:8] + len(raw).to_bytes(2, "little") + raw + data[10 + length :]


# --- sound files, and what is done with them ---------------------------------------------------------------


@cache
def toy_base():
    return load_toy_base()


@cache
def _layers() -> dict[str, torch.nn.Module]:
    """A few of the toy base's layers: queries, keys and values that read text, one of the text encoder's."""
    found = concept_layers(toy_base(), Targets(("attention",), ("attention",)))
    text = [name for name in found if name.startswith("text_encoder")][:1]
    return {name: found[name] for name in [*[name for name in found if ".attn2." in name][:4], *text]}


def made_concept(name: str = "kodo", seed: int = 0, mixed: bool = True) -> Concept:
    """A concept of the toy base; mixed: with an adapter of every kind."""
    generator, basis = torch.Generator().manual_seed(seed), OrthogonalBasis("hadamard", 7)
    layers = {}
    for number, (layer, module) in enumerate(_layers().items()):
        adapter = _fresh(number % 5 if mixed else 4, module.weight.shape, seed % 4, basis, generator)
        up = 0.1 * torch.randn(adapter.lora_up.shape, generator=generator)
        layers[layer] = adapter.replace(lora_up=up)
    word = torch.randn(2, toy_base().embedding.embedding_dim, generator=generator)
    recipe = Recipe(
        method="orthogonal",
        rank=3,
        alpha=2.0,
        base_hash=toy_base().hash,
        architecture="toy",
        triggers=(f"<{name}>",),
        class_word="man",
        basis=basis.identity,
        basis_kind="hadamard",
        basis_seed=7,
        slot=1,
        blocks=4,
        layout="contiguous",
        training={"steps": 400},
        origin={"pictures": 16},
    )
    return Concept(name, layers, {f"<{name}>": word}, recipe)


def _fresh(kind: int, shape: Sequence[int], slot: int, basis: OrthogonalBasis, generator: torch.Generator) -> LowRank:
    out, inp = shape
    if kind == 0:
        return new_orthogonal(out, inp, 3, 2.0, basis, [4, 5, 9])
    if kind == 1:
        return new_block_orthogonal(out, inp, 2.0, block_rows(out, 4, slot), basis, [4, 5, 9])
    if kind == 2:
        return new_full(out, inp)
    if kind == 3:
        return new_block(out, inp, 3, 2.0, block_rows(out, 4, slot), generator)
    return new_lora(out, inp, 3, 2.0, generator)


@cache
def _partner() -> Concept:
    return made_concept("fell", 1)


@cache
def _usual():
    return usual_text(toy_base())


@cache
def _plain_moments() -> dict[str, Moment]:
    return {name: Moment.of(torch.eye(module.weight.shape[1])) for name, module in _layers().items()}


def use_concept(concept: Concept, path: Path, out: Path, moments: dict[str, Moment] | None = None) -> None:
    """All that a person can do with a concept; AdapterError is an answer everywhere."""
    pair = [concept, _partner()]
    for how in METHOD_HELP:
        with contextlib.suppress(AdapterError):
            use_merge(pair, how, moments or _plain_moments(), out)
    for write in (save_concept, export_kohya, export_diffusers):
        with contextlib.suppress(AdapterError):
            write(concept, out / f"{write.__name__}{SUFFIX}")
    with contextlib.suppress(AdapterError):
        save_concept(concept, out / "compact.safetensors", compact=True)
        load_concept(out / "compact.safetensors")
    with contextlib.suppress(AdapterError):
        export_embeddings(concept, out)
    crosstalk_table(pair, signs=True)
    with contextlib.suppress(AdapterError), customised(toy_base(), [concept], [1.0]) as tokens:
        sample(toy_base(), [PROMPT], [0], tokens, QUICK)


def use_merge(pair: Sequence[Concept], how: str, moments: dict[str, Moment], out: Path) -> None:
    evidence = Evidence(moments=[moments, _plain_moments()])
    if how == "custom_diffusion":
        evidence = Evidence(texts=[text_features(toy_base(), each) for each in pair], usual=_usual())
    options = MergeOptions(rank=4)
    merged = merge_concepts(pair, [0.7, -1.0], how, options=options, evidence=evidence)
    for layer, own in merged.items():
        if not bool(torch.isfinite(own.delta()).all()):
            raise ArithmeticError(f"{how}, {layer}: the merge is not finite")
    save_concept(merged_concept("both", pair, [0.7, -1.0], Merge(how, False, options, evidence)), out / f"both{SUFFIX}")


def use_file(value: object, path: Path, out: Path) -> None:
    """A concept or LoRA file: as a concept, and in the shell's commands."""
    use_concept(value, path, out)
    partner = path.parent / "partner.sound"
    if not partner.exists():
        save_concept(_partner(), partner)
    in_shell("inspect", "-v", str(path), str(partner))
    for form in ("kohya", "diffusers", "concept", "compact"):
        in_shell("export", str(path), "--format", form, "--out", str(out / f"{form}{SUFFIX}"))


def in_shell(*arguments: str) -> None:
    """A command, whose answer is 0, or 2 with one sentence."""
    from modular_concepts.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or len(errors) != (code == 2):
        raise RuntimeError(f"{arguments[0]} gave {code} and {said.getvalue()[:200]!r}")


def use_basis(basis: OrthogonalBasis, path: Path, out: Path) -> None:
    for width in basis.matrices:
        columns = basis.columns(width, [0])
        if not bool(torch.isfinite(columns).all()) or abs(columns.norm().item() - 1) > 1e-3:
            raise ArithmeticError(f"a column of width {width} has the length {columns.norm().item()}")
        new_orthogonal(5, width, 1, 1.0, basis, [0])
    basis.identity  # noqa: B018  (a digest of everything)


def use_moments(moments: dict[str, Moment], path: Path, out: Path) -> None:
    for moment in moments.values():
        if not bool(torch.isfinite(moment.factor).all()):
            raise ArithmeticError("a moment is not finite")
    with contextlib.suppress(AdapterError):
        use_merge([made_concept(), _partner()], "fusion", moments, out)


def use_word(value: tuple[str, torch.Tensor], path: Path, out: Path) -> None:
    word, rows = value
    concept = Concept(word[:100], {}, {word: rows}, Recipe(method="words", triggers=(word,), architecture="toy"))
    with contextlib.suppress(AdapterError):
        check_concept(concept)
        save_concept(concept, out / f"word{SUFFIX}")
        load_concept(out / f"word{SUFFIX}")
        export_embeddings(concept, out)
    with contextlib.suppress(AdapterError), customised(toy_base(), [concept], [1.0]) as tokens:
        sample(toy_base(), [f"a {word}"], [0], tokens, QUICK)


def use_regions(regions: list, path: Path, out: Path) -> None:
    with contextlib.suppress(AdapterError):
        sample(toy_base(), ["a photo"], [0], None, QUICK, regions)
    stack = [(made_concept(), 1.0)]
    with contextlib.suppress(AdapterError):
        sample(toy_base(), ["a photo"], [0], None, QUICK, regions, mode="gated", stack=stack)


def use_pictures(data: Dataset, path: Path, out: Path) -> None:
    for picture in data.pictures:
        if picture.shape != (3, 32, 32) or not 0 <= picture.min() <= picture.max() <= 1:
            raise ArithmeticError(f"a picture of shape {tuple(picture.shape)} is not what was asked for")
    if len(data.captions) != len(data.pictures) or not all(map(str.strip, data.captions)):
        raise ArithmeticError("a picture has no caption")


def _write_moments(place: Path) -> Path:
    save_moments(_plain_moments(), place / "kodo.moments.safetensors")
    return place / "kodo.moments.safetensors"


def _write_locon(place: Path) -> Path:
    shapes = {"up": (4, 3, 1, 1), "mid": (3, 3, 3, 3), "down": (3, 5, 1, 1)}
    key = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{key}.lora_{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
    said = {"modelspec.trigger_phrase": "a, b", "modelspec.thumbnail": "data:image/jpeg;base64,/9j/"}
    (place / "locon.safetensors").write_bytes(save(tensors, said))
    return place / "locon.safetensors"


def _write_own_words(place: Path) -> Path:
    """Two concepts for their own words in one file."""
    pair = []
    for concept in (made_concept(mixed=False), _partner()):
        layers = {name: adapter for name, adapter in concept.layers.items() if reads_text(name)}
        pair.append(replace(concept, layers=layers, recipe=replace(concept.recipe, method="own_words")))
    save_concept(merged_concept("both", pair, [1.0, 0.5]), place / f"kodo{SUFFIX}")
    return place / f"kodo{SUFFIX}"


def _write_basis(place: Path) -> Path:
    basis = {str(width): OrthogonalBasis().columns(width, range(width)).mT.contiguous() for width in (8, 24)}
    (place / "basis.safetensors").write_bytes(save(basis))
    return place / "basis.safetensors"


def _write_npy(place: Path) -> Path:
    np.save(place / "8.npy", OrthogonalBasis().columns(8, range(8)).double().numpy())
    return place / "8.npy"


def _training():
    from dataclasses import replace

    from tiny_problem import EVERYTHING, problem_with_everything, tiny_basis

    return problem_with_everything(), replace(EVERYTHING, steps=4), tiny_basis()


def _write_checkpoint(place: Path) -> Path:
    from modular_concepts.training.checkpoint import newest_checkpoint
    from modular_concepts.training.loop import Keeping, Listeners, train

    problem, settings, basis = _training()
    train(problem, settings, Listeners(lambda at: at.step == 3), Keeping(place), basis=basis)
    return newest_checkpoint(place)


def _read_checkpoint(path: Path):
    from modular_concepts.training.checkpoint import restore_checkpoint
    from modular_concepts.training.run import Run

    problem, settings, basis = _training()
    run = Run(problem, settings, basis)
    restore_checkpoint(path, run)
    return run


def _use_checkpoint(value: object, path: Path, out: Path) -> None:
    from modular_concepts.training.loop import Keeping, train

    problem, settings, basis = _training()
    with contextlib.suppress(AdapterError):
        train(problem, settings, keeping=Keeping(resume=path), basis=basis)


def _latents() -> list[torch.Tensor]:
    return [torch.arange(48.0).reshape(3, 4, 4), torch.arange(96.0).reshape(3, 4, 8)]


def _read_latents(path: Path) -> list[torch.Tensor]:
    return kept(toy_base(), path.parent, "two pictures", _latents)


def _write_latents(place: Path) -> Path:
    _read_latents(place / "any")
    return next(place.glob(f"latents-*{SUFFIX}"))


def _use_latents(value: list[torch.Tensor], path: Path, out: Path) -> None:
    if len(value) != 2 or not all(map(torch.equal, value, _latents())):
        raise ArithmeticError("the latents of the cache are not those of the pictures")


def _write_pictures(place: Path) -> Path:
    from PIL import Image

    pixels = np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)
    for name in ("a", "b"):
        Image.fromarray(pixels).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text("a {concept} on the grass, a sunny day")
        Image.fromarray(np.full((40, 40), 255, np.uint8)).save(place / f"{name}.mask.png")
    return place / "a.png"


def _write_form(form: str) -> Callable[[Path], Path]:
    """Pictures of which one is of another format."""

    def write(place: Path) -> Path:
        from PIL import Image

        Image.open(_write_pictures(place)).save(place / f"a.{form}")
        (place / "a.png").unlink()
        return place / f"a.{form}"

    return write


def _beside(write: Callable[[Path], Path], name: str) -> Callable[[Path], Path]:
    return lambda place: write(place).with_name(name)


def _read_folder(path: Path) -> Dataset:
    return load_folder(path.parent, (32, 32), ("<kodo>",), class_word="man")


def _write_regions(place: Path) -> Path:
    regions = [
        {"prompt": "a <kodo>", "box": [0, 0, 0.5, 1], "concepts": ["kodo"], "feather": 0.1, "strength": 0.7},
        {"prompt": "a house", "box": [8, 0, 32, 32], "units": "pixels", "priority": 1, "start": 0.1, "end": 0.9},
        {"prompt": "the sky", "negative": "rain", "box": [0.2, 0.2, 1, 1]},
    ]
    (place / "regions.json").write_text(json.dumps(regions))
    return place / "regions.json"


def _read_regions(path: Path) -> list:
    text = path.read_bytes().decode(errors="surrogateescape")
    json_problem(text)
    return regions_from_json(text)


def _written(write: Callable[[Concept, Path], object], mixed: bool = True) -> Callable[[Path], Path]:
    def one(place: Path) -> Path:
        write(made_concept(mixed=mixed), place / f"kodo{SUFFIX}")
        return place / f"kodo{SUFFIX}"

    return one


def _as_concept(path: Path) -> Concept:
    return read_concept(path).concept


KINDS: dict[str, Kind] = {
    "concept": Kind(_written(save_concept), _as_concept, use_file, changed_file),
    "compact": Kind(_written(lambda c, p: save_concept(c, p, compact=True)), _as_concept, use_file, changed_file),
    "own words": Kind(_write_own_words, _as_concept, use_file, changed_file),
    "kohya": Kind(_written(export_kohya), _as_concept, use_file, changed_file),
    "diffusers": Kind(_written(export_diffusers), _as_concept, use_file, changed_file),
    "locon": Kind(_write_locon, _as_concept, use_file, changed_file),
    "embedding": Kind(
        _written(lambda concept, path: export_embedding(concept, "<kodo>", path)),
        import_embedding,
        use_word,
        changed_file,
    ),
    "moments": Kind(_write_moments, load_moments, use_moments, changed_file),
    "basis": Kind(_write_basis, load_basis, use_basis, changed_file),
    "basis npy": Kind(_write_npy, load_basis, use_basis, changed_npy),
    "checkpoint": Kind(_write_checkpoint, _read_checkpoint, _use_checkpoint, changed_file),
    "latents": Kind(_write_latents, _read_latents, _use_latents, changed_file),
    "picture png": Kind(_write_pictures, _read_folder, use_pictures, changed_png),
    "picture jpeg": Kind(_write_form("jpg"), _read_folder, use_pictures, mutate_bytes),
    "picture webp": Kind(_write_form("webp"), _read_folder, use_pictures, mutate_bytes),
    "picture bmp": Kind(_write_form("bmp"), _read_folder, use_pictures, mutate_bytes),
    "mask": Kind(_beside(_write_pictures, "a.mask.png"), _read_folder, use_pictures, changed_png),
    "caption": Kind(_beside(_write_pictures, "a.txt"), _read_folder, use_pictures, changed_caption),
    "regions": Kind(_write_regions, _read_regions, use_regions, changed_text),
    "base folder": Kind(write_texts("sd"), read_texts, use_base, changed_texts),
    "base folder XL": Kind(write_texts("xl"), read_texts, use_base, changed_texts),
    "base weights": Kind(write_weights, read_weights, use_base, changed_file),
}
