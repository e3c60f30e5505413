"""All that can be chosen about the basis that concepts share."""

from __future__ import annotations

from .setting import Setting, Widget, group
from .training import LAST_SEED, RANK

KIND = Setting(
    "kind",
    str,
    "hadamard",
    "how it is generated: hadamard for any width, quickly; haar is random in the strict sense, up to width 2048",
    ". No effect on a file",
    choices=("hadamard", "haar"),
)
SEED = Setting(
    "seed",
    int,
    0,
    "which basis is generated",
    ". Everyone whose concepts are to be merged needs the same number",
    widget=Widget(least=0, most=LAST_SEED),
)
METHOD = Setting(
    "method",
    str,
    "orthogonal",
    "orthogonal for Train Orthogonal Concept; block_orthogonal for Train Block Concept, where each concept also has "
    "output rows of its own",
    choices=("orthogonal", "block_orthogonal"),
)
COLUMNS = Setting(
    "rank",
    int,
    RANK.default,
    "columns per concept",
    ". More learn more and leave room for fewer concepts: width / rank",
    least=RANK.least,
    most=RANK.most,
    widget=RANK.widget,
)
SLOT_POLICY = Setting(
    "slot_policy",
    str,
    "slot",
    "slot: by the number on the trainer, exactly disjoint. hashed: by the concept's name, no numbers to agree on, "
    "almost disjoint",
    choices=("slot", "hashed"),
    widget=Widget(advanced=True),
)
BASIS = group(KIND, SEED, METHOD, COLUMNS, SLOT_POLICY)
