"""What a careless program could leave on a loaded model: everything as one digest, or its weights and hooks."""

from __future__ import annotations

import hashlib
import zlib

import torch


def traces(model, clip, flags: bool = True) -> str:
    """Of weights, gradients, hooks, forwards and patches of MODEL and CLIP.

    flags: whether a parameter's own count too, of which the host sets one when it takes a patch out again.
    """
    digest = hashlib.sha256()
    for root in (model.model, clip.cond_stage_model):
        for name, value in root.state_dict().items():
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            # A checksum is enough to see a change, and much faster over a whole model.
            digest.update(f"{name}{value.dtype}{value.requires_grad}{zlib.crc32(raw.numpy())}".encode())
        for name, parameter in root.named_parameters() if flags else ():
            digest.update(f"{name}{parameter.requires_grad}{parameter.grad is None}{parameter.is_inference()}".encode())
        for name, part in root.named_modules():
            hooks = [len(getattr(part, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            digest.update(f"{name}{hooks}{'forward' in vars(part)}{part.training}".encode())
    digest.update(f"{len(model.patches)}{len(clip.patcher.patches)}{sorted(model.attachments)}".encode())
    return digest.hexdigest()


def weights(model, clip) -> dict[str, torch.Tensor]:
    """All weights of MODEL and CLIP as they are in memory now, copied."""
    parts = {"model": model.model, "clip": clip.cond_stage_model}
    return {f"{part}.{key}": value.clone() for part, net in parts.items() for key, value in net.state_dict().items()}


def hooks_on(model, clip) -> int:
    parts = (*model.model.modules(), *clip.cond_stage_model.modules())
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)
