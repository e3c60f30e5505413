"""The one error class for everything that a user can cause."""

import unicodedata
from collections.abc import Collection
from itertools import islice


class AdapterError(ValueError):
    """A file, setting or input that cannot be used; the message names it and the way out.

    It is one line, whatever the names in it hold: see `in_one_line`.
    """

    # A host shows this before the message, and would put the pack's folder there.
    __module__ = "modular_concepts"

    def __str__(self) -> str:
        return in_one_line(super().__str__())


def in_one_line(text: str) -> str:
    """The text with escapes for what would break a line, move a terminal's cursor or turn the text around."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or unicodedata.category(sign) == "Zs" else _escaped(sign) for sign in text
    )


def listed(names: Collection[str], most: int = 5, between: str = ", ", longest: int = 80) -> str:
    """The first of some names in a sentence, and how many more there are; each as it can be shown anywhere."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(_shown(name, longest) for name in islice(names, most)) + more


def _shown(name: str, longest: int) -> str:
    name = unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode())
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= longest else f"{name[:longest]}…"


def _escaped(sign: str) -> str:
    return ascii(sign)[1:-1]
