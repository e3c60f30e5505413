"""Stable Diffusion 3 in the host: its own keys, two CLIPs that learn words and a T5 that does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import torch
import torch.nn.functional as F
from comfy.text_encoders.sd3_clip import SD3ClipModel
from torch import Tensor

from ...modular_concepts.families.sd3 import SD3
from .family import DENOISER, HostFamily, Read, Said

(T5,) = SD3.readers
_T5_WIDTH = 4096  # to which the other two together are padded


def _matches(model: comfy.model_patcher.ModelPatcher) -> bool:
    return isinstance(model.model, comfy.model_base.SD3)


def _weight_names(model: comfy.model_patcher.ModelPatcher) -> dict[str, str]:
    keys = sorted(model.model.state_dict())
    return {key.removeprefix(DENOISER): key for key in keys if key.startswith(DENOISER)}


def _cells(config: Mapping) -> int:
    return config["patch_size"]


def _put_together(
    clip: comfy.sd.CLIP, hidden: Mapping[str, Tensor], pooled: Mapping[str, Tensor], said: Said, read: Read
) -> tuple[Tensor, Tensor]:
    """The CLIPs' columns side by side, and behind them in the row what T5 made of the text, where there is one."""
    both = torch.cat(list(hidden.values()), dim=-1)
    both = F.pad(both, (0, _T5_WIDTH - both.shape[-1]))
    if getattr(clip.cond_stage_model, T5) is not None:
        both = torch.cat([both, _of_t5(clip, [one[T5][0] for one in said], read)], dim=1)
    return both, torch.cat(list(pooled.values()), dim=-1)


@torch.no_grad()
def _of_t5(clip: comfy.sd.CLIP, said: Sequence[list], read: Read) -> Tensor:
    """T5 learns no words, so that nothing goes back through it and each text is read once.

    Each alone, so that what it makes of one does not depend, to the last bit, on what is read beside it.
    """
    length, padding = max(map(len, said)), getattr(clip.tokenizer, T5).pad_token
    ids = [(*(token for token, *_ in one), *[padding] * (length - len(one))) for one in said]
    for one in ids:
        if one not in read:
            read[one] = getattr(clip.cond_stage_model, T5)([list(one)])[0]
    return torch.cat([read[one] for one in ids])


HOST_SD3 = HostFamily(
    SD3,
    _matches,
    _weight_names,
    _cells,
    clip_model=SD3ClipModel,
    put_together=_put_together,
)
