"""Paths that can be written on every system, looked at part by part before the work whose end they are."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import AdapterError

RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³]) *(\..*)?", re.IGNORECASE)
FORBIDDEN = frozenset('\\:*?"<>|')  # in a name on Windows; a backslash is what stands between folders there
LONGEST_NAME = 200  # bytes: systems take 255, and a file beside it or before it has a longer name
LONGEST_PATH = 3800  # of 4096


def check_new_path(path: Path, option: str = "--out") -> None:
    """Raise AdapterError for a path whose parts, where they are not there yet, some system could not write."""
    text = str(path)
    if any(not letter.isprintable() and not "\ud800" <= letter <= "\udfff" for letter in text):
        raise AdapterError(f"{ascii(text)[:80]} has letters that no file's name can have; choose another {option}")
    if len(bytes_of(text)) > LONGEST_PATH:
        raise AdapterError(f"{text[:40]}…: the path is too long; choose a shorter {option}")
    for number, part in enumerate(path.parts):
        if part == path.anchor:
            continue
        if fault := fault_of(part):
            there = Path(*path.parts[: number + 1])
            if len(bytes_of(part)) > 255 or not there.exists():
                raise AdapterError(f"{text[:80]}: {fault}; choose another {option}")


def fault_of(part: str) -> str:
    """Why one part of a path cannot be a file or folder everywhere, in words; empty if it can."""
    shown = repr(part if len(part) < 60 else f"{part[:50]}…")
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
