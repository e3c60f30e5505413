"""A rank far beyond the weight's, of a file or a sum of many concepts, is measured as any other, in little memory."""

import pytest
import torch

from modular_concepts.adapters.low_rank import LowRank, narrowed
from modular_concepts.concept import Concept, Recipe
from modular_concepts.crosstalk.measures import cosine, crosstalk, delta_norm, sign_conflicts
from modular_concepts.crosstalk.report import shared_columns
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.merging.as_concept import merged_concept

LAYER = "unet.mid_block.attentions.0.proj_in"


def factors(rank, out=8, inputs=6, seed=0, rows=None):
    generator = torch.Generator().manual_seed(seed)
    height = out if rows is None else len(rows)
    up, down = (torch.randn(*shape, generator=generator) for shape in ((height, rank), (rank, inputs)))
    kind = "lora" if rows is None else "block"
    return LowRank(up, down, float(rank), kind, None if rows is None else torch.tensor(rows), out)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (5, 5)])
@pytest.mark.parametrize("rank", [1, 4, 5, 6, 7, 50])
def test_narrowed_factors_have_the_same_product(shape, rank):
    adapter = factors(rank, *shape)
    up, down = narrowed(adapter.lora_up, adapter.lora_down)
    assert len(down) <= min(rank, *shape)
    assert torch.allclose(up @ down, adapter.lora_up.double() @ adapter.lora_down.double(), atol=1e-12)


@pytest.mark.parametrize("rows", [None, [1, 3, 4]])
def test_measures_are_those_of_the_whole_deltas(rows):
    a, b = factors(40, seed=1, rows=rows), factors(3, seed=2)
    one, other = a.delta().double(), b.delta().double()
    sizes = one.norm() * other.norm()
    assert abs(delta_norm(a) - float(one.norm())) < 1e-5 * float(one.norm())
    assert abs(crosstalk(a, b) - float((one @ other.mT).norm() / sizes)) < 1e-5
    assert abs(cosine(a, b) - float((one * other).sum() / sizes)) < 1e-5
    both = (one != 0) & (other != 0)
    assert abs(sign_conflicts(a, b) - float(((one * other < 0) & both).sum() / both.sum())) < 1e-6
    assert shared_columns(a, a) == 0 and shared_columns(b, b) == 3


def test_no_rank_asks_for_more_than_its_factors():
    """Factors of a megabyte: what is rank x rank would take 20 GB each."""
    wide, other = factors(50_000, seed=1), factors(40_000, seed=2)
    assert 0 <= crosstalk(wide, other) <= 1 and -1 <= cosine(wide, other) <= 1 and delta_norm(wide) > 0
    assert shared_columns(wide, other) == 0


def test_a_sum_of_any_number_of_concepts_is_written_and_read(tmp_path):
    concepts = [
        Concept(f"c{number}", {LAYER: factors(128, 320, 320, seed=number)}, {}, Recipe("lora", 128, 128.0))
        for number in range(12)
    ]
    merged = merged_concept("all", concepts, [1.0] * 12)
    save_concept(merged, tmp_path / "x.safetensors")
    read = load_concept(tmp_path / "x.safetensors").layers[LAYER]
    assert read.rank == 12 * 128
    wanted = sum(concept.layers[LAYER].delta() for concept in concepts)
    assert torch.allclose(read.delta(), wanted, rtol=1e-4, atol=1e-2)
