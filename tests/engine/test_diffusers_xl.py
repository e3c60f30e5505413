"""A Stable Diffusion XL folder as the base: what its own pipeline computes is what we train on and draw with."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from laws import relative_error, seeded
from safetensors.torch import load_file
from tiny_sd import LENGTH, edit_json
from tiny_xl import POOLED, WIDTHS, write_tiny_xl

from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.embeddings import export_embeddings
from modular_concepts.files.kohya import export_kohya
from modular_concepts.merging import Evidence, merge_concepts
from modular_concepts.models.base import weights_hash
from modular_concepts.models.diffusers_folder import load_diffusers_base
from modular_concepts.models.targets import Targets
from modular_concepts.recording import text_features, usual_text
from modular_concepts.regions.geometry import Region
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Prior, Subject, company_examples, train_concept

diffusers = pytest.importorskip("diffusers")
PROMPT = "a photo of a dog, on the beach"
QUICK = SampleSettings(steps=3, cfg=5.0)
EVERYWHERE = Targets(("attention", "feed_forward"), ("attention",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_xl(tmp_path_factory.mktemp("xl") / "sdxl")


@pytest.fixture(scope="module")
def base(folder):
    return load_diffusers_base(folder)


def trained(base, **changed):
    pictures = torch.rand(2, 3, 16, 16, generator=seeded(3))
    settings = TrainSettings(rank=2, steps=3, batch=2, slot=0, adapter_lr=0.05, token_lr=0.5, **changed)
    subject = Subject("kodo", pictures, ["a photo of <kodo>"] * 2, "dog")
    if settings.company:
        subject = replace(subject, company=company_examples(base, subject, Prior("dog", 4, settings=QUICK)))
    return train_concept(base, subject, settings, EVERYWHERE)[0]


def test_a_folder_draws_what_its_own_pipeline_draws(folder, base):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", steps_offset=0
    )
    pipeline.set_progress_bar_config(disable=True)
    for prompt in (PROMPT, ""):
        text, nothing, pooled, pooled_nothing = pipeline.encode_prompt(prompt, negative_prompt="", device="cpu")
        assert relative_error(base.context([prompt], {}).text, text) < 1e-6
        assert relative_error(base.context([prompt], {}).pooled, pooled) < 1e-6
        assert relative_error(base.context([""], {}).text, nothing) < 1e-6
    noise = torch.randn(1, 4, 8, 8, generator=seeded(5))
    wanted = pipeline(
        PROMPT,
        negative_prompt="",
        num_inference_steps=3,
        guidance_scale=5.0,
        latents=noise,
        height=16,
        width=16,
        output_type="pt",
    ).images
    drawn = sample(base, [PROMPT], [5], settings=QUICK)
    # Three guided steps in float32 round by up to 2e-4, differently with every number of threads; a setting off by one
    # changes hundredths.
    assert relative_error(drawn, wanted) < 1e-3
    assert (drawn - sample(base, ["man"], [5], settings=QUICK)).abs().max() > 1e-3


@torch.no_grad()
def test_a_word_with_the_rows_of_a_known_word_means_the_same(base):
    rows = base.word_rows("dog")
    assert rows.shape == (1, sum(WIDTHS))
    known, learned = base.context(["a dog"], {}), base.context(["a <x>"], {"<x>": rows})
    other = base.context(["a <x>"], {"<x>": -rows})
    for part in ("text", "pooled"):
        assert torch.equal(getattr(known, part), getattr(learned, part))
        assert relative_error(getattr(other, part), getattr(known, part)) > 1e-3
    with pytest.raises(AdapterError, match="<x>: the learned word is 32 wide, the two text models 80"):
        base.context(["a <x>"], {"<x>": rows[:, :32]})


@torch.no_grad()
def test_each_layer_reads_its_own_rows(base):
    layers = base.cross_attention_layers
    rows = torch.randn(layers, 2, sum(WIDTHS), generator=seeded(2))
    context = base.context(["a <x> dog", "a dog"], {"<x>": rows})
    assert context.text.shape == (2, layers, LENGTH, sum(WIDTHS)) and context.pooled.shape == (2, POOLED)
    for layer in range(layers):
        alone = base.context(["a <x> dog", "a dog"], {"<x>": rows[layer]})
        assert relative_error(context.text[:, layer], alone.text) < 1e-5
    assert relative_error(context.pooled, base.context(["a <x> dog", "a dog"], {"<x>": rows.mean(0)}).pooled) < 1e-6


@pytest.mark.parametrize(
    "changed", [{"method": "orthogonal"}, {"method": "lora", "layerwise": True}, {"method": "words"}]
)
def test_a_concept_is_trained_saved_and_drawn(base, tmp_path, changed):
    before = weights_hash(*base.modules)
    concept = trained(base, **changed)
    assert weights_hash(*base.modules) == before
    parts = {name.split(".")[0] for name in concept.layers}
    assert parts == (set() if changed["method"] == "words" else {"unet", "text_encoder", "text_encoder_2"})
    save_concept(concept, tmp_path / "kodo.safetensors")
    loaded = load_concept(tmp_path / "kodo.safetensors")
    assert loaded.recipe.architecture == "sdxl"
    prompt, regions = "a photo of <kodo>", [Region("a <kodo>", (0.0, 0.0, 0.5, 1.0))]
    with customised(base, [loaded], [1.0]) as tokens:
        drawn = sample(base, [prompt], [5], tokens, QUICK)
        assert relative_error(sample(base, [prompt], [5], tokens, QUICK, regions), drawn) > 1e-5
        whole = [Region(prompt, (0.0, 0.0, 1.0, 1.0))]
        assert relative_error(sample(base, [prompt], [5], tokens, QUICK, whole), drawn) < 1e-5
    with customised(base, [concept], [1.0]) as tokens:
        assert torch.equal(sample(base, [prompt], [5], tokens, QUICK), drawn)
    assert relative_error(drawn, sample(base, ["a photo of dog"], [5], settings=QUICK)) > 1e-3


def test_in_company_the_network_is_told_that_the_picture_is_wide(base):
    """Both encoders read both subjects, and the sizes are those of the canvas."""
    told = []

    def note(_module, _args, named, _output):
        told.append(tuple(named["added_cond_kwargs"]["time_ids"][0].tolist()))

    handle = base.unet.register_forward_hook(note, with_kwargs=True)
    try:
        trained(base, method="lora", company=1.0)
    finally:
        handle.remove()
    assert set(told[-3:]) == {(16, 32, 0, 0, 16, 32)} and (16, 16, 0, 0, 16, 16) in told


def test_whole_weights_are_merged_as_custom_diffusion_merges_them(base):
    concept = trained(base, method="custom_diffusion")
    features, usual = text_features(base, concept, ["a {concept}"]), usual_text(base)
    assert features.shape[1] == sum(WIDTHS) and usual.shape == (sum(WIDTHS), sum(WIDTHS))
    merged = merge_concepts([concept], [1.0], "custom_diffusion", evidence=Evidence((), [features], usual))
    name = next(name for name in merged if name.endswith("attn2.to_k"))
    wanted = concept.layers[name].residual(features)
    assert relative_error(merged[name].residual(features), wanted) < 1e-2 and wanted.abs().max() > 1e-3


def test_exports_name_both_text_encoders(base, tmp_path):
    concept = trained(base, method="lora")
    export_kohya(concept, tmp_path / "kohya.safetensors")
    prefixes = {"_".join(key.split("_")[:2]) for key in load_file(tmp_path / "kohya.safetensors")}
    assert prefixes == {"lora_unet", "lora_te1", "lora_te2"}
    assert export_embeddings(concept, tmp_path)


def test_folders_that_are_not_whole_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / "unet/config.json", projection_class_embeddings_input_dim=6 * 8 + POOLED + 1)
    with pytest.raises(AdapterError, match="config.json"):
        load_diffusers_base(copy)
    shutil.rmtree(copy)
    copy = shutil.copytree(folder, tmp_path / "copy")
    words = json.loads((copy / "tokenizer_2/vocab.json").read_text())
    first, second = list(words)[:2]
    words[first], words[second] = words[second], words[first]
    (copy / "tokenizer_2/vocab.json").write_text(json.dumps(words))
    with pytest.raises(AdapterError, match="tokenizer_2: its words have other ids"):
        load_diffusers_base(copy)
