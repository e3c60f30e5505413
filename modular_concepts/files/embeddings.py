"""Learned words as textual inversion files: one tensor (vectors, width) whose key is the word itself.

ComfyUI and A1111 take the only tensor whatever its key and name it after the file; diffusers takes the key as
the word.  So the key is the trigger and the file is the trigger made safe: `<kodo>` becomes
`kodo.safetensors`.  For models of two text encoders (SDXL, SD3) all of them expect the keys clip_l and clip_g.
No such file has rows for each layer: a layer-wise word becomes the mean of its layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..concept import Concept, check_rows, check_token
from ..errors import AdapterError
from .modelspec import modelspec
from .safe import read_safetensors, safe_child, safe_name, write_safetensors

CLIP_L, CLIP_G = 768, 1280


def export_embeddings(concept: Concept, folder: Path | str) -> list[Path]:
    """Write one file per learned word into `folder`; returns the files, none when nothing was learned.

    Raises AdapterError, before anything is written, for two words that would share a file.
    """
    files = embedding_files(concept, folder)
    for path, word in files.items():
        export_embedding(concept, word, path)
    return list(files)


def embedding_files(concept: Concept, folder: Path | str) -> dict[Path, str]:
    """The file of each learned word.  Raises AdapterError for two words that would share one."""
    files: dict[Path, str] = {}
    for word, vectors in concept.tokens.items():
        check_token(word, vectors.shape)
        path = safe_child(folder, f"{safe_name(word)}.safetensors")
        if path in files:
            raise AdapterError(f"trigger words {files[path]!r} and {word!r} would both be {path.name}; rename one")
        files[path] = word
    return files


def export_embedding(concept: Concept, word: str, path: Path | str) -> None:
    """Write one of a concept's learned words, (vectors, width) or (layers, vectors, width): see `stock_rows`."""
    vectors = concept.tokens[word]
    check_token(word, vectors.shape)
    rows = stock_rows(vectors).float().contiguous()
    if rows.shape[1] == CLIP_L + CLIP_G:
        left, right = rows.split((CLIP_L, CLIP_G), dim=1)
        tensors = {"clip_l": left.contiguous(), "clip_g": right.contiguous()}
    else:
        tensors = {word: rows}
    # A manager shows the word that this file is, and not those beside it.
    alone = replace(concept, recipe=replace(concept.recipe, triggers=(word,)))
    write_safetensors(path, tensors, modelspec(alone, tensors, "textual-inversion"))


def stock_rows(vectors: Tensor) -> Tensor:
    """(vectors, width) that programs without layer-wise words can read: a layer-wise word's mean over its layers."""
    return vectors.mean(dim=0) if vectors.dim() == 3 else vectors


def import_embedding(path: Path | str, word: str | None = None) -> tuple[str, Tensor]:
    """(word, vectors float32 (vectors, width)) of a textual inversion file.

    It holds one tensor, or clip_l and clip_g, which come back side by side.
    word: how to call it; by default the tensor's key, or the file's name where the key is only A1111's
    "emb_params" or names a text encoder.
    """
    path = Path(path)
    tensors, _ = read_safetensors(path)
    if set(tensors) == {"clip_l", "clip_g"}:
        tensors = {"*": _side_by_side(path, tensors["clip_l"], tensors["clip_g"])}
    if len(tensors) != 1:
        raise AdapterError(
            f"{path.name}: {len(tensors)} tensors; an embedding file holds one, or clip_l and clip_g for SDXL"
        )
    (key, vectors), *_ = tensors.items()
    word = word or (path.stem if key in ("emb_params", "*") else key)
    vectors = vectors.float()[None] if vectors.dim() == 1 else vectors.float()
    try:
        check_token(word, vectors.shape)
        check_rows(word, vectors)
    except AdapterError as error:
        raise AdapterError(f"{path.name}: {error}") from error
    if vectors.dim() != 2:
        raise AdapterError(f"{path.name}: shape {tuple(vectors.shape)}; an embedding is (vectors, width)")
    return word, vectors


def _side_by_side(path: Path, left: Tensor, right: Tensor) -> Tensor:
    left, right = (part[None] if part.dim() == 1 else part for part in (left, right))
    if left.dim() != 2 or right.dim() != 2 or len(left) != len(right):
        raise AdapterError(
            f"{path.name}: clip_l {tuple(left.shape)} and clip_g {tuple(right.shape)} are not rows of one word"
        )
    return torch.cat([left.float(), right.float()], dim=1)
