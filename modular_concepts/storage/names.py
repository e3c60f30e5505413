"""Names of files: those that can be written on every system, and what is wrong with those that cannot."""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import os
import re
from pathlib import Path

from ..errors import AdapterError, cut_in_the_middle

RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³]) *(\..*)?", re.IGNORECASE)
FORBIDDEN = frozenset('\\:*?"<>|')  # in a name on Windows; a backslash is what stands between folders there
LONGEST_NAME = 200  # bytes: systems take 255, and a file beside it or before it has a longer name
LONGEST_PATH = 3800  # of 4096
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


def check_new_path(path: Path, option: str = "--out") -> None:
    """Raise AdapterError for a path whose parts, where they are not there yet, some system could not write."""
    text = str(path)
    if any(not letter.isprintable() and not "\ud800" <= letter <= "\udfff" for letter in text):
        raise AdapterError(
            f"{cut_in_the_middle(ascii(text), 80)} has letters that no file's name can have; choose another {option}"
        )
    if len(bytes_of(text)) > LONGEST_PATH:
        raise AdapterError(f"{cut_in_the_middle(text, 80)}: the path is too long; choose a shorter {option}")
    for number, part in enumerate(path.parts):
        if part == path.anchor:
            continue
        if fault := fault_of(part):
            there = Path(*path.parts[: number + 1])
            if len(bytes_of(part)) > 255 or not there.exists():
                raise AdapterError(f"{cut_in_the_middle(text, 80)}: {fault}; choose another {option}")


def fault_of(part: str) -> str:
    """Why one part of a path cannot be a file or folder everywhere, in words; empty if it can."""
    shown = repr(cut_in_the_middle(part, 60))
    if part in (".", ".."):
        return ""
    if len(bytes_of(part)) > LONGEST_NAME:
        return f"the name {shown} is too long, at most {LONGEST_NAME} bytes"
    if RESERVED.fullmatch(part):
        return f"the name {shown} is one that Windows keeps for itself"
    if match := re.fullmatch(r"\$\{?\w+\}?|%\w+%|~\w+", part):
        return f"the shell left {match[0]} as it stands, perhaps for its quotes"
    if letters := sorted(FORBIDDEN & set(part)):
        return f"the name {shown} has {letters[0]!r} in it, which not every system can have in a name"
    if part.endswith((".", " ")):
        return f"the name {shown} ends with a dot or a space, which Windows drops"
    return ""


def bytes_of(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def safe_name(name: str) -> str:
    """A file name, without suffix, for what a person typed: no separators, leading dots or reserved names.

    Raises AdapterError when nothing is left.
    """
    cleaned = _FORBIDDEN.sub(" ", name)
    cleaned = "".join(letter if letter.isprintable() else " " for letter in cleaned)
    cleaned = re.sub(r"\s+", "_", cleaned.strip(" .")).encode()[:120].decode(errors="ignore").strip("._ ")
    if not cleaned:
        raise AdapterError(f"name {ascii(name)[:60]}: a name needs at least one letter or digit")
    return f"_{cleaned}" if RESERVED.fullmatch(cleaned) else cleaned


def resolved(path: Path | str) -> Path:
    """The absolute path without links; a link that leads back to itself stays as it is, where others raise."""
    return Path(os.path.realpath(path))


def safe_child(folder: Path | str, name: str) -> Path:
    """`folder / name`, resolved; subfolders are fine.  Raises AdapterError when it would leave the folder."""
    root = resolved(folder)
    relative = str(name).replace("\\", "/")
    if not relative.isprintable() or not relative.strip() or re.match(r"[A-Za-z]:", relative):
        raise AdapterError(f"{cut_in_the_middle(ascii(name), 80)} is not a file name")
    if len(bytes_of(relative)) > LONGEST_PATH or any(len(bytes_of(part)) > 255 for part in relative.split("/")):
        raise AdapterError(f"{cut_in_the_middle(ascii(name), 80)} is too long for a file name; choose a shorter one")
    child = resolved(root / relative)
    if child == root or not child.is_relative_to(root):
        raise AdapterError(
            f"{cut_in_the_middle(ascii(name), 80)} leads outside the folder {root.name}; choose a name inside it"
        )
    return child


def nameable(path: Path | str) -> Path:
    """The path, to be asked whether it is there.

    Raises AdapterError for one that is longer than any system has, or has no letter that could be a name's.
    """
    path = Path(path)
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            fault = "no file can have this name" if isinstance(error, ValueError) else "the path is too long"
            raise AdapterError(f"{cut_in_the_middle(printed(str(path)), 80)}: {fault}; choose another") from error
    return path


def not_a_file(path: Path) -> str:
    """Why a path cannot be read as a file, in words."""
    if path.is_dir():
        return "this is a folder; give a file in it"
    if path.exists():
        return "this is a device or a pipe; give a plain file"
    if path.is_symlink():
        return f"this is a link to {os.readlink(path)}, which is not there"
    near = _near(path)
    if not near and set("*?") & set(path.name):
        return "there is no such file, for the shell left it as it stands; name each file"
    return f"there is no such file; perhaps {near} is meant" if near else "there is no such file"


def not_a_folder(path: Path) -> str:
    """Why a path cannot be read as a folder, in words."""
    if path.is_file():
        return "this is a file"
    slashes = Path(str(path).replace("\\", "/"))
    if slashes != path and slashes.is_dir():
        return f"there is no such folder; perhaps {slashes} is meant"
    with contextlib.suppress(OSError, ValueError):
        folders = [entry.name for entry in itertools.islice(path.parent.iterdir(), 1000) if entry.is_dir()]
        if near := difflib.get_close_matches(path.name, folders, 1, 0.65):
            return f"there is no such folder; perhaps {path.parent / near[0]} is meant"
    return "there is no such folder"


def printed(name: str) -> str:
    """A name from a file as it may stand in a sentence: with signs that a screen would not show written out."""
    return name if name.isprintable() else ascii(name)


def _near(path: Path) -> str:
    """What is there under nearly the same path: without an ending, with another system's marks, or misspelled."""
    with contextlib.suppress(OSError, ValueError):
        slashes = Path(str(path).replace("\\", "/"))
        usual = "concepts" / slashes.with_suffix(".safetensors")
        for other in (slashes, Path(f"{slashes}.safetensors"), usual):
            if other.is_file():
                return str(other)
        stems = {entry.stem: str(entry) for entry in itertools.islice(path.parent.iterdir(), 1000)}
        return stems.get(next(iter(difflib.get_close_matches(path.stem, stems, 1, 0.65)), None), "")
    return ""
