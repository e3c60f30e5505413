"""Two files are two concepts that can be told apart, whatever a program calls all of its files."""

import pytest
import torch
from safetensors.torch import save_file

from modular_concepts.cli.paths import concepts_at
from modular_concepts.concept import same_concept
from modular_concepts.errors import AdapterError
from modular_concepts.files.lora import import_lora, told_apart
from modular_concepts.regions.assignment import acting
from modular_concepts.regions.geometry import Region

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def lora(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 768, generator=g) * 0.05, torch.randn(320, 2, generator=g) * 0.05
    save_file({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}, path)
    return path


NAMES = {
    "anna/pytorch_lora_weights.safetensors": "anna",
    "ben/adapter_model.safetensors": "ben",
    "ben/checkpoint-500/pytorch_lora_weights.safetensors": "ben_checkpoint-500",
    "loras/pytorch_lora_weights.safetensors": "pytorch_lora_weights",
    "anna/tom.safetensors": "tom",
}


@pytest.mark.parametrize("path", NAMES)
def test_a_lora_is_called_by_its_folder_where_its_file_says_nothing(tmp_path, path):
    assert import_lora(lora(tmp_path / path)).concept.name == NAMES[path]


def test_two_of_one_file_name_act_each_in_its_region(tmp_path):
    files = [
        lora(tmp_path / name / "pytorch_lora_weights.safetensors", seed) for seed, name in enumerate(("anna", "ben"))
    ]
    stack = [(import_lora(file).concept, 1.0) for file in files]
    regions = [Region("", LEFT, concepts=("anna",)), Region("", RIGHT, concepts=("ben",))]
    assert acting(stack, "", regions) == [(), (0,), (1,)]


def test_names_that_two_folders_share_have_the_folder_before_them(tmp_path):
    files = [lora(tmp_path / name / "tom.safetensors", seed) for seed, name in enumerate(("anna", "ben"))]
    concepts, _, _ = concepts_at([*map(str, files), str(lora(tmp_path / "anna" / "other.safetensors"))])
    assert [concept.name for concept in concepts] == ["anna/tom", "ben/tom", "other"]
    assert told_apart(["tom", "tom"], [files[0], files[0]]) == ["tom", "tom"]


def test_a_name_of_two_concepts_is_refused_until_it_is_numbered(tmp_path):
    files = [lora(tmp_path / name / "tom.safetensors", seed) for seed, name in enumerate(("anna", "ben"))]
    stack = [(import_lora(file).concept, 1.0) for file in files]
    with pytest.raises(AdapterError, match=r"2 concepts are called 'tom'; let the region name tom \(1\) or tom \(2\)"):
        acting(stack, "", [Region("", LEFT, concepts=("tom",))])
    regions = [Region("", LEFT, concepts=("tom (2)",)), Region("", RIGHT, concepts=("tom (1)",))]
    assert acting(stack, "", regions) == [(), (1,), (0,)]
    assert not same_concept(stack[0][0], stack[1][0]) and same_concept(stack[0][0], import_lora(files[0]).concept)
