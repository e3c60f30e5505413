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
    """The first of some names in a sentence, and how many more there are; each as it can be shown anywhere.

    Names that would look alike when they are shortened are shortened less.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    some = list(islice(names, most))
    shown = [_shown(name, longest) for name in some]
    if len(set(shown)) < len(set(some)):
        shown = [_shown(name, 3 * longest) for name in some]
    return between.join(shown) + more


def cut_in_the_middle(text: str, longest: int, mark: str = "…") -> str:
    """A text of at most so many letters beside the mark: names mostly begin alike, and differ at their ends."""
    tail = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[: longest - tail]}{mark}{text[len(text) - tail :]}"


def _shown(name: str, longest: int) -> str:
    name = unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode())
    return cut_in_the_middle(name if name.isprintable() else ascii(name)[1:-1], longest)


def _escaped(sign: str) -> str:
    return ascii(sign)[1:-1]
