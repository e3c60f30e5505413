"""Captions are text of any script; marks that nobody sees fall away, and what is no text is named with its place."""

import random

import pytest

from modular_concepts.data.captions import MAX_CAPTION, checked_caption, read_caption
from modular_concepts.data.dataset import of_pictures
from modular_concepts.errors import AdapterError

READ = {
    "emoji of several signs": ("a {concept} \U0001f469\u200d\U0001f680 on the beach",) * 2,
    "a flag of tags": ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f flag",) * 2,
    "Persian": ("\u0639\u06a9\u0633 {concept} \u0645\u06cc\u200c\u062e\u0646\u062f\u062f",) * 2,
    "a sign newer than this Python": ("a \U0001fae9 face",) * 2,
    "zero width space": ("a {con\u200bcept}\u200b on the beach", "a {concept} on the beach"),
    "soft hyphen": ("the sea\u00adside", "the seaside"),
    "inner byte order mark": ("a {concept},\ufeff beach", "a {concept}, beach"),
    "marks of direction": ("\u202ba\u202c \u2067man\u2069\u200e", "a man"),
    "word joiner": ("sea\u2060side", "seaside"),
    "joiners at the edge of a word": ("a \u200dman\u200c \u200d here", "a man here"),
    "spaces of all kinds": (" a\u00a0man\u3000on\u2028the\r\nbeach\t", "a man on the beach"),
}
REFUSED = {
    "": "is empty",
    " \n": "is empty",
    "\u200b\u00ad\ufeff": "is empty",
    "a" * (MAX_CAPTION + 1): f"longer than {MAX_CAPTION} letters",
    "a \0 man": r"letter 3 of this caption is U\+0000, which is no text",
    "\x1b[31mred": r"letter 1 of this caption is U\+001B",
    "a man\ud800": r"letter 6 of this caption is U\+D800",
}


@pytest.mark.parametrize("kind", READ)
def test_text_is_read_and_marks_that_mean_nothing_fall_away(tmp_path, kind):
    text, caption = READ[kind]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read_caption(tmp_path / "a.txt") == caption


@pytest.mark.parametrize("text", REFUSED)
def test_each_reason_has_a_sentence_of_its_own(text):
    with pytest.raises(AdapterError, match=REFUSED[text]) as caught:
        checked_caption(text, "a.txt")
    words = ("is empty", "longer than", "which is no text")
    assert sum(word in str(caught.value) for word in words) == 1 and "\n" not in str(caught.value)


def test_a_file_is_read_no_further_than_a_caption_may_be_long(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write("人".encode() * 20_000)
        file.truncate(2**34)
    with pytest.raises(AdapterError, match="longer than"):
        read_caption(path)


@pytest.mark.parametrize(("data", "words"), [("ä".encode("utf-16"), "UTF-16"), (b"caf\xe9", "byte 4 is 0xe9")])
def test_other_encodings_are_named(tmp_path, data, words):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(AdapterError, match=words):
        read_caption(tmp_path / "a.txt")


def test_any_bytes_are_a_caption_or_one_sentence(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.txt"  # noqa: S311 - a sample, no secret
    for _ in range(200):
        path.write_bytes(rng.randbytes(rng.randrange(60)))
        try:
            assert read_caption(path).strip()
        except AdapterError as error:
            assert "a.txt: " in str(error) and "\n" not in str(error)


def test_a_line_on_the_node_is_named_by_its_number():
    import torch

    with pytest.raises(AdapterError, match="line 2: letter 1 of this caption"):
        of_pictures([torch.ones(3, 16, 16)] * 2, ["a man", "\0"], None, (16, 16))
