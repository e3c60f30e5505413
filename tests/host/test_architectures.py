"""SDXL and Stable Diffusion 3 in the host: what training, merging, words and export do there is what they do elsewhere.

The checkpoints are random, narrow and shallow, in the layout in which the families are shared.
"""

from __future__ import annotations

from functools import cache

import architectures
import full_layouts
import pytest
import torch
from laws import relative_error

ORTHOGONAL = {"method": "orthogonal", "slot": 3, "steps": 4}
ATTENTION = ["attention"]


def case(name: str, settings: dict, targets: list[str] = ATTENTION, **more) -> dict:
    return {"name": name, "settings": {"steps": 4, **settings}, "targets": targets, **more}


WORDS = case("words", {"method": "words", "steps": 2}, token_learning_rate=5e-2)
LAYERWISE = case("pplus", {"method": "words", "layerwise": True, "steps": 2}, token_learning_rate=5e-2)
CUSTOM = case("custom", {"method": "custom_diffusion", "steps": 2}, ["cross_attention_kv"], learning_rate=1e-3)
PLANS = {
    "sdxl": {
        # SDXL's layout with fewer blocks, which the host knows as a family of its own with SDXL's model.
        "model": "vega",
        "stored": "float32",
        "main": "tom",
        "cases": [
            case("tom", ORTHOGONAL, ATTENTION, text=ATTENTION),
            WORDS,
            LAYERWISE,
            CUSTOM,
        ],
        "gradients": [
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
            "unet.up_blocks.0.attentions.2.transformer_blocks.1.ff.net.0.proj",
            "unet.up_blocks.1.attentions.2.proj_out",
            "text_encoder.text_model.encoder.layers.0.self_attn.v_proj",
            "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
        ],
        "steps": ["gradients", "merge", "texts", "one step", "regions"],
        "refused cases": {},
    },
    "sd3": {
        "model": "sd3",
        "stored": "float32",
        "main": "tom",
        "cases": [
            case("tom", ORTHOGONAL, ["all_linear"], text=ATTENTION, preview_every=4),
            case(
                "block",
                {"method": "block_orthogonal", "slot": 1, "blocks": 4, "gradient_checkpointing": True},
                ["attention", "feed_forward"],
            ),
            case("lora", {"method": "lora", "precision": "bf16"}),
            WORDS,
        ],
        "gradients": [
            "unet.joint_blocks.0.x_block.attn.qkv",
            "unet.joint_blocks.0.context_block.adaLN_modulation.1",
            "unet.joint_blocks.1.x_block.mlp.fc2",
            "text_encoder.text_model.encoder.layers.0.self_attn.v_proj",
            "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
        ],
        "steps": ["gradients", "merge", "texts", "one step", "regions"],
        "refused cases": {"layer-wise": LAYERWISE, "cross-attention": CUSTOM},
    },
    # Half precision, norms within the attention and a second one in the blocks, as in 3.5.
    "sd35": {
        "model": "sd35",
        "stored": "float16",
        "main": "tom",
        "cases": [case("tom", ORTHOGONAL, ["all_linear"])],
        "gradients": ["unet.joint_blocks.0.x_block.attn2.qkv", "unet.joint_blocks.0.context_block.attn.qkv"],
        "steps": ["gradients"],
        "refused cases": {},
    },
    "sd3_t5": {
        "model": "sd3_t5",
        "stored": "float16",
        "main": "tom",
        "cases": [case("tom", {"method": "orthogonal", "slot": 0, "steps": 3}, text=ATTENTION)],
        "gradients": [],
        "steps": ["texts"],
        "refused cases": {},
    },
}
LOADED = {
    "sdxl": ["Segmind_Vega", "SDXL"],
    "sd3": ["SD3", "SD3"],
    "sd35": ["SD3", "SD3"],
    "sd3_t5": ["SD3", "SD3"],
}
ARCHITECTURES = {name: "sdxl" if name == "sdxl" else "sd3" for name in PLANS}
CASES = [(name, own["name"]) for name, plan in PLANS.items() for own in plan["cases"]]
WITH_TEXTS = [name for name, plan in PLANS.items() if "texts" in plan["steps"]]
WITH_MERGE = [name for name, plan in PLANS.items() if "merge" in plan["steps"]]


@pytest.fixture(scope="module")
def seen(checkpoint, folder, warnings):
    """Name of a plan -> (tensors, facts); each is carried out once, when it is first asked for."""

    @cache
    def tried(name: str) -> tuple[dict[str, torch.Tensor], dict]:
        found, facts = architectures.tried(PLANS[name], checkpoint(PLANS[name]["model"]), folder, warnings)
        return {key: value.detach().clone() for key, value in found.items()}, facts

    return tried


@pytest.fixture(scope="module")
def layouts():
    return full_layouts.layouts()


@pytest.mark.parametrize(
    ("title", "attention", "feed_forward", "all_linear"),
    [
        ("sdxl", 8 * 70, 2 * 70, 10 * 70 + 2 * 11),
        # The last block reads the text and says nothing more of it.
        ("sd3 medium", 4 * 24 - 1, 4 * 24 - 2, 10 * 24 - 3),
        ("sd3.5 medium", 4 * 24 - 1 + 2 * 13, 4 * 24 - 2, 10 * 24 - 3 + 2 * 13),
        ("sd3.5 large", 4 * 38 - 1, 4 * 38 - 2, 10 * 38 - 3),
    ],
)
def test_the_stock_loader_knows_every_layer_of_the_full_size(layouts, title, attention, feed_forward, all_linear):
    facts = layouts[title]
    family = "sdxl" if title == "sdxl" else "sd3"
    assert facts["class"].lower() == facts["architecture"] == family
    assert facts["unknown"] == []
    if title == "sdxl":  # diffusers' names and Stability's, which kohya's trainers write
        assert facts["other spellings"] == [] and facts["spellings"] == 2 * 10 * 70
    assert facts["targets"] == dict(attention=attention, feed_forward=feed_forward, all_linear=all_linear)
    assert facts["text"] == 6 * (12 + 32)


def test_sdxls_identity_is_made_of_what_a_folder_holds(layouts):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    first, second = (
        transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            projection_dim=width,
        )
        for width, depth in ((768, 12), (1280, 32))
    )
    with torch.device("meta"):
        folder = [
            diffusers.UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            transformers.CLIPTextModel(first),
            transformers.CLIPTextModelWithProjection(second),
        ]
    for network, hashed in zip(folder, layouts["sdxl"]["hashed"], strict=True):
        weights = {name.removeprefix("text_model."): value for name, value in network.state_dict().items()}
        assert {name: list(value.shape) for name, value in weights.items()} == hashed


@pytest.mark.parametrize("name", PLANS)
def test_the_host_knows_the_family_and_so_do_we(seen, name):
    _, facts = seen(name)
    assert facts["loaded"] == LOADED[name] and facts["load warnings"] == []
    architecture, digest, multiple, layers = facts["base"]
    assert architecture == ARCHITECTURES[name] and len(digest) == 16
    assert (multiple, layers) == ((32, 10) if architecture == "sdxl" else (16, 0))


@pytest.mark.parametrize(("name", "method"), CASES, ids="-".join)
def test_the_loss_falls(seen, name, method):
    facts = seen(name)[1]["cases"][method]
    before, after = facts["fixed"]
    assert after < 0.999 * before
    assert facts["architecture"] == ARCHITECTURES[name]
    vectors = [10, 2, 2048] if method == "pplus" else [2, 2048]
    assert list(facts["tokens"].values()) == [vectors]


@pytest.mark.parametrize("name", PLANS)
def test_the_model_is_as_it_was(seen, name):
    facts = seen(name)[1]
    assert facts["untouched"] == [True, True]  # after the trainings, after everything


def test_adapters_are_where_they_were_asked_for(seen):
    sdxl, sd3 = (seen(name)[1]["cases"] for name in ("sdxl", "sd3"))
    parts = {part: [one for one in sdxl["tom"]["layers"] if one.startswith(f"{part}.")] for part in ("unet",)}
    assert len(parts["unet"]) == 8 * (2 * 1 + 2 * 2 + 3 * 2 + 3 * 1)  # transformer blocks down and up
    for found in (sdxl, sd3):
        for part in ("text_encoder.", "text_encoder_2."):
            assert sum(one.startswith(part) for one in found["tom"]["layers"]) == 4 * 3
    inside = {one.removeprefix("unet.joint_blocks.1.") for one in sd3["tom"]["layers"] if ".joint_blocks.1." in one}
    picture = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"}
    assert inside == {f"x_block.{one}" for one in picture} | {
        "context_block.attn.qkv",
        "context_block.adaLN_modulation.1",
    }
    assert sdxl["words"]["layers"] == sd3["words"]["layers"] == []


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan["gradients"]])
def test_gradients_are_those_of_plain_autograd_in_float64(seen, name):
    tensors, facts = seen(name)
    for what in (*PLANS[name]["gradients"], "word"):
        ours, plain = tensors[f"gradient|{what}"], tensors[f"plain gradient|{what}"]
        assert relative_error(ours, plain) < 1e-4, what
        assert plain.norm() > 0, what
    for columns in tensors["gradient|word"].split([768, 1280], dim=1):
        assert columns.norm() > 0
    assert facts["no gradient on weights"]


@pytest.mark.parametrize("name", WITH_MERGE)
def test_our_merge_is_cores_lora_loader_with_the_exported_file(seen, name):
    tensors, facts = seen(name)
    assert facts["lora warnings"] == [] and facts["patched keys"] == [True, True]
    layers = facts["cases"]["tom"]["layers"]
    moved = 0.0
    for layer in layers:
        ours, core, engine, base = (tensors[f"{way}|{layer}"] for way in ("ours", "core", "engine", "base"))
        assert relative_error(ours, core) <= 1e-6 and relative_error(ours, engine) <= 1e-6, layer
        moved = max(moved, relative_error(ours, base))
    assert moved > 1e-3


@pytest.mark.parametrize("name", WITH_TEXTS)
@pytest.mark.parametrize("length", ["short", "long"])
def test_training_reads_prompts_as_the_hosts_own_encoding_does(seen, name, length):
    tensors, _ = seen(name)
    for what in ("text", "pooled"):
        ours, host = tensors[f"{what}|{length}"], tensors[f"host {what}|{length}"]
        assert ours.shape == host.shape and relative_error(ours, host) <= 1e-5
    assert (tensors["text|long"].shape[1] > 77) and tensors["pooled|short"].shape[0] == 3


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_a_word_reaches_both_encoders_and_t5_reads_the_class_word(seen, name):
    tensors, _ = seen(name)
    learned, first, second = (tensors[f"word|{which}"][:, :77] for which in ("as learned", "first", "second"))
    for other, own, rest in ((first, slice(0, 768), slice(768, 2048)), (second, slice(768, 2048), slice(0, 768))):
        assert relative_error(other[..., own], learned[..., own]) > 1e-3
        assert torch.equal(other[..., rest], learned[..., rest])
    pooled = [tensors[f"word pooled|{which}"] for which in ("as learned", "first", "second")]
    # SDXL hears the summary of the second alone, SD3 of both.
    assert torch.equal(pooled[0], pooled[1]) == (name == "sdxl") and relative_error(pooled[2], pooled[0]) > 1e-3
    stock = tensors["word|stock embedding"][:, :77]
    assert torch.equal(stock, learned) and torch.equal(tensors["word pooled|stock embedding"], pooled[0])
    if name == "sd3_t5":
        t5 = [tensors[f"word|{which}"][:, 77:] for which in ("as learned", "class word")]
        assert t5[0].shape[1] == 77 and torch.equal(*t5) and t5[0].norm() > 0


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if "one step" in plan["steps"]])
def test_training_asks_the_network_what_sampling_asks_it(seen, name):
    tensors, _ = seen(name)
    assert relative_error(tensors["one step|training"], tensors["one step|host"]) <= 1e-5


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_regions_hold_in_both_modes(seen, name):
    tensors, _ = seen(name)
    for title in ("everywhere", "halves"):
        for mode in ("merged", "gated"):
            plain = tensors[f"region|plain, {mode}"]
            assert relative_error(tensors[f"region|{title}, {mode}"], plain) <= 1e-4, (title, mode)
    assert relative_error(tensors["region|other text everywhere"], tensors["region|plain other text"]) <= 1e-4
    different = [
        "plain, merged",
        "half, merged",
        "half, gated",
        "concept in a half",
        "no concept in a half",
        "plain other text",
    ]
    for number, title in enumerate(different):
        for other in different[:number]:
            assert relative_error(tensors[f"region|{title}"], tensors[f"region|{other}"]) > 3e-4, (title, other)


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("sd3", "layer-wise", "layer"),
        ("sd3", "cross-attention", "no cross-attention of its own; choose attention"),
        ("sdxl", "other clip", "training on Stable Diffusion XL needs its own CLIP-L and CLIP-G"),
        ("sd3", "other clip", "training on Stable Diffusion 3 needs its own CLIP-L and CLIP-G"),
        ("sdxl", "no clip", "the clip is missing"),
        ("sdxl", "other family", "was trained on 'sdxl', this base is 'toy'"),
        ("sd3", "other family", "was trained on 'sd3', this base is 'toy'"),
        ("sdxl", "narrow word", "<new>: the learned tokens are 768 wide, the text model's 2048"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(seen, name, what, words):
    message = seen(name)[1]["refused"][what]
    assert message.startswith("AdapterError: ") and words in message and "\n" not in message
