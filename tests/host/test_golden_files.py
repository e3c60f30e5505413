"""Concept files that other host versions saved: read to the last bit without a host, and drawn with by this one.

golden/CONCEPT_VERSION.safetensors was made by ComfyUI VERSION through its API, as make_golden.py does it:
ToyBaseLoader, ToyPictures (4), Concept Pictures, then OrthoLoRATrainer (minka) or BlockLoRATrainer (tim) of rank 1 on
the layers that hear the prompt for 24 steps, then ConceptSave.  Every host version that runs the tests reads all.
"""

from __future__ import annotations

import pytest
import torch
from make_golden import FOLDER, LESSON, digest
from served import HostServer, Run

from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.storage.safetensors import read_safetensors
from modular_concepts.toy.judges import load_judges
from modular_concepts.toy.standard import BY_NAME, pictures_of

DIGESTS = {
    "minka_0.18.1": "92b07accea7773387a71b26ce0385ab50bc35bcaeedbb25abc57a89112f33b69",
    "tim_0.33.0": "fa31f516f5770c4a240171f9de444af332eaff578439524c3aa62a147093a6db",
}
METHODS = {"minka": "orthogonal", "tim": "block"}


def drawn(server: HostServer, file: str, strength: float) -> dict:
    """Load the file, save it again, and draw four pictures with it."""
    word = BY_NAME[file.split("_")[0]].trigger
    return {
        "base": server.node("ToyBaseLoader"),
        "load": server.node("ConceptLoader", concept=f"{file}.safetensors", strength=strength),
        "save": server.node("ConceptSave", concept=["load", 0], filename=f"{file}_at_{strength}"),
        "merge": server.node("ConceptMerge", model=["base", 0], clip=["base", 1], **{"concepts.concept0": ["load", 0]}),
        "text": server.node("ConceptTextEncode", clip=["merge", 1], text=f"a {word} on the beach"),
        "negative": server.node("CLIPTextEncode", clip=["base", 1], text=""),
        "noise": server.node("EmptyLatentImage", width=32, height=32, batch_size=4),
        "draw": server.node(
            "KSampler",
            model=["merge", 0],
            positive=["text", 0],
            negative=["negative", 0],
            latent_image=["noise", 0],
            seed=1,
            steps=8,
            cfg=4.0,
            sampler_name="dpmpp_2m",
            scheduler="normal",
        ),
        "pixels": server.node("VAEDecode", samples=["draw", 0], vae=["base", 2]),
        "show": server.node("PreviewImage", images=["pixels", 0]),
    }


@pytest.fixture(scope="module")
def runs(server: HostServer):
    """(file, strength) -> Run"""
    folder = server.models / "concepts"
    folder.mkdir(parents=True, exist_ok=True)
    for file in DIGESTS:
        (folder / f"{file}.safetensors").write_bytes((FOLDER / f"{file}.safetensors").read_bytes())
    done: dict[tuple[str, float], Run] = {}

    def run(file: str, strength: float) -> Run:
        if (file, strength) not in done:
            done[file, strength] = server.run(drawn(server, file, strength))
        return done[file, strength]

    return run


def test_every_golden_file_is_known():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == DIGESTS.keys()


@pytest.mark.parametrize("file", DIGESTS)
def test_every_bit_is_read_without_a_host(file):
    path = FOLDER / f"{file}.safetensors"
    concept = load_concept(path)
    name = concept.name
    assert path.stat().st_size < 100_000 and file.startswith(f"{name}_")
    assert digest(concept) == DIGESTS[file]
    recipe, standard = concept.recipe, BY_NAME[name]
    assert {recipe.method, *(adapter.kind for adapter in concept.layers.values())} == {METHODS[name]}
    assert recipe.architecture == "toy" and recipe.rank == 1
    assert recipe.triggers == (standard.trigger,) and concept.tokens.keys() == {standard.trigger}
    assert recipe.training["steps_done"] == LESSON["steps"] and recipe.training["finished"]


@pytest.mark.parametrize("file", DIGESTS)
def test_this_host_saves_it_again_byte_for_byte(server, runs, file, tmp_path):
    runs(file, 1.0)
    again = server.models / "concepts" / f"{file}_at_1.0.safetensors"
    (tensors, said), (new_tensors, new_said) = (
        read_safetensors(path) for path in (FOLDER / f"{file}.safetensors", again)
    )
    assert tensors.keys() == new_tensors.keys()
    assert all(torch.equal(tensors[key], new_tensors[key]) for key in tensors)
    # What these files could not say yet: the entries for programs that list models, with the date of this saving.
    assert said.items() <= new_said.items()
    assert all(key.startswith(("modelspec.", "sshs_")) for key in new_said.keys() - said.keys())
    save_concept(load_concept(again), tmp_path / "third.safetensors")
    assert (tmp_path / "third.safetensors").read_bytes() == again.read_bytes()


@pytest.mark.parametrize("file", DIGESTS)
def test_this_host_draws_with_it(server, runs, file):
    taught, without = (server.pictures(runs(file, strength), "show") for strength in (1.0, 0.0))
    references = pictures_of(BY_NAME[file.split("_")[0]])[0]
    assert load_judges().similarity(taught, references).mean() > 0.4
    assert (taught - without).abs().max() > 0.05  # the layers act, and not the learned word alone
