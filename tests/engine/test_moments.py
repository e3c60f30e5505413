"""Second moments are those of the inputs that a layer really reads, survive their file, and hold no picture."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from laws import relative_error, seeded
from torch import nn
from untrained_toy import filled_concept, untrained_base

from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.moments import (
    Recorded,
    is_moments,
    load_moments,
    moments_path,
    recorded_from,
    save_moments,
    why_not,
)
from modular_concepts.merging.moments import Moment, recording
from modular_concepts.models.fingerprint import base_mark, concept_mark, same_base
from modular_concepts.storage.safetensors import write_safetensors


def layers():
    torch.nn.init.normal_((linear := nn.Linear(12, 5)).weight, generator=seeded(0))
    return {"unet.a.b": linear, "unet.c": nn.Conv2d(3, 4, 3, stride=2, padding=1)}


def test_moments_are_those_of_all_inputs():
    modules = layers()
    texts = [torch.randn(2, 7, 12, generator=seeded(seed)) for seed in range(3)]
    picture = torch.randn(2, 3, 8, 8, generator=seeded(5))
    with recording(modules) as recorder:
        for text in texts:
            modules["unet.a.b"](text)
        modules["unet.c"](picture)
    matrices = recorder.matrices()
    rows = torch.cat(texts).flatten(0, 1).double()
    assert relative_error(matrices["unet.a.b"], rows.mT @ rows / len(rows)) < 1e-6
    patches = F.unfold(picture, 3, 1, 1, 2).mT.flatten(0, 1).double()
    assert relative_error(matrices["unet.c"], patches.mT @ patches / len(patches)) < 1e-6
    flat = modules["unet.c"].weight.flatten(1) @ patches.float().mT
    answer = modules["unet.c"](picture) - modules["unet.c"].bias[:, None, None]
    assert relative_error(flat.reshape(4, 2, 16).transpose(0, 1).flatten(2), answer.flatten(2)) < 1e-5
    assert not any(module._forward_pre_hooks for module in modules.values())


def test_a_moment_of_few_directions_keeps_the_largest_and_the_trace():
    rows = torch.randn(500, 40, generator=seeded(1), dtype=torch.float64) * torch.logspace(1, -3, 40)
    matrix = rows.mT @ rows / 500
    whole, few = Moment.of(matrix, 40), Moment.of(matrix, 12)
    assert relative_error(whole.matrix(), matrix) < 1e-6
    assert few.factor.shape == (12, 40)
    assert 1e-6 < relative_error(few.matrix(), matrix) < 0.02
    assert few.matrix().trace().item() == pytest.approx(matrix.trace().item(), rel=1e-6)


def test_wide_layers_keep_nearly_the_same_directions():
    rows = torch.randn(300, 1500, generator=seeded(1), dtype=torch.float64) * torch.logspace(1, -2, 1500)
    matrix = rows.mT @ rows / 300
    found, values = Moment.of(matrix, 20), torch.linalg.eigvalsh(matrix)
    best = (values[:-20] - values[:-20].mean()).norm() / matrix.norm()
    assert relative_error(found.matrix(), matrix) == pytest.approx(best.item(), rel=0.01)
    assert found.matrix().trace().item() == pytest.approx(matrix.trace().item(), rel=1e-6)
    assert torch.equal(found.factor, Moment.of(matrix, 20).factor)


def test_a_file_brings_them_back(tmp_path):
    rows = torch.randn(300, 20, generator=seeded(2))
    moments = {"unet.a.b": Moment.of(rows.mT @ rows * 1e-9, 8), "unet.c": Moment.of(rows.mT @ rows * 1e9, 20)}
    path = moments_path(tmp_path / "kodo.safetensors")
    save_moments(moments, path)
    assert path.name == "kodo.moments"
    again = load_moments(path)
    assert set(again) == set(moments)
    for name, moment in moments.items():
        assert relative_error(again[name].matrix(), moment.matrix()) < 2e-3
    before = path.read_bytes()
    save_moments(moments, path)
    assert path.read_bytes() == before


def test_a_file_says_which_concept_and_base_it_is_of(tmp_path):
    concept, base = filled_concept("kodo", 1), untrained_base()
    path = tmp_path / "kodo.moments"
    save_moments({"unet.a": Moment.of(torch.eye(3))}, path, Recorded(concept_mark(concept), base.mark, "as ever"))
    origin = recorded_from(path)
    assert origin.drawing == "as ever" and why_not(origin, concept) == why_not(origin, concept, base.mark) == ""
    assert "on another base" in why_not(origin, concept, "hash:0123")
    save_moments({"unet.a": Moment.of(torch.eye(3))}, path)
    assert "does not say which weights" in why_not(recorded_from(path), concept, base.mark)


def test_a_concepts_mark_is_of_what_it_draws_with_alone(tmp_path):
    """The same through its file and under another name; another for any number, word or strength that changes."""
    concept = replace(filled_concept("kodo", 1), layers={
        name: adapter.replace(alpha=0.1) for name, adapter in filled_concept("kodo", 1).layers.items()
    })  # fmt: skip
    mark = concept_mark(concept)
    save_concept(concept, tmp_path / "x.safetensors")
    assert concept_mark(load_concept(tmp_path / "x.safetensors")) == mark
    assert concept_mark(replace(concept, name="other", about={"title": "A"})) == mark
    first = next(iter(concept.layers))
    up = concept.layers[first].lora_up.clone()
    up[0, 0] += 1e-4
    others = [
        replace(concept, layers=concept.layers | {first: concept.layers[first].replace(lora_up=up)}),
        replace(concept, layers=concept.layers | {first: concept.layers[first].replace(alpha=0.2)}),
        replace(concept, layers={name: a for name, a in concept.layers.items() if name != first}),
        replace(concept, tokens={"<kodo>": concept.tokens["<kodo>"] + 1e-4}),
        replace(concept, tokens={"<minka>": concept.tokens["<kodo>"]}),
    ]
    assert len({mark, *map(concept_mark, others)}) == 1 + len(others)


def test_a_bases_mark_is_the_same_in_half_precision_and_another_for_any_network():
    base = untrained_base()
    half = [{name: value.half() for name, value in n.state_dict().items()} for n in base.modules]
    mark = base_mark(half, lambda: "")
    assert same_base(mark, base.mark) and same_base(base.mark, mark)
    for number in range(2):
        changed = [dict(table) for table in half]
        changed[number] = {name: value + 0.01 for name, value in half[number].items()}
        assert not same_base(base_mark(changed, lambda: ""), base.mark)
    assert not same_base(base_mark(half[:1], lambda: ""), base.mark) and not same_base("", "")
    eight = [{"a.weight": torch.zeros(4, 4, dtype=torch.int8)}]
    assert base_mark(eight, lambda: "abc") == "hash:abc" and same_base("hash:abc", "hash:abc")
    assert not same_base("hash:abc", "hash:abd")


@pytest.mark.parametrize("kind", ["another file", "no tensors at all", "half of one"])
def test_what_is_no_file_of_moments_is_never_replaced_by_one_and_the_way_out_is_said(tmp_path, kind):
    path, moments = tmp_path / "kodo.moments", {"unet.a": Moment.of(torch.eye(3))}
    save_moments(moments, path)
    write_safetensors(tmp_path / "other", {"a": torch.ones(2)}, {"title": "a person's own"})
    other, half = (tmp_path / "other").read_bytes(), path.read_bytes()[:200]
    path.write_bytes({"another file": other, "no tensors at all": b"", "half of one": half}[kind])
    before = path.read_bytes()
    for use in (lambda: recorded_from(path), lambda: save_moments(moments, path)):
        with pytest.raises(AdapterError, match="move it away"):
            use()
    assert path.read_bytes() == before


def test_moments_of_nothing_are_refused(tmp_path):
    save_moments({"unet.a": Moment.of(torch.zeros(3, 3)), "unet.b": Moment.of(torch.eye(3))}, tmp_path / "some")
    assert len(load_moments(tmp_path / "some")) == 2
    save_moments({"unet.a": Moment.of(torch.zeros(3, 3))}, tmp_path / "none")
    with pytest.raises(AdapterError, match="none: its moments are all 0"):
        load_moments(tmp_path / "none")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(2)}, {})
    with pytest.raises(AdapterError, match="not a file of moments"):
        load_moments(path)
    good = {"unet.a.factor": torch.ones(2, 3), "unet.a.scale": torch.ones(2, dtype=torch.float64)}
    for wrong in (
        {"unet.a.factor": torch.ones(2, 3)},
        good | {"unet.a.scale": torch.ones(3)},
        good | {"unet.a.scale": -torch.ones(2)},
        good | {"unet.a.factor": torch.ones(3)},
        good | {"unet.b.scale": torch.ones(2)},
        {"a b.factor": torch.ones(2, 3), "a b.scale": torch.ones(2)},
    ):
        write_safetensors(path, wrong, {"format": "modular-concepts-moments-1"})
        with pytest.raises(AdapterError):
            load_moments(path)
    with pytest.raises(AdapterError, match="no moments to save"):
        save_moments({}, path)


def test_a_concept_called_like_another_ones_moments_keeps_its_file(tmp_path):
    for name in ("minka", "minka.moments"):
        save_concept(filled_concept(name, 1), tmp_path / f"{name}.safetensors")
    whole = (tmp_path / "minka.moments.safetensors").read_bytes()
    paths = [moments_path(tmp_path / f"{name}.safetensors") for name in ("minka", "minka.moments")]
    assert [path.name for path in paths] == ["minka.moments", "minka.moments.moments"]
    for path in paths:
        save_moments({"unet.a": Moment.of(torch.eye(3))}, path)
        assert moments_path(path.with_suffix(".safetensors")) == path and is_moments(path)
    assert (tmp_path / "minka.moments.safetensors").read_bytes() == whole
    assert not is_moments(tmp_path / "minka.moments.safetensors")


def test_moments_under_their_former_name_are_still_read(tmp_path):
    former = tmp_path / "kodo.moments.safetensors"
    save_moments({"unet.a": Moment.of(torch.eye(3))}, former)
    assert moments_path(tmp_path / "kodo.safetensors") == former
    save_moments({"unet.a": Moment.of(torch.eye(3))}, tmp_path / "kodo.moments")
    assert moments_path(tmp_path / "kodo.safetensors") == tmp_path / "kodo.moments"
