"""A strength's way from the slider to the weight is short, and drawn in docs/architecture.md as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from made_concepts import made_concept

from modular_concepts.files.concept import save_concept

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_STAYS = 15


def listed(title: str) -> list[str]:
    """file:function, one for each stay, of the first block of code behind a heading of the page."""
    block = PAGE.split(f"### {title}\n")[1].split("```")[1]
    return re.findall(r"[\w/]+\.py:[\w.]+", block)


def test_a_strength_comes_to_its_weight_as_the_page_says(host, tmp_path):
    (tmp_path / "concepts").mkdir()
    for slot, name in enumerate(("tom", "rex")):
        save_concept(made_concept(name, slot=slot), tmp_path / "concepts" / f"{name}.safetensors")
    host.run("walk.py", tmp_path)
    walked = json.loads((tmp_path / "walk.json").read_text())
    way, beside = listed("A strength"), listed("Who looks at it on the way")
    assert len(way) <= MOST_STAYS
    assert [stay for stay in walked if stay in way] == way
    assert {stay for stay in walked if stay not in way} == set(beside)
