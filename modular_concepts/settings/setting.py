"""What a setting is: one declaration, of which the engine's check, shell, nodes and docs are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, cast

from ..errors import AdapterError


@dataclass(frozen=True)
class Widget:
    """How a form shows a setting, where that does not follow from the setting itself.

    name: what the form calls it, if that is another.  least, most: where the widget ends, nearer than what works.
    step: of its arrows; round: what numbers are rounded to.  advanced: shown only to those who ask for more.
    """

    name: str = ""
    least: float | None = None
    most: float | None = None
    step: float | None = None
    round: float | None = None
    advanced: bool | None = None


@dataclass(frozen=True)
class Setting:
    """One thing that a person can choose.

    kind: bool, int, float or str.  default: where it is None, None is a value: it is left out, and `without` holds.
    help: what it is, with neither capital nor full stop; a tooltip begins with it.  more: what a tooltip goes on with.
    in_shell: what the shell's help goes on with.
    choices: the words there are.  least, most: bounds that are values too; above, below: such as are none.
    never: a value within the bounds that cannot work.  why: what else happens at `below`.  must: a refusal in its own
    words.
    read_by: the methods that read it, all if empty.  needs: what has to be there besides (see `unread.py`).
    widget: None for what no form asks.
    """

    name: str
    kind: type
    default: Any
    help: str
    more: str = ""
    in_shell: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    never: float | None = None
    why: str = ""
    must: str = ""
    without: str = "none"
    read_by: tuple[str, ...] = ()
    needs: str = ""
    widget: Widget | None = Widget()

    @property
    def tooltip(self) -> str:
        return f"{self.opening}{self.more}"

    @property
    def opening(self) -> str:
        """The help as the beginning of a text; a choice is no word to write large."""
        first = self.help.split()[0].rstrip(":")
        return self.help if first in self.choices else f"{self.help[0].upper()}{self.help[1:]}"

    @property
    def widget_name(self) -> str:
        return self.widget.name or self.name if self.widget else self.name

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Where a widget ends: nearer than what works, where it says so."""
        shown = self.widget or Widget()
        least = self.least if shown.least is None else shown.least
        return least, self.most if shown.most is None else shown.most

    @property
    def is_number(self) -> bool:
        return self.kind in (int, float)

    @property
    def reach(self) -> str:
        """The bounds as a refusal ends with them: from 0 to 1."""
        return f"from {self.least:g} to {self.most:g}"

    def check(self, value: object, called: str = "") -> None:
        """Raise AdapterError, with what it has to be, for a value that cannot work.

        called: the setting as the person knows it, `--prior` for instance.
        """
        if value is None and self.default is None:
            return
        if must := self._find_fault(value):
            shown = repr(value) if not isinstance(value, Real) else f"{value:g}" if self.must else str(value)
            raise AdapterError(f"{called or self.name} is {shown}; {must}")

    def allows(self, number: float) -> bool:
        """Whether a number lies within the bounds."""
        return (
            number == number
            and abs(number) != math.inf
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
            and number != self.never
        )

    def _find_fault(self, value: object) -> str:
        """What the value would have to be, or "" where it is."""
        if self.choices:
            return "" if value in self.choices else f"choose one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "" if isinstance(value, bool) else "it must be true or false"
        if self.kind is str:
            return "" if isinstance(value, str) else "it must be text"
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind is int else Real):
            return "it must be a whole number" if self.kind is int else "it must be a number"
        number = cast(float, value)  # of any size: a seed is larger than what a float tells apart
        return "" if self.allows(number) else self.must or self._say_bound(number)

    def _say_bound(self, number: float) -> str:
        """The bound that a number does not keep."""
        if self.most is not None and number > self.most:
            return f"it can be at most {self.most}"
        if self.below is not None and number >= self.below:
            return f"it must be below {self.below:g}, or {self.why}"
        if self.least is not None:
            return f"it must be at least {self.least}" if self.least else "it must be 0 or a positive number"
        if self.above is not None:
            return "it must be positive, or left out" if self.default is None else "it must be a positive number"
        return "it must be a finite number"


def group(*settings: Setting) -> dict[str, Setting]:
    """Settings by their names."""
    return {setting.name: setting for setting in settings}
