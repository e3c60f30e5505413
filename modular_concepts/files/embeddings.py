"""Learned words as textual inversion files: one tensor (vectors, width) whose key is the word itself.

ComfyUI and A1111 take the only tensor whatever its key and name it after the file; diffusers takes the key as
the word.  So the key is the trigger and the file is the trigger made safe: `<kodo>` becomes
`kodo.safetensors`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..concept import Concept, check_token
from ..errors import AdapterError
from .safe import read_safetensors, safe_child, safe_name, write_safetensors


def export_embeddings(concept: Concept, folder: Path | str) -> list[Path]:
    """Write one file per learned word into `folder`; returns the files, none when nothing was learned.

    Raises AdapterError, before anything is written, for layer-wise words (no stock format holds them) and for
    two words that would share a file.
    """
    files: dict[Path, str] = {}
    for word, vectors in concept.tokens.items():
        _check_stock(word, vectors)
        path = safe_child(folder, f"{safe_name(word)}.safetensors")
        if path in files:
            raise AdapterError(f"trigger words {files[path]!r} and {word!r} would both be {path.name}; rename one")
        files[path] = word
    for path, word in files.items():
        export_embedding(word, concept.tokens[word], path)
    return list(files)


def export_embedding(word: str, vectors: Tensor, path: Path | str) -> None:
    """Write one learned word, (vectors, width).  Raises AdapterError for a layer-wise one."""
    _check_stock(word, vectors)
    write_safetensors(path, {word: vectors.float()}, {})


def _check_stock(word: str, vectors: Tensor) -> None:
    check_token(word, vectors.shape)
    if vectors.dim() != 2:
        raise AdapterError(f"trigger word {word!r} has one embedding per layer; stock embedding files hold only one")


def import_embedding(path: Path | str, word: str | None = None) -> tuple[str, Tensor]:
    """(word, vectors float32 (vectors, width)) of a textual inversion file with one tensor.

    word: how to call it; by default the tensor's key, or the file's name where the key is only A1111's
    "emb_params".
    """
    path = Path(path)
    tensors, _ = read_safetensors(path)
    if len(tensors) != 1:
        raise AdapterError(f"{path.name}: {len(tensors)} tensors; an embedding file for SD 1.5 holds exactly one")
    (key, vectors), *_ = tensors.items()
    word = word or (path.stem if key in ("emb_params", "*") else key)
    vectors = vectors.float()[None] if vectors.dim() == 1 else vectors.float()
    try:
        check_token(word, vectors.shape)
    except AdapterError as error:
        raise AdapterError(f"{path.name}: {error}") from error
    if vectors.dim() != 2:
        raise AdapterError(f"{path.name}: shape {tuple(vectors.shape)}; an embedding is (vectors, width)")
    return word, vectors
