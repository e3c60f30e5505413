"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Generator, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from ..errors import AdapterError, cut_in_the_middle

# Of `all_or_none`: temporary files and the names that they will take.
_WAITING: ContextVar[list[tuple[Path, Path]] | None] = ContextVar("waiting", default=None)
_ONLY_NEW: ContextVar[bool] = ContextVar("only new", default=False)


class Taken(AdapterError):
    """Within `only_new`, a file has the name that another was to take."""


@contextlib.contextmanager
def only_new() -> Generator[None]:
    """Within the block `replacing` takes free names alone: what has appeared under one meanwhile stays as it is.

    For a name that was found free before the work: it may be another's by its end.  `Taken` says so.
    """
    token = _ONLY_NEW.set(True)
    try:
        yield
    finally:
        _ONLY_NEW.reset(token)


@contextlib.contextmanager
def replacing(path: Path | str) -> Generator[BinaryIO]:
    """Write `path` whole or not at all: temporary file in the same folder, fsync, rename.

    If the body raises, or the disk is full, the old file stays as it was and the temporary one is removed.
    Inside `all_or_none` the rename waits for its end.
    Raises AdapterError, in words, for what the system refuses.
    """
    path, waiting = Path(path), _WAITING.get()
    if not path.name or "\0" in str(path):
        raise AdapterError(f"{cut_in_the_middle(str(path), 80)!r} is no file's name; choose one to write to")
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        if waiting is not None:
            waiting.append((temporary, path))
            return
        _take_name(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        if waiting is None or (temporary, path) not in waiting:
            _remove([temporary])


@contextlib.contextmanager
def all_or_none() -> Generator[None]:
    """All files that `replacing` writes within the block, or none of them: they take their names at its end.

    A file that cannot take its name brings back those before it.  Only a process that is killed between two renames
    leaves some new and some old files, each of them whole.
    """
    waiting: list[tuple[Path, Path]] = []
    token = _WAITING.set(waiting)
    try:
        try:
            yield
        finally:
            _WAITING.reset(token)
        _take_names(waiting)
    finally:
        _remove([temporary for temporary, _ in waiting])


def _take_names(waiting: Sequence[tuple[Path, Path]]) -> None:
    done: list[tuple[Path, Path | None]] = []
    try:
        for temporary, path in waiting:
            before = _second_name(path) if path.exists() and not _ONLY_NEW.get() else None
            done.append((path, before))
            _take_name(temporary, path)
        for folder in dict.fromkeys(path.parent for path, _ in done):
            sync_folder(folder)
    except BaseException as error:
        for (place, before), (temporary, _) in zip(done, waiting, strict=False):
            if before is not None:
                with contextlib.suppress(OSError):  # what cannot be brought back keeps its second name
                    os.replace(before, place)
                    _remove([before])  # which a rename to another name of the same file leaves
            elif not temporary.exists():
                _remove([place])
        if isinstance(error, OSError):
            raise AdapterError(f"{path}: cannot be written: {reason(error)}") from error
        raise
    _remove([before for _, before in done if before is not None])


def _take_name(temporary: Path, path: Path) -> None:
    if not _ONLY_NEW.get():
        os.replace(temporary, path)
        return
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: an empty file keeps the name for the moment between
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            try:
                os.replace(temporary, path)
            except OSError:
                _remove([path])
                raise
        else:
            temporary.unlink()
    except FileExistsError as error:
        raise Taken(f"{path} is there now and was not before; it stays as it is, so choose another name") from error


def _second_name(path: Path) -> Path:
    """Under which a file stays when its name goes to another."""
    before = _beside(path)
    try:
        os.link(path, before)
    except OSError:  # a file system without links
        shutil.copy2(path, before)
    return before


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; see `replacing`."""
    with replacing(path) as handle:
        handle.write(data)


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some systems cannot open a folder, and keep it safe anyway."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: OSError, work: str = "write") -> str:
    """In words; work: what was to be done to the file."""
    doing = "read it" if work == "read" else "write there"
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EFBIG: "the file would be larger than the system allows",
        errno.EDQUOT: "your disk quota is used up",
        errno.EACCES: f"you have no permission to {doing}",
        errno.EPERM: f"you have no permission to {doing}",
        errno.EROFS: "the disk is read-only",
        errno.ENOENT: "the folder does not exist",
        errno.ENOTDIR: "the folder is a file",
        errno.ENAMETOOLONG: "the name is too long",
        errno.EISDIR: "there is a folder of that name",
    }
    return reasons.get(error.errno, error.strerror or str(error))
