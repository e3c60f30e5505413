"""report.md says of each figure how many pictures it comes from."""

from modular_concepts.toy.demo import JOINT_SCENES, PICTURES_EACH
from modular_concepts.toy.report import report_text

FIGURES = ("identity", "image", "text", "mistaken")


def test_the_joint_pictures_are_counted_apart():
    alone = {f"{name}_{stage}": 0.5 for name in FIGURES for stage in ("single", "merged")}
    method = {
        "concepts": {"tom": alone},
        "joint": {"tom": {"identity": 0.25, "mistaken": 0.0, "missing": 0.0}},
        "crosstalk": 0.125,
        "merge_ms": 1.0,
        "prior_drift": {"man": 0.0},
    }
    rates = {"true_accepts": 1.0, "false_accepts_strangers": 0.0, "false_accepts_look_alikes": 0.0}
    said = report_text(
        {
            "methods": {"lora": method},
            "settings": {"pictures_per_figure": PICTURES_EACH, "joint_pictures": len(JOINT_SCENES)},
            "judges": {"accuracy": {"recogniser": rates, "reader": {"class": 1.0, "scene": 1.0}}},
            "seconds": 600.0,
        }
    )
    assert "comes from 24 pictures, those of the joint picture from 4," in said and "took 600 seconds" in said
    assert "| plain LoRA | 0.1250 | 1.0 ms | 0.25 |" in said
