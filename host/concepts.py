"""Concept files among the host's models: found by name, loaded, and saved as concepts or for other programs."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import folder_paths

from ..modular_concepts.concept import Concept
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.files.concept import KEY, load_concept, save_concept
from ..modular_concepts.files.embeddings import export_embedding
from ..modular_concepts.files.kohya import export_kohya, import_kohya
from ..modular_concepts.files.moments import SUFFIX as MOMENTS
from ..modular_concepts.files.safe import read_header, safe_child, safe_name
from ..modular_concepts.merged import merged_concept
from .folders import names, path_of

SUFFIX = ".safetensors"
_FILES: weakref.WeakKeyDictionary[Concept, Path] = weakref.WeakKeyDictionary()


class Format(Enum):
    """How a concept is written: full, compact, or as a LoRA and embeddings for other programs."""

    CONCEPT = 0
    COMPACT = 1
    LORA = 2


@dataclass(frozen=True)
class Saved:
    """name: as the host's loaders list the file; message: what was written, for a person."""

    name: str
    message: str


# -- reading


def concept_names() -> list[str]:
    """What models/concepts holds, without what lies there beside a concept."""
    return [name for name in names("concepts") if not name.endswith(MOMENTS)]


def concept_problem(name: str | None) -> str:
    """Why a concept cannot be loaded, in a sentence; empty if its file is there.  None: not known yet."""
    try:
        if name is not None:
            path_of("concepts", name)
    except AdapterError as error:
        return str(error)
    return ""


def file_fingerprint(name: str) -> str:
    """Changes whenever the file does, so that the host loads it anew."""
    if problem := concept_problem(name):
        return problem
    path = path_of("concepts", name)
    found = path.stat()
    return f"{path} {found.st_mtime_ns} {found.st_size}"


def load_concept_named(name: str) -> Concept:
    """A concept file of models/concepts; a plain LoRA there becomes a concept without trigger words."""
    path = path_of("concepts", name)
    if KEY in read_header(path).metadata:
        concept = load_concept(path)
    else:
        imported = import_kohya(path)
        if imported.unmatched:
            logging.warning("%s: no place for %s", name, ", ".join(imported.unmatched))
        concept = imported.concept
    _FILES[concept] = path
    return concept


def file_of(concept: Concept) -> Path | None:
    """The file that this very concept was loaded from, or None for one that was made or changed since."""
    return _FILES.get(concept)


# -- writing


def save(concepts: Sequence[Concept], strengths: Sequence[float], filename: str, form: Format, replace: bool) -> Saved:
    """Write one concept, or the exact merge of several, under a name of the user's or the concept's own."""
    typed = filename.strip().replace("\\", "/").removesuffix(SUFFIX)
    title = typed.rpartition("/")[2] or "+".join(concept.name for concept in concepts)
    concept = concepts[0] if list(strengths) == [1.0] else merged_concept(title[:100], concepts, strengths)
    if form is Format.LORA:
        return _save_lora(concept, typed or concept.name, replace)
    folder, path = _target("concepts", typed or concept.name)
    path = path if replace else _free(path)
    save_concept(concept, path, compact=form is Format.COMPACT)
    return _saved(folder, path, f"trigger words: {' '.join(concept.tokens) or 'none'}")


def _save_lora(concept: Concept, typed: str, replace: bool) -> Saved:
    """The layers in models/loras, the words in models/embeddings; words alone, as Textual Inversion's, only there."""
    folder, path = _target("loras" if concept.layers else "embeddings", typed)
    words = list(concept.tokens)
    _, beside = _target("embeddings", path.stem)

    def embeddings(stem: str) -> list[Path]:
        return [beside.with_name(f"{stem}{f'-{safe_name(w)}' if len(words) > 1 else ''}{SUFFIX}") for w in words]

    if not replace:
        path = _free(path, lambda free: any(file.exists() for file in embeddings(free.stem)))
    written = embeddings(path.stem)
    if concept.layers:
        export_kohya(concept, path)
    else:
        path = written[0]
    for word, file in zip(words, written, strict=True):
        export_embedding(concept, word, file)
    return _saved(folder, path, " ".join(f"{w} is embedding:{f.stem}" for w, f in zip(words, written, strict=True)))


def _target(kind: str, typed: str) -> tuple[Path, Path]:
    """(the kind's folder, a file in it that may be written); folders of the name are made."""
    folder = Path(folder_paths.get_folder_paths(kind)[0]).resolve()
    path = safe_child(folder, typed)
    path = path.with_name(safe_name(path.name) + SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"{path.parent}: the folder cannot be made ({error.strerror})") from error
    return folder, path


def _free(path: Path, taken=lambda path: False) -> Path:
    """The path itself, or with the first number from 2 on that no file has."""
    number, free = 1, path
    while free.exists() or taken(free):
        number += 1
        free = path.with_name(f"{path.stem}_{number}{SUFFIX}")
    return free


def _saved(folder: Path, path: Path, more: str) -> Saved:
    name = path.relative_to(folder).as_posix()
    return Saved(name, f"{folder.name}/{name}\n{more}".strip())
