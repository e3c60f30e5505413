"""Every workflow on a checkpoint in Stable Diffusion 1.5's layout: small, random, and loaded by the host itself."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from laws import relative_error
from safetensors.torch import load_file
from served import HostServer, Run
from test_workflows import NAMES, SAMPLERS, TRAINERS, brief, check_progress

from modular_concepts.files.concept import load_concept
from scripts.queue_workflow import find_node

SIDE = 64  # pixels of a tile
# Rates that two steps show at, and what costs time for nothing here left out.
TRAINING = {
    "steps": 2,
    "batch_size": 1,
    "learning_rate": 1e-2,
    "token_learning_rate": 1e-3,
    "preview_every": 0,
    "checkpoint_every": 0,
}
STEPS = 2  # of sampling


@pytest.fixture(scope="module")
def checkpoint(checkpoint, server) -> str:
    folder = server.models / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(checkpoint("sd15"), folder)).name


def saved_as(trainer: dict) -> str:
    """Concepts for their own words beside others of their names."""
    kind = "_words" if trainer["class_type"] == "OwnWordTrainer" else ""
    return f"{trainer['inputs']['name']}{kind}_sd15"


def on_stable_diffusion(name: str, checkpoint: str) -> dict:
    """The workflow with the checkpoint for its base, pictures of its size, few steps.

    Every concept is saved as `CONCEPT_sd15`, and the latent of the sampler NODE is node `latent of NODE`.
    """
    prompt = brief(name)
    for node, about in list(prompt.items()):
        kind, inputs = about["class_type"], about["inputs"]
        if kind == "ToyBaseLoader":
            about |= {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
        elif kind in TRAINERS:
            inputs |= TRAINING
            saving = {"concept": [node, 0], "filename": saved_as(about), "format": "concept", "replace": True}
            prompt[f"save {inputs['name']}"] = {"class_type": "ConceptSave", "inputs": saving}
        elif kind == "ConceptSave":  # not under the name that the toy base's workflows save theirs
            inputs |= {"filename": "workflow_sd15"}
        elif kind == "ConceptDataset":
            inputs |= {"width": SIDE, "height": SIDE}
        elif kind == "EmptyLatentImage":
            wide = any(other["class_type"] == "RegionalConceptSampler" for other in prompt.values())
            inputs |= {"width": 3 * SIDE if wide else SIDE, "height": SIDE, "batch_size": 1}
        elif kind in SAMPLERS:
            inputs |= {"steps": STEPS}
            prompt[f"latent of {node}"] = latent_of(node)
        elif kind == "ImageScaleBy":
            inputs |= {"scale_by": 1.0}
        elif kind == "LoraLoader":  # the shipped LoRA is the toy base's; `stock_files` saves this one
            inputs |= {"lora_name": "minka_sd15.safetensors"}
        elif kind == "CLIPTextEncode":
            inputs["text"] = inputs["text"].replace("toy_minka", "minka_sd15")
    return prompt


def latent_of(node: str) -> dict:
    return {"class_type": "SaveLatent", "inputs": {"samples": [node, 0], "filename_prefix": "latents/drawn"}}


def upstream(prompt: dict, *wanted: str) -> dict:
    """The part of a prompt that some nodes need."""
    kept, waiting = {}, list(wanted)
    while waiting:
        node = waiting.pop()
        kept[node] = prompt[node]
        waiting += [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return kept


def latents(server: HostServer, run: Run) -> dict[str, torch.Tensor]:
    """Sampler -> what it drew, (1, 4, h, w)."""
    found = {}
    for node in run.of_class("SaveLatent"):
        (file,) = run.outputs[node]["latents"]
        path = server.output / file["subfolder"] / file["filename"]
        found[node.removeprefix("latent of ")] = load_file(path)["latent_tensor"]
    return found


def plainly(server: HostServer, checkpoint: str, negative: str) -> torch.Tensor:
    """What the checkpoint draws by itself.  Another number of spaces says the same, but is drawn anew."""
    whole = on_stable_diffusion("1_train_and_save", checkpoint)
    sampler = find_node(whole, "draw without")
    prompt = upstream(whole, f"latent of {sampler}")
    prompt[sampler]["inputs"]["seed"] = 7  # not the workflow's own, which shall not find it in the cache
    prompt[find_node(prompt, "negative")]["inputs"]["text"] = negative
    run = server.run(prompt)
    assert sampler in run.ran
    return latents(server, run)[sampler]


@pytest.fixture(scope="module")
def runs(server, checkpoint):
    """(name -> its Run, what the checkpoint drew before any of them); each is run once, when it is first asked for."""
    done, before = {}, plainly(server, checkpoint, "")

    def run(name: str) -> Run:
        if name not in done:
            prompt = on_stable_diffusion(name, checkpoint)
            if any(about["class_type"] == "LoraLoader" for about in prompt.values()):
                stock_files(server, prompt)
            done[name] = server.run(prompt)
            assert not set(done[name].of_class("CheckpointLoaderSimple")) & set(done[name].ran), "a fresh checkpoint"
        return done[name]

    return run, before


def stock_files(server: HostServer, prompt: dict) -> None:
    """Save the workflow's concept for stock loaders, under the name that its stock loader asks for."""
    trainer = next(node for node, about in prompt.items() if about["class_type"] in TRAINERS)
    saving = {"filename": "minka_sd15", "format": "LoRA for stock loaders", "replace": True, "concept": [trainer, 0]}
    server.run(upstream(prompt | {"stock": {"class_type": "ConceptSave", "inputs": saving}}, "stock"))


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_draws_on_stable_diffusion_and_tells_of_it(server, runs, name):
    run = runs[0](name)
    check_progress(run)
    drawn = latents(server, run)
    assert drawn.keys() == set(run.of_class(*SAMPLERS))
    wide = 3 if run.of_class("RegionalConceptSampler") else 1
    for latent in drawn.values():
        assert latent.shape == (1, 4, SIDE // 8, wide * SIDE // 8)
        assert latent.isfinite().all() and latent.std() > 0
    for node in run.of_class("SaveImage"):
        pictures = server.pictures(run, node)
        assert pictures.shape[1:] == (3, SIDE, wide * SIDE) and pictures.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_its_concepts_are_those_of_stable_diffusion(server, runs, name):
    run = runs[0](name)
    trainers = run.of_class(*TRAINERS)
    for node in trainers:
        concept = load_concept(server.models / "concepts" / f"{saved_as(run.prompt[node])}.safetensors")
        assert concept.recipe.architecture == "sd15" and concept.recipe.training["steps_done"] == TRAINING["steps"]
        # Two transformers in the levels, one in the middle, one more on the way up: attention and feed-forward, or
        # keys and values of their cross-attentions alone.
        by_word = run.prompt[node]["class_type"] == "OwnWordTrainer"
        assert len(concept.layers) >= (4 * 2 if by_word else 3 * 10) and all(
            name.startswith("unet.") for name in concept.layers
        )
        for layer, adapter in concept.layers.items():
            assert adapter.lora_up.isfinite().all() and adapter.lora_up.any(), layer
        (rows,) = concept.tokens.values()
        assert rows.shape[1] == 768 and rows.isfinite().all()
    assert trainers


def test_stock_nodes_draw_what_ours_draw_on_stable_diffusion(server, runs):
    run = runs[0]("5_stock_lora_interop")
    ours, memory, file = (
        find_node(run.prompt, f"draw {what}") for what in ("with ours", "from memory", "with the file")
    )
    # The same prompt, with the word that was learned but without the layers.
    prompt = upstream(copy.deepcopy(run.prompt), f"latent of {memory}")
    prompt[memory]["inputs"]["model"] = [next(n for n in prompt if "ckpt_name" in prompt[n]["inputs"]), 0]
    without = latents(server, server.run(prompt))[memory]
    drawn = latents(server, run)
    # Measured: no bit differs, and 0.35 without the layers.
    assert relative_error(drawn[memory], drawn[ours]) < 1e-5
    assert relative_error(drawn[file], drawn[ours]) < 1e-5
    assert relative_error(drawn[ours], without) > 0.05


def test_after_all_five_the_checkpoint_draws_the_same_bits(server, checkpoint, runs):
    run, before = runs
    assert all(run(name).succeeded for name in NAMES)
    assert torch.equal(plainly(server, checkpoint, " "), before)


def test_what_belongs_to_stable_diffusion_is_refused_on_another_base(server, runs):
    assert runs[0]("3_regional_picture").succeeded
    fault = server.fault(
        {
            "toy": server.node("ToyBaseLoader"),
            "tom": server.node("ConceptLoader", concept="tom_sd15.safetensors"),
            "merge": server.node(
                "ConceptMerge", model=["toy", 0], clip=["toy", 1], **{"concepts.concept0": ["tom", 0]}
            ),
            "save": server.node("ConceptSave", concept=["merge", 2]),
        }
    )
    assert fault.node == "merge" and "sd15" in fault.reason and "toy" in fault.reason
