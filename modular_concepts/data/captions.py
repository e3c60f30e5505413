"""A caption as text: read from a file, and freed of signs that nobody sees; what is no text is named."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from ..errors import AdapterError

MAX_CAPTION = 10_000
JOINERS = "\u200c\u200d"  # inside Persian and Hindi words, and emoji of several signs


def read_caption(path: Path) -> str:
    """The caption in a UTF-8 file, in one line.  Raises AdapterError that names the file."""
    most = 4 * MAX_CAPTION
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise AdapterError(f"{path}: this caption cannot be read ({error.strerror})") from error
    try:
        # What is too long may end within a letter.
        text = data.decode("utf-8-sig", "ignore" if len(data) > most else "strict")
    except UnicodeDecodeError as error:
        kind = "UTF-16, as some editors call Unicode" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text"
        raise AdapterError(
            f"{path}: this caption is {kind} (byte {error.start + 1} is {data[error.start]:#04x}); save it as UTF-8"
        ) from error
    return checked_caption(text, str(path))


def checked_caption(text: str, where: str) -> str:
    """The caption with single spaces and without marks that mean nothing, such as zero width spaces.

    Joiners within words stay.  Raises AdapterError for one that is empty, too long, or holds what is no text.
    """
    caption = " ".join("".join(filter(_means_something, text)).split())
    caption = " ".join(word for word in (word.strip(JOINERS) for word in caption.split(" ")) if word)
    if not caption:
        raise AdapterError(f"{where}: this caption is empty; write what is in the picture, with {{concept}} in it")
    if len(caption) > MAX_CAPTION:
        raise AdapterError(f"{where}: this caption is longer than {MAX_CAPTION} letters; shorten it")
    odd = next((number for number, letter in enumerate(caption) if unicodedata.category(letter) in ("Cc", "Cs")), None)
    if odd is not None:
        raise AdapterError(
            f"{where}: letter {odd + 1} of this caption is U+{ord(caption[odd]):04X}, which is no text; take it out"
        )
    return caption


def _means_something(letter: str) -> bool:
    """Not so: soft hyphens, zero width spaces, byte order marks, marks of direction.  Tags make flags of emoji."""
    return unicodedata.category(letter) != "Cf" or letter in JOINERS or "\U000e0020" <= letter <= "\U000e007f"
