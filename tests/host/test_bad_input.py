"""Bad input through /prompt: the node and the reason are named, and the server goes on answering."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
from made_concepts import foreign_concept, made_concept
from served import Fault, HostServer

from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.files.concept import save_concept
from scripts.queue_workflow import Refused

BASE = {"class_type": "ToyBaseLoader", "inputs": {}}
NOISE = {"class_type": "EmptyLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}}
_seeds = itertools.count()


@pytest.fixture(scope="module")
def concepts(server: HostServer):
    return write_concepts(server)


def write_concepts(server: HostServer) -> Path:
    """The concept files that the prompts below name, in models/concepts; the folder."""
    folder = server.models / "concepts"
    folder.mkdir(parents=True, exist_ok=True)
    good = made_concept("good")
    files = {
        "good": good,
        "other": made_concept("other", slot=1),
        "foreign": foreign_concept("foreign"),
        "elsewhere": made_concept("elsewhere", basis=OrthogonalBasis(seed=77), slot=3),
        "block0": made_concept("block0", method="block", blocks=5, slot=0),
        "again0": made_concept("again0", method="block", blocks=5, slot=0),
        "thirds": made_concept("thirds", method="block", blocks=3, slot=2),
    }
    for name, concept in files.items():
        save_concept(concept, folder / f"{name}.safetensors")
    (folder / "damaged.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:5000])
    (folder / "letter.safetensors").write_text("not a concept at all")
    return folder


def drawn(merge: dict | None = None, **more: dict) -> dict:
    """A prompt that draws one picture in one step from the merge of node "merge", or from the base."""
    source = "merge" if merge else "base"
    return {
        "base": BASE,
        **({"merge": merge} if merge else {}),
        **more,
        "text": {"class_type": "ConceptTextEncode", "inputs": {"clip": [source, 1], "text": "a dog"}},
        "noise": NOISE,
        "draw": {
            "class_type": "KSampler",
            "inputs": {
                "model": [source, 0],
                "positive": ["text", 0],
                "negative": ["text", 0],
                "latent_image": ["noise", 0],
                "seed": next(_seeds),
                "steps": 1,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "pixels": {"class_type": "VAEDecode", "inputs": {"samples": ["draw", 0], "vae": ["base", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["pixels", 0]}},
    }


def merged(*names: str, how: str = "ConceptMerge", strength: float = 1.0) -> dict:
    """`drawn` with concept files, each on a loader named after it."""
    loaders = {
        name: {"class_type": "ConceptLoader", "inputs": {"concept": f"{name}.safetensors", "strength": strength}}
        for name in names
    }
    sockets = {f"concepts.concept{index}": [name, 0] for index, name in enumerate(names)}
    choice = {"method": "sum"} if how == "ConceptMerge" else {"strengths": "as set"}
    return drawn(
        {"class_type": how, "inputs": {"model": ["base", 0], "clip": ["base", 1], **sockets, **choice}}, **loaders
    )


def regional(**changes) -> dict:
    """A prompt with one region on a picture of 64 x 32; None leaves an input out."""
    prompt = drawn()
    region = {
        "prompt": "a dog",
        "units": "fractions",
        "left": 0.0,
        "top": 0.0,
        "right": 0.5,
        "bottom": 1.0,
        "feather": 0.0,
        "strength": 1.0,
    }
    prompt["region"] = {"class_type": "ConceptRegion", "inputs": region | changes}
    prompt["noise"] = copy.deepcopy(NOISE)
    prompt["noise"]["inputs"]["width"] = 64
    sampler = prompt["draw"]["inputs"]
    prompt["draw"] = {
        "class_type": "RegionalConceptSampler",
        "inputs": {
            "model": ["base", 0],
            "clip": ["base", 1],
            "prompt": "a dog and a cat",
            "negative": "",
            "regions": ["region", 0],
            "latent": ["noise", 0],
            **{key: sampler[key] for key in ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")},
        },
    }
    return prompt


def without(prompt: dict, node: str, name: str) -> dict:
    del prompt[node]["inputs"][name]
    return prompt


def taught(server: HostServer, pictures: int = 4, **changes) -> dict:
    """A prompt that trains for two steps; `changes` are the trainer's inputs."""
    pupil = {"slot": 0, "name": "pupil", "class_word": "dog", "steps": 2, "batch_size": 2, "preview_every": 0}
    return {
        "base": BASE,
        "pictures": {"class_type": "ToyPictures", "inputs": {"concept": "rex", "count": 4, "seed": next(_seeds)}},
        "some": {
            "class_type": "ImageFromBatch",
            "inputs": {"image": ["pictures", 0], "batch_index": 0, "length": pictures},
        },
        "data": server.node("ConceptDataset", images=["some", 0], captions="a {concept} on the beach"),
        "basis": server.node("OrthoBasisLoader", rank=8),
        "train": server.node(
            "OrthoLoRATrainer",
            **{"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "dataset": ["data", 0]},
            **{"ortho_basis": ["basis", 0], **pupil, **changes},
        ),
        "shown": {"class_type": "LossGraphNode", "inputs": {"loss": ["train", 2], "filename_prefix": "loss"}},
    }


def saving(filename: str, **changes) -> dict:
    prompt = merged("good")
    prompt["save"] = {
        "class_type": "ConceptSave",
        "inputs": {"concept": ["good", 0], "filename": filename, "format": "concept", "replace": True, **changes},
    }
    return prompt


# What is asked for, the node that must be named, words that the reason must hold.
BAD = {
    "a concept of another architecture": (lambda _: merged("foreign"), "merge", ["foreign", "sd15", "toy"]),
    "a missing file": (lambda _: merged("absent"), "absent", ["absent.safetensors"]),
    "a path out of the folder": (lambda _: merged("../../secrets"), "../../secrets", ["../../secrets"]),
    "an absolute path": (lambda _: merged("/etc/passwd"), "/etc/passwd", ["/etc/passwd"]),
    "a damaged file": (lambda _: merged("damaged"), "damaged", ["damaged.safetensors"]),
    "a file that is something else": (lambda _: merged("letter"), "letter", ["letter.safetensors"]),
    "a saving path out of the folder": (lambda _: saving("../escaped"), "save", ["../escaped"]),
    "an absolute saving path": (lambda _: saving("/escaped"), "save", ["/escaped"]),
    "concepts of two bases of columns": (
        lambda _: merged("good", "elsewhere"),
        "merge",
        ["good", "elsewhere", "basis"],
    ),
    "one concept twice": (lambda _: drawn_twice(), "merge", ["good"]),
    "blocks that overlap": (
        lambda _: merged("block0", "again0", how="BlockLoRAMerge"),
        "merge",
        ["block0", "again0", "slot"],
    ),
    "blocks cut differently": (
        lambda _: merged("block0", "thirds", how="BlockLoRAMerge"),
        "merge",
        ["5", "3", "blocks"],
    ),
    "no blocks in a block merge": (lambda _: merged("good", how="BlockLoRAMerge"), "merge", ["good", "block"]),
    "a strength that is no number": (lambda _: merged("good", strength=math.nan), "good", ["strength", "nan"]),
    "an infinite strength": (lambda _: merged("good", strength=math.inf), "good", ["strength"]),
    "a strength out of range": (lambda _: merged("good", strength=1e9), "good", ["strength"]),
    "a strength just out of range": (lambda _: merged("good", strength=-100.5), "good", ["strength", "-100 to 100"]),
    "no concept in a merge": (lambda _: without(merged("good"), "merge", "concepts.concept0"), "merge", ["concept"]),
    "zero regions": (lambda _: without(regional(), "draw", "regions"), "draw", ["regions"]),
    "a region beyond the picture": (lambda _: regional(left=0.5, right=1.5), "region", ["1.5"]),
    "a region beyond the picture in pixels": (
        lambda _: regional(units="pixels", right=200, bottom=32),
        "draw",
        ["200"],
    ),
    "a region left of the picture": (lambda _: regional(left=-0.5), "region", ["left"]),
    "a region inside out": (lambda _: regional(left=0.5, right=0.2), "region", ["0.5", "0.2"]),
    "a region edge that is no number": (lambda _: regional(left=math.nan), "region", ["nan"]),
    "a dataset of one picture": (lambda server: taught(server, pictures=1), "data", ["picture"]),
    "captions for other pictures": (lambda server: captioned(server, "one\ntwo\nthree"), "data", ["3", "4"]),
    "a folder that is not there": (lambda server: from_folder(server, "no_such_folder"), "data", ["no_such_folder"]),
    "a folder outside of input": (lambda server: from_folder(server, "../models"), "data", ["../models"]),
    "a slot that the basis lacks": (lambda server: taught(server, slot=10_000), "train", ["slot"]),
    "a class word that the base lacks": (lambda server: taught(server, class_word="xylophone"), "train", ["xylophone"]),
    "a name that is none": (lambda server: taught(server, name="../escaped"), "train", ["../escaped"]),
    "a learning rate that is no number": (lambda server: taught(server, learning_rate=math.nan), "train", ["nan"]),
    "no steps": (lambda server: taught(server, steps=0), "train", ["steps"]),
}


def drawn_twice() -> dict:
    prompt = merged("good")
    prompt["merge"]["inputs"]["concepts.concept1"] = ["good", 0]
    return prompt


def captioned(server: HostServer, captions: str) -> dict:
    prompt = taught(server)
    prompt["data"]["inputs"]["captions"] = captions
    return prompt


def from_folder(server: HostServer, folder: str) -> dict:
    prompt = taught(server)
    del prompt["data"]["inputs"]["images"]
    prompt["data"]["inputs"]["folder"] = folder
    return prompt


def ours_are_untouched(server: HostServer) -> set[str]:
    return {str(path.relative_to(server.folder)) for path in server.folder.rglob("*") if "escaped" in path.name}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_names_the_node_and_the_reason_and_the_server_goes_on(server, concepts, what):
    build, node, words = BAD[what]
    fault = server.fault(build(server))
    assert fault.node == node, fault
    for word in words:
        assert word.lower() in fault.reason.lower(), fault
    assert len(fault.reason) < 500 and "Traceback" not in fault.reason, fault
    assert ours_are_untouched(server) == set()
    assert server.run(drawn()).outputs["show"]["images"]


def test_good_input_of_the_same_form_is_taken(server, concepts):
    """Without this, a test above could pass because of something else that is wrong in its prompt."""
    for prompt in (
        merged("good", "other"),
        merged("good", strength=5.0),
        merged("good", strength=-100.0),
        merged("good", strength=0.33),
        merged("block0", how="BlockLoRAMerge"),
        regional(),
        taught(server),
        saving("fine"),
    ):
        server.run(prompt)
    assert (concepts / "fine.safetensors").is_file()


def test_a_queue_with_poison_in_it_finishes_all_that_is_good(server, concepts):
    poison = [BAD[what][0] for what in BAD if BAD[what][1] not in ("train", "data")]
    waiting, refused, failed = {}, 0, 0
    for number in range(100):
        bad = number % 10 == 7
        prompt = poison[number // 10](server) if bad else merged("good", "other", strength=round(0.02 * number, 2))
        try:
            waiting[server.begin(prompt)] = bad
        except Refused as fault:
            assert bad and fault.faults
            refused += 1
    for prompt_id, bad in waiting.items():
        run = server.wait(prompt_id)
        assert run.succeeded is not bad, (run.ending, run.error)
        failed += bad
        assert bad or run.outputs["show"]["images"]
    assert refused + failed == 10 and len(waiting) - failed == 90
    assert json.loads(server.get("/queue")) == {"queue_running": [], "queue_pending": []}
    assert isinstance(server.fault(merged("absent")), Fault)
