"""kohya's LoRA files, which ComfyUI and most programs read: `lora_unet_….lora_up.weight` and so on."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank, check_adapter, check_size
from ..adapters.sites import put_together
from ..concept import Concept, Recipe, clip
from ..errors import AdapterError, listed
from ..merging.compatibility import refuse_own_words
from ..models.layers import file_key
from ..storage.safetensors import DTYPES, FLOATS, check_finite, write_safetensors
from .concept import layer_tensors, stock_metadata
from .modelspec import about_of, architecture_said, modelspec, triggers_said

EXPORTED = "a plain LoRA acts"  # wherever others load it
READ = ("up", "down", "mid", "alpha")  # factors whose numbers are needed
Parse = Callable[[str], tuple[str | None, str]]
MAX_KERNEL = 7
LONGEST_KEY = 120  # letters of a key in a sentence; most have fewer
# What diffusers and peft call every file, and folders that hold many of them and name none.
GENERIC = {"pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model", "pytorch_model"}
PLACES = {"loras", "lora", "concepts", "models", "output", "downloads"}
CHECKPOINT = re.compile(r"(checkpoint|step|epoch)[-_]?\d+")
FACTORS = {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid", "alpha": "alpha"}
# A changed bias stands beside the two factors and changes nothing about them.
FACTORS |= {name: "apart" for name in ("diff_b", "bias", "lora_up.bias", "lora_down.bias")}


@dataclass(frozen=True)
class Imported:
    """A concept from another program's file, and every key of the file that found no place in it.

    sentences: of learned words that came in the file, and of layers that are left out; explained: unmatched keys that
    they are about.  Unpacks to (concept, unmatched).
    """

    concept: Concept
    unmatched: list[str]
    sentences: Sequence[str] = ()
    explained: Collection[str] = ()

    def __getitem__(self, place: int) -> Concept | list[str]:
        return (self.concept, self.unmatched)[place]

    def notes(self, file: str) -> list[str]:
        """What of the file is not used, in sentences for a person: learned words first, then keys one by one."""
        rest = [key for key in self.unmatched if key not in self.explained]
        keys = (
            [f"no place for {len(rest)} {'key' if len(rest) == 1 else 'keys'}: {listed(rest, longest=LONGEST_KEY)}"]
            if rest
            else []
        )
        return [f"{file}: {sentence}" for sentence in (*self.sentences, *keys)]


def export_kohya(concept: Concept, path: Path | str, dtype: torch.dtype | None = None) -> Path:
    """Write the adapters as a plain kohya file; learned words go to `embeddings.export_embeddings`.

    Returns the file.  dtype: None keeps the adapters' own.  Frozen factors, blocks and whole weights become
    ordinary factors; delta is unchanged.
    """
    require_layers(concept)
    refuse_own_words([concept], EXPORTED)
    tensors = {}
    for name, adapter in put_together(concept.layers).items():
        stock, key = adapter.stock(), file_key(name, concept.recipe.architecture)
        tensors |= layer_tensors(key, stock.to(dtype=dtype) if dtype else stock)
    write_safetensors(path, tensors, stock_metadata(concept) | modelspec(concept, tensors))
    return Path(path)


def assemble(
    path: Path, tensors: Mapping[str, Tensor], parse: Parse
) -> tuple[dict[str, LowRank], list[str], list[list[str]]]:
    """Adapters from foreign keys, the keys that fit nowhere, and those of them that cost a layer, layer by layer.

    parse: key -> (canonical name or None, "up" | "down" | "mid" | "alpha" | "apart" | "unknown"); a layer with an
    unknown factor is left out whole, without what stands apart it is read.  Missing alpha means alpha = rank.
    Tensors that find no place may hold anything.
    """
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    unmatched, costly = [], []
    for key in sorted(tensors):
        name, factor = parse(key)
        if name is None or factor == "apart":
            unmatched.append(key)
        elif factor in parts[name] and factor != "unknown":
            raise AdapterError(f"{path.name}: {key} and {parts[name][factor]} are the same factor of one layer")
        else:
            parts[name][factor if factor != "unknown" else key] = key
    adapters = {}
    for name, keys in sorted(parts.items()):
        if not {"up", "down"} <= set(keys) <= {"up", "down", "mid", "alpha"}:
            if ("up" in keys) != ("down" in keys):
                raise AdapterError(f"{path.name}: {min(keys.values())}: only one factor is there; the file is damaged")
            unmatched += keys.values()
            if "up" in keys:
                costly.append([key for factor, key in keys.items() if factor not in READ])
            continue
        factors = {factor: _numbers(f"{path.name}: {key}", tensors[key]) for factor, key in keys.items()}
        try:
            adapters[name] = _adapter(name, factors)
        except AdapterError as error:
            raise AdapterError(f"{path.name}: {error}") from error
    if not tensors:
        raise AdapterError(f"{path.name}: the file holds no tensor at all; it was saved empty, so get it again")
    if not adapters:
        raise AdapterError(
            f"{path.name}: none of its {len(tensors)} keys fits a layer of this model, for example "
            f"{', '.join(clip(key) for key in sorted(tensors)[:3])}; it is for another architecture or method"
        )
    return adapters, sorted(unmatched), costly


def tell_lost_layers(costly: Sequence[Sequence[str]]) -> list[str]:
    """A sentence on layers that were left out for what stands beside their factors, if there are any."""
    if not costly:
        return []
    layers = "1 layer is" if len(costly) == 1 else f"{len(costly)} layers are"
    return [
        f"{layers} left out whole, as what stands beside the factors is not read and may change what "
        f"they mean: {listed([key for keys in costly for key in keys], longest=LONGEST_KEY)}"
    ]


def name_of_file(path: Path) -> str:
    """What a LoRA is called: by its file, or by its folder where a program gives all files one name."""
    folder = path.absolute().parent
    if path.stem.lower() not in GENERIC or not folder.name or folder.name.lower() in PLACES:
        return path.stem
    if CHECKPOINT.fullmatch(folder.name.lower()) and folder.parent.name:
        return f"{folder.parent.name}_{folder.name}"
    return folder.name


def imported_concept(
    path: Path, name: str | None, adapters: dict[str, LowRank], kind: str, metadata: Mapping[str, str]
) -> Concept:
    """A concept around foreign adapters; what the file says of itself is kept as its origin."""
    rank, _ = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0]
    alpha, _ = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0]
    base = {key: metadata[key][:200] for key in ("ss_base_model_version", "ss_sd_model_name") if key in metadata}
    title = "".join(letter for letter in name or name_of_file(path) if letter.isprintable())[:100].strip() or "imported"
    recipe = Recipe(
        method="lora",
        rank=rank,
        alpha=alpha,
        architecture=architecture_said(metadata),
        triggers=triggers_said(metadata),
        origin={"imported_from": kind, **base},
    )
    return Concept(title, adapters, {}, recipe, about_of(metadata, title))


def require_layers(concept: Concept) -> None:
    """A LoRA file holds adapters; a concept of learned words alone has none to give."""
    if not concept.layers:
        raise AdapterError(f"{concept.name}: the concept has no adapters; export its learned words as embeddings")


def _numbers(what: str, tensor: Tensor) -> Tensor:
    """A factor as floating numbers: whole ones, and eight-bit ones, read exactly as single precision."""
    if tensor.numel() == 0 or tensor.is_complex():
        raise AdapterError(f"{what} is empty, or of a type that is not read; save it in float32 or float16")
    tensor = tensor if tensor.dtype in (DTYPES[name] for name in FLOATS) else tensor.float()
    check_finite(what, tensor)
    return tensor


def _adapter(name: str, factors: Mapping[str, Tensor]) -> LowRank:
    up, down, mid = factors["up"], factors["down"], factors.get("mid")
    if "alpha" in factors and factors["alpha"].numel() != 1:
        raise AdapterError(f"{name}: alpha has shape {tuple(factors['alpha'].shape)}; it must be one number")
    if up.dim() == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    # By the rank of lora_down, also where a middle factor has another: so LyCORIS and the host scale.
    rank = down.shape[0] if down.dim() else 0
    alpha = float(factors["alpha"]) if "alpha" in factors else float(rank)
    if mid is not None:
        down = joined_with_middle(name, mid, down)
        alpha = alpha if len(down) == rank else alpha * len(down) / rank
    adapter = LowRank(up.contiguous(), down.contiguous(), alpha, "lora", None, up.shape[0] if up.dim() else 0)
    check_adapter(name, adapter)
    check_size(name, adapter)
    return adapter


def joined_with_middle(name: str, mid: Tensor, down: Tensor) -> Tensor:
    """LoCon's middle convolution and its lora_down (rank, in, 1, 1) as one lora_down (rank, in, kh, kw), exactly."""
    flat = down.flatten(1) if down.dim() > 1 else down
    fits = mid.dim() == 4 and flat.dim() == 2 and mid.shape[1] == len(flat)
    fits = fits and max(mid.shape[2:]) <= MAX_KERNEL and (down.dim() == 2 or down.shape[2:] == (1, 1))
    # No larger than a kernel makes it, so that a small file cannot ask for much memory.
    if not fits or mid.shape[0] * flat.shape[1] > mid.numel() + flat.numel():
        raise AdapterError(
            f"{name}: lora_mid {tuple(mid.shape)} does not fit lora_down {tuple(down.shape)}; the file is damaged or "
            "of a kind that is not read"
        )
    dtype = torch.promote_types(flat.dtype, torch.float32)
    return torch.einsum("abhw,bi->aihw", mid.to(dtype), flat.to(dtype))
