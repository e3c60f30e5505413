"""Whether what a checkpoint holds is the whole state of one run, told before anything is built of it.

Nobody vouches for a file, and neither the optimizer nor the generators check what they are given: a moment of a wrong
shape is read beyond its end.  Every fault is an AdapterError that names the entry.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from ..adapters.low_rank import MAX_SIZE
from ..concept import MAX_TEXT, clip
from ..errors import AdapterError
from ..storage.strict_json import parse_json
from .optimizers import MOST_MOMENT, fresh_state
from .run import PURPOSES, Run
from .shuffle import Shuffle

OPTIMIZER = "optimizer."
MAX_SCALE = 2.0**127
MAX_NORMAL = 40.0  # no draw of a normal distribution from 64 random bits comes near it
_TWISTER, _TWISTER_BYTES = 624, 5056  # words of the Mersenne Twister, and bytes of a generator's state
_UNDERFLOW = 1e-18  # a moment so small may have a square that is 0 in single precision
_STEP = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Origin:
    """Of which training a checkpoint is, and how many steps it has behind it.  run: see ownership.py."""

    step: int
    identity: Mapping
    run: str


def read_origin(metadata: Mapping[str, str]) -> Origin:
    """From a checkpoint's metadata."""
    if not _STEP.fullmatch(metadata.get("step", "")):
        raise AdapterError(f"its step is {clip(metadata.get('step'))}, not a whole number")
    identity = parse_json(metadata.get("identity", ""), "its description of the training")
    texts = ("dataset", "base", "basis", "frozen")
    if not isinstance(identity, dict) or not all(isinstance(identity.get(key), str) for key in texts):
        raise AdapterError(f"its description of the training lacks one of {', '.join(texts)}")
    settings = identity.get("settings")
    if not isinstance(settings, dict) or not all(map(_is_setting, settings, settings.values())):
        raise AdapterError("its description of the training has no settings, or strange ones")
    return Origin(int(metadata["step"]), identity, _run(metadata))


def _run(metadata: Mapping[str, str]) -> str:
    """The run that it names; for a checkpoint of a version that named none, a digest of its identity."""
    return metadata.get("run") or f"identity-{sha256(metadata['identity'].encode()).hexdigest()[:32]}"


def check_state(tensors: Mapping[str, Tensor], step: int, run: Run, changed: bool) -> None:
    """Raise AdapterError unless these are the tensors that `run` itself could have written after `step` steps.

    changed: settings or pictures are others now, so that options may have been on or off that are not any more.
    """
    _check_losses(tensors, step)
    _check_options(tensors, run, changed)
    parts = optimizer_parts(tensors)
    for name, parameter in run.parameters().items():
        _check_parameter(name, tensors[name], parameter)
        _check_optimizer_state(name, parts.get(name, {}), fresh_state(run.optimizer, parameter), step)
    for name in _below(tensors, "generators."):
        _check_generator(f"generators.{name}", tensors[f"generators.{name}"], run.generators["noise"])
    for name in _below(tensors, "orders."):
        order = run.orders.get(name)
        _check_order(f"orders.{name}", tensors[f"orders.{name}"], None if changed else order)
    if "loss_scale" in tensors:
        _check_loss_scale(tensors["loss_scale"])


def optimizer_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parameter -> part -> tensor: what a checkpoint holds of the optimizer's state; a part's name has no dot."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if key.startswith(OPTIMIZER):
            parameter, _, part = key.removeprefix(OPTIMIZER).rpartition(".")
            parts[parameter][part] = tensor
    return parts


def _is_setting(name: str, value: object) -> bool:
    if not name.isidentifier() or len(name) > 100:
        return False
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and value.isprintable()
    return value is None or (isinstance(value, bool | int | float) and abs(value) < 2**63)


def _check_losses(tensors: Mapping[str, Tensor], step: int) -> None:
    losses = tensors.get("losses")
    if losses is None or losses.dtype != torch.float64 or losses.dim() != 1 or len(losses) != step:
        raise AdapterError(f"its losses {_described(losses)} are not one number for each of its {step} steps")
    if len(losses) and losses.min() < 0:
        raise AdapterError(f"its losses go down to {losses.min().item():.3g}, and a loss is never below 0")


def _check_options(tensors: Mapping[str, Tensor], run: Run, changed: bool) -> None:
    """Everything that is there belongs to the run, and everything that the run goes on from is there."""
    parameters = run.parameters()
    needed = {"losses", *(f"generators.{name}" for name in run.generators), *(f"orders.{name}" for name in run.orders)}
    needed |= {"loss_scale"} if run.loss_scale is not None else set()
    options = {"loss_scale", "orders.examples", "orders.prior", *(f"generators.{name}" for name in PURPOSES)}
    missing = sorted(needed - set(tensors))
    if missing and not changed:
        raise AdapterError(f"{missing[0]} is missing")
    for name in tensors:
        owner = name.removeprefix(OPTIMIZER).rpartition(".")[0] if name.startswith(OPTIMIZER) else name
        if owner not in parameters and name not in (options | needed if changed else needed):
            raise AdapterError(f"{clip(name)} belongs to nothing that this training has")


def _check_parameter(name: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.dtype != parameter.dtype or tensor.shape != parameter.shape:
        raise AdapterError(f"{name} {_described(tensor)} is not {_described(parameter)}")
    _check_reach(name, tensor, MAX_SIZE)


def _check_reach(what: str, tensor: Tensor, most: float) -> None:
    largest = tensor.abs().max().item()
    if largest > most:
        raise AdapterError(f"{what} reaches {largest:.1e}, which no training survives")


def _check_optimizer_state(name: str, parts: Mapping[str, Tensor], fresh: Mapping[str, Tensor], step: int) -> None:
    """What the optimizer itself would make for this parameter is the pattern."""
    if not parts and fresh.get("step", torch.empty(0)).dtype == torch.int64:
        return  # an eight-bit optimizer keeps nothing of what had no gradient yet
    if set(parts) != set(fresh):
        differing = sorted(set(parts) ^ set(fresh))[0]
        raise AdapterError(
            f"the optimizer's state of {name} {'lacks' if differing in fresh else 'has a strange'} {differing}"
        )
    for part, tensor in parts.items():
        what, pattern = f"the optimizer's {part} of {name}", fresh[part]
        if tensor.dtype != pattern.dtype or tensor.shape != pattern.shape:
            raise AdapterError(f"{what} {_described(tensor)} is not {_described(pattern)}")
        if part == "step" and not (0 <= tensor.item() <= step and float(tensor) == int(tensor)):
            raise AdapterError(f"{what} is {tensor.item()}, of {step} steps in all")
        if part in ("exp_avg_sq", "absmax1", "absmax2") and tensor.min() < 0:
            raise AdapterError(f"{what} has negative numbers")
        if part == "state2" and tensor.is_floating_point() and tensor.min() < 0:
            raise AdapterError(f"{what} has negative numbers")
        if part.startswith("qmap") and not torch.equal(tensor.cpu(), pattern.cpu()):
            raise AdapterError(f"{what} is not the optimizer's own")
    if {"exp_avg", "exp_avg_sq"} <= set(parts):
        _check_moments(name, parts["exp_avg"], parts["exp_avg_sq"], parts["step"])


def _check_moments(name: str, mean: Tensor, square: Tensor, step: Tensor) -> None:
    """Both are means of the same gradients, so that one bounds the other; before the first there are none."""
    _check_reach(f"the optimizer's exp_avg of {name}", mean, MAX_SIZE)
    if (mean.abs() > MOST_MOMENT * square.sqrt() + _UNDERFLOW).any():
        raise AdapterError(f"the optimizer's exp_avg of {name} is larger than its exp_avg_sq allows")
    if not step.item() and (mean.any() or square.any()):
        raise AdapterError(f"the optimizer's state of {name} is no longer 0, but after 0 steps it would be")


def _check_generator(what: str, state: Tensor, generator: torch.Generator) -> None:
    """The Mersenne Twister reads wherever its state tells it to."""
    size = len(generator.get_state())
    if state.dtype != torch.uint8 or state.shape != (size,):
        raise AdapterError(f"{what} {_described(state)} is not the state of a generator, {size} bytes")
    if size != _TWISTER_BYTES:
        return
    raw = state.numpy().tobytes()
    left, seeded, following = struct.unpack_from("=iiQ", raw, 8)
    words = struct.unpack_from(f"={_TWISTER}Q", raw, 24)
    normals = (*struct.unpack_from("=3d", raw, 24 + 8 * _TWISTER), *struct.unpack_from("=f", raw, size - 8))
    started = (left, following) == (1, 0) or (1 <= left <= _TWISTER and left + following == _TWISTER + 1)
    possible = max(words) < 2**32 and any(words)  # all zero, it gives nothing but zeros for ever
    if seeded != 1 or not started or not possible or not all(abs(normal) <= MAX_NORMAL for normal in normals):
        raise AdapterError(f"{what} is not a state that a generator can be in")


def _check_order(what: str, pending: Tensor, order: Shuffle | None) -> None:
    if pending.dtype != torch.int64 or pending.dim() != 1 or (len(pending) and pending.min() < 0):
        raise AdapterError(f"{what} {_described(pending)} is not a list of pictures")
    if order is not None and not torch.isin(pending, order.entries).all():
        raise AdapterError(f"{what} names pictures that there are not")
    if order is not None and not torch.equal(pending, order.possible(pending)):
        raise AdapterError(f"{what} names a picture more often than it comes")


def _check_loss_scale(state: Tensor) -> None:
    if state.dtype != torch.float64 or state.shape != (2,):
        raise AdapterError(f"loss_scale {_described(state)} is not two numbers")
    value, good_steps = state.tolist()
    power = 0 < value <= MAX_SCALE and torch.frexp(state[0])[0].item() == 0.5
    if not power or not 0 <= good_steps < 2**31 or good_steps != int(good_steps):
        raise AdapterError(
            f"loss_scale is {value} after {good_steps} good steps; it is a power of two, and they are counted"
        )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]


def _described(tensor: Tensor | None) -> str:
    return (
        "(none)" if tensor is None else f"({str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)})"
    )
