"""The words of the toy world and the captions made of them."""

from __future__ import annotations

CLASSES = ("man", "woman", "dog", "cat", "robot", "bird", "car", "house")
SCENES = ("beach", "snow", "forest", "night", "desert", "city")
STYLES = ("plain", "sepia", "neon", "outline")
PATTERNS = ("plain", "striped", "dotted")

SCENE_PHRASES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "night": "at night",
    "desert": "in the desert",
    "city": "in the city",
}

# What the first and the second colour of a subject are called, and what it may wear: (none, first, second).
PRIMARY_PART = ("shirt", "dress", "fur", "fur", "body", "body", "paint", "walls")
SECONDARY_PART = ("hair", "hair", "ears", "tail", "head", "wings", "roof", "roof")
ACCESSORIES = (
    ("", "hat", "scarf"),
    ("", "hat", "scarf"),
    ("", "hat", "collar"),
    ("", "hat", "collar"),
    ("", "hat", "antenna"),
    ("", "hat", "scarf"),
    ("", "flag", "box"),
    ("", "flag", "chimney"),
)

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.55, 0.12),
    "yellow": (0.96, 0.86, 0.20),
    "green": (0.20, 0.66, 0.26),
    "blue": (0.18, 0.38, 0.88),
    "purple": (0.55, 0.22, 0.75),
    "pink": (0.97, 0.55, 0.74),
    "brown": (0.47, 0.28, 0.13),
    "white": (0.93, 0.93, 0.93),
    "black": (0.13, 0.13, 0.15),
}
COLOUR_NAMES = tuple(COLOURS)

# Of the fifteen concepts in `standard.py`, in their order.
STANDARD_NAMES = ("tom", "tim", "omar", "ada", "ida", "nia", "rex", "fleck", "minka", "bolt", "pip")
STANDARD_NAMES += ("candy", "mars", "riso", "mint")

# Closed vocabulary, in the order of the embedding rows.  The four first rows are special; RESERVED rows belong to
# words that no caption of the base used, so they mean nothing to it yet.
SPECIAL = ("<start>", "<end>", "<pad>", "<unknown>")
RESERVED = ("an", "photo", "picture", "of", "two", "three", "person", "people", "animal", "animals", "left")
RESERVED += ("right", "middle", "wearing", "no")
RESERVED += ("men", "women", "dogs", "cats", "robots", "birds", "cars", "houses", "plain")
WORDS = SPECIAL + tuple(
    dict.fromkeys(
        (
            "a",
            "an",
            "and",
            "with",
            "the",
            "in",
            "on",
            "at",
            ",",
            "photo",
            "picture",
            "of",
            "style",
            "two",
            "three",
        )
        + ("person", "people", "animal", "animals", "left", "right", "middle", "wearing", "no")
        + CLASSES
        + ("men", "women", "dogs", "cats", "robots", "birds", "cars", "houses")
        + SCENES
        + STYLES
        + PATTERNS
        + COLOUR_NAMES
        + PRIMARY_PART
        + SECONDARY_PART
        + tuple(word for words in ACCESSORIES for word in words if word)
    )
)
