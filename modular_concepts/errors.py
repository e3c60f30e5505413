"""The one error class for everything that a user can cause."""

import unicodedata


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


def _escaped(sign: str) -> str:
    return ascii(sign)[1:-1]
