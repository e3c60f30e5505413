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
_OPEN: list[Bar] = []


class Interruption:
    """Within the block the first Ctrl-C is only noted, so that a step is finished; the second one acts at once.

    So are the system's own ways to end a process, as when its terminal is closed.
    """

    def __enter__(self) -> Interruption:
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
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
    """While a command runs Ctrl-C is KeyboardInterrupt, and remembered: a library may make another error of it."""

    def __enter__(self) -> Interrupts:
        self.asked, self.before = False, None
        # Whoever started the command may have made it deaf to Ctrl-C, as shells do in the background.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) not in DEAF:
            self.before = signal.signal(signal.SIGINT, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _raise(self, *_: object) -> None:
        self.asked = True
        raise KeyboardInterrupt


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
