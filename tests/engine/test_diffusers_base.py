"""A diffusers folder as the base: what diffusers computes is what we train on and draw with."""

import json
import shutil
import socket

import pytest
import torch
from laws import relative_error, seeded
from safetensors.torch import load_file, save_file
from tiny_sd import END, LENGTH, edit_json, write_tiny_sd

from modular_concepts.cli.main import main
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.models import diffusers_folder as diffusers_base
from modular_concepts.models.base import weights_hash
from modular_concepts.models.diffusers_folder import load_diffusers_base
from modular_concepts.models.targets import Targets
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, train_concept

diffusers = pytest.importorskip("diffusers")
PROMPT = "a photo of a dog, on the beach"
QUICK = SampleSettings(steps=3, cfg=5.0)
EVERYWHERE = Targets(("attention", "feed_forward"), ("attention",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sd(tmp_path_factory.mktemp("sd") / "sd15")


@pytest.fixture(scope="module")
def base(folder):
    return load_diffusers_base(folder)


@pytest.fixture(scope="module")
def concepts(base):
    return [trained(base, name, slot) for slot, name in enumerate(("kodo", "mira"))]


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def pipeline_of(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)


def pictures(count=2, seed=3):
    return torch.rand(count, 3, 16, 16, generator=seeded(seed))


def trained(base, name, slot):
    subject = Subject(name, pictures(2, slot), [f"a photo of <{name}>"] * 2, "man")
    settings = TrainSettings(rank=2, steps=3, batch=2, slot=slot, adapter_lr=0.05, token_lr=0.05, name=name)
    return train_concept(base, subject, settings, EVERYWHERE)[0]


def rewrite(file, change):
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("prediction, pad, zero_snr", [("epsilon", END, False), ("v_prediction", "!", True)])
def test_a_folder_draws_what_its_own_pipeline_draws(tmp_path, prediction, pad, zero_snr):
    folder = write_tiny_sd(tmp_path / "sd", prediction, pad, zero_snr)
    base, pipeline = load_diffusers_base(folder), pipeline_of(folder)
    assert base.schedule.prediction == prediction
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", steps_offset=0
    )
    assert torch.equal(base.schedule.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    pipeline.set_progress_bar_config(disable=True)
    long = "a photo of a dog on the beach " * 20
    for prompt in (PROMPT, "", long):
        wanted, nothing = pipeline.encode_prompt(prompt, "cpu", 1, True, "")
        assert torch.equal(base.context([prompt], {}), wanted)
        assert torch.equal(base.context([""], {}), nothing)
    noise = torch.randn(1, 4, 8, 8, generator=seeded(5))
    wanted = pipeline(PROMPT, num_inference_steps=3, guidance_scale=5.0, latents=noise, output_type="pt").images
    drawn = sample(base, [PROMPT], [5], settings=QUICK)
    assert (drawn - wanted).abs().max() < 1e-4
    assert (drawn - sample(base, ["man"], [5], settings=QUICK)).abs().max() > 1e-3


def test_pictures_become_the_mode_of_the_posterior(folder, base):
    pipeline = pipeline_of(folder)
    latents, vae = base.encode(pictures()), pipeline.vae
    with torch.no_grad():
        wanted = vae.encode(pictures() * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
        back = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert relative_error(latents, wanted) < 1e-5 and torch.equal(latents, base.encode(pictures()))
    assert relative_error(base.decode(latents), back) < 1e-5
    noisy, steps = torch.randn(2, 4, 8, 8, generator=seeded(1)), torch.tensor([3, 900])
    context = base.context([PROMPT, "man"], {})
    with torch.no_grad():
        assert torch.equal(base.predict(noisy, steps, context), pipeline.unet(noisy, steps, context).sample)
    with pytest.raises(AdapterError, match="17 x 16 pixels do not fit this base; choose multiples of 4"):
        base.encode(torch.zeros(1, 3, 16, 17))


@torch.no_grad()
def test_a_layer_wise_word_reaches_each_cross_attention(base):
    layers = base.cross_attention_layers
    rows = torch.randn(layers, 2, 32, generator=seeded(2))
    context = base.context(["a <kodo> dog", "a dog"], {"<kodo>": rows})
    assert context.shape == (2, layers, LENGTH, 32) and layers > 1
    for layer in range(layers):
        alone = base.context(["a <kodo> dog", "a dog"], {"<kodo>": rows[layer]})
        assert relative_error(context[:, layer], alone) < 1e-5
    noisy, steps = torch.randn(2, 4, 8, 8, generator=seeded(1)), torch.tensor([3, 900])
    drawn = base.predict(noisy, steps, context)
    assert relative_error(base.predict(noisy, steps, context[:, :1].expand(-1, layers, -1, -1)), drawn) > 1e-4
    plain = base.predict(noisy, steps, context[:, 0])
    assert relative_error(base.predict(noisy, steps, context[:, :1].expand(-1, layers, -1, -1)), plain) < 1e-5


@pytest.mark.parametrize("method", ["words", "custom_diffusion"])
def test_a_layer_wise_word_is_learned_and_drawn(base, method):
    subject = Subject("kodo", pictures(), ["a photo of <kodo>"] * len(pictures()), "dog")
    settings = TrainSettings(method=method, steps=2, batch=2, layerwise=True, token_lr=0.5, adapter_lr=1e-2)
    concept, result = train_concept(base, subject, settings, Targets(("cross_attention_kv",)))
    assert concept.tokens["<kodo>"].shape == (base.cross_attention_layers, 2, 32) and result.finished
    assert {adapter.kind for adapter in concept.layers.values()} == ({"full"} if concept.layers else set())
    with customised(base, [concept], [1.0]) as tokens:
        drawn = sample(base, ["a photo of <kodo>"], [5], tokens, QUICK)
    assert relative_error(drawn, sample(base, ["a photo of dog"], [5], settings=QUICK)) > 1e-3


def test_trigger_words_stand_for_ids_behind_the_vocabulary(base):
    rows = {"<kodo>": torch.randn(2, 32, generator=seeded(2))}
    first = base.embedding.num_embeddings
    ids, plain = base.tokenize([f"a <kodo> dog {END}", "a dog"], {"<kodo>": [first, first + 1]})
    assert len(ids) == LENGTH and (ids >= first).sum() == 2
    assert ids[2:4].tolist() == [first, first + 1] and ids[4] == plain[2]
    assert relative_error(base.context(["a <kodo>"], rows), base.context(["a <kodo>"], {})) > 1e-2
    lost = base.tokenize(["dog " * 100 + "<kodo>"], {"<kodo>": [first, first + 1]})
    assert lost.shape == (1, LENGTH) and lost.max() < first
    assert torch.equal(base.word_rows("dog"), base.embedding.weight[plain[2:3]])
    assert base.word_rows("old man").shape == (4, 32)  # o, l, d and the whole word man


def test_weights_are_the_tensors_that_were_read_and_nothing_is_fetched(folder, monkeypatch):
    read, addresses = diffusers_base.read_safetensors, set()

    def remember(*args):
        tensors, metadata = read(*args)
        addresses.update(tensor.data_ptr() for tensor in tensors.values())
        return tensors, metadata

    def refuse(*_args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(diffusers_base, "read_safetensors", remember)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = load_diffusers_base(folder)
    weights = [*base.unet.parameters(), *base.text_encoder.parameters()]
    assert {weight.data_ptr() for weight in weights} <= addresses
    assert not any(weight.requires_grad for weight in weights)
    assert not base.unet.training and not base.text_encoder.training


def test_old_names_half_precision_and_shards_are_read_as_well(copy, base):
    text, vae, unet = copy / "text_encoder", copy / "vae", copy / "unet"
    rewrite(text / "model.safetensors", lambda key: f"text_model.{key.removeprefix('text_model.')}")
    old = load_file(text / "model.safetensors") | {
        "text_model.embeddings.position_ids": torch.arange(LENGTH).expand(1, -1)
    }
    save_file({key: tensor.clone() for key, tensor in old.items()}, text / "model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(key):
        for new, before in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        return key

    rewrite(vae / "diffusion_pytorch_model.safetensors", old_name)
    assert any(".proj_attn." in key for key in load_file(vae / "diffusion_pytorch_model.safetensors"))
    whole = unet / "diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    shards = {key: f"part-{number % 2}.safetensors" for number, key in enumerate(weights)}
    for shard in set(shards.values()):
        save_file({key: weights[key] for key in weights if shards[key] == shard}, unet / shard)
    whole.unlink()
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("{}", encoding="utf-8")
    edit_json(index, weight_map=shards)
    again = load_diffusers_base(copy)
    assert again.hash == base.hash
    assert torch.equal(again.encode(pictures()), base.encode(pictures()))
    index.unlink()
    save_file({key: w.half() for key, w in weights.items()}, unet / "diffusion_pytorch_model.fp16.safetensors")
    half = load_diffusers_base(copy)
    assert {weight.dtype for weight in half.unet.parameters()} == {torch.float32} and half.hash != base.hash


def test_training_leaves_the_base_as_it_was(base, concepts):
    assert weights_hash(base.unet, base.text_encoder) == base.hash
    for concept in concepts:
        assert concept.recipe.base_hash == base.hash and concept.recipe.architecture == base.architecture
        sizes = {name: adapter.delta().norm() for name, adapter in concept.layers.items()}
        assert all(size > 0 for size in sizes.values()), sizes
        assert {name.split(".")[0] for name in sizes} == {"unet", "text_encoder"}
        rows = concept.tokens[f"<{concept.name}>"]
        assert relative_error(rows, base.word_rows("man").expand_as(rows)) > 1e-2


def test_a_merged_file_draws_what_its_concepts_draw(base, concepts, tmp_path):
    for concept in concepts:
        save_concept(concept, tmp_path / f"{concept.name}.safetensors")
    loaded = [load_concept(tmp_path / f"{concept.name}.safetensors") for concept in concepts]
    merged = merged_concept("both", loaded, [1.0, 0.7])
    prompt = "a photo of <kodo> and <mira>"
    with customised(base, loaded, [1.0, 0.7]) as tokens:
        together = sample(base, [prompt], [1], tokens, QUICK)
    with customised(base, [merged], [1.0]) as tokens:
        assert (sample(base, [prompt], [1], tokens, QUICK) - together).abs().max() < 1e-4
    assert (sample(base, [prompt], [1], {}, QUICK) - together).abs().max() > 1e-2


def test_an_exported_concept_is_the_same_change_in_diffusers(folder, base, concepts, tmp_path):
    concept, pipeline = concepts[0], pipeline_of(folder)
    weights = load_file(export_diffusers(concept, tmp_path))
    noisy, steps = torch.randn(1, 4, 8, 8, generator=seeded(1)), torch.tensor([500])
    with torch.no_grad():
        plain = pipeline.unet(noisy, steps, pipeline.encode_prompt("man", "cpu", 1, False)[0]).sample
        for key in [key for key in weights if ".lora_A." in key]:
            part, path = key.removesuffix(".lora_A.weight").split(".", 1)
            own = dict(getattr(pipeline, part).named_modules())
            module = own.get(path) or own[path.removeprefix("text_model.")]
            module.weight += weights[key.replace("lora_A", "lora_B")] @ weights[key]
        wanted = pipeline.unet(noisy, steps, pipeline.encode_prompt("man", "cpu", 1, False)[0]).sample
        with customised(base, [concept], [1.0]) as tokens:
            got = base.predict(noisy, steps, base.context(["man"], tokens))
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(wanted, plain) > 1e-3


def test_diffusers_loads_the_export_with_peft(folder, base, concepts, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed; the exported keys are checked without it")
    concept, pipeline = concepts[0], pipeline_of(folder)
    export_diffusers(concept, tmp_path)
    pipeline.load_lora_weights(tmp_path)
    noisy, steps = torch.randn(1, 4, 8, 8, generator=seeded(1)), torch.tensor([500])
    with torch.no_grad(), customised(base, [concept], [1.0]) as tokens:
        wanted = pipeline.unet(noisy, steps, pipeline.encode_prompt("man", "cpu", 1, False)[0]).sample
        assert relative_error(base.predict(noisy, steps, base.context(["man"], tokens)), wanted) < 1e-5


def test_the_command_line_trains_and_draws_on_a_folder(folder, tmp_path, capsys):
    from PIL import Image

    shots, concept, drawn = tmp_path / "shots", tmp_path / "kodo.safetensors", tmp_path / "kodo.png"
    shots.mkdir()
    for number, picture in enumerate(pictures()):
        array = (picture.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(array).save(shots / f"{number}.png")
    small = ["--rank", "2", "--steps", "2", "--batch", "1", "--slot", "0", "--text-encoder"]
    small += ["--company", "0.5", "--company-pictures", "2"]
    command = ["train", str(shots), "--name", "kodo", "--class-word", "dog", "--base", str(folder)]
    assert main([*command, *small, "--out", str(concept)]) == 0
    assert main(["inspect", str(concept)]) == 0
    prompt = ["sample", "a photo of <kodo>", "--concept", str(concept), "--steps", "2"]
    regions = ["--region", "0,0,0.5,1:a <kodo> on the beach"]
    assert main([*prompt, *regions, "--base", str(folder), "--out", str(drawn)]) == 0
    assert Image.open(drawn).size == (16, 16)
    assert main(["export", str(concept), "--out", str(tmp_path / "kohya.safetensors")]) == 0
    capsys.readouterr()
    assert main([*prompt, "--base", str(tmp_path / "nowhere"), "--out", str(tmp_path / "none.png")]) == 2
    assert "nowhere" in capsys.readouterr().err


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def as_pickle(part):
    for file in part.glob("*.safetensors"):
        file.rename(part / "pytorch_model.bin")


def without_one_weight(file):
    weights = load_file(file)
    save_file(dict(sorted(weights.items())[1:]), file)


def widen_input(unet):
    edit_json(unet / "config.json", in_channels=9)
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"]] * 3, dim=1)[:, :9].contiguous()
    save_file(weights, unet / "diffusion_pytorch_model.safetensors")


UNET, TEXT, VAE = "unet/config.json", "text_encoder", "vae/diffusion_pytorch_model.safetensors"
FAULTS = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "flux": (
        lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
        "'FluxPipeline'; only Stable Diffusion 1.x and 2.x .* and XL .* can be the base",
    ),
    "sdxl": (
        lambda f: edit_json(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "its text_encoder_2 is None; it must be a CLIPTextModelWithProjection",
    ),
    "other vae": (
        lambda f: edit_json(f / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
        "vae is 'AutoencoderTiny'",
    ),
    "index no json": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not sound JSON"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json: is missing"),
    "no weights": (lambda f: (f / VAE).unlink(), "vae/diffusion_pytorch_model.safetensors: is missing"),
    "pickle": (lambda f: as_pickle(f / TEXT), "pytorch_model.bin: this is a pickle.*safe_serialization=True"),
    "cut weights": (lambda f: cut(f / VAE), "copy/vae: diffusion_pytorch_model.safetensors: the file is cut short"),
    "one weight": (lambda f: without_one_weight(f / VAE), "is missing .1 missing, 0 too many.; the file is damaged"),
    "other config": (
        lambda f: edit_json(f / TEXT / "config.json", intermediate_size=96),
        "model.safetensors: .* has shape .*, config.json asks for",
    ),
    "strange config": (lambda f: edit_json(f / UNET, down_block_types=["Nothing"]), "unet/config.json: no network"),
    "inpainting": (
        lambda f: widen_input(f / "unet"),
        "takes 9 channels where the VAE gives 4, as models for inpainting",
    ),
    "sample size": (lambda f: edit_json(f / UNET, sample_size="big"), "sample_size is 'big'"),
    "no vocabulary": (lambda f: (f / "tokenizer/vocab.json").unlink(), "tokenizer/vocab.json: is missing"),
    "damaged vocabulary": (
        lambda f: (f / "tokenizer/vocab.json").write_text("{1"),
        "copy/tokenizer: the tokenizer cannot be read",
    ),
    "alien vocabulary": (
        lambda f: edit_json(f / "tokenizer/vocab.json", **{f"word{n}": 600 + n for n in range(9)}),
        "the tokenizer has 536 tokens, the text encoder 527",
    ),
    "flow": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_schedule=None),
        "scheduler_config.json: .* has no betas",
    ),
    "prediction": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="sample"),
        "scheduler_config.json: prediction type is 'sample'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_and_damaged_folders_are_refused_in_words(copy, fault):
    damage, words = FAULTS[fault]
    damage(copy)
    with pytest.raises(AdapterError, match=words) as refused:
        load_diffusers_base(copy)
    assert str(copy) in str(refused.value)


def test_a_checkpoint_file_is_no_folder(folder):
    with pytest.raises(AdapterError, match="this is a file.*from_single_file"):
        load_diffusers_base(folder / VAE)


def test_weights_are_looked_for_as_the_libraries_do(copy, base):
    unet, other = copy / "unet", torch.zeros(1)
    whole = unet / "diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    half = {key: weight.half() for key, weight in weights.items()}
    save_file(half, unet / "diffusion_pytorch_model.fp16.safetensors")
    assert load_diffusers_base(copy).hash == base.hash
    # A list of parts goes before a file that lies beside them, as diffusers has it.
    save_file(weights, unet / "part.safetensors")
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "part.safetensors")}), encoding="utf-8")
    save_file({"another's": other}, whole)
    assert load_diffusers_base(copy).hash == base.hash
    # Of a variant there may be nothing else.
    whole.unlink()
    index.rename(unet / "diffusion_pytorch_model.safetensors.index.fp16.json")
    (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert load_diffusers_base(copy).hash == base.hash
    (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").unlink()
    with pytest.raises(AdapterError, match="part.safetensors is not called as weights are"):
        load_diffusers_base(copy)
    (unet / "part.safetensors").rename(unet / "diffusion_pytorch_model.bf16.safetensors")
    assert load_diffusers_base(copy).hash == base.hash


def test_a_mark_of_the_encoding_before_a_text_is_no_fault(copy, base):
    for path in (copy / "unet" / "config.json", copy / "model_index.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_diffusers_base(copy).hash == base.hash


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_mark_of_the_encoding_in_a_tokenizer_is_one_sentence(copy, name):
    path = copy / "tokenizer" / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(AdapterError, match=f"{name}: it begins with a mark of its encoding"):
        load_diffusers_base(copy)
