"""One odd thing in another program's file does not cost the file: what is not needed may be anything."""

import json
import math
import os

import pytest
import torch
from laws import relative_error
from mutations import peak_memory
from safetensors.torch import save_file

from modular_concepts.errors import AdapterError
from modular_concepts.files.lora import read_concept
from modular_concepts.storage.safetensors import MAX_HEADER
from modular_concepts.storage.strict_json import parse_json

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
STEM, LAYER = f"lora_unet_{PATH.replace('.', '_')}", f"unet.{PATH}"
UP, DOWN = (torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])) for shape in ((12, 4), (4, 8)))


def kohya(stem=STEM, alpha=2.0):
    return {f"{stem}.lora_up.weight": UP, f"{stem}.lora_down.weight": DOWN, f"{stem}.alpha": torch.tensor(alpha)}


def raw(path, tensors, metadata=None):
    """A file with types that torch has not.  tensors: name -> tensor, or (type, shape, bytes)."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            tensor = ("F32", list(tensor.shape), tensor.numpy().tobytes())
        dtype, shape, numbers = tensor
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


ALPHAS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.float8_e4m3fn)
ALPHAS += (torch.float64, torch.float16, torch.bfloat16, torch.uint32, torch.uint64, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", ALPHAS, ids=str)
def test_alpha_may_be_of_any_type(tmp_path, dtype):
    tensors = kohya()
    tensors[f"{STEM}.alpha"] = torch.tensor(2).to(dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    concept, unmatched = read_concept(tmp_path / "x.safetensors")
    adapter = concept.layers[LAYER]
    assert adapter.scale == 0.5 and not unmatched
    assert relative_error(adapter.delta(), 0.5 * UP @ DOWN) < 1e-6


def test_factors_in_eight_bits_read_exactly(tmp_path):
    eight = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in kohya().items()}
    save_file(eight, tmp_path / "x.safetensors")
    adapter = read_concept(tmp_path / "x.safetensors").concept.layers[LAYER]
    assert torch.equal(adapter.lora_up, eight[f"{STEM}.lora_up.weight"].float()) and adapter.scale == 0.5


ODD = {
    "a type that torch has not": ("F4", [4], b"\1\2"),
    "a type of eight bits": ("F8_E8M0", [2], b"\1\2"),
    "whole numbers": ("I16", [2], b"\1\2\3\4"),
    "truth": ("BOOL", [2], b"\1\0"),
    "complex numbers": ("C64", [1], bytes(8)),
    "nothing": ("F32", [0], b""),
    "no numbers": ("F32", [1], b"\0\0\xc0\x7f"),
}


@pytest.mark.parametrize(
    "name", ["something", "bundle_emb.a/b.string_to_param.*", "lora_unet_x.alpha_note", "conds..x"]
)
@pytest.mark.parametrize("odd", ODD)
def test_a_tensor_that_is_not_needed_may_be_anything(tmp_path, odd, name):
    concept, unmatched = read_concept(raw(tmp_path / "x.safetensors", kohya() | {name: ODD[odd]}))
    assert torch.equal(concept.layers[LAYER].lora_up, UP) and unmatched == [name]


@pytest.mark.parametrize("odd", ["a type that torch has not", "complex numbers", "nothing", "no numbers"])
def test_a_factor_that_holds_no_numbers_is_refused(tmp_path, odd):
    with pytest.raises(AdapterError, match=r"x.safetensors: .*alpha.*(not read|NaN)"):
        read_concept(raw(tmp_path / "x.safetensors", kohya() | {f"{STEM}.alpha": ODD[odd]}))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../b", "a\\b", "a\nb"])
def test_a_name_that_climbs_is_refused_all_the_same(tmp_path, name):
    with pytest.raises(AdapterError, match="not a layer's name"):
        read_concept(raw(tmp_path / "x.safetensors", kohya() | {name: torch.ones(1)}))


BIASES = ("{}.diff_b", "{}.bias", "{}.lora_up.bias")
OTHER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_beside_a_layer_leaves_the_layer(tmp_path, bias):
    key = bias.format(STEM)
    save_file(
        kohya() | {k: v.clone() for k, v in kohya(OTHER).items()} | {key: torch.ones(12)}, tmp_path / "x.safetensors"
    )
    concept, unmatched = read_concept(tmp_path / "x.safetensors")
    assert unmatched == [key] and len(concept.layers) == 2
    assert relative_error(concept.layers[LAYER].delta(), 0.5 * UP @ DOWN) < 1e-6


@pytest.mark.parametrize("bias", ["lora_B.bias", "lora_A.bias", "lora_B.default.bias"])
def test_pefts_bias_leaves_the_layer(tmp_path, bias):
    key = f"unet.{PATH}.{bias}"
    tensors = {f"unet.{PATH}.lora_A.weight": DOWN, f"unet.{PATH}.lora_B.weight": UP, key: torch.ones(12)}
    save_file(tensors, tmp_path / "x.safetensors")
    concept, unmatched = read_concept(tmp_path / "x.safetensors")
    assert unmatched == [key] and relative_error(concept.layers[LAYER].delta(), UP @ DOWN) < 1e-6


@pytest.mark.parametrize("factor", ["dora_scale", "hada_w1_a", "diff", "w_norm", "set_weight", "reshape_weight"])
def test_a_factor_that_changes_what_the_others_mean_throws_the_layer_out(tmp_path, factor):
    odd = kohya(OTHER) | {f"{OTHER}.{factor}": torch.ones(12)}
    save_file(kohya() | {key: tensor.clone() for key, tensor in odd.items()}, tmp_path / "x.safetensors")
    concept, unmatched = read_concept(tmp_path / "x.safetensors")
    assert list(concept.layers) == [LAYER] and unmatched == sorted(odd)


def tags(count):
    return json.dumps({"10_subject": {f"tag number {i}, with": i for i in range(count)}})


@pytest.mark.parametrize("count", [160_000, 400_000])
def test_a_large_header_is_read_in_proportion_to_it(tmp_path, count):
    path = raw(tmp_path / "x.safetensors", kohya(), {"ss_tag_frequency": tags(count), "modelspec.title": "tom"})
    size = path.stat().st_size
    before = peak_memory(reset=True)
    concept, unmatched = read_concept(path)
    assert concept.layers[LAYER].scale == 0.5 and not unmatched and concept.about == {"title": "tom"}
    assert peak_memory() - before < 8 * size + 16 * 2**20


def test_metadata_beyond_the_limit_is_named_with_the_way_out(tmp_path):
    path = raw(tmp_path / "x.safetensors", kohya(), {"note": "x" * MAX_HEADER})
    with pytest.raises(AdapterError, match="metadata is too long: .* save the file again without tags") as caught:
        read_concept(path)
    assert "damaged" not in str(caught.value) and "not a safetensors" not in str(caught.value)


def test_what_a_text_holds_is_one_entry(tmp_path):
    assert parse_json(json.dumps({"a": '[{,\\"' * 400_000}), "x")
    for many in ('["' + '\\"' * 10 + '"' + ",[]" * 400_000 + "]", '["",' * 300_000, '"' * 2_000_000, "[" * 600_000):
        with pytest.raises(AdapterError, match="more entries"):
            parse_json(many, "x")


# --- peft's folder ---


def peft(folder, config, name="adapter_model.safetensors"):
    key = f"base_model.model.{PATH}"
    save_file({f"{key}.lora_A.weight": DOWN, f"{key}.lora_B.weight": UP}, folder / name)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder / name


SCALES = {
    "alpha and rank": ({"r": 4, "lora_alpha": 16}, 4.0),
    "a fraction": ({"r": 4, "lora_alpha": 0.5}, 0.125),
    "rslora": ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8.0),
    "a pattern": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"attn2.to_k": 2}}, 0.5),
    "a whole path": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {f"^{PATH}$": 2}}, 0.5),
    "a pattern for others": ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"n2.to_k": 2, "to_q": 8}}, 4.0),
    "a rank pattern": ({"r": 8, "lora_alpha": 16, "rank_pattern": {"to_k": 4}}, 4.0),
    "both": ({"r": 8, "lora_alpha": 16, "rank_pattern": {"to_k": 4}, "alpha_pattern": {"to_k": 1}}, 0.25),
    "none": (None, 1.0),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_configuration_beside_pefts_file_says_how_strongly_it_acts(tmp_path, case):
    config, scale = SCALES[case]
    adapter = read_concept(peft(tmp_path, config)).concept.layers[LAYER]
    assert math.isclose(adapter.scale, scale, rel_tol=1e-12)
    assert relative_error(adapter.delta(), scale * UP @ DOWN) < 1e-6


def test_the_configuration_is_of_pefts_own_name_and_yields_to_the_file(tmp_path):
    assert read_concept(peft(tmp_path, {"r": 4, "lora_alpha": 16}, "tom.safetensors")).concept.layers[LAYER].scale == 1
    key = f"base_model.model.{PATH}"
    tensors = {f"{key}.lora_A.weight": DOWN, f"{key}.lora_B.weight": UP, f"{key}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert read_concept(tmp_path / "adapter_model.safetensors").concept.layers[LAYER].scale == 0.5


BROKEN = {
    "no JSON": "{",
    "another rank": {"r": 8, "lora_alpha": 16},
    "no rank": {"lora_alpha": 16},
    "no alpha": {"r": 4},
    "alpha in words": {"r": 4, "lora_alpha": "16"},
    "alpha without end": '{"r": 4, "lora_alpha": 1e400}',
    "alpha of nothing": {"r": 4, "lora_alpha": 0},
    "a list": [1],
    "an entry twice": '{"r": 4, "r": 4, "lora_alpha": 16}',
    "a pattern that is an expression": {"r": 4, "lora_alpha": 16, "alpha_pattern": {"(a+)+$": 2}},
    "a pattern of lists": {"r": 4, "lora_alpha": 16, "alpha_pattern": [1]},
    "a pattern of words": {"r": 4, "lora_alpha": 16, "alpha_pattern": {"to_k": "2"}},
    "rslora in words": {"r": 4, "lora_alpha": 16, "use_rslora": "true"},
    "rslora as a number": {"r": 4, "lora_alpha": 16, "use_rslora": 1},
    "a rank between": {"r": 4.5, "lora_alpha": 16},
    "lengths that are not there": {"r": 4, "lora_alpha": 16, "use_dora": True},
    "another method": {"r": 4, "lora_alpha": 16, "peft_type": "ADALORA"},
    "a method of numbers": {"r": 4, "lora_alpha": 16, "peft_type": [1]},
    "another base's weights": {"r": 4, "lora_alpha": 16, "init_lora_weights": "pissa_niter_16"},
    "much": " " * (2**20 + 1),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_configuration_that_cannot_be_read_is_said(tmp_path, case):
    with pytest.raises(AdapterError, match="adapter_config.json beside adapter_model.safetensors.*remove it") as caught:
        read_concept(peft(tmp_path, BROKEN[case]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


EMBEDDED = {
    "rslora in words": {"unet.use_rslora": "yes"},
    "a list of patterns": {"unet.alpha_pattern": ["to_k"]},
    "another rank": {"unet.r": 64, "unet.lora_alpha": 64},
    "lengths that are not there": {"unet.use_dora": True},
    "another base's weights": {"unet.init_lora_weights": "olora"},
    "a strength beyond all": {"unet.lora_alpha": 9e11},
}


@pytest.mark.parametrize("case", EMBEDDED)
def test_settings_in_the_file_are_held_to_the_same(tmp_path, case):
    tensors = {f"{PATH}.lora_A.weight": 100 * DOWN, f"{PATH}.lora_B.weight": 100 * UP}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(EMBEDDED[case])})
    with pytest.raises(AdapterError, match="^x.safetensors: "):
        read_concept(tmp_path / "x.safetensors")


def test_factors_with_a_third_beside_them_are_left_out(tmp_path):
    other = PATH.replace("to_k", "to_q")
    tensors = {
        f"{path}.lora_{side}.weight": own.clone() for path in (PATH, other) for side, own in (("A", DOWN), ("B", UP))
    }
    save_file(tensors | {f"{other}.lora_E": torch.ones(4, 1)}, tmp_path / "x.safetensors")
    concept, unmatched = read_concept(tmp_path / "x.safetensors")
    assert set(concept.layers) == {LAYER} and f"{other}.lora_E" in unmatched and len(unmatched) == 3


def test_a_configuration_that_is_a_folder_is_said(tmp_path):
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(AdapterError, match="is no file.*remove it"):
        read_concept(peft(tmp_path, None))


NO_FILE = {"a dead link": "a link to nowhere", "a link to itself": "a link to", "a pipe": "a device or a pipe"}
NO_FILE |= {"a folder": "a folder", "a gigabyte": "longer than"}


@pytest.mark.parametrize("case", NO_FILE)
def test_a_configuration_that_is_no_file_to_read_is_said_and_never_counts_as_none(tmp_path, case):
    path = tmp_path / "adapter_config.json"
    if case == "a folder":
        path.mkdir()
    elif case == "a pipe":
        os.mkfifo(path)
    elif case == "a gigabyte":
        with open(path, "wb") as file:
            file.truncate(2**30)
    else:
        path.symlink_to(path.name if "itself" in case else "nowhere")
    with pytest.raises(AdapterError, match=f"beside adapter_model.safetensors.*{NO_FILE[case]}.*remove it"):
        read_concept(peft(tmp_path, None))


def test_half_a_character_in_what_a_file_says_is_no_text(tmp_path):
    for place in ("modelspec.title", "ss_sd_model_name", "anything"):
        raw(tmp_path / "x.safetensors", kohya(), {place: "a \ud800"})
        with pytest.raises(AdapterError) as caught:
            read_concept(tmp_path / "x.safetensors")
        assert str(caught.value) == "x.safetensors: the header holds half a character; the file is damaged"


def test_a_file_without_a_tensor_says_so(tmp_path):
    raw(tmp_path / "x.safetensors", {}, {"ss_sd_model_name": "a"})
    with pytest.raises(AdapterError, match="^x.safetensors: the file holds no tensor at all"):
        read_concept(tmp_path / "x.safetensors")


def test_a_configuration_in_another_encoding_is_said_in_plain_words_and_a_mark_before_it_is_no_fault(tmp_path):
    path = peft(tmp_path, {"r": 4, "lora_alpha": 16})
    config = path.with_name("adapter_config.json")
    plain = read_concept(path).concept.recipe.alpha
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert read_concept(path).concept.recipe.alpha == plain == 16
    config.write_bytes(config.read_bytes().decode("utf-8-sig").encode("utf-16"))
    with pytest.raises(AdapterError, match=r"is not UTF-8 text \(byte 1 is 0xff\); it says how strongly"):
        read_concept(path)
    config.write_text('{"r": 4, "lora_alpha": 1e13}')
    with pytest.raises(AdapterError, match="not a number other than 0 of at most 1e"):
        read_concept(path)


SCALES_BESIDE = [
    f"unet.{PATH}.lora_A.weight_scale",
    f"unet.{PATH}.lora_B.scale",
    f"unet.{PATH}.lora_A.default.weight_scale",
    f"unet.{PATH}.lora_A.weight_scale_inv",
    f"unet.{PATH}.weight_scale",
    f"unet.{PATH}.scale_weight",
    f"unet.{PATH}.lora_up.scale_weight",
    f"unet.{PATH}.lora_A.weight.absmax",
    f"unet.{PATH}.scalar",
    f"unet.{PATH}.magnitude",
    f"unet.{PATH}.anything",
    f"unet.{PATH}.lora_magnitude_vector",
    f"unet.{PATH}.lora_magnitude_vector.weight",
    f"unet.{PATH}.lora_magnitude_vector.default.weight",
    f"unet.{PATH}.some.thing.else",
]


@pytest.mark.parametrize("key", SCALES_BESIDE)
def test_a_scale_beside_a_factor_leaves_the_layer_out_as_it_is_not_applied(tmp_path, key):
    other = PATH.replace("to_k", "to_v")
    tensors = {f"unet.{name}.lora_{side}.weight": torch.ones(4, 4) for name in (PATH, other) for side in "AB"}
    tensors |= {key: torch.tensor(0.01)}
    save_file(tensors, tmp_path / "x.safetensors")
    imported = read_concept(tmp_path / "x.safetensors")
    concept, unmatched = imported
    (told,) = (sentence for sentence in imported.notes("x") if "left out whole" in sentence)
    assert "1 layer is" in told and key in told and "lora_B.weight" not in told
    assert set(concept.layers) == {f"unet.{other}"}
    assert set(unmatched) == {key, f"unet.{PATH}.lora_A.weight", f"unet.{PATH}.lora_B.weight"}


def test_layers_that_are_lost_are_counted_and_those_that_lose_nothing_are_not(tmp_path):
    names = [PATH, PATH.replace("to_k", "to_v"), PATH.replace("to_k", "to_q")]
    tensors = {f"unet.{name}.lora_{side}.weight": torch.ones(4, 4) for name in names for side in "AB"}
    save_file(tensors | {f"unet.{names[2]}.bias": torch.ones(4)}, tmp_path / "x.safetensors")
    assert not any("left out" in sentence for sentence in read_concept(tmp_path / "x.safetensors").notes("x"))
    beside = {f"unet.{name}.note": torch.ones(1) for name in names[:2]}
    save_file(tensors | beside, tmp_path / "x.safetensors")
    told = " ".join(read_concept(tmp_path / "x.safetensors").notes("x"))
    assert "2 layers are left out whole" in told and all(key in told for key in beside)


FLAT = {"r": 4, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("settings", "scale", "told"),
    [
        (FLAT, 4.0, ""),
        ({"default": FLAT}, 4.0, ""),
        ({"unet": FLAT}, 4.0, ""),
        ({"unet.r": 4, "unet.lora_alpha": 16}, 4.0, ""),
        ({"text_encoder.lora_alpha": 16}, 1.0, ""),
        ({"prior.r": 4, "prior.lora_alpha": 16}, 1.0, "speaks of prior, no part"),
        ({"diffusion_model.lora_alpha": 16}, 1.0, "speaks of diffusion_model, no part"),
        ({"prior": FLAT, "unet": FLAT}, 4.0, "speaks of prior, no part"),
        ({"unrelated": 3}, 1.0, ""),
    ],
)
def test_peft_settings_in_a_file_are_read_however_they_name_parts(tmp_path, settings, scale, told):
    tensors = {f"unet.{PATH}.lora_A.weight": DOWN, f"unet.{PATH}.lora_B.weight": UP}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    imported = read_concept(tmp_path / "x.safetensors")
    assert imported.concept.layers[LAYER].scale == scale
    assert told in " ".join(imported.notes("x")) and bool(told) == bool(imported.notes("x"))


@pytest.mark.parametrize(
    "settings", [{"r": 8, "lora_alpha": 16}, {"lora_alpha": None}, {"alpha_pattern": {"(a|b)": 1}}]
)
def test_peft_settings_in_a_file_that_do_not_fit_are_refused_with_a_way_out(tmp_path, settings):
    tensors = {f"unet.{PATH}.lora_A.weight": DOWN, f"unet.{PATH}.lora_B.weight": UP}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(
        AdapterError, match="take lora_adapter_metadata out of the file's metadata to have alpha = rank"
    ):
        read_concept(tmp_path / "x.safetensors")
