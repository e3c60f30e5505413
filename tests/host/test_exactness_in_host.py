"""One merge on every kind of weight that the host has: full, fp8, mixed precision, and each offloaded or not."""

from __future__ import annotations

import pytest
import torch
from kinds_of_weights import on_kinds_of_weights
from laws import relative_error

KINDS = ["float32", "fp8", "mixed", "int8"]
FEW_BITS = KINDS[1:]
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def found(folder, warnings):
    """(tensors, facts)."""
    found, facts = on_kinds_of_weights(folder, warnings)
    return {key: value.clone() for key, value in found.items()}, facts


def error(found, kind: str, way: str) -> float:
    """Of the change that the merge makes to the network's output, relative to the change."""
    tensors = found[0]
    if kind not in found[1]["kinds"]:
        pytest.skip(f"this host knows no {kind} weights")
    changed = tensors[f"{kind}|wanted"] - tensors[f"{kind}|base"]
    # What the host's own quantised arithmetic loses is the base's, and not the merge's.
    return float((tensors[f"{kind}|{way}"] - tensors[f"{kind}|its base"] - changed).norm() / changed.norm())


def test_every_layer_of_every_kind_is_found(found):
    assert all(found[1]["names"].values()) and found[1]["offloaded"]


@pytest.mark.parametrize("way", ["weights", "weights offloaded", "activations", "activations offloaded"])
def test_full_weights_take_a_merge_exactly(found, way):
    assert relative_error(found[0][f"float32|{way}"], found[0]["float32|wanted"]) < 1e-5
    assert relative_error(found[0]["float32|wanted"], found[0]["float32|base"]) > 1e-2


@pytest.mark.parametrize("kind", ["fp8", "mixed"])
def test_quantised_weights_take_a_merge_exactly_as_activations_or_offloaded(found, kind):
    for way in ("weights offloaded", "activations", "activations offloaded"):
        assert error(found, kind, way) < 1e-3, way


@pytest.mark.parametrize("kind", FEW_BITS)
def test_quantised_weights_round_a_merge_and_the_node_says_so(found, kind):
    """Added to weights of few bits, a small change goes under: what rounding adds is 1.6 and 1.0 times its size."""
    assert 0.1 < error(found, kind, "weights") < 5
    assert "set apply to activations" in found[1]["warned"][kind][0] and found[1]["warned"]["float32"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_activations_add_to_a_layer_exactly_what_the_concepts_are(found, kind):
    """Also where the host rounds what a layer reads, as of int8 weights, so that whole networks cannot be compared."""
    if kind not in found[1]["kinds"]:
        pytest.skip(f"this host knows no {kind} weights")
    assert relative_error(found[0][f"{kind}|layer"], found[0][f"{kind}|layer wanted"]) < 1e-5


@pytest.mark.parametrize("title", [f"{dtype}{way}" for dtype in HALF for way in ("", ", changed")])
def test_weights_in_half_precision_are_rounded_once(found, title):
    assert found[0][f"rounded {title}"] <= 1.01 * found[0][f"rounding {title}"]


def test_every_hook_is_called_whatever_the_weights_are(found):
    tensors, facts = found
    assert facts["silent"] == []
    for kind, (called, layers, held) in facts["called"].items():
        assert called == layers == held > 50, kind
        base, gated, wanted = (tensors[f"{kind}|{title}"] for title in ("its base", "gated", "gated wanted"))
        if kind == "int8":  # whose layers round what they read
            continue
        assert relative_error(gated - base, wanted - base) < 1e-3, kind


def test_the_loaded_weights_are_untouched(found):
    assert all(found[1]["untouched"][kind] for kind in found[1]["kinds"])


def test_a_model_saved_by_cores_node_holds_the_merge(found):
    error, moved = found[1]["saved"]
    assert error < 1e-6 and moved > 1e-2
    assert torch.equal(found[0]["float32|saved"], found[0]["float32|weights"])


def test_a_lora_of_separate_queries_keys_and_values_is_one_adapter_of_the_joint_layer(found):
    tensors, facts = found
    modules, layers, joint = facts["fused"]
    assert joint == 4 and layers < modules
    for way in ("weights", "activations"):
        assert relative_error(tensors[f"sd3|{way}"], tensors["sd3|core"]) < 1e-5
    assert relative_error(tensors["sd3|core"], tensors["sd3|base"]) > 1e-2
