"""What the commands read and write: bases, concept files and other programs' LoRAs, and paths that can be written."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import AdapterError, cut_in_the_middle, in_one_line
from ..storage.names import check_new_path, safe_name
from ..typed import read_number

if TYPE_CHECKING:
    from ..models.base import BaseModel

ENDINGS = (".safetensors", ".st")  # of a concept


def read_path(text: str) -> Path:
    """An option's path: not empty, which would mean the folder one is in, and ~ is one's home as shells have it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a path")
    return Path(os.path.expanduser(text))


def read_file(text: str) -> Path:
    """The path of a file to write, which does not end as a folder's does."""
    path = read_path(text)
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text!r} ends as a folder does; give a file in it")
    return path


def base_named(name: str) -> BaseModel:
    """The base of an option's value; loading it takes seconds."""
    from ..load import load_base

    return load_base(name)


def concepts_at(texts: Sequence[str], apart: str = "with a space between") -> tuple[list, list[float], list[Path]]:
    """(concepts, strengths, files) of FILE or FILE:STRENGTH each; also of a LoRA with kohya's or diffusers' keys.

    apart: how the command takes several.
    """
    from ..files.lora import told_apart
    from ..merging.block_strengths import check_strength

    concepts, strengths, paths = [], [], []
    texts = [os.path.expanduser(str(text)) for text in texts]
    for text, before, after in zip(texts, ["", *texts], [*texts[1:], ""], strict=False):
        path, colon, number = text.rpartition(":")
        if not text.strip() or (colon and not path.strip()):
            raise AdapterError(f"a concept is given as {text!r}, which names no file; give FILE or FILE:STRENGTH")
        try:
            strength = read_number(number) if colon and not Path(text).exists() else None
        except ValueError:
            strength = None
        if not Path(text if strength is None else path).exists():
            _refuse_misplaced(text, before, after, apart)
        if strength is not None:
            check_strength(text, strength)
        paths.append(Path(text if strength is None else path))
        concepts.append(concept_at(paths[-1]))
        strengths.append(1.0 if strength is None else strength)
    named = told_apart([concept.name for concept in concepts], paths)
    concepts = [c if c.name == name else replace(c, name=name) for c, name in zip(concepts, named, strict=True)]
    return concepts, strengths, paths


def _refuse_misplaced(text: str, before: str, after: str, apart: str) -> None:
    """Raise AdapterError where a strength is written as none is read, with the way to write it.

    text: what is no file; before, after: its neighbours, the file of which it is the strength, or that strength.
    """
    if (strength := _guess_number(text)) is not None:
        file = before.rstrip(":= ") if Path(before.rstrip(":= ")).is_file() else "FILE"
        raise AdapterError(
            f"{text!r} is no file; a strength stands behind its file and a colon, without a space: {file}:{strength}"
        )
    for mark in re.finditer(r"[:=@*;,+&|\s]", text):
        file, tail = text[: mark.start()], text[mark.start() :]
        if Path(file).is_file() and Path(tail[1:].strip()).is_file():
            raise AdapterError(f"{text}: these are two files; give them {apart}")
        if Path(file).is_file():
            meant = [_guess_number(part) for part in re.split(r"[:=@*;\s]+", tail) if part]
            written = dict.fromkeys(number or "0.8" for number in meant or [_guess_number(after)])
            example = " or ".join(f"{file}:{number}" for number in written)
            raise AdapterError(f"{text}: {tail.removeprefix(':')!r} is no strength; write {example}, for example")


def _guess_number(text: str) -> str | None:
    """A strength as it is read, of one that may be written with a decimal comma or in percent."""
    plain, percent, _ = text.strip().replace(",", ".").partition("%")
    try:
        number = read_number(plain) / (100 if percent else 1)
    except ValueError:
        return None
    return f"{number:g}" if math.isfinite(number) else None


def load_plain_concepts(texts: Sequence[str], command: str) -> tuple[list, list[Path]]:
    """(concepts, files) for a command that takes them as they are; refuses a strength, which it would not use."""
    concepts, _, paths = concepts_at(texts)
    for text, path in zip(texts, paths, strict=True):
        if path != Path(os.path.expanduser(text)):
            raise AdapterError(
                f"{text}: {command} takes a concept as it is, without a strength; give {path}, or write it at that "
                f"strength first: merge {text} --out FILE"
            )
    return concepts, paths


def concept_at(path: Path):
    """A concept file, or a LoRA with kohya's or diffusers' keys; what finds no place in it is said key by key."""
    from ..files.lora import read_concept

    imported = read_concept(path)
    for sentence in imported.notes(path.name):
        note(sentence)
    return imported.concept


def check_folder_place(path: Path, option: str) -> None:
    """Raise AdapterError where a folder neither is nor can be made; it is not made yet, for the work may be refused."""
    check_new_path(path, option)
    if files := [place for place in (path, *path.parents) if os.path.lexists(place) and not place.is_dir()]:
        raise AdapterError(f"the folder {path} cannot be made: {files[-1]} is a file; choose another {option}")
    there = next((place for place in (path, *path.absolute().parents) if place.is_dir()), None)
    if there is None or not os.access(there, os.W_OK):
        raise AdapterError(f"you have no permission to write in {there or path}; choose another {option}")


def folder(path: Path, option: str = "--out") -> Path:
    """Made where it is not there yet."""
    check_folder_place(path, option)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"the folder {path} cannot be made: {error.strerror}; choose another {option}") from error
    return path


def add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace what is there under the same name")


def take_free_names(overwrite: bool) -> AbstractContextManager[None]:
    """Within the block files are written under free names alone, unless they may replace what is there."""
    from ..storage.atomic import only_new

    return nullcontext() if overwrite else only_new()


def check_concept_output(path: Path, overwrite: bool = True) -> None:
    """`check_output` of a file that other programs know a concept by."""
    from ..storage.safetensors import is_text

    if not is_text(path):
        raise AdapterError(
            f"{path}: a name in this path is no UTF-8, by which most programs could not read it; choose another --out"
            + (
                ""
                if sys.getfilesystemencoding() == "utf-8"
                else ", or set PYTHONUTF8=1, for names are read as ASCII here"
            )
        )
    if not path.is_dir() and path.suffix.lower() not in ENDINGS:
        raise AdapterError(f"{path}: a concept is written as {ENDINGS[0]}; give --out such an ending")
    check_output(path, overwrite)


def check_output(path: Path, overwrite: bool = True) -> None:
    """Refuse before the work begins what could not be written after it, or would replace something unasked."""

    check_new_path(path)
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; give --out a file name")
    parent = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), None)
    if parent is None or not parent.is_dir():
        raise AdapterError(f"{path} cannot be written: {parent} is not a folder; choose another --out")
    if not os.access(parent, os.W_OK):
        raise AdapterError(f"{path} cannot be written: you have no permission in {parent}; choose another --out")
    if os.path.lexists(path) and not overwrite:
        refuse_existing(path)


def refuse_existing(path: Path) -> NoReturn:
    if path.is_symlink() and not path.exists():
        raise AdapterError(f"{path} is a link to nothing; choose another --out, or replace the link with --overwrite")
    raise AdapterError(f"{path} is there already; choose another --out, or replace it with --overwrite")


def check_name(typed: str, option: str = "--name") -> str:
    """The name that a file and a trigger word can have; said where it is not the one that was typed."""

    name = safe_name(typed)
    if name != typed:
        shown = cut_in_the_middle(typed, 60)
        note(f"{option} {shown!r} is not a name that every file and prompt can have; it is {name!r} here")
    return name


def note_repeated(args: argparse.Namespace) -> None:
    """Say which options were typed twice, and which of their values count."""
    for sentence in getattr(args, "repeated", ()):
        note(sentence)


def say(sentence: str) -> None:
    """One line of what a command has to say; what stands in files cannot move the terminal's cursor."""
    print(in_one_line(sentence))


def note(sentence: str) -> None:
    """Something to know that is no fault, on the error stream."""
    print(f"note: {in_one_line(sentence)}", file=sys.stderr)
