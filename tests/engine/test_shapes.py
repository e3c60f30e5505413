"""Shapes that annotations name are checked while tests run, and nothing is needed for them otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes import WrongShape

from modular_concepts.adapters.low_rank import erasure_mask, low_rank_product, new_frozen, new_lora
from modular_concepts.adapters.sites import Site
from modular_concepts.merging.custom_diffusion import constrained_factors
from modular_concepts.merging.dense import MergedDense
from modular_concepts.merging.fusion import fused_factors
from modular_concepts.merging.moments import Moment
from modular_concepts.merging.sparse import ties_merge
from modular_concepts.regions.attention import attend_by_region
from modular_concepts.regions.find import HeardWords, disjoint_masks
from modular_concepts.regions.shares import Division
from modular_concepts.training.losses import masked_mean

ENGINE = Path(__file__).parents[2] / "modular_concepts"
ones = torch.ones


def adapter():
    return new_lora(6, 4, 2, None, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "misshapen",
    [
        lambda: low_rank_product(ones(3, 4), ones(6, 2), ones(3, 4)),
        lambda: low_rank_product(ones(3, 4), ones(6, 2), ones(2, 4), rows=torch.arange(5)),
        lambda: new_frozen(6, ones(4), None),
        lambda: adapter().residual(torch.arange(4)),
        lambda: Site(torch.nn.Linear(4, 6), 0, 3).of(ones(2, 2)),
        lambda: MergedDense(ones(6)).delta(),
        lambda: MergedDense(ones(6, 4)).add_to(ones(6)),
        lambda: fused_factors([adapter()] * 2, [1.0, 1.0], [ones(4, 3)] * 2),
        lambda: constrained_factors([adapter()], [1.0], [ones(1, 3)], torch.eye(4)),
        lambda: ties_merge([ones(6, 4), ones(4, 6)], [1.0, 1.0], 0.5),
        lambda: Moment.of(ones(4, 3)),
        lambda: attend_by_region(lambda q, k, v: q, ones(1, 3, 4), [(ones(2, 5, 4),) * 2], Division(ones(0, 3))),
        lambda: Division(ones(3)),
        lambda: HeardWords([[0]], 1, (1, 2)).hear(ones(1, 2, 4), ones(1, 1, 3), 1),
        lambda: disjoint_masks(ones(2, 4)),
        lambda: masked_mean(ones(2, 4, 3, 3), ones(3, 1, 3, 3)),
    ],
)
def test_a_shape_that_does_not_fit_its_name_is_refused(misshapen):
    with pytest.raises(WrongShape):
        misshapen()


def test_shapes_may_follow_from_arguments():
    assert erasure_mask(7, 0.5, torch.Generator().manual_seed(0)).shape == (7,)


def test_nothing_is_needed_for_them_otherwise():
    modules = [
        ".".join(("modular_concepts", *path.relative_to(ENGINE).with_suffix("").parts))
        for room in ("adapters", "merging", "regions")
        for path in sorted((ENGINE / room).glob("[a-z]*.py"))
    ]
    absent = "import sys; sys.modules.update(dict.fromkeys(('jaxtyping', 'beartype'))); import importlib; "
    code = absent + f"[importlib.import_module(name) for name in {[*modules, 'modular_concepts.training.losses']}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ENGINE.parent, capture_output=True, text=True)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stderr
