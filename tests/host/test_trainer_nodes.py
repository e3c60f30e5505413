"""Every trainer's node through the API: what it shows while it runs, what it makes, and that this can be drawn."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from served import HostServer
from test_bad_input import taught

from modular_concepts.adapters.own_words import Said, at_own_words
from modular_concepts.files.concept import load_concept
from modular_concepts.sampling import customised
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.standard import BY_NAME, pictures_of

STEPS = 12
# Title -> trainer, its own inputs, those of Training Options.
CASES = {
    "ownwords": ("OwnWordTrainer", {"token_vectors": 2}, {"gradient_checkpointing": True}),
    "columns": ("OrthoLoRATrainer", {"slot": 1}, {"word_layers": "one for each layer", "min_snr": 5.0}),
    "blocks": ("BlockLoRATrainer", {"blocks": 5, "rank": 4, "erasure": 0.2}, {"flip": "half of the pictures"}),
    "lora": ("LoRATrainer", {"rank": 4}, {"gradient_checkpointing": True, "noise_offset": 0.05, "warmup": 3}),
    "edlora": ("EDLoRATrainer", {}, None),
    "custom": ("CustomDiffusionTrainer", {"prior_pictures": 2}, {"keep_latents": True}),
    "inversion": ("WordTrainer", {}, {"caption_dropout": 0.2, "shuffle_tags": True}),
    "pplus": ("WordTrainer", {"word": "one for each layer"}, {}),
}
TOY = {"token_learning_rate": 0.03, "steps": STEPS, "batch_size": 2, "preview_every": 6, "class_word": "dog"}
LAYERWISE = ("columns", "edlora", "pplus")


def lesson(server: HostServer, title: str, loader: dict | None = None, **changes) -> dict:
    """Train by a case's node, save, and draw its word from the merged model."""
    kind, own, options = CASES[title]
    prompt = taught(server)
    basis = prompt.pop("basis")
    del prompt["shown"]
    if loader is not None:
        prompt["base"] = loader
    prompt["pictures"]["inputs"]["seed"] = 5
    inputs = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "dataset": ["data", 0], "name": title}
    if kind == "OrthoLoRATrainer":
        prompt["basis"], inputs["ortho_basis"] = basis, ["basis", 0]
    if options is not None:
        prompt["more"], inputs["options"] = server.node("ConceptTrainingOptions", **options), ["more", 0]
    if kind != "WordTrainer":
        inputs["learning_rate"] = 1e-3
    prompt["train"] = server.node(kind, **inputs, **TOY, **own, **changes)
    losses = 1 if kind in ("WordTrainer", "OwnWordTrainer") else 2
    prompt["shown"] = server.node("LossGraphNode", loss=["train", losses], filename_prefix="loss")
    prompt["save"] = server.node("ConceptSave", concept=["train", 0], filename=title, replace=True)
    merge = {"model": ["base", 0], "clip": ["base", 1], "concepts.concept0": ["train", 0], "method": "sum"}
    prompt["merge"] = {"class_type": "ConceptMerge", "inputs": merge}
    for node, text in (("text", f"a <{title}> on the beach"), ("bare", "")):
        prompt[node] = server.node("ConceptTextEncode", clip=["merge", 1], text=text)
    prompt["noise"] = server.node("EmptyLatentImage", width=32, height=32, batch_size=1)
    prompt["draw"] = server.node(
        "KSampler",
        **{"model": ["merge", 0], "positive": ["text", 0], "negative": ["bare", 0], "latent_image": ["noise", 0]},
        **{"seed": 3, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
    )
    prompt["pixels"] = server.node("VAEDecode", samples=["draw", 0], vae=["base", 2])
    prompt["show"] = server.node("PreviewImage", images=["pixels", 0])
    return prompt


@pytest.fixture(scope="module")
def runs(server):
    """title -> its finished run; each is run once, when it is first asked for."""
    done = {}

    def run(title: str):
        if title not in done:
            done[title] = server.run(lesson(server, title, preview_prompt="a {concept} | {concept} at night"))
        return done[title]

    return run


def trained(server: HostServer, title: str):
    return load_concept(server.models / "concepts" / f"{title}.safetensors")


@torch.no_grad()
def loss_of(concept=None, count: int = 32) -> float:
    """Mean loss on fixed draws of picture, noise and timestep, with the class word where there is no concept."""
    base, generator = load_toy_base(), torch.Generator().manual_seed(7)
    pictures, _ = pictures_of(BY_NAME["rex"], count)
    latents, indices = base.encode(pictures), torch.randint(1000, (count,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy, wanted = (make(latents, noise, indices) for make in (base.schedule.noisy, base.schedule.target))
    word = concept.recipe.triggers[0] if concept else "dog"
    with customised(base, [concept] if concept else [], [1.0] if concept else []) as tokens:
        prompt = f"a {word} on the beach"
        context = base.context([prompt] * count, tokens)
        places = base.word_places(prompt, tokens)
        said = Said({number: [each.places(places)] * count for number, each in enumerate(tokens.by_word)})
        with at_own_words(base.layers(("all_linear",), None), tokens.by_word, said):
            predicted = base.predict(noisy, base.schedule.times_of(indices), context)
    return float((predicted - wanted).square().mean())


@pytest.mark.parametrize("title", CASES)
def test_a_concept_is_learned_and_drawn(server, runs, title):
    run, kind = runs(title), CASES[title][0]
    concept = trained(server, title)
    assert loss_of(concept) < loss_of()
    assert bool(concept.layers) == (kind != "WordTrainer")
    (rows,) = concept.tokens.values()
    assert rows.dim() == (3 if title in LAYERWISE else 2)
    picture = server.pictures(run, "show")
    assert picture.shape == (1, 3, 32, 32) and picture.std() > 0


def test_methods_are_those_that_the_nodes_are_named_for(server, runs):
    settings = {}
    for title in CASES:
        runs(title)
        settings[title] = trained(server, title).recipe.training
    assert {title: own["method"] for title, own in settings.items()} == {
        "ownwords": "own_words",
        "columns": "orthogonal",
        "blocks": "block",
        "lora": "lora",
        "edlora": "lora",
        "custom": "custom_diffusion",
        "inversion": "words",
        "pplus": "words",
    }
    assert settings["columns"]["min_snr"] == 5.0 and settings["columns"]["schedule"] == "cosine"
    assert settings["blocks"]["flip"] and not settings["lora"]["flip"]
    assert settings["lora"]["warmup"] == 3 and settings["lora"]["noise_offset"] == 0.05
    ed_lora = ("random + class", "linear", 4, 0.01)
    assert tuple(settings["edlora"][key] for key in ("token_start", "schedule", "rank", "noise_offset")) == ed_lora
    assert settings["edlora"]["text_encoder_lr"] == pytest.approx(0.1 * settings["edlora"]["adapter_lr"])
    assert settings["custom"]["schedule"] == "constant" and settings["custom"]["flip"]
    assert settings["custom"]["targets"] == ["cross_attention_kv"]
    assert list((server.output / "modular_concepts_latents").rglob("*.safetensors"))
    assert settings["inversion"]["caption_dropout"] == 0.2 and settings["inversion"]["shuffle_tags"]


@pytest.mark.parametrize("title", CASES)
def test_the_node_shows_an_estimate_then_the_loss_and_pictures(runs, title):
    run = runs(title)
    first, *_, last = run.texts["train"]
    assert "a step" in first and "GiB of memory" in first
    *notes, progress = last.splitlines()
    assert progress.startswith(f"step {STEPS} of {STEPS}, loss ") and "learning rate" in progress
    # Its captions have no parts to shuffle.
    assert [note.partition(":")[0] for note in notes] == ["shuffle_tags changes nothing"] * (title == "inversion")
    assert run.progress["train"][-1] == (STEPS, STEPS)
    sizes = [Image.open(io.BytesIO(picture)).size for picture in run.previews["train"]]
    assert sizes == [(512, 256)] * 2  # two prompts side by side, after steps 6 and 12


def test_a_fresh_training_options_changes_nothing(server, runs):
    runs("edlora")
    before = trained(server, "edlora")
    prompt = lesson(server, "edlora")
    prompt["more"] = server.node("ConceptTrainingOptions")
    prompt["train"]["inputs"] |= {"options": ["more", 0], "preview_every": 0}
    server.run(prompt)
    after = trained(server, "edlora")
    assert torch.equal(after.tokens["<edlora>"], before.tokens["<edlora>"])
    assert all(torch.equal(after.layers[name].lora_up, own.lora_up) for name, own in before.layers.items())
    assert after.recipe.to_json() == before.recipe.to_json()


def test_resume_goes_on_with_other_settings_only_when_told_to(server, runs):
    runs("pplus")
    longer = lesson(server, "pplus", resume=True)
    longer["train"]["inputs"]["steps"] = STEPS + 4
    fault = server.fault(copy.deepcopy(longer))
    assert fault.node == "train" and f"steps was {STEPS}, is now {STEPS + 4}" in fault.reason
    assert "on_change set to go on resumes all the same" in fault.reason
    longer["train"]["inputs"]["on_change"] = "go on"
    run = server.run(longer)
    assert run.progress["train"][0][0] == STEPS + 1
    assert trained(server, "pplus").recipe.training["steps_done"] == STEPS + 4


def test_words_alone_are_embeddings_for_other_programs(server, runs):
    runs("inversion")
    prompt = lesson(server, "inversion")
    form = {"format": "LoRA for stock loaders", "filename": "inversion_word", "replace": True}
    prompt["stock"] = server.node("ConceptSave", concept=["train", 0], **form)
    server.run(prompt)
    (rows,) = trained(server, "inversion").tokens.values()
    with safe_open(server.models / "embeddings" / "inversion_word.safetensors", "pt") as file:
        (key,) = file.keys()
        assert torch.equal(file.get_tensor(key), rows)
    assert not (server.models / "loras" / "inversion_word.safetensors").exists()


def optional(server: HostServer, title: str, **options) -> dict:
    prompt = lesson(server, title)
    prompt["more"] = server.node("ConceptTrainingOptions", **options)
    prompt["train"]["inputs"]["options"] = ["more", 0]
    return prompt


def said_by_core(server: HostServer) -> dict:
    prompt = lesson(server, "pplus")
    prompt["text"] = server.node("CLIPTextEncode", clip=["merge", 1], text="a <pplus> on the beach")
    return prompt


@pytest.mark.parametrize(
    ("what", "node", "words"),
    [
        (lambda server: optional(server, "edlora", attention_regularisation=0.01), "train", "give a mask for each"),
        (lambda server: optional(server, "lora", optimizer="adamw8bit"), "train", "bitsandbytes"),
        (lambda server: optional(server, "lora", caption_dropout=2.0), "more", "caption_dropout"),
        (said_by_core, "text", "Concept Prompt"),
    ],
    ids=["no masks", "no bitsandbytes", "all captions dropped", "a layer-wise word in core's prompt"],
)
def test_what_cannot_work_is_said_on_the_node(server, what, node, words):
    fault = server.fault(what(server))
    assert fault.node == node and words in fault.reason and len(fault.reason) < 400, fault


@pytest.fixture(scope="module")
def checkpoint(checkpoint, server):
    folder = server.models / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(shutil.copy(checkpoint("sd15"), folder / "sd15_methods.safetensors")).name
    return {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}


@pytest.mark.parametrize("title", ["ownwords", "columns", "edlora", "custom", "pplus"])
def test_the_same_on_stable_diffusion(server, checkpoint, title):
    changes = {"preview_every": 0, "steps": 8, "token_learning_rate": 1e-3}
    prompt = lesson(server, title, loader=checkpoint)
    prompt["train"]["inputs"] |= changes
    prompt["data"]["inputs"] |= {"width": 64, "height": 64}
    prompt["noise"]["inputs"] |= {"width": 64, "height": 64}
    prompt["save"]["inputs"]["filename"] = f"{title}_sd15"
    run = server.run(prompt)
    concept = trained(server, f"{title}_sd15")
    (rows,) = concept.tokens.values()
    assert concept.recipe.architecture == "sd15" and rows.shape[-1] == 768
    assert rows.dim() == (3 if title in LAYERWISE else 2)
    if title in LAYERWISE:
        assert not torch.equal(rows[0], rows[1])
    for adapter in concept.layers.values():
        assert adapter.lora_up.abs().max() > 0
    assert server.pictures(run, "show").shape == (1, 3, 64, 64)
    assert "a step" in run.texts["train"][0]
