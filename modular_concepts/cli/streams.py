"""The streams that a shell hands over: closed, broken off by who read them, on a full disk, or short of letters."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from types import TracebackType
from typing import TextIO


class Streams:
    """Within the block the work goes on whatever becomes of what is printed about it.

    A stream that is closed would lend its number to the first file that is opened, so it leads nowhere instead.
    Letters that a stream cannot hold are escaped.
    """

    def __enter__(self) -> Streams:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115 - open as long as the process
        self.before = sys.stdout, sys.stderr
        for stream in self.before:
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        sys.stdout, sys.stderr = map(_Patient, self.before)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises SystemExit(2) where what was to be printed is lost, unless it was who read it that left."""
        out = sys.stdout
        for stream in (out, sys.stderr):
            stream.flush()
        fault: OSError | None = getattr(out, "fault", None)
        if fault is not None and not isinstance(fault, BrokenPipeError):
            sys.stderr.write(f"error: what there was to say could not be written: {fault.strerror}\n")
            if error is None or (isinstance(error, SystemExit) and not error.code):
                raise SystemExit(2)


class _Patient:
    """A stream whose first fault is kept, and which then leads nowhere."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            return self._give_up(error)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> int:
        self.fault = self.fault or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        return 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)
