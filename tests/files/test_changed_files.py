"""Promise 1: whatever is done to a file, also a sound one, it is refused in a sentence or can be used for everything.

A few of each kind here; `make torture` tries thousands, tests/files/mutations.py says how.
"""

import pytest
from mutations import KINDS, run

ELSEWHERE = ("basis", "basis npy", "latents")
COSTLY = ("concept", "compact", "kohya", "diffusers", "locon", "base folder", "base folder XL", "base weights")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ELSEWHERE])
def test_changed_files_are_refused_in_a_sentence_or_used(tmp_path, kind):
    count = 16 if kind in COSTLY else 40
    (outcome,) = run(count, 7, tmp_path / "x", [kind])
    assert not outcome.faults
    assert outcome.tried == count == outcome.refused + outcome.accepted and min(outcome.refused, outcome.accepted) > 0
    assert outcome.slowest < 1 and outcome.growth < 64 * 2**20
