"""The mask of regions in a joint attention lies where the attention computes, and in its precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from modular_concepts_pack.host.regions.cross_attention import MOMENT
from modular_concepts_pack.host.regions.joint_attention import OVERRIDE, JointListening, positions_of
from modular_concepts_pack.modular_concepts.errors import AdapterError
from modular_concepts_pack.modular_concepts.regions.geometry import Region
from modular_concepts_pack.modular_concepts.regions.moment import Moment
from modular_concepts_pack.modular_concepts.regions.shares import Places

TEXT, SIDE, WIDTH = 5, 8, 16
TOKENS = TEXT + TEXT + (SIDE // 2) ** 2


@pytest.fixture(scope="module")
def override():
    """What the attention calls, for one region in the left half beside the global prompt."""
    context = torch.randn(2, TEXT, WIDTH, generator=torch.Generator().manual_seed(0))
    places = Places([Region("left", box=(0.0, 0.0, 0.5, 1.0))], scale=8)
    heard = JointListening(places, [context[:1]], [context[1:]])
    options = {"cond_or_uncond": [0, 1], MOMENT: Moment((SIDE, SIDE))}
    longer, options, _ = heard.prepared(SimpleNamespace(patch_size=2), context, options)
    assert longer.shape[1] + (SIDE // 2) ** 2 == TOKENS
    return options[OVERRIDE]


def mask_for(override, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    query = torch.zeros(2, TOKENS, WIDTH, device=device, dtype=dtype)
    return override(lambda *_, mask: mask, query, query, query)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("meta", "float16")])
def test_mask_follows_the_query_in_device_and_dtype(override, device, dtype):
    mask = mask_for(override, device, getattr(torch, dtype))
    assert str(mask.device) == device and mask.dtype is getattr(torch, dtype)
    assert mask.shape[-2:] == (TOKENS, TOKENS)


def test_something_is_kept_apart_in_any_precision(override):
    """Two texts from each other, and each half of the picture from one of them; also when asked for again."""
    dtypes = torch.float32, torch.bfloat16, torch.float32
    apart = {int(torch.isinf(mask_for(override, dtype=dtype)).sum()) for dtype in dtypes}
    assert len(apart) == 1 and apart.pop() >= 2 * TEXT * TEXT + 16 * TEXT


def test_heads_may_be_split_already_and_a_picture_alone_has_no_mask(override):
    split = torch.zeros(2, 4, TOKENS, WIDTH // 4)
    mask = override(lambda *_, mask, **_more: mask, split, split, split, skip_reshape=True)
    assert mask.shape[-2:] == (TOKENS, TOKENS)
    picture = torch.zeros(2, (SIDE // 2) ** 2, WIDTH)
    assert override(lambda *_, **more: sorted(more), picture, picture, picture) == []


def test_other_tokens_than_texts_and_picture_are_refused(override):
    strange = torch.zeros(2, TOKENS + 1, WIDTH)
    with pytest.raises(AdapterError, match="joins 27 tokens, where texts and picture have 26"):
        override(lambda *_, **_more: None, strange, strange, strange)


def test_a_network_of_patches_says_how_many_positions_a_picture_has():
    assert positions_of(SimpleNamespace(patch_size=2), (9, 8)) == 5 * 4
    assert positions_of(SimpleNamespace(), (9, 8)) == positions_of(SimpleNamespace(patch_size=None), (9, 8)) == 0
