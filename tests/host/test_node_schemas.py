"""Every node tells a newcomer what it is for and what each input means, on the oldest and the newest host."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from modular_concepts_pack.nodes import ModularConcepts

from modular_concepts.settings import basis, drawing, merging, training
from modular_concepts.settings.setting import Setting

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NODES = {
    "ToyBaseLoader": "MODEL CLIP VAE",
    "ToyPictures": "IMAGE STRING MASK STRING STRING",
    "OrthoBasisLoader": "ORTHO_BASIS STRING",
    "ConceptDataset": "CONCEPT_DATASET",
    "OwnWordTrainer": "CONCEPT LOSS_MAP",
    "OrthoLoRATrainer": "CONCEPT LORA_MODEL LOSS_MAP",
    "BlockLoRATrainer": "CONCEPT LORA_MODEL LOSS_MAP",
    "LoRATrainer": "CONCEPT LORA_MODEL LOSS_MAP",
    "EDLoRATrainer": "CONCEPT LORA_MODEL LOSS_MAP",
    "CustomDiffusionTrainer": "CONCEPT LORA_MODEL LOSS_MAP",
    "WordTrainer": "CONCEPT LOSS_MAP",
    "ConceptTrainingOptions": "CONCEPT_TRAINING_OPTIONS",
    "ConceptLoader": "CONCEPT_STACK STRING",
    "LoRAToConcept": "CONCEPT_STACK STRING",
    "ConceptStrength": "CONCEPT_STACK",
    "ConceptSave": "STRING",
    "ConceptTextEncode": "CONDITIONING",
    "ConceptStack": "CONCEPT_STACK",
    "ConceptMerge": "MODEL CLIP CONCEPT_STACK",
    "BlockLoRAMerge": "MODEL CLIP CONCEPT_STACK",
    "ConceptFusion": "MODEL CLIP CONCEPT_STACK",
    "ConceptOrthogonalize": "CONCEPT_STACK STRING",
    "ConceptHook": "HOOKS",
    "ConceptFromModel": "CONCEPT LORA_MODEL",
    "ConceptRegion": "CONCEPT_REGIONS",
    "DrawRegions": "CONCEPT_REGIONS INT INT",
    "RegionsFromJSON": "CONCEPT_REGIONS",
    "RegionPreview": "IMAGE",
    "FindRegions": "CONCEPT_REGIONS MASK",
    "RegionalConcepts": "MODEL CONDITIONING CONDITIONING",
    "RegionalConceptSampler": "LATENT",
    "CrosstalkReport": "IMAGE STRING STRING",
}


@pytest.fixture(scope="module")
def schemas(folder):
    """Node id -> what the node says of itself."""
    return {node.GET_SCHEMA().node_id: described(node) for node in asyncio.run(ModularConcepts().get_node_list())}


def described(node) -> dict:
    schema = node.GET_SCHEMA()
    return {
        "name": schema.display_name,
        "category": schema.category,
        "description": schema.description,
        "aliases": schema.search_aliases,
        "inputs": node.GET_NODE_INFO_V1()["input"],
        "outputs": [[output.id, output.io_type, output.tooltip] for output in schema.outputs],
    }


def inputs_of(schema: dict):
    """(name, type or options, settings) of every input, those that the host adds left out."""
    for group in ("required", "optional"):
        for name, (kind, *settings) in schema["inputs"].get(group, {}).items():
            yield name, kind, settings[0] if settings else {}


def test_the_nodes_are_those_that_workflows_name(schemas):
    assert {node: " ".join(kind for _, kind, _ in s["outputs"]) for node, s in schemas.items()} == NODES


def test_every_node_can_be_found_and_says_what_it_does(schemas):
    for node, schema in schemas.items():
        assert schema["category"].startswith("modular concepts"), node
        assert schema["name"] and schema["name"] != node, node
        assert 60 < len(schema["description"]) < 400 and schema["description"].endswith("."), node
        assert len(schema["aliases"]) >= 3, node
    assert len({schema["name"] for schema in schemas.values()}) == len(schemas)
    searched = {alias for schema in schemas.values() for alias in schema["aliases"]}
    assert {"lora merge", "regional lora", "dreambooth"} <= searched


def test_every_input_and_output_has_a_tooltip(schemas):
    for node, schema in schemas.items():
        for name, _, settings in inputs_of(schema):
            assert len(settings.get("tooltip", "")) >= 10, f"{node}.{name}"
        for name, _, tooltip in schema["outputs"]:
            assert tooltip, f"{node} -> {name}"


def test_defaults_are_there_and_within_their_limits(schemas):
    for node, schema in schemas.items():
        for name, kind, settings in inputs_of(schema):
            if kind not in WIDGETS or settings.get("forceInput"):
                continue
            where, default = f"{node}.{name}", settings.get("default")
            if kind == "COMBO":
                options = settings["options"]
                assert not options or default is None or default in options, where
                continue
            assert default is not None, where
            if kind in ("INT", "FLOAT"):
                assert settings["min"] <= default <= settings["max"], where
                assert math.isfinite(settings["min"]) and math.isfinite(settings["max"]), where


def test_sliders_have_a_step_that_both_renderers_keep(schemas):
    sliders = [
        (f"{node}.{name}", settings)
        for node, schema in schemas.items()
        for name, _, settings in inputs_of(schema)
        if settings.get("display") == "slider"
    ]
    assert {"ConceptLoader.strength", "ConceptStrength.strength"} <= {where for where, _ in sliders}
    for where, settings in sliders:
        assert settings["step"] == settings["round"] > 0, where


INPUTS = Path(__file__).parent / "golden" / "inputs.json"


def reduced(schema: dict) -> list[list]:
    """What saved workflows go by: names in order, kinds, defaults and bounds of a node's inputs."""
    return [
        [name, kind if isinstance(kind, str) else "COMBO", *(settings.get(key) for key in ("default", "min", "max"))]
        for name, kind, settings in inputs_of(schema)
    ]


def test_inputs_are_those_that_saved_workflows_name(schemas):
    """A new input comes last, is optional, and is added to the file."""
    golden = json.loads(INPUTS.read_text(encoding="utf-8"))
    assert {node: reduced(schema) for node, schema in schemas.items()} == golden


def test_inputs_are_as_their_settings_are_declared(schemas):
    inputs = [each for schema in schemas.values() for each in inputs_of(schema)]
    declared = [value for module in (training, basis, merging, drawing) for value in vars(module).values()]
    settings = [value for value in declared if isinstance(value, Setting) and value.widget is not None]
    assert len(settings) > 50
    for setting in settings:
        if setting in (drawing.EDGE, drawing.CANVAS):  # one for each side
            continue
        named = [(kind, more) for name, kind, more in inputs if name == setting.widget_name]
        assert named, setting.name
        if setting.is_number:
            assert any(more.get("max") == setting.ends[1] for _, more in named), setting.name
