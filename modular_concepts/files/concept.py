"""Concept files, format version 1: one safetensors file that stock LoRA loaders read as it is.

Tensors: `<file_key>.lora_up.weight` (out, rank[, 1, 1]), `.lora_down.weight` (rank, in[, kh, kw]) and
`.alpha`, as kohya's.  Block adapters are stored over all output rows, zero outside their block.  Those of a concept
that acts at its own words alone have `own_words.` before their key: a stock loader would let them act everywhere, and
so it finds none.
Metadata: `modular_concepts` is one JSON text (format, name, recipe, and per layer its kind and rows),
`modular_concepts_tokens` another with the learned words as base64 of little-endian float32, then kohya's `ss_`
basics and `modelspec.` entries for programs that list models (`modelspec.py`).

Learned words are in the metadata and not among the tensors because a stock loader meets every tensor: ComfyUI
warns of each key that it does not know, and diffusers refuses the whole file for one.  Metadata both ignore
in silence.

Compact files leave out what the recipe gives back bit for bit: frozen factors (basis columns, the identity of
full adapters) and the zero rows of block adapters.  Only this program reads those.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.basis import OrthogonalBasis, hashed_indices, printed, slot_indices, work_of
from ..adapters.low_rank import LowRank, check_adapter, check_size
from ..adapters.own_words import METHOD as OWN_WORDS
from ..concept import Concept, Recipe, check_concept, check_rows, check_token, clip
from ..errors import AdapterError
from ..merging.own_words import check_own_words
from ..models.layers import check_name, file_key
from ..storage.safetensors import check_finite, read_safetensors, tensor_bytes, write_safetensors
from ..storage.strict_json import parse_json
from .modelspec import about_of, modelspec

FORMAT = 1
KEY = "modular_concepts"
TOKENS_KEY = "modular_concepts_tokens"
MAX_WIDTH = 2**20
MAX_LAYER_ELEMENTS = 2**24
FREE_NUMBERS, FREE_WORK = 2**22, 10_000_000  # of any file, however small; work as `adapters.basis.work_of`
EXPANSION = 64  # numbers left out for each that is there
MOST_BLOCKS = 1024
_CHUNK = 128


def save_concept(
    concept: Concept, path: Path | str, compact: bool = False, basis: OrthogonalBasis | None = None
) -> None:
    """Write a concept file, whole or not at all; the same concept gives the same bytes.

    compact: leave out frozen factors and zero rows; `basis` is needed then only if the recipe cannot
    regenerate it.
    A frozen factor that is not the basis' columns bit for bit (the Gaussian variant) is kept in the file.
    Raises AdapterError for a concept that cannot be read back, for a compact file that would leave out
    nothing, and when the file cannot be written.
    """
    check_concept(concept)
    check_own_words(concept)
    for name, adapter in concept.layers.items():
        check_size(name, adapter)
    for word, rows in concept.tokens.items():
        check_rows(word, rows)
    columns = _frozen_columns(concept, basis) if compact else {}
    identities = {name for name, adapter in concept.layers.items() if compact and _gives_identity_back(adapter)}
    columns, identities = _with_room(concept, columns, identities)
    if compact and not columns and not identities and all(a.rows is None for a in concept.layers.values()):
        raise AdapterError(f"{concept.name}: nothing to leave out: no adapter has basis columns or a block of rows")
    tensors, layers = {}, {}
    for name, adapter in concept.layers.items():
        key = _key(name, concept.recipe)
        if f"{key}.alpha" in tensors:
            raise AdapterError(f"{name}: another layer has the same name in files, {key}")
        left_out = name in columns or name in identities
        layers[name] = _describe(adapter, compact, columns.get(name), left_out)
        tensors |= _layer_tensors(key, adapter, compact, with_down=not left_out)
    document = {
        "format": FORMAT,
        "name": concept.name,
        "compact": compact,
        "recipe": concept.recipe.to_json(),
        "layers": layers,
    }
    if columns:
        used = basis or recipe_basis(concept.recipe)
        widths = {math.prod(concept.layers[name].lora_down.shape[1:]) for name in columns}
        document["bases"] = {str(width): used.fingerprint(width) for width in widths}
    metadata = stock_metadata(concept) | modelspec(concept, tensors)
    write_safetensors(path, tensors, metadata | {KEY: _dump(document)} | _dump_tokens(concept.tokens))


def _key(name: str, recipe: Recipe) -> str:
    key = file_key(name, recipe.architecture)
    return f"{OWN_WORDS}.{key}" if recipe.method == OWN_WORDS else key


def load_concept(path: Path | str, basis: OrthogonalBasis | None = None) -> Concept:
    """Read a concept file that nobody vouches for, full or compact.

    basis: needed for a compact file whose basis came from a file; if given, it must be the recipe's.
    Adapters come back in the stored dtype, tokens in float32, layers sorted by name.
    Raises AdapterError, in one sentence that names the file.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    if KEY not in metadata:
        raise AdapterError(f"{path.name}: this is not a concept file (no {KEY} entry); import it as a LoRA instead")
    try:
        return _parse(tensors, metadata, basis)
    except AdapterError as error:
        raise AdapterError(f"{path.name}: {error}") from error


def recipe_basis(recipe: Recipe) -> OrthogonalBasis:
    """The shared basis that a recipe names.  Raises AdapterError when only its file could give it back."""
    if recipe.basis_kind is None or recipe.basis_seed is None or recipe.basis_kind == "file":
        raise AdapterError(
            f"the concept's shared basis {recipe.basis or '(unnamed)'} cannot be regenerated from a seed; "
            "load the basis file first and pass it along"
        )
    return OrthogonalBasis(recipe.basis_kind, recipe.basis_seed)


def stock_metadata(concept: Concept) -> dict[str, str]:
    """The kohya entries that other programs show: rank, alpha, module."""
    ranks = {adapter.rank for adapter in concept.layers.values()} or {concept.recipe.rank}
    return {
        "ss_network_module": f"modular_concepts.{OWN_WORDS}" if concept.recipe.method == OWN_WORDS else "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(concept.recipe.alpha),
        "ss_output_name": concept.name,
    }


def layer_tensors(key: str, adapter: LowRank) -> dict[str, Tensor]:
    """One adapter as kohya's three tensors: lora_up over all rows, (out, rank, 1, 1) for a convolution."""
    return _layer_tensors(key, adapter, compact=False, with_down=True)


def _layer_tensors(key: str, adapter: LowRank, compact: bool, with_down: bool) -> dict[str, Tensor]:
    up = adapter.lora_up if compact else adapter.full_up()
    if adapter.lora_down.dim() == 4:
        up = up[:, :, None, None]
    stored = {f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(adapter.alpha))}
    return stored | ({f"{key}.lora_down.weight": adapter.lora_down} if with_down else {})


def _describe(adapter: LowRank, compact: bool, columns: Sequence[int] | None, left_out: bool) -> dict[str, object]:
    entry: dict[str, object] = {"kind": adapter.kind}
    if adapter.rows is not None:
        entry["rows"] = _pack(adapter.rows.tolist())
        if compact:
            entry["out"] = adapter.out_features
    if columns is not None:
        entry["columns"] = _pack(columns)
    if left_out:
        entry["down_shape"] = list(adapter.lora_down.shape)
    return entry


def _gives_identity_back(adapter: LowRank) -> bool:
    """Whether a compact file may leave lora_down out as the identity: no wider than reading allows."""
    same = adapter.lora_up.dtype == adapter.lora_down.dtype
    return same and adapter.kind == "full" and adapter.lora_down.numel() <= MAX_LAYER_ELEMENTS


def _with_room(
    concept: Concept, columns: Mapping[str, list[int]], identities: set[str]
) -> tuple[dict[str, list[int]], set[str]]:
    """Of the factors that could be left out those that reading would give back."""
    room = _Room(sum(adapter.lora_up.numel() + 1 for adapter in concept.layers.values()))
    there, widths, left_out = set(), set(), set()
    for name in sorted({*columns, *identities}):
        down = concept.layers[name].lora_down
        width, chosen = down[0].numel(), columns.get(name)
        key = (None if chosen is None else tuple(chosen), down.dtype, down.shape)
        if key in there or room.take(*_costs(concept.recipe.basis_kind or "", width, chosen, width in widths)):
            there.add(key)
            widths |= set() if chosen is None else {width}
            left_out.add(name)
    return {name: chosen for name, chosen in columns.items() if name in left_out}, identities & left_out


def _frozen_columns(concept: Concept, basis: OrthogonalBasis | None) -> dict[str, list[int]]:
    """Layer name -> the basis columns that are its frozen factor, for those that equal them in every bit."""
    frozen = {name: a for name, a in concept.layers.items() if a.frozen and a.kind != "full"}
    if not frozen:
        return {}
    basis = basis or recipe_basis(concept.recipe)
    _check_identity(concept.recipe, basis)
    by_layer: dict[str, list[int]] = {}
    seen: dict[int, list[int]] = {}
    for name, adapter in frozen.items():
        if adapter.lora_up.dtype != adapter.lora_down.dtype:
            continue
        down = adapter.lora_down.detach().cpu().flatten(1)
        width = down.shape[1]
        guesses = _guesses(concept, name, *down.shape)
        columns = next((guess for guess in (seen.get(width, []), *guesses) if _gives(basis, guess, down)), None)
        columns = columns or _nearest_columns(basis, down)
        if _gives(basis, columns, down):
            by_layer[name] = seen[width] = columns
    return by_layer


def _guesses(concept: Concept, layer: str, rank: int, width: int) -> list[list[int]]:
    """The columns that the recipe's own policy chooses; `_nearest_columns` finds any others."""
    recipe = concept.recipe
    if recipe.slot is not None and 0 <= recipe.slot < width // rank:
        return [slot_indices(width, rank, recipe.slot)]
    return [hashed_indices(width, rank, concept.name, layer)] if rank <= width else []


def _gives(basis: OrthogonalBasis, columns: Sequence[int], down: Tensor) -> bool:
    if len(columns) != len(down):
        return False
    return torch.equal(basis.columns(down.shape[1], columns).to(down.dtype), down)


def _nearest_columns(basis: OrthogonalBasis, down: Tensor) -> list[int]:
    """For each row of `down` (rank, width) the column of the basis with the largest inner product."""
    width = down.shape[1]
    best = down.new_full((len(down),), -math.inf, dtype=torch.float32)
    index = torch.zeros(len(down), dtype=torch.int64)
    for start in range(0, width, _CHUNK):
        columns = basis.columns(width, list(range(start, min(start + _CHUNK, width))))
        value, position = (down.float() @ columns.mT).max(dim=1)
        index = torch.where(value > best, position + start, index)
        best = torch.maximum(value, best)
    return index.tolist()


def _parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], basis: OrthogonalBasis | None) -> Concept:
    document = parse_json(metadata[KEY], "the concept's description")
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise AdapterError("the concept's description has no format number; the file is damaged")
    if document["format"] != FORMAT:
        raise AdapterError(f"concept format {clip(document['format'])}: this program reads {FORMAT}; update it")
    compact, layers = document.get("compact"), document.get("layers")
    expected = {"format", "name", "compact", "recipe", "layers"} | ({"bases"} & set(document))
    if set(document) != expected or type(compact) is not bool or not isinstance(layers, dict):
        raise AdapterError("the concept's description lacks an entry or has a strange one; the file is damaged")
    recipe = Recipe.from_json(document["recipe"])
    if basis is not None:
        _check_identity(recipe, basis)
    stored = sum(tensor.numel() for tensor in tensors.values())
    expanded = _Expansion(recipe, document.get("bases", {}), basis, stored) if compact else None
    rest = dict(tensors)
    adapters = {}
    for name, entry in sorted(layers.items()):
        key = _key(check_name(name), recipe)
        adapters[name] = _adapter(name, key, entry, rest, expanded)
    if rest:
        raise AdapterError(f"{min(rest)} belongs to no layer of the description ({len(rest)} such tensors)")
    name = document["name"]
    concept = Concept(name, adapters, _parse_tokens(metadata.get(TOKENS_KEY)), recipe, about_of(metadata, name))
    check_concept(concept)
    check_own_words(concept)
    return concept


def _costs(kind: str, width: int, columns: Sequence[int] | None, checked: bool) -> tuple[int, int]:
    """(numbers, work) of a frozen factor: an identity, or columns and, the first time, their basis' fingerprint."""
    if columns is None:
        return width * width, width * width
    return width * len(columns), work_of(kind, width, columns) + (
        0 if checked else work_of(kind, width, printed(width))
    )


class _Room:
    """How much a compact file may leave out: what the numbers that it holds justify.

    An orthogonal adapter has two to five times as many frozen numbers as trained ones, one in blocks that times the
    number of blocks; layers that share their columns share the tensor too.
    """

    def __init__(self, stored: int):
        self.numbers = FREE_NUMBERS + EXPANSION * stored
        self.work = FREE_WORK + EXPANSION * stored

    def take(self, numbers: int, work: int) -> bool:
        """Whether there is room for so many numbers, which cost so much work."""
        if numbers > min(self.numbers, MAX_LAYER_ELEMENTS) or work > self.work:
            return False
        self.numbers, self.work = self.numbers - numbers, self.work - work
        return True


class _Expansion:
    """Gives a compact file's frozen factors back, within bounds and from the basis that the file names."""

    def __init__(self, recipe: Recipe, fingerprints: object, basis: OrthogonalBasis | None, stored: int):
        if not isinstance(fingerprints, dict):
            raise AdapterError("the list of basis fingerprints is not a JSON object; the file is damaged")
        self.recipe, self.fingerprints, self.basis = recipe, fingerprints, basis
        self.checked: set[int] = set()
        self.room = _Room(stored)
        self.shared: dict[object, Tensor] = {}

    def lora_down(self, name: str, entry: Mapping[str, object], up: Tensor) -> Tensor:
        """(rank, in[, kh, kw]) in the dtype of `up`: the columns that `entry` names, or the identity."""
        shape = entry["down_shape"]
        whole = isinstance(shape, list) and all(type(size) is int and 0 < size <= MAX_WIDTH for size in shape)
        if not whole or len(shape) not in (2, 4) or shape[0] != up.shape[1]:
            raise AdapterError(f"{name}: lora_down of shape {clip(shape)} does not fit lora_up {tuple(up.shape)}")
        width = math.prod(shape[1:])
        if shape[0] > width or width > MAX_WIDTH:
            raise AdapterError(f"{name}: lora_down of shape {shape} is larger than any adapter needs; damaged file")
        columns = None
        if "columns" in entry:
            columns = tuple(_unpack(f"{name}: columns", entry["columns"], width, shape[0]))
        elif shape[0] != width:
            raise AdapterError(f"{name}: an identity of shape {shape} is not square; the file is damaged")
        key = (columns, up.dtype, *shape)
        if key not in self.shared:
            self.shared[key] = self._made(name, width, columns, up.dtype).reshape(shape)
        return self.shared[key]

    def _made(self, name: str, width: int, columns: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
        kind = self.recipe.basis_kind or ""
        if not self.room.take(*_costs(kind, width, columns, width in self.checked)):
            raise AdapterError(
                f"{name}: its frozen factor, {width if columns is None else len(columns)} x {width} numbers, is more "
                "than a file of this size leaves out; the file is damaged"
            )
        if columns is None:
            return torch.eye(width, dtype=dtype)
        return self._basis_of(width).columns(width, columns).to(dtype)

    def _basis_of(self, width: int) -> OrthogonalBasis:
        """The basis, whose fingerprint of this width is the file's."""
        if width not in self.checked and str(width) not in self.fingerprints:
            raise AdapterError(f"no basis fingerprint for width {width}; the file is damaged")
        basis = self.basis = self.basis or recipe_basis(self.recipe)
        if width in self.checked:
            return basis
        if basis.fingerprint(width) != self.fingerprints[str(width)]:
            raise AdapterError(
                f"the shared basis of width {width} is not the one that the concept was trained with "
                f"(expected {clip(self.fingerprints[str(width)])}); load the right basis file or seed"
            )
        self.checked.add(width)
        return basis


def _adapter(name: str, key: str, entry: object, rest: dict[str, Tensor], expansion: _Expansion | None) -> LowRank:
    """Take one layer's tensors out of `rest` and check them against its entry."""
    if not isinstance(entry, dict) or not set(entry) <= {"kind", "rows", "out", "columns", "down_shape"}:
        raise AdapterError(f"{name}: its description is not understood; the file is damaged")
    up = _take(rest, f"{key}.lora_up.weight")
    alpha = _take(rest, f"{key}.alpha")
    if up.dim() == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    if up.dim() != 2 or alpha.numel() != 1:
        raise AdapterError(f"{name}: lora_up {tuple(up.shape)} or alpha {tuple(alpha.shape)} has a wrong shape")
    regenerated = expansion is not None and "down_shape" in entry
    if regenerated and ("columns" in entry) == (entry.get("kind") == "full"):
        raise AdapterError(f"{name}: its frozen factor is not described as its kind asks; the file is damaged")
    down = expansion.lora_down(name, entry, up) if regenerated else _take(rest, f"{key}.lora_down.weight")
    kind, out, rows = entry.get("kind"), up.shape[0], None
    if not isinstance(kind, str):
        raise AdapterError(f"{name}: its adapter kind is {clip(kind)}; the file is damaged")
    if "rows" in entry:
        out = entry.get("out") if expansion is not None else out
        most = len(up) if expansion is None else _most_rows(expansion.recipe, len(up))
        if type(out) is not int or not 0 < out <= most:
            raise AdapterError(f"{name}: {clip(out)} output rows, of which {len(up)} are there; the file is damaged")
        count = None if expansion is None else len(up)
        rows = torch.tensor(_unpack(f"{name}: rows", entry["rows"], out, count), dtype=torch.int64)
        up = up if expansion is not None else _rows_of(name, up, rows)
    adapter = LowRank(up.contiguous(), down, float(alpha), kind, rows, out)
    check_adapter(name, adapter)
    check_size(name, adapter)
    return adapter


def _most_rows(recipe: Recipe, rows: int) -> int:
    """How many output rows a layer may have of which a block has so many."""
    return min(MAX_WIDTH, (rows + 1) * min(recipe.blocks or EXPANSION, MOST_BLOCKS))


def _rows_of(name: str, up: Tensor, rows: Tensor) -> Tensor:
    inside = torch.zeros(len(up), dtype=torch.bool)
    inside[rows] = True
    if up[~inside].any():
        raise AdapterError(f"{name}: lora_up writes outside the adapter's block of rows; the file is damaged")
    return up[rows]


def _take(rest: dict[str, Tensor], key: str) -> Tensor:
    if key not in rest:
        raise AdapterError(f"{key} is missing; the file is damaged")
    return rest.pop(key)


def _pack(indices: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """A list of indices, or {"range": [start, stop, step]} where that says the same."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 0:
        span = range(indices[0], indices[-1] + 1, step)
        if list(span) == list(indices):
            return {"range": [span.start, span.stop, span.step]}
    return list(indices)


def _unpack(what: str, packed: object, size: int, count: int | None = None) -> list[int]:
    """Distinct indices below `size`, `count` of them if that is known, from an untrusted source."""
    span = packed.get("range") if isinstance(packed, dict) and len(packed) == 1 else packed
    if not isinstance(span, list) or not all(type(value) is int and 0 <= value <= size for value in span):
        raise AdapterError(f"{what} are not whole numbers between 0 and {size}; the file is damaged")
    if isinstance(packed, dict):
        if len(span) != 3 or span[2] < 1:
            raise AdapterError(f"{what} are not a start, a stop and a step; the file is damaged")
        span = range(*span)
    if count is not None and len(span) != count:
        raise AdapterError(f"{what} are {len(span)}, but {count} are there; the file is damaged")
    if not span or max(span) >= size or len(set(span)) != len(span):
        raise AdapterError(f"{what} are not distinct whole numbers below {size}; the file is damaged")
    return list(span)


def _check_identity(recipe: Recipe, basis: OrthogonalBasis) -> None:
    if recipe.basis is not None and basis.identity != recipe.basis:
        raise AdapterError(
            f"the concept was trained on shared basis {clip(recipe.basis)}, but {basis.identity} is in use; "
            "load the same basis, or train again on this one"
        )


def _dump(document: object) -> str:
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the concept's description cannot be written as JSON: {error}") from error


def _dump_tokens(tokens: Mapping[str, Tensor]) -> dict[str, str]:
    if not tokens:
        return {}
    entries = {}
    for word, vectors in tokens.items():
        check_finite(f"trigger word {word!r}", vectors)
        data = base64.b64encode(tensor_bytes(vectors.float())).decode("ascii")
        entries[word] = {"shape": list(vectors.shape), "float32": data}
    return {TOKENS_KEY: _dump(entries)}


def _parse_tokens(text: str | None) -> dict[str, Tensor]:
    entries = parse_json(text, "the list of learned words") if text is not None else {}
    if not isinstance(entries, dict):
        raise AdapterError("the list of learned words is not a JSON object; the file is damaged")
    return {word: _token(word, entry) for word, entry in sorted(entries.items())}


def _token(word: str, entry: object) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"shape", "float32"} or not isinstance(entry["float32"], str):
        raise AdapterError(f"trigger word {clip(word)}: not a shape and its data; the file is damaged")
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and 0 < size <= MAX_WIDTH for size in shape):
        raise AdapterError(f"trigger word {clip(word)}: shape {clip(shape)} is not understood; the file is damaged")
    check_token(word, tuple(shape))
    try:
        data = base64.b64decode(entry["float32"], validate=True)
    except ValueError as error:
        raise AdapterError(f"trigger word {clip(word)}: its data is not base64; the file is damaged") from error
    if len(data) != 4 * math.prod(shape):
        raise AdapterError(f"trigger word {clip(word)}: {len(data)} bytes do not fill shape {shape}")
    vectors = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
    check_finite(f"trigger word {clip(word)}", vectors)
    check_rows(word, vectors)
    return vectors
