"""Second moments are those of the inputs that a layer really reads, survive their file, and hold no picture."""

import pytest
import torch
import torch.nn.functional as F
from laws import relative_error, seeded
from torch import nn

from modular_concepts.errors import AdapterError
from modular_concepts.files.moments import load_moments, moments_path, save_moments
from modular_concepts.moments import Moment, recording


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
    assert path.name == "kodo.moments.safetensors"
    again = load_moments(path)
    assert set(again) == set(moments)
    for name, moment in moments.items():
        assert relative_error(again[name].matrix(), moment.matrix()) < 2e-3
    before = path.read_bytes()
    save_moments(moments, path)
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path):
    from modular_concepts.files.safe import write_safetensors

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
