"""Learned words as textual inversion files: one tensor (vectors, width) whose key is the word itself.

ComfyUI and A1111 take the only tensor whatever its key and name it after the file; diffusers takes the key as
the word.  So the key is the trigger and the file is the trigger made safe: `<kodo>` becomes
`kodo.safetensors`.  For models of two text encoders (SDXL, SD3) all of them expect a key for each,
called as the encoder is.  No such file has rows for each layer: a layer-wise word becomes the mean of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..concept import Concept, check_rows, check_token
from ..errors import AdapterError
from ..families import families
from ..families.family import TextEncoder
from ..storage.names import safe_child, safe_name
from ..storage.safetensors import read_safetensors, write_safetensors
from ..text.learned_word import layers_of
from .modelspec import modelspec


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
        path = Path(folder) / f"{safe_name(word)}.safetensors"
        if path.is_symlink():
            raise AdapterError(
                f"{path} is a link, and no word is written through one; remove it, or choose another --out"
            )
        path = safe_child(folder, path.name)
        if path in files:
            raise AdapterError(f"trigger words {files[path]!r} and {word!r} would both be {path.name}; rename one")
        files[path] = word
    return files


def export_embedding(concept: Concept, word: str, path: Path | str) -> None:
    """Write one of a concept's learned words, (vectors, width) or (layers, vectors, width): see `stock_rows`."""
    vectors = concept.tokens[word]
    check_token(word, vectors.shape)
    rows = stock_rows(vectors).float().contiguous()
    encoders = _encoders_of(rows.shape[1])
    if encoders:
        columns = rows.split([encoder.width for encoder in encoders], dim=1)
        tensors = {encoder.name: columns_of.contiguous() for encoder, columns_of in zip(encoders, columns, strict=True)}
    else:
        tensors = {word: rows}
    # A manager shows the word that this file is, and not those beside it.
    alone = replace(concept, recipe=replace(concept.recipe, triggers=(word,)))
    write_safetensors(path, tensors, modelspec(alone, tensors, "textual-inversion"))


def stock_rows(vectors: Tensor) -> Tensor:
    """(vectors, width) that programs without layer-wise words can read: a layer-wise word's mean over its layers."""
    return vectors.mean(dim=0) if layers_of(vectors) else vectors


def import_embedding(path: Path | str, word: str | None = None) -> tuple[str, Tensor]:
    """(word, vectors float32 (vectors, width)) of a textual inversion file.

    It holds one tensor, or one for each of a family's text encoders, which come back side by side.
    word: how to call it; by default the tensor's key, or the file's name where the key is only A1111's
    "emb_params" or names a text encoder.
    """
    path = Path(path)
    tensors, _ = read_safetensors(path)
    for encoders in _several_encoders():
        if set(tensors) == {encoder.name for encoder in encoders}:
            tensors = {"*": _side_by_side(path, tensors, encoders)}
    if len(tensors) != 1:
        several = dict.fromkeys(" and ".join(e.name for e in encoders) for encoders in _several_encoders())
        raise AdapterError(
            f"{path.name}: {len(tensors)} tensors; an embedding file holds one, or {', or '.join(several)} for SDXL"
        )
    (key, vectors), *_ = tensors.items()
    nameless = {"emb_params", "*", *(encoder.name for encoders in _several_encoders() for encoder in encoders)}
    word = word or (path.stem if key in nameless else key)
    vectors = vectors.float()[None] if vectors.dim() == 1 else vectors.float()
    try:
        check_token(word, vectors.shape)
        check_rows(word, vectors)
    except AdapterError as error:
        raise AdapterError(f"{path.name}: {error}") from error
    if vectors.dim() != 2:
        raise AdapterError(f"{path.name}: shape {tuple(vectors.shape)}; an embedding is (vectors, width)")
    return word, vectors


def _several_encoders() -> list[Sequence[TextEncoder]]:
    """The text encoders of each family that learns its words in more than one."""
    return [family.text_encoders for family in families() if len(family.text_encoders) > 1]


def _encoders_of(width: int) -> Sequence[TextEncoder]:
    """The text encoders whose rows are so wide together, where there are several; else none."""
    fitting = (encoders for encoders in _several_encoders() if sum(one.width for one in encoders) == width)
    return next(fitting, ())


def _side_by_side(path: Path, parts: Mapping[str, Tensor], encoders: Sequence[TextEncoder]) -> Tensor:
    rows = {one.name: parts[one.name][None] if parts[one.name].dim() == 1 else parts[one.name] for one in encoders}
    shapes = " and ".join(f"{name} {tuple(part.shape)}" for name, part in rows.items())
    if any(part.dim() != 2 for part in rows.values()) or len({len(part) for part in rows.values()}) != 1:
        raise AdapterError(f"{path.name}: {shapes} are not rows of one word")
    if any(rows[one.name].shape[1] != one.width for one in encoders):
        wide = " and ".join(f"{one.width} of {one.name}" for one in encoders)
        raise AdapterError(f"{path.name}: {shapes} are not as wide as these text encoders read words: {wide}")
    return torch.cat([part.float() for part in rows.values()], dim=1)
