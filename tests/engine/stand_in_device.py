"""A second device for machines without a GPU: `elsewhere`, which computes on the CPU and refuses what a GPU refuses.

Tensors there are `Elsewhere`, which hold a tensor of the CPU; within `elsewhere()` every operation goes through
`run`.  It raises, as a GPU does, where one operation meets tensors of both devices (numbers of no dimension are allowed
where torch allows them), where a factory or a random operation is handed a generator of the other device, and in
whatever needs the bytes themselves, `numpy()` for instance.  Half precision by autocast follows CUDA's lists.
Values stay real, so that results can be held against those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten
# Operations that may meet both devices: copies, and indices, which may lie on the CPU.
COPIES = {aten.copy_, aten._to_copy, aten.copy, aten._foreach_copy_, aten.set_}
INDEXING = {aten.index: 1, aten.index_put: 1, aten.index_put_: 1, aten._unsafe_index: 1}
# Numbers of no dimension may come from the CPU in pointwise operations, and in these, which have no such tag.
NUMBERS = {aten.masked_fill, aten.masked_fill_, aten.fill_, aten.fill, aten.index_put, aten.index_put_, aten.where}
AUTOCAST_DOWN = (
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "matmul", "linear", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose2d.input", "scaled_dot_product_attention"),
)
AUTOCAST_UP = (
    "softmax.int",
    "log_softmax.int",
    "layer_norm",
    "group_norm",
    "mse_loss",
    "norm.Scalar",
    "exp",
    "pow.Tensor_Scalar",
)


class Elsewhere(Tensor):
    """A tensor on the stand-in; `inner` is what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self, *, tensor_contents=None):
        return f"Elsewhere({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class _Everything(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the compiler is imported, which takes seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Within the block tensors can be made on the stand-in and moved to it; yields it as a device."""
    lifted, wait = torch._C._only_lift_cpu_tensors(), torch.accelerator.synchronize
    torch._C._set_only_lift_cpu_tensors(True)  # else `torch.tensor(..., device=...)` asks for a real device
    torch.accelerator.synchronize = _synchronize
    try:
        with _Everything():
            yield torch.device(NAME, 0)
    finally:
        torch.accelerator.synchronize = wait
        torch._C._set_only_lift_cpu_tensors(lifted)


def _synchronize(device: torch.device) -> None:
    if device.type != NAME:
        raise RuntimeError(f"the accelerator is {NAME}, and {device} is waited for")


def run(function: Any, args: tuple, kwargs: dict) -> Any:
    """One operation, on the CPU; what comes out is where a GPU would have it."""
    packet = function.overloadpacket
    if packet is aten._fused_sdp_choice:
        return 0  # by plain products: the CPU's kernels are not this device's
    if packet in (aten.to, aten.type_as):  # these come as they are where autograd is off for good
        return _moved(function, *args, **kwargs)
    if packet is aten._has_compatible_shallow_copy_type:
        return isinstance(args[0], Elsewhere) == isinstance(args[1], Elsewhere)
    tensors = _tensors((args, kwargs))
    if packet.__name__.startswith("_foreach_") and len({tensor.device for tensor in tensors if tensor.dim()}) > 1:
        return _one_by_one(function, args, kwargs)
    told = kwargs.get("device")
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if told is None and not there:
        return function(*args, **kwargs)
    if packet in COPIES:
        there = (tensors[0].device if told is None else told).type == NAME
    elif told is not None:
        there = told.type == NAME
    if there:
        _check(function, packet, args, kwargs, tensors)
    inner = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    if told is not None:
        inner["device"] = torch.device("cpu") if told.type == NAME else told
    result = function(*_mapped(args, Elsewhere, _inner), **_mapped(inner, Elsewhere, _inner))
    if not there:
        return result
    result = _mapped(result, Tensor, _wrapped)
    return return_and_correct_aliasing(function, args, kwargs, result) if _aliases(function) else result


def _moved(function: Any, tensor: Tensor, *args, **kwargs) -> Tensor:
    given = {argument.name: value for argument, value in zip(function._schema.arguments[1:], args, strict=False)}
    given |= kwargs
    like = given.get("other", tensor)
    device = like.device if given.get("device") is None else torch.device(given["device"])
    dtype = like.dtype if given.get("dtype") is None else given["dtype"]
    same = device.type == tensor.device.type and dtype == tensor.dtype
    if same and not given.get("copy"):
        return tensor
    return run(aten._to_copy.default, (tensor,), {"device": device, "dtype": dtype})


def _one_by_one(function: Any, args: tuple, kwargs: dict) -> list | None:
    """An operation on lists, which may hold tensors of both devices: each element by itself."""

    def element(value: Any, number: int) -> Any:
        return [value[number]] if isinstance(value, list | tuple) else value

    results = [
        run(function, tuple(element(arg, n) for arg in args), {key: element(arg, n) for key, arg in kwargs.items()})
        for n in range(len(args[0]))
    ]
    return None if results[0] is None else [result[0] for result in results]


def _check(function: Any, packet: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"{function}: expected a '{NAME}' generator, got one of '{generator.device.type}'")
    if packet in COPIES:
        return
    if (position := INDEXING.get(packet)) is not None:
        tensors = _tensors(([arg for place, arg in enumerate(args) if place != position], kwargs))
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    if len(strangers) == len(tensors) and (not strangers or _makes(function)):
        return
    numbers = torch.Tag.pointwise in function.tags or packet in NUMBERS
    for stranger in strangers:
        if stranger.dim() or not numbers or len(strangers) == len(tensors):
            raise RuntimeError(
                f"{function}: expected all tensors to be on the same device, found {NAME}:0 and cpu "
                f"(a tensor of shape {tuple(stranger.shape)} and {stranger.dtype})"
            )


@cache
def _makes(function: Any) -> bool:
    """Whether it makes a tensor on the device that it is told, like another."""
    return any(argument.name == "device" for argument in function._schema.arguments)


@cache
def _aliases(function: Any) -> bool:
    """Whether what comes out shares memory with what goes in."""
    return any(result.alias_info is not None for result in function._schema.returns)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _mapped(values: Any, kind: type, change: Callable) -> Any:
    if isinstance(values, kind):
        return change(values)
    if isinstance(values, dict):
        return {key: _mapped(value, kind, change) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_mapped(value, kind, change) for value in values)
    return values


def _inner(tensor: Elsewhere) -> Tensor:
    return tensor.inner


def _wrapped(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, Elsewhere) else Elsewhere(tensor)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


def _autocast(name: str, dtype: Callable[[], torch.dtype]) -> None:
    packet, _, overload = name.partition(".")
    function = getattr(getattr(aten, packet), overload or "default")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype()) if value.is_floating_point() and value.dtype != torch.float64 else value

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return function(*_mapped(args, Tensor, cast), **_mapped(kwargs, Tensor, cast))

    _LIBRARY.impl(name, kernel, "AutocastPrivateUse1")


_setup_privateuseone_for_python_backend(NAME, _Backend())
_ANY, _LIBRARY = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_ANY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _name in AUTOCAST_DOWN:
    _autocast(_name, lambda: torch.get_autocast_dtype(NAME))
for _name in AUTOCAST_UP:
    _autocast(_name, lambda: torch.float32)
