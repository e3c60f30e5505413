"""What our files say to programs that list models, and what we keep of what other programs' files say."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modular_concepts.concept import Concept
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.files.embeddings import export_embeddings
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.modelspec import COVERS, JPEG, MAX_THUMBNAIL, dated, saying, thumbnail
from modular_concepts.storage.safetensors import read_safetensors, write_safetensors

WRITE = {"concept": save_concept, "kohya": export_kohya, "diffusers": export_diffusers}
SAID = {"author": "Ana", "license": "CC0", "tags": "dog, cartoon", "usage_hint": "a <kodo> dog"}


def metadata(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def behind_header(path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def picture(height: int = 40, width: int = 60) -> torch.Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", WRITE)
def test_every_file_names_itself_its_words_its_family_and_its_picture(make_concept, tmp_path, form):
    concept = saying(make_concept("lora"), title="Kodo", thumbnail=thumbnail(picture()), **SAID)
    WRITE[form](concept, tmp_path / "x")
    said = metadata(tmp_path / "x")
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert said["modelspec.architecture"] == "modular-concepts-toy/lora"
    assert said["modelspec.title"] == "Kodo" and said["modelspec.trigger_phrase"] == "<kodo> <fell>"
    assert {key: said[f"modelspec.{key}"] for key in SAID} == SAID
    assert said["modelspec.hash_sha256"] == "0x" + hashlib.sha256(behind_header(tmp_path / "x")).hexdigest()
    assert said["modelspec.hash_sha256"] == "0x" + said["sshs_model_hash"]
    image = pytest.importorskip("PIL.Image")
    for data in (said["modelspec.thumbnail"].removeprefix(JPEG), *json.loads(said[COVERS])):
        shown = image.open(io.BytesIO(base64.b64decode(data)))
        assert shown.format == "JPEG" and max(shown.size) <= 256 and shown.size[0] / shown.size[1] == 1.5


@pytest.mark.parametrize(
    ("architecture", "said", "implementation"),
    [
        ("sd15", "stable-diffusion-v1/lora", "diffusers"),
        ("sdxl", "stable-diffusion-xl-v1-base/lora", "https://github.com/Stability-AI/generative-models"),
        ("sd3", "stable-diffusion-3/lora", "diffusers"),
        ("", "unknown/lora", "diffusers"),
    ],
)
def test_architectures_are_called_as_managers_know_them(make_concept, tmp_path, architecture, said, implementation):
    plain = make_concept("lora")
    concept = dataclasses.replace(plain, recipe=dataclasses.replace(plain.recipe, architecture=architecture))
    export_kohya(concept, tmp_path / "x")
    found = metadata(tmp_path / "x")
    assert (found["modelspec.architecture"], found["modelspec.implementation"]) == (said, implementation)
    assert found["modelspec.title"] == plain.name
    assert ("modelspec.resolution" in found) == bool(architecture)


def test_an_embedding_names_its_own_word_alone(make_concept, tmp_path):
    concept = make_concept("lora")
    words = list(concept.tokens)
    for word, path in zip(words, export_embeddings(concept, tmp_path), strict=True):
        said = metadata(path)
        assert said["modelspec.trigger_phrase"] == word
        assert said["modelspec.architecture"] == "modular-concepts-toy/textual-inversion"


def test_what_was_said_comes_back_and_is_written_the_same(make_concept, same_concept, tmp_path):
    concept = dated(saying(make_concept("orthogonal"), thumbnail=thumbnail(picture(512, 300)), **SAID))
    save_concept(concept, tmp_path / "first")
    loaded = load_concept(tmp_path / "first")
    same_concept(loaded, concept)
    assert loaded.about == concept.about and set(loaded.about) == {*SAID, "thumbnail", "date"}
    save_concept(dated(loaded), tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_merge_names_its_parts(make_concept, tmp_path):
    plain = make_concept("lora")
    recipe = dataclasses.replace(
        plain.recipe, triggers=("<a>", "<b>"), origin={"parts": [{"name": "a", "strength": 1}, {"name": "b"}, 3]}
    )
    save_concept(dataclasses.replace(plain, recipe=recipe), tmp_path / "x")
    said = metadata(tmp_path / "x")
    assert said["modelspec.merged_from"] == "a, b" and said["modelspec.trigger_phrase"] == "<a>, <b>"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("titel", "x", "'titel' is nothing that a file says"),
        ("description", "x" * 5000, "its description cannot be written"),
        ("author", "a\0b", "its author cannot be written"),
        ("thumbnail", "data:image/png;base64,AAAA", "its thumbnail cannot be written; give a JPEG"),
        ("thumbnail", JPEG + "not base64", "its thumbnail cannot be written"),
    ],
)
def test_what_no_file_can_say_is_refused_before_anything_is_written(make_concept, tmp_path, key, value, words):
    concept = dataclasses.replace(make_concept("lora"), about={key: value})
    with pytest.raises(AdapterError, match=words):
        save_concept(concept, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_strange_entries_of_other_programs_never_make_a_file_unreadable(make_concept, same_concept, tmp_path):
    concept = make_concept("lora")
    save_concept(concept, tmp_path / "x")
    tensors, said = read_safetensors(tmp_path / "x")
    said |= {f"modelspec.{key}": "y" * 100_000 for key in ("title", "description", "date")}
    said |= {"modelspec.thumbnail": JPEG + "A" * MAX_THUMBNAIL, "modelspec.author": " \x00\x07 "}
    said |= {"modelspec.hash_sha256": "a lie", COVERS: "[[[[", "modelspec.new_in_version_9": "z"}
    write_safetensors(tmp_path / "x", tensors, said)
    loaded = load_concept(tmp_path / "x")
    same_concept(loaded, concept)
    assert {key: len(value) for key, value in loaded.about.items()} == dict.fromkeys(
        ("title", "description", "date"), 4096
    )
    save_concept(loaded, tmp_path / "y")
    assert load_concept(tmp_path / "y").about == loaded.about


@pytest.mark.parametrize(
    ("said", "architecture"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v1-lora"}, "sd15"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"}, ""),
        ({"modelspec.architecture": "flux-1-dev/lora"}, ""),
        ({"ss_base_model_version": "sd_v1"}, "sd15"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({}, ""),
    ],
)
def test_another_programs_file_tells_its_family_its_words_and_its_picture(tmp_path, make_concept, said, architecture):
    from modular_concepts.files.lora import import_lora

    export_kohya(make_concept("lora"), tmp_path / "x.safetensors")
    tensors, _ = read_safetensors(tmp_path / "x.safetensors")
    shown = thumbnail(picture(8, 8))
    said = said | {"modelspec.trigger_phrase": "ohwx dog, in\nsnow,ohwx dog", "modelspec.thumbnail": shown}
    save_file(tensors, tmp_path / "y.safetensors", said | {"modelspec.title": "Ohwx"})
    concept = import_lora(tmp_path / "y.safetensors").concept
    assert isinstance(concept, Concept) and concept.recipe.architecture == architecture
    assert concept.recipe.triggers == ("ohwx dog", "in snow")
    assert concept.about == {"title": "Ohwx", "thumbnail": shown}
