"""What a person sees and does while a command works: a progress bar, and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

DEAF = (signal.SIG_IGN, None)
ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # Ctrl-C, a machine that shuts down, a terminal that is closed
_OPEN: list[Bar] = []


class Interruption:
    """Within the block the first Ctrl-C is only noted, so that a step is finished; the second one acts at once.

    So are the system's own ways to end a process, as when its terminal is closed.
    """

    def __enter__(self) -> Interruption:
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in endings():
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.asked

    def hold(self) -> None:
        """From now on nothing is interrupted: what was learned is being written."""
        for number in self.before:
            signal.signal(number, lambda *_: _say("what was learned is being written, one moment"))

    def _note(self, *_: object) -> None:
        self.asked = True
        for number, handler in self.before.items():
            signal.signal(number, handler)
        _say("stopping after this step; once more to stop at once")


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(sentence, file=sys.stderr)


class Interrupts:
    """While a command runs Ctrl-C is KeyboardInterrupt, and remembered: a library may make another error of it.

    So are the system's own ways to end a process.
    """

    def __enter__(self) -> Interrupts:
        self.asked, self.before = False, {}
        # Whoever started the command may have made it deaf to them, as shells do in the background.
        if threading.current_thread() is threading.main_thread():
            for number in endings():
                self.before[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _raise(self, *_: object) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def end(self) -> None:
        """The command has ended for one; what is said about that is said whole."""
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)


def endings() -> list[int]:
    """Signals that ask a process to end, and to which it is not deaf."""
    numbers = (getattr(signal, name, None) for name in ENDINGS)
    return [number for number in numbers if number is not None and signal.getsignal(number) not in DEAF]


class Bar:
    """A progress bar that appears with the first step; call it with the amount done so far."""

    def __init__(self, text: str, total: int):
        self.text, self.total = text, total
        self.bar: tqdm | None = None

    def __call__(self, done: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            _OPEN.append(self)
            self.bar = tqdm(total=self.total, desc=self.text, dynamic_ncols=True, mininterval=0.5)
        self.bar.update(done - self.bar.n)
        if done >= self.total:
            self.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None and self in _OPEN:
            _OPEN.remove(self)
            self.bar.close()


def close_bars() -> None:
    """So that what is said next has a line of its own."""
    for bar in list(_OPEN):
        bar.close()
