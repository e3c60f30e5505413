"""A learned word: as loud as its concept, told from another of its name, and back to its class word."""

from __future__ import annotations

import torch
from laws import EFFECT, relative_error, seeded
from untrained_toy import filled_concept

from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.merging.compatibility import learned_words
from modular_concepts.text.learned_word import LearnedWord, layers_of

ROWS = torch.randn(3, 2, 8, generator=seeded(1))
CLASS = torch.randn(1, 8, generator=seeded(2))


def test_a_word_fades_to_its_class_word_and_keeps_what_it_was():
    word = LearnedWord("<tom>", ROWS, "man")
    half, silent = word.faded(0.5, CLASS), word.faded(0.0, CLASS)
    assert torch.equal(silent.rows, CLASS.expand_as(ROWS))
    assert relative_error(half.rows, (ROWS + CLASS) / 2) < 1e-6 and relative_error(half.rows, ROWS) > EFFECT
    assert half.at_full_strength is ROWS and (half.trigger, half.class_word) == ("<tom>", "man")
    assert half.faded(1.0, CLASS).rows.allclose(ROWS)  # from what was learned, and not from what is left of it


def test_a_word_without_rows_of_its_class_word_stays_as_it_is():
    word = LearnedWord("<tom>", ROWS)
    assert word.faded(0.0, CLASS[:0]) is word and word.faded(0.0, CLASS[:, :5]) is word


def test_rows_say_for_how_many_layers_they_are():
    assert (layers_of(ROWS), layers_of(ROWS[0])) == (3, 0)
    assert (LearnedWord("<tom>", ROWS).layers, LearnedWord("<tom>", ROWS[0]).layers) == (3, 0)


def test_a_saved_merge_hands_its_words_on_with_their_class_words():
    """As its parts did: where a text model cannot learn words it reads the class word, of a merge too."""
    parts = [filled_concept("tom", 1), filled_concept("minka", 3)]
    both = merged_concept("both", parts, [1.0, 0.4])
    alone = learned_words([(parts[0], 1.0), (parts[1], 0.4)], None)
    assert [(word.trigger, word.class_word) for word in learned_words([(both, 1.0)], None)] == [
        (word.trigger, word.class_word) for word in alone
    ]
    assert all(word.class_word for word in alone)
