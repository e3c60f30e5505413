"""Promise 7: stock tools read our files, we read theirs, and no key is dropped in silence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

import pytest
import torch
from laws import SHIFT
from safetensors.torch import load_file, save_file

from modular_concepts.concept import Concept
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.diffusers import FILE_NAME, export_diffusers
from modular_concepts.files.embeddings import export_embeddings, import_embedding
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.lora import Place, Places, by_rule, import_lora
from modular_concepts.merging.compatibility import fitting_concepts
from modular_concepts.models.layers import find_layers, name_of_key

EXPORTS = {"kohya": export_kohya, "diffusers": export_diffusers}


def places_in(layers: Iterable[str]) -> Places:
    """Where a model with these layers has what a LoRA brings."""
    there = set(layers)

    def place(stem: str) -> Place | None:
        name = by_rule(stem)
        return Place(name) if name in there else None

    return place


@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("named", [True, False])
def test_export_and_import_keep_every_delta(concept, tmp_path, form, named):
    path = EXPORTS[form](concept, tmp_path / "pytorch_lora_weights.safetensors")
    imported, unmatched = import_lora(path, places=places_in(concept.layers) if named else None)
    assert unmatched == [] and set(imported.layers) == set(concept.layers)
    for name, adapter in concept.layers.items():
        assert imported.layers[name].kind == "lora"
        assert torch.allclose(imported.layers[name].delta(), adapter.delta(), rtol=1e-6, atol=1e-7)
        assert adapter.delta().abs().max() > 1e-2


def test_kohya_keys_are_the_ones_that_stock_loaders_look_for(make_concept, tmp_path):
    export_kohya(make_concept("block_orthogonal"), tmp_path / "x", torch.float16)
    tensors = load_file(tmp_path / "x")
    assert tensors["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"].shape == (4, 24)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{stem}.lora_up.weight"].dtype == torch.float16
    assert tensors[f"{stem}.alpha"].item() == 2.0
    assert tensors[f"{stem}.lora_up.weight"].abs().sum(1).nonzero().flatten().tolist() == [1, 5, 9, 13]


def of_two_text_encoders(concept: Concept, layer: str) -> Concept:
    """The concept as one of SDXL, with an adapter on both text encoders and one more layer."""
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    adapter = concept.layers[f"text_encoder.{path}"]
    layers = {f"text_encoder.{path}": adapter, f"text_encoder_2.{path}": adapter, layer: adapter}
    return dataclasses.replace(concept, layers=layers, recipe=dataclasses.replace(concept.recipe, architecture="sdxl"))


@pytest.mark.parametrize("form", EXPORTS)
def test_both_text_encoders_of_sdxl_come_back_by_name(make_concept, tmp_path, form):
    concept = of_two_text_encoders(make_concept("lora"), "unet.mid_block.attentions.0.proj_in")
    path = EXPORTS[form](concept, tmp_path / "x.safetensors")
    keys = {key.split(".")[0] for key in load_file(path)}
    if form == "kohya":
        path_in_file = "text_model_encoder_layers_0_self_attn_q_proj"
        assert {f"lora_te1_{path_in_file}", f"lora_te2_{path_in_file}"} <= keys
    for places in (None, places_in(concept.layers)):
        imported, unmatched = import_lora(path, places=places)
        assert unmatched == [] and set(imported.layers) == set(concept.layers)
    save_concept(concept, tmp_path / "whole.safetensors")
    assert set(load_concept(tmp_path / "whole.safetensors").layers) == set(concept.layers)


def test_joint_blocks_go_to_kohyas_form_alone(make_concept, tmp_path):
    layer = "unet.joint_blocks.0.x_block.attn.qkv"
    concept = of_two_text_encoders(make_concept("lora"), layer)
    tensors = load_file(export_kohya(concept, tmp_path / "x"))
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight" in tensors
    assert layer in import_lora(tmp_path / "x").concept.layers
    with pytest.raises(AdapterError, match="joint_blocks.0.x_block.attn.qkv: .* export to kohya's form"):
        export_diffusers(concept, tmp_path)
    assert not (tmp_path / FILE_NAME).exists()


def test_every_unmatched_key_is_reported(make_concept, tmp_path):
    concept = make_concept("lora")
    export_kohya(concept, tmp_path / "x")
    tensors = load_file(tmp_path / "x")
    strange = {"lora_te2_text_model_x.alpha", "bundle_emb.word.string_to_param.*"}
    strange |= {f"lora_unet_new_layer.lora_{side}.weight" for side in ("up", "down")}
    dora = "lora_unet_mid_block_attentions_0_proj_in"
    tensors |= {key: torch.ones(4, 4) for key in strange} | {f"{dora}.dora_scale": torch.ones(16)}
    save_file(tensors, tmp_path / "y")
    imported, unmatched = import_lora(tmp_path / "y", places=places_in(concept.layers))
    assert set(unmatched) == strange | {key for key in tensors if key.startswith(dora)}
    assert set(imported.layers) == set(concept.layers) - {"unet.mid_block.attentions.0.proj_in"}


@pytest.mark.parametrize("form", EXPORTS)
def test_file_of_another_model_is_refused(make_concept, tmp_path, form):
    concept = make_concept("lora")
    EXPORTS[form](concept, tmp_path / "x")
    with pytest.raises(AdapterError, match="x: none of its"):
        import_lora(tmp_path / "x", places=places_in(["unet.other"]))
    shapes = dict.fromkeys(concept.layers, (8, 8))
    with pytest.raises(AdapterError, match=r"x, .*another architecture"):
        fitting_concepts("toy", shapes, [import_lora(tmp_path / "x").concept])


def test_half_a_layer_is_refused(make_concept, tmp_path):
    export_kohya(make_concept("lora"), tmp_path / "x")
    tensors = load_file(tmp_path / "x")
    tensors.pop("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight")
    save_file(tensors, tmp_path / "x")
    with pytest.raises(AdapterError, match="only one factor"):
        import_lora(tmp_path / "x")


def test_missing_alpha_means_scale_one(make_concept, tmp_path):
    concept = make_concept("lora")
    export_kohya(concept, tmp_path / "x")
    save_file({key: t for key, t in load_file(tmp_path / "x").items() if "alpha" not in key}, tmp_path / "x")
    imported, _ = import_lora(tmp_path / "x")
    assert {adapter.scale for adapter in imported.layers.values()} == {1.0}
    assert {adapter.scale for adapter in concept.layers.values()} == {0.5}


OLD_FORMS = {
    "unet.a.attentions.0.attn1.processor.to_q_lora.{}.weight": "unet.a.attentions.0.attn1.to_q",
    "unet.a.attentions.0.attn1.processor.to_out_lora.{}.weight": "unet.a.attentions.0.attn1.to_out.0",
    "unet.a.ff.net.0.proj.lora.{}.weight": "unet.a.ff.net.0.proj",
    "down_blocks.0.attn1.to_k.lora.{}.weight": "unet.down_blocks.0.attn1.to_k",
    "text_encoder.text_model.a.q_proj.lora_linear_layer.{}.weight": "text_encoder.text_model.a.q_proj",
    "text_encoder.text_model.b.to_out_lora.{}.weight": "text_encoder.text_model.b.out_proj",
    "text_encoder.encoder.mlp.fc1.lora.{}.weight": "text_encoder.text_model.encoder.mlp.fc1",
}


def test_older_diffusers_keys_are_understood(tmp_path):
    tensors = {}
    for form in OLD_FORMS:
        tensors |= {form.format("down"): torch.ones(2, 6), form.format("up"): torch.ones(4, 2)}
    tensors["unet.a.ff.net.0.proj.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "x")
    imported, unmatched = import_lora(tmp_path / "x")
    assert unmatched == [] and set(imported.layers) == set(OLD_FORMS.values())
    assert imported.layers["unet.a.ff.net.0.proj"].scale == 0.5
    assert imported.layers["unet.a.attentions.0.attn1.to_q"].delta().eq(2).all()


def test_alpha_of_peft_settings_is_applied(tmp_path):
    keys = [f"{part}.a.to_q.lora_{side}.weight" for part in ("base_model.model.unet", "text_encoder") for side in "AB"]
    shapes = [(4, 6), (3, 4)] * 2
    tensors = {key: torch.ones(shape) for key, shape in zip(keys, shapes, strict=True)}
    settings = {
        "unet.lora_alpha": 8,
        "unet.r": 4,
        "text_encoder.lora_alpha": 8,
        "text_encoder.use_rslora": True,
    }
    save_file(tensors, tmp_path / "x", {"lora_adapter_metadata": json.dumps(settings)})
    imported, _ = import_lora(tmp_path / "x")
    assert imported.layers["unet.a.to_q"].scale == 2.0
    assert imported.layers["text_encoder.text_model.a.q_proj"].scale == 4.0
    save_file(tensors, tmp_path / "x", {"lora_adapter_metadata": '{"unet.lora_alpha": "8"}'})
    with pytest.raises(AdapterError, match="lora_alpha"):
        import_lora(tmp_path / "x")


def test_embeddings_are_one_tensor_named_by_the_word(make_concept, tmp_path):
    concept = make_concept("lora")
    flat = dataclasses.replace(
        concept, tokens={"<kodo>": concept.tokens["<kodo>"], "fell": concept.tokens["<fell>"][0]}
    )
    files = export_embeddings(flat, tmp_path)
    assert [file.name for file in files] == ["kodo.safetensors", "fell.safetensors"]
    for file, (word, vectors) in zip(files, flat.tokens.items(), strict=True):
        assert list(load_file(file)) == [word]
        read_word, read_vectors = import_embedding(file)
        assert read_word == word and torch.equal(read_vectors, vectors)
    clash = dataclasses.replace(flat, tokens={"<a>": torch.ones(1, 4), "a": torch.ones(1, 4)})
    with pytest.raises(AdapterError, match=r"both be a\.safetensors"):
        export_embeddings(clash, tmp_path)


def test_foreign_embedding_takes_its_name_from_the_file(tmp_path):
    save_file({"emb_params": torch.ones(24)}, tmp_path / "cat.safetensors")
    word, vectors = import_embedding(tmp_path / "cat.safetensors")
    assert word == "cat" and vectors.shape == (1, 24)
    save_file({"clip_g": torch.ones(1, 8), "t5xxl": torch.ones(1, 8)}, tmp_path / "three.safetensors")
    with pytest.raises(AdapterError, match="2 tensors; an embedding file holds one, or clip_l and clip_g"):
        import_embedding(tmp_path / "three.safetensors")
    save_file({"clip_g": torch.ones(2, 8), "clip_l": torch.ones(1, 8)}, tmp_path / "torn.safetensors")
    with pytest.raises(AdapterError, match="not rows of one word"):
        import_embedding(tmp_path / "torn.safetensors")


def test_a_word_of_two_text_encoders_is_two_tensors(make_concept, tmp_path):
    vectors = torch.randn(2, 768 + 1280, generator=torch.Generator().manual_seed(0))
    (file,) = export_embeddings(dataclasses.replace(make_concept("lora"), tokens={"<kodo>": vectors}), tmp_path)
    stored = load_file(file)
    assert stored["clip_l"].shape == (2, 768) and stored["clip_g"].shape == (2, 1280)
    word, read = import_embedding(file)
    assert word == "kodo" and torch.equal(read, vectors)


def test_a_layer_wise_word_is_exported_as_the_mean_of_its_layers(make_concept, tmp_path):
    concept = make_concept("lora")
    layered = concept.tokens["<fell>"]
    export_embeddings(concept, tmp_path)
    word, vectors = import_embedding(tmp_path / "fell.safetensors")
    assert word == "<fell>" and torch.allclose(vectors, layered.mean(dim=0))
    assert not torch.equal(layered[0], layered[1])


def test_a_whole_weight_is_exported_in_the_smaller_of_two_ways(make_concept, tmp_path):
    concept = make_concept("full")
    export_kohya(concept, tmp_path / "x")
    tensors = load_file(tmp_path / "x")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
    assert tensors[f"{stem}attn2_to_k.lora_up.weight"].shape == (16, 16)
    assert tensors[f"{stem}attn2_to_k.lora_down.weight"].shape == (16, 24)
    assert tensors[f"{stem}ff_net_0_proj.lora_down.weight"].shape == (16, 16)
    assert tensors[f"{stem}ff_net_0_proj.lora_up.weight"].shape == (64, 16)


@pytest.fixture(scope="module")
def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(SHIFT)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


def unet_concept(concept, unet):
    """The concept's adapters, repeated over every attention layer of the same shape."""
    by_shape = {adapter.weight_shape: adapter for adapter in concept.layers.values()}
    layers = find_layers(unet, None, "attention")
    return dataclasses.replace(concept, layers={name: by_shape[tuple(m.weight.shape)] for name, m in layers.items()})


@pytest.mark.parametrize("form", ["concept file", "kohya", "diffusers"])
def test_diffusers_loads_our_files_and_computes_our_delta(make_concept, unet, tmp_path, form):
    pytest.importorskip("peft")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    concept = unet_concept(make_concept("block_orthogonal"), unet)
    write = {"concept file": save_concept, "kohya": export_kohya, "diffusers": export_diffusers}[form]
    write(concept, tmp_path / FILE_NAME)
    layers = find_layers(unet, None, "attention")
    base = {name: module.weight.detach().clone() for name, module in layers.items()}
    state, alphas = Loader.lora_state_dict(str(tmp_path), weight_name=FILE_NAME)
    Loader.load_lora_into_unet(state, alphas, unet, adapter_name="ours")
    try:
        for name, module in layers.items():
            path = name.removeprefix("unet.")
            delta = unet.get_submodule(path).get_delta_weight("ours")
            assert torch.allclose(delta, concept.layers[name].delta(), rtol=1e-5, atol=1e-6), name
            assert delta.abs().max() > 1e-2 and torch.equal(module.weight, base[name])
    finally:
        unet.unload_lora()


def test_diffusers_takes_a_concept_file_with_words_for_a_kohya_file(make_concept, tmp_path):
    pytest.importorskip("diffusers")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    save_concept(make_concept("orthogonal"), tmp_path / FILE_NAME)
    state = Loader.lora_state_dict(load_file(tmp_path / FILE_NAME))[0]
    assert len(state) == 12 and all("lora" in key for key in state)


def test_kohya_keys_of_a_real_model_are_understood_without_it(unet):
    from modular_concepts.models.layers import file_key

    names = list(find_layers(unet, None, "all_linear"))
    assert len(names) > 20
    assert [name_of_key(file_key(name)) for name in names] == names


def test_rows_of_encoders_changed_over_are_refused_and_an_encoders_name_is_no_word(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file({"clip_l": torch.ones(2, 1280), "clip_g": torch.ones(2, 768)}, path)
    with pytest.raises(
        AdapterError, match=r"clip_l \(2, 1280\) and clip_g \(2, 768\).*768 of clip_l and 1280 of clip_g"
    ):
        import_embedding(path)
    for name in ("clip_l", "clip_g"):
        save_file({name: torch.ones(2, 768)}, path)
        assert import_embedding(path)[0] == "cat"
