"""Concept files among the host's models: found by name, loaded, and saved as concepts or for other programs."""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import folder_paths

from ...modular_concepts.concept import Concept
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.files.concept import save_concept
from ...modular_concepts.files.diffusers import export_diffusers
from ...modular_concepts.files.embeddings import export_embedding
from ...modular_concepts.files.kohya import export_kohya
from ...modular_concepts.files.lora import read_concept
from ...modular_concepts.files.modelspec import dated, saying, trigger_phrase
from ...modular_concepts.files.moments import FORMER, is_moments
from ...modular_concepts.merging.as_concept import merged_concept
from ...modular_concepts.storage.atomic import all_or_none
from ...modular_concepts.storage.keeping import Kept, free_name, keep, last_places
from ...modular_concepts.storage.names import resolved, safe_child, safe_name
from ..messages import show_text
from .folders import names, path_of

SUFFIX = ".safetensors"
KEEP_BYTES = 2**29  # of files, the longest unused go first
_FILES: weakref.WeakKeyDictionary[Concept, Path] = weakref.WeakKeyDictionary()
_KEPT: dict[tuple[Path, int, int], tuple[Concept, str]] = {}


class Format(Enum):
    """How a concept is written: full, compact, or as a LoRA and embeddings for other programs, in whose keys."""

    CONCEPT = 0
    COMPACT = 1
    LORA = 2
    DIFFUSERS = 3


EXPORTS = {Format.LORA: export_kohya, Format.DIFFUSERS: export_diffusers}


@dataclass(frozen=True)
class Saved:
    """name: as the host's loaders list the file; message: what was written, for a person."""

    name: str
    message: str


# -- reading


def concept_names() -> list[str]:
    """What models/concepts holds, without moments that lie there beside a concept under their former name."""
    return [name for name in names("concepts") if not (name.endswith(FORMER) and is_moments(path_of("concepts", name)))]


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
    stat = path.stat()
    return f"{path} {stat.st_mtime_ns} {stat.st_size}"


def load_concept_named(name: str) -> Concept:
    """A concept file of models/concepts, or a LoRA there as a concept, with the learned words that came in its file.

    Kept until it changes on the disk, so that a strength that is changed reads nothing again.
    """
    path = path_of("concepts", name)
    stat = path.stat()
    key = (path, stat.st_mtime_ns, stat.st_size)
    if key not in _KEPT:
        imported = read_concept(path)
        _FILES[imported.concept] = path
        _KEPT[key] = (imported.concept, "\n".join(imported.notes(path.name)))
        while len(_KEPT) > 1 and sum(size for _, _, size in _KEPT) > KEEP_BYTES:
            del _KEPT[next(iter(_KEPT))]
    _KEPT[key] = _KEPT.pop(key)
    concept, text = _KEPT[key]
    if text:
        logging.warning("%s", text)
        show_text(text)
    return concept


def file_of(concept: Concept) -> Path | None:
    """The file that this very concept was loaded from, or None for one that was made or changed since."""
    return _FILES.get(concept)


# -- writing


def save(
    concepts: Sequence[Concept],
    strengths: Sequence[float],
    filename: str,
    form: Format,
    replace: bool,
    about: Mapping[str, str] | None = None,
) -> Saved:
    """Write one concept, or the exact sum of several, under a name of the user's or the concept's own.

    about: what the file says of it to programs that list models; see `files/modelspec.py`.
    """
    typed = filename.strip().replace("\\", "/").removesuffix(SUFFIX)
    title = typed.rpartition("/")[2] or "+".join(concept.name for concept in concepts)
    concept = concepts[0] if list(strengths) == [1.0] else merged_concept(title[:100], concepts, strengths)
    concept = dated(saying(concept, **(about or {})))
    if form in EXPORTS:
        return _save_lora(concept, typed or concept.name, replace, EXPORTS[form])
    folder, path = _target("concepts", typed or concept.name)
    path = path if replace else _free(path)
    written = keep(partial(save_concept, concept, compact=form is Format.COMPACT), path, _other_places())
    return _saved(folder, path, typed, f"trigger words: {trigger_phrase(concept) or 'none'}", written)


def _save_lora(concept: Concept, typed: str, replace: bool, export: Callable[[Concept, Path], Path]) -> Saved:
    """The layers in models/loras, the words in models/embeddings; words alone, as Textual Inversion's, only there."""
    folder, path = _target("loras" if concept.layers else "embeddings", typed)
    words = list(concept.tokens)
    _, beside = _target("embeddings", path.stem)

    def embeddings(stem: str) -> list[Path]:
        return [beside.with_name(f"{stem}{f'-{safe_name(w)}' if len(words) > 1 else ''}{SUFFIX}") for w in words]

    if not replace:
        path = _free(path, lambda free: any(file.exists() for file in embeddings(free.stem)))
    written = embeddings(path.stem)
    called = " ".join(f"{w} is embedding:{f.stem}" for w, f in zip(words, written, strict=True))
    if called and "usage_hint" not in concept.about:
        concept = saying(concept, usage_hint=f"in ComfyUI's prompts {called}")

    path = path if concept.layers else written[0]

    def beside_lora(place: Path, word: str, file: Path) -> Path:
        return free_name(place.with_name(f"{place.stem}-{safe_name(word)}{SUFFIX}" if concept.layers else file.name))

    def write(place: Path) -> None:
        """Where the folders of models take nothing, all files lie beside each other."""
        elsewhere = place != path
        with all_or_none():
            for word, file in zip(words, written, strict=True):
                file = beside_lora(place, word, file) if elsewhere else file
                file.parent.mkdir(parents=True, exist_ok=True)
                export_embedding(concept, word, file)
            if concept.layers:
                export(concept, place)

    outcome = keep(write, path, _other_places())
    if outcome.fault is not None:
        called = f"beside it the learned words {' '.join(words)}" if words and concept.layers else ""
    return _saved(folder, path, typed, called, outcome)


def name_problem(filename: str) -> str:
    """Why a concept cannot be saved under what a person typed, in a sentence; empty if it can."""
    try:
        typed = filename.strip().replace("\\", "/").removesuffix(SUFFIX)
        if typed:
            _place(resolved(folder_paths.get_folder_paths("concepts")[0]), typed)
    except AdapterError as error:
        return str(error)
    return ""


def _target(kind: str, typed: str) -> tuple[Path, Path]:
    """(the kind's folder, a file in it that may be written)."""
    folder = resolved(folder_paths.get_folder_paths(kind)[0])
    return folder, _place(folder, typed)


def _other_places() -> list[Path]:
    """Where a concept goes that the folders of models do not take; the host's own output folder first."""
    return [Path(folder_paths.get_output_directory()), *last_places()]


def _place(folder: Path, typed: str) -> Path:
    """A file in the folder, each part of whose name every system takes; folders that are there keep theirs."""
    *above, name = safe_child(folder, typed).relative_to(folder).parts
    place = folder
    for part in above:
        # Spaces inside a folder's name are as good as underscores.
        clean = part if safe_name(part) == "_".join(part.split()) else safe_name(part)
        place = place / (part if (place / part).is_dir() else clean)
    return place / (safe_name(name) + SUFFIX)


def _free(path: Path, taken=lambda path: False) -> Path:
    """The path itself, or with the first number from 2 on that no file has."""
    number, free = 1, path
    while os.path.lexists(free) or taken(free):
        number += 1
        free = path.with_name(f"{path.stem}_{number}{SUFFIX}")
    return free


def _saved(folder: Path, path: Path, typed: str, more: str, kept: Kept) -> Saved:
    """typed: by a person; a name that some system could not take has become another, which is said."""
    if kept.fault is not None:
        where = f"{kept.fault}; it is in {kept.path} instead, from where it can be moved to {folder}"
        return Saved(str(kept.path), f"{where}\n{more}".strip())
    name = path.relative_to(folder).as_posix()
    stem = name.removesuffix(SUFFIX)
    changed = typed and stem != typed and not re.fullmatch(re.escape(typed) + r"_\d+", stem)
    why = f" ({typed!r} is no name that every system takes)" if changed else ""
    return Saved(name, f"{folder.name}/{name}{why}\n{more}".strip())
