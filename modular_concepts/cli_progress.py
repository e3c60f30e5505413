"""What a person sees and does while a command works: a progress bar, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading


class Interruption:
    """Within the block the first Ctrl-C is only noted, so that a step is finished; the second one acts at once."""

    def __enter__(self) -> Interruption:
        self.asked = False
        self.in_main = threading.current_thread() is threading.main_thread()
        if self.in_main:
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_main:
            signal.signal(signal.SIGINT, self.before)

    def __call__(self) -> bool:
        return self.asked

    def _note(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        print("stopping after this step; once more to stop at once", file=sys.stderr)


class Bar:
    """A progress bar that appears with the first step; call it with the amount done so far."""

    def __init__(self, text: str, total: int):
        self.text, self.total, self.bar = text, total, None

    def __call__(self, done: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=self.total, desc=self.text, dynamic_ncols=True, mininterval=0.5)
        self.bar.update(done - self.bar.n)
        if done >= self.total:
            self.bar.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
