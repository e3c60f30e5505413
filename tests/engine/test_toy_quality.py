"""The shipped toy base draws what it is asked for, and the judges can tell: a few pictures, so relaxed thresholds.

`python -m modular_concepts.toy.evaluate` asks for many more; docs/toy-base.md says what it found.
"""

import pytest
import torch
from laws import seeded

from modular_concepts.sampling import SampleSettings
from modular_concepts.toy import evaluate, model
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.judges import NOTHING, load_judges
from modular_concepts.toy.standard import STANDARD, pictures_of
from modular_concepts.toy.world import draw, random_poses, random_scenes, random_subjects

FILES = ("unet.safetensors", "text_encoder.safetensors", "reader.safetensors", "recogniser.safetensors", "judges.json")
SETTINGS = SampleSettings(steps=12, cfg=5.0, batch=24)
MISSING = [name for name in FILES if not (model.WEIGHTS / name).is_file()]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the toy base is not trained: {', '.join(MISSING)} missing")


@pytest.fixture(scope="module")
def base():
    return load_toy_base()


@pytest.fixture(scope="module")
def judges():
    return load_judges()


def test_the_weights_are_small():
    assert sum((model.WEIGHTS / name).stat().st_size for name in FILES) <= 20 * 2**20


def test_classes_and_scenes_are_drawn(base, judges):
    found = evaluate.single_subjects(base, judges, SETTINGS, 1)
    assert found["class"] >= 0.87 and found["scene"] >= 0.87, found


def test_two_subjects_are_drawn_side_by_side(base, judges):
    found = evaluate.two_subjects(base, judges, SETTINGS, 20)
    assert found["both_classes"] >= 0.75, found


@pytest.fixture(scope="module")
def attributes(base, judges):
    return evaluate.named_attributes(base, judges, SETTINGS, 24)


def test_the_first_named_colour_is_drawn(attributes):
    """Ten colours, so chance is 0.1."""
    assert attributes["primary"] >= 0.8, attributes


def test_named_attributes_are_drawn(attributes):
    assert attributes["attributes"] >= 0.75, attributes


def test_the_reader_reads_drawn_pictures(judges):
    generator = seeded(31)
    subjects, scenes = random_subjects(200, generator), random_scenes(200, generator)
    answer = judges.read(draw([subjects], [random_poses(200, generator)], scenes))
    for name, truth in (("class", subjects.kind), ("scene", scenes.kind)):
        assert (answer[name] == truth).float().mean() > 0.95, name
    for name, truth in (("primary", subjects.primary_name), ("secondary", subjects.secondary_name)):
        assert (answer[name] == truth).float().mean() > 0.85, name
    assert (judges.read(draw([], [], scenes))["class"] == NOTHING).float().mean() > 0.95


def test_the_recogniser_knows_the_standard_concepts_apart(judges):
    """Pictures that are in no training set: accepted as themselves, and hardly ever as someone else."""
    concepts = [concept for concept in STANDARD if concept.family in ("person", "subject")]
    references = [pictures_of(concept)[0] for concept in concepts]
    rates = torch.tensor(
        [[judges.identity(pictures_of(c, seed=1)[0], reference) for reference in references] for c in concepts]
    )
    own = rates.diag()
    others = (rates.sum() - own.sum()) / (rates.numel() - len(own))
    assert own.mean() > 0.9 and others < 0.05, rates
    empty = draw([], [], random_scenes(16, seeded(32)))
    assert judges.identity(empty, references[0]) == 0
