"""Ordinary captions: what people ask pictures of, for a merge that must leave all other text as it is.

Every noun in three of the templates; fixed, so that the same base gives the same merge everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import listed

_NOUNS = """
man, woman, child, person, girl, boy, family, crowd, musician, chef, soldier, dancer, dog, cat, horse, bird,
fish, elephant, butterfly, bear, sheep, lion, house, castle, church, bridge, tower, street, kitchen, bedroom,
office, garden, farm, car, train, bicycle, boat, airplane, bus, truck, spaceship, robot, tree, flower,
mountain, lake, river, forest, beach, desert, waterfall, sunset, storm, chair, table, lamp, book, clock,
bottle, phone, toy, sofa, mirror, cake, pizza, apple, bowl of soup, cup of coffee, red dress, blue shirt, hat,
pair of shoes, sign, statue, city skyline
"""
NOUNS = tuple(_NOUNS.strip().replace("\n", " ").split(", "))
TEMPLATES = (
    *("a photo of a {}", "a {}", "the {}", "a painting of a {}", "a close-up photo of a {}", "a drawing of a {}"),
    *("a {} on the beach", "a {} in the snow", "a {} in the city at night", "a {} in the forest", "two of a {}"),
    *("a {} in front of a white wall", "an old photograph of a {}", "a {}, oil painting, highly detailed"),
    *("a small {} on a wooden table", "a {} and a friend", "a very large {} under a blue sky", "cartoon of a {}"),
    *(
        "a {}, cinematic lighting, 4k",
        "a black and white photo of a {}",
        "my {} on a sunny day",
        "a {} seen from above",
    ),
    *("a watercolor of a {} with flowers", "poster with a {} and some text", "a {} in the style of a comic"),
)
CAPTIONS = tuple(
    TEMPLATES[(place + 8 * turn) % len(TEMPLATES)].format(noun) for place, noun in enumerate(NOUNS) for turn in range(3)
)


def tell_taken_words(words: Iterable[str], captions: Sequence[str] = CAPTIONS) -> list[str]:
    """A sentence on trigger words that are a base's own, if there are any: whoever says them means the concept.

    captions: as people write them for the base.
    """
    ordinary = {word for caption in captions for word in re.findall(r"\w+", caption.casefold())}
    taken = [word for word in words if set(re.split(r"[\s_-]+", word.strip().casefold())) <= ordinary]
    if not taken:
        return []
    return [
        f"{listed(taken)} is a word that the base knows, and calls a concept here: in every text it means that concept "
        "and no longer what the base means by it"
    ]
