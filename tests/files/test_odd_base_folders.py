"""Promise 1 for folders with a base model: whatever is wrong in one, it is a sentence before any work, or it draws.

A part of all entries with all odd values here; `make torture` tries all of them.
"""

import json
import os
import shutil
import time
from contextlib import suppress

import pytest
import torch
from base_folders import PROMPT, QUICK, VAE_WEIGHTS, swept, tiny_folder
from mutations import peak_memory
from safetensors.torch import load_file, save_file

from modular_concepts.cli.main import main
from modular_concepts.errors import AdapterError
from modular_concepts.models.diffusers_configs import (
    MAX_TEXT,
    SCHEDULER,
    TEXT_ENCODER,
    UNET,
    VAE,
    check_depth,
    check_facts,
)
from modular_concepts.models.diffusers_folder import load_diffusers_base
from modular_concepts.sampling import SampleSettings, sample

pytest.importorskip("diffusers")
TOKENS, TEXT, NET = "tokenizer/tokenizer_config.json", "text_encoder/config.json", "unet/config.json"
PICTURES, LEVELS = "vae/config.json", "scheduler/scheduler_config.json"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": VAE_WEIGHTS,
}


@pytest.fixture(scope="module", params=["sd", "xl"])
def both(request, tmp_path_factory):
    return tiny_folder(request.param, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_folder("sd", tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(sd, tmp_path):
    return shutil.copytree(sd, tmp_path / "copy")


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused(folder, *words):
    """The one sentence that a folder gives, in bounded time."""
    started = time.process_time()
    with pytest.raises(AdapterError) as fault:
        load_diffusers_base(folder)
    sentence = str(fault.value)
    assert time.process_time() - started < 1
    assert len(sentence) < 700 and "\\n" not in sentence and "\n" not in sentence
    assert str(folder) in sentence and all(word in sentence for word in words), sentence
    return sentence


ENTRIES = [
    *[(TOKENS, "model_max_length", value) for value in ("abc", -1, 0, 1, 2, [77], True, 1e308, 77.0)],
    *[(PICTURES, "scaling_factor", value) for value in (0, -0.5, 1e308, 1e-300, "x", None, [1], True)],
    *[(PICTURES, name, [1.0] * 4) for name in ("latents_mean", "latents_std")],
    (PICTURES, "shift_factor", 0.1),
    *[(PICTURES, "layers_per_block", value) for value in (0, 10**9, None)],
    *[(TEXT, "layer_norm_eps", value) for value in (None, 0, -1, 1e308, "x")],
    *[(TEXT, "eos_token_id", value) for value in (None, -1, [1], 10**9, 527, True)],
    *[(TEXT, "num_attention_heads", value) for value in (-4, 0, 3, 10**9, None)],
    *[(TEXT, "num_hidden_layers", value) for value in (20_000, 3, 0, -1, 1e308)],
    *[(TEXT, "max_position_embeddings", value) for value in (1, 10**9, 78)],
    (TEXT, "hidden_act", "nothing of the kind"),
    *[(NET, "layers_per_block", value) for value in (20_000, [20_000, 1], 0, [], [[1]])],
    *[(NET, "transformer_layers_per_block", value) for value in (20_000, [1, 20_000], [[20_000], [1]], -1)],
    (NET, "reverse_transformer_layers_per_block", [[20_000], 1]),
    *[(NET, "norm_eps", value) for value in (None, -1e-5, 1e308)],
    *[(NET, "downsample_padding", value) for value in (10**9, -1, None)],
    *[(NET, "attention_head_dim", value) for value in (-4, 0, [], [4, -4])],
    (NET, "block_out_channels", [16] * 5000),
    (NET, "num_attention_heads", 8),
    *[(LEVELS, "num_train_timesteps", value) for value in (10**9, 1, 0, None, 1000.0)],
    *[(LEVELS, name, value) for name in ("beta_start", "beta_end") for value in (None, 0, 1, 1e308, -1, "x")],
    (LEVELS, "beta_end", 0.99),  # so that nothing of the picture is left, and a division by it
    *[(LEVELS, "trained_betas", value) for value in ([0.1], [0.1] * 7, ["x", 1], [0.5] * 1000, 5)],
    *[(LEVELS, "prediction_type", value) for value in (["epsilon"], None, "sample", 5)],
]


@pytest.mark.parametrize("file, name, value", ENTRIES, ids=lambda each: str(each)[:30])
def test_an_entry_that_cannot_be_is_a_sentence_that_names_its_file(copy, file, name, value):
    edit(copy / file, **{name: value})
    refused(copy, file.split("/")[0])


@pytest.mark.parametrize(
    "family_and_file", ["text_encoder_2/config.json num_hidden_layers", "unet/config.json addition"]
)
def test_the_second_text_encoder_and_the_sizes_are_read_as_strictly(tmp_path, family_and_file):
    folder, (file, entry) = tiny_folder("xl", tmp_path), family_and_file.split()
    name, values = {
        "num_hidden_layers": ("num_hidden_layers", (20_000, None)),
        "addition": ("addition_time_embed_dim", (None, 10**9, -1, "x", 9)),
    }[entry]
    for value in values:
        edit(folder / file, **{name: value})
        refused(folder, file)


TEXTS = [NET, TEXT, PICTURES, LEVELS, TOKENS, "model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
MORE = ["tokenizer/special_tokens_map.json", "tokenizer/added_tokens.json", "tokenizer/tokenizer.json"]
CANNOT_BE_READ = {
    "huge": lambda path: os.truncate(path, MAX_TEXT + 1) if path.exists() else path.write_bytes(b" " * (MAX_TEXT + 1)),
    "pipe": lambda path: (path.unlink(missing_ok=True), os.mkfifo(path)),
    "device": lambda path: (path.unlink(missing_ok=True), path.symlink_to("/dev/zero")),
    "dead link": lambda path: (path.unlink(missing_ok=True), path.symlink_to("nowhere")),
    "folder": lambda path: (path.unlink(missing_ok=True), path.mkdir()),
}


UNREADABLE = [(file, fault) for file in (*TEXTS, *MORE) for fault in CANNOT_BE_READ]
UNREADABLE += [(file, fault) for file in WEIGHTS.values() for fault in CANNOT_BE_READ if fault != "huge"]


@pytest.mark.parametrize("file, fault", UNREADABLE)
def test_what_is_no_plain_file_of_a_plain_size_is_never_opened(copy, file, fault):
    CANNOT_BE_READ[fault](copy / file)
    before = peak_memory(reset=True)
    refused(copy)
    assert peak_memory() - before < 2 * MAX_TEXT


@pytest.mark.parametrize("file", [TOKENS, "tokenizer/special_tokens_map.json"])
@pytest.mark.parametrize("name", ["vocab_file", "tokenizer_file", "gguf_file", "init_inputs", "trust_remote_code"])
def test_a_tokenizer_reads_nothing_but_the_files_beside_it(copy, file, name):
    edit(copy / file, **{name: "/dev/zero"})
    refused(copy, name, "reads from elsewhere")


def test_a_text_that_would_be_millions_of_objects_is_not_parsed(copy):
    (copy / "tokenizer/tokenizer.json").write_bytes(b"[" + b"[]," * (MAX_TEXT // 3 - 2) + b"[]]")
    before = peak_memory(reset=True)
    refused(copy, "tokenizer.json")
    assert peak_memory() - before < 16 * MAX_TEXT


def test_words_with_numbers_beyond_the_text_encoder_are_refused(copy):
    words = json.loads((copy / "tokenizer/vocab.json").read_text())
    words["photo</w>"] = 10**6
    (copy / "tokenizer/vocab.json").write_text(json.dumps(words))
    refused(copy, "tokenizer: 'photo</w>' has the number 1000000, and the text encoder has 527 tokens")


NEW = [f"word{number}" for number in range(100_000)]
MANY = {
    "merges": ("merges.txt", lambda: "#version: 0.2\n" + "a b\n" * 4_000_000),
    "vocabulary": ("vocab.json", lambda: json.dumps({str(number): number for number in range(300_000)})),
    "added": ("added_tokens.json", lambda: json.dumps({word: 527 + number for number, word in enumerate(NEW)})),
    "special": ("special_tokens_map.json", lambda: json.dumps({"additional_special_tokens": NEW})),
    "extra": ("tokenizer_config.json", lambda: json.dumps({"extra_special_tokens": NEW})),
}


@pytest.mark.parametrize("what", MANY)
def test_words_without_number_are_refused_before_the_library_counts_them(copy, what):
    file, text = MANY[what]
    (copy / "tokenizer" / file).write_text(text())
    before = peak_memory(reset=True)
    refused(copy, file)
    assert peak_memory() - before < 4 * MAX_TEXT


@pytest.mark.parametrize("gone", ["<|startoftext|>", "<|endoftext|>"])
def test_marks_that_the_vocabulary_lacks_are_not_made_up(copy, gone):
    path = copy / "tokenizer/vocab.json"
    path.write_text(json.dumps({word: number for word, number in json.loads(path.read_text()).items() if word != gone}))
    refused(copy, "copy/tokenizer: the vocabulary has no start or end token")


def test_two_words_of_one_number_are_refused(copy):
    edit(copy / "tokenizer/vocab.json", **{"photo</w>": 5})
    refused(copy, "copy/tokenizer: two words have the same number")


def test_a_token_with_parts_that_no_token_has_is_refused(copy):
    for entries in ({"bos_token": {"content": "a", "other": 1}}, {"added_tokens_decoder": {"-5": {"content": "a"}}}):
        edit(copy / TOKENS, **entries)
        refused(copy, TOKENS)


def changed(weights, change):
    name = next(name for name, tensor in weights.items() if tensor.dim() >= 2)
    return weights | {name: change(weights[name])}


def with_value(value):
    return lambda weights: changed(weights, lambda tensor: torch.full_like(tensor, value))


WRONG = {
    "missing": lambda weights: dict(list(weights.items())[1:]),
    "more": lambda weights: weights | {"another.weight": torch.ones(3)},
    "shape": lambda weights: changed(weights, lambda tensor: tensor[..., :1].contiguous()),
    "int64": lambda weights: changed(weights, torch.Tensor.long),
    "int32": lambda weights: changed(weights, torch.Tensor.int),
    "float64 too large": lambda weights: changed(weights, lambda tensor: tensor.double() + 1e300),
    "NaN": with_value(float("nan")),
    "infinity": with_value(float("inf")),
    "largest": lambda weights: {name: torch.full_like(tensor, 3e38) for name, tensor in weights.items()},
}


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_download_that_was_not_finished_is_refused_and_some_zeros_are_not(copy, part):
    """Room for the whole file, its end never written."""
    path = copy / WEIGHTS[part]
    weights = load_file(path)
    names = [name for name, tensor in weights.items() if tensor.dim() >= 2]
    for share, sound in ((0.3, True), (0.7, False)):
        gone = set(names[: int(share * len(names))])
        save_file({name: tensor * (name not in gone) for name, tensor in weights.items()}, path)
        if sound:
            load_diffusers_base(copy)
        else:
            refused(copy, f"copy/{part}", "every number is 0", "get the model again")


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_do_not_belong_are_refused(copy, part, fault):
    path = copy / WEIGHTS[part]
    save_file(WRONG[fault](load_file(path)), path)
    refused(copy, f"copy/{part}")


def test_the_same_weight_under_two_names_is_refused(copy):
    path = copy / WEIGHTS["text_encoder"]
    weights = load_file(path)
    name = next(iter(weights))
    other = f"text_model.{name}" if not name.startswith("text_model.") else name.removeprefix("text_model.")
    save_file(weights | {other: weights[name].clone()}, path)
    refused(copy, "is there twice")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sound_weights_of_another_precision_draw(copy, dtype):
    for file in WEIGHTS.values():
        save_file({name: tensor.to(dtype) for name, tensor in load_file(copy / file).items()}, copy / file)
    picture = sample(load_diffusers_base(copy), [PROMPT], [0], settings=QUICK)
    assert torch.isfinite(picture).all() and picture.std() > 0


def test_weights_in_parts_are_files_beside_their_list_or_links(copy, tmp_path):
    path = copy / WEIGHTS["unet"]
    index = path.with_name(f"{path.name}.index.json")
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    (path.parent / "part.safetensors").symlink_to(elsewhere)  # as a download keeps its files
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "part.safetensors"}}))
    load_diffusers_base(copy)
    for name in ("../../elsewhere", str(elsewhere), "none.safetensors", "..", "a\0b"):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        refused(copy)


def test_every_entry_with_every_odd_value_is_a_sentence_or_draws(tmp_path):
    for outcome in swept(40, 11, tmp_path):
        assert not outcome.faults
        assert outcome.tried == outcome.refused + outcome.accepted and min(outcome.refused, outcome.accepted) > 5
        assert outcome.slowest < 1 and outcome.growth < 64 * 2**20


def test_trying_a_base_draws_nothing_from_the_global_generator(both):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_diffusers_base(both)
    assert torch.equal(torch.get_rng_state(), before)


# What the published models' configs say.
PUBLISHED = {
    "sd15": (
        UNET,
        {
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "layers_per_block": 2,
            "norm_eps": 1e-05,
            "freq_shift": 0,
        },
    ),
    "sd21": (UNET, {"attention_head_dim": [5, 10, 20, 20], "upcast_attention": True, "only_cross_attention": False}),
    "sdxl": (
        UNET,
        {
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "reverse_transformer_layers_per_block": None,
            "upcast_attention": None,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "resnet_out_scale_factor": 1.0,
            "mid_block_scale_factor": 1,
        },
    ),
    "distilled": (
        UNET,
        {
            "transformer_layers_per_block": [0, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "block_out_channels": [320, 640, 1280],
        },
    ),
    "text": (TEXT_ENCODER, {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "layer_norm_eps": 1e-05}),
    "vae": (VAE, {"scaling_factor": 0.13025, "latents_mean": None, "shift_factor": None, "layers_per_block": 2}),
    "noise": (SCHEDULER, {"num_train_timesteps": 1000, "trained_betas": None, "beta_end": 0.012}),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_what_published_models_say_is_taken(tmp_path, model):
    facts, config = PUBLISHED[model]
    check_facts(tmp_path, config, facts)
    check_depth(tmp_path, config, 686)


def test_a_picture_that_is_not_finite_is_a_sentence(sd):
    base = load_diffusers_base(sd)
    with torch.no_grad():
        base.unet.conv_out.weight.mul_(1e38)
    with pytest.raises(AdapterError, match="'a photo of a dog': what was drawn holds NaN or infinity; lower cfg"):
        sample(base, [PROMPT], [0], settings=SampleSettings(steps=2, cfg=100))


def test_latents_that_are_not_finite_are_a_sentence(sd):
    base = load_diffusers_base(sd)
    with pytest.raises(AdapterError, match="the base's VAE makes NaN or infinity of a picture"):
        base.encode(torch.full((1, 3, base.multiple, base.multiple), torch.nan))


SHELL = [(TOKENS, "model_max_length", "abc"), (PICTURES, "scaling_factor", 0), (TEXT, "num_hidden_layers", 20_000)]


@pytest.mark.parametrize("file, name, value", SHELL, ids=lambda each: str(each)[:30])
def test_both_commands_say_one_line_before_any_picture(copy, tmp_path, capfd, file, name, value):
    from PIL import Image

    edit(copy / file, **{name: value})
    shots = tmp_path / "shots"
    shots.mkdir()
    Image.new("RGB", (32, 32)).save(shots / "0.png")
    out = tmp_path / "out"
    commands = [
        ["sample", "a photo", "--base", str(copy), "--out", str(out / "a.png")],
        ["train", str(shots), "--name", "kodo", "--class-word", "dog", "--base", str(copy), "--out", f"{out}/k.st"],
    ]
    for command in commands:
        capfd.readouterr()
        assert main(command) == 2
        text, error = capfd.readouterr()
        assert not text and error.startswith("error: ") and error.count("\n") == 1 and file in error
    with suppress(FileNotFoundError):
        assert not list(out.iterdir())
