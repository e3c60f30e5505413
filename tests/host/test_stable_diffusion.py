"""A whole workflow on a checkpoint in Stable Diffusion 1.5's layout: small, random, and loaded by the host itself."""

from __future__ import annotations

import pytest
from test_workflows import TRAINERS, brief

from modular_concepts.files import load_concept

SIDE = 64  # pixels; one tile of the regional picture


@pytest.fixture(scope="module")
def checkpoint(host, server, tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoint")
    host.run("tiny_checkpoint.py", made)
    folder = server.models / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return (made / "tiny_sd15.safetensors").rename(folder / "tiny_sd15.safetensors").name


def test_train_merge_and_regions_on_stable_diffusion(server, checkpoint):
    prompt = brief("3_regional_picture")
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "ToyBaseLoader":
            node |= {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
        elif node["class_type"] in TRAINERS:
            inputs |= {"steps": 2, "batch_size": 1, "preview_every": 0, "token_learning_rate": 1e-3}
        elif node["class_type"] == "ConceptDataset":
            inputs |= {"width": SIDE, "height": SIDE}
        elif node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": 3 * SIDE, "height": SIDE, "batch_size": 1}
        elif node["class_type"] == "RegionalConceptSampler":
            inputs |= {"steps": 2}
        elif node["class_type"] == "ImageScaleBy":
            inputs |= {"scale_by": 1.0}
    save = {"concept": [next(n for n, about in prompt.items() if about["class_type"] in TRAINERS), 0]}
    prompt["save"] = server.node("ConceptSave", **save, filename="tom_sd15")
    run = server.run(prompt)
    pictures = server.pictures(run, run.of_class("SaveImage")[0])
    assert pictures.shape == (1, 3, SIDE, 3 * SIDE) and pictures.std() > 0
    concept = load_concept(server.models / "concepts" / "tom_sd15.safetensors")
    assert concept.recipe.architecture == "sd15"
    # What belongs to one model is refused on another, by name.
    prompt["toy"] = {"class_type": "ToyBaseLoader", "inputs": {}}
    merge = run.of_class("ConceptMerge")[0]
    prompt[merge]["inputs"] |= {"model": ["toy", 0], "clip": ["toy", 1]}
    fault = server.fault(prompt)
    assert fault.node == merge and "sd15" in fault.reason and "toy" in fault.reason
