"""Checks the shapes that the engine's annotations name, while tests run: `Float[Tensor, "out rank"]` by jaxtyping.

The engine imports jaxtyping for type checkers alone, so that nothing is added to what it needs; its annotations stay
text.  Here each module of these rooms is handed the names before it runs, and afterwards every function and method of
its own whose annotations name a shape is checked, call by call: what is called alike is equal within one call, in all
elements of a sequence too.  `jaxtyping.install_import_hook` would check the functions within functions and the hooks
as well, each time that one is made, and would not find names that are imported for type checkers alone.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType, UnionType
from typing import Any, Union, get_args, get_origin

import jaxtyping

ROOMS = ("adapters", "merging", "regions", "training.losses")
NAMES = ("Bool", "Float", "Float32", "Int64")
_names = {name: getattr(jaxtyping, name) for name in NAMES}


def install(package: str) -> None:
    """Check `package`'s rooms from now on; before any of their modules is imported."""
    loaded = [name for name in sys.modules if _watched(name, package)]
    assert not loaded, f"imported before their shapes could be checked: {loaded}"
    sys.meta_path.insert(0, _Finder(package))


class _Finder(MetaPathFinder):
    def __init__(self, package: str):
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if _watched(name, self._package) else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Checking(spec.loader)
        return spec


class _Checking(Loader):
    """Another loader, and then the checks."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_names)
        self._loader.exec_module(module)
        for holder in (module, *(one for one in vars(module).values() if _defined_in(one, module, type))):
            for name, value in list(vars(holder).items()):
                if (checked := _checked(value, module)) is not None:
                    setattr(holder, name, checked)


def _watched(name: str, package: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.{room}.") for room in ROOMS)


def _defined_in(value: object, module: ModuleType, kind: type) -> bool:
    return isinstance(value, kind) and value.__module__ == module.__name__


def _checked(value: object, module: ModuleType) -> object | None:
    """The function, method or property with its shapes checked, None if it names none."""
    if isinstance(value, property):
        getter = _checked(value.fget, module)
        return None if getter is None else property(getter, doc=value.__doc__)
    if isinstance(value, classmethod | staticmethod):
        inner = _checked(value.__func__, module)
        return None if inner is None else type(value)(inner)
    if not isinstance(value, FunctionType) or value.__module__ != module.__name__:
        return None
    hints = {
        name: eval(hint, vars(module))  # noqa: S307  (the module's own annotations)
        for name, hint in value.__annotations__.items()
        if any(f"{kind}[" in str(hint) for kind in NAMES)
    }
    if not hints:
        return None
    within = inspect.unwrap(value)
    for cell in value.__closure__ or ():  # a decorator, such as torch.no_grad(), goes around the checks
        if within is not value and cell.cell_contents is within:
            cell.cell_contents = _with_shapes(within, hints)
            return value
    return _with_shapes(value, hints)


def _with_shapes(function: FunctionType, hints: dict[str, Any]) -> Callable:
    """The function, which raises WrongShape where an argument or the result does not fit its hint."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(function, name, value, hints)
        result = function(*args, **kwargs)
        _check(function, "return", result, hints)
        return result

    return jaxtyping.jaxtyped(typechecker=None)(checked)


class WrongShape(AssertionError):
    """A tensor does not have the shape that an annotation names."""


def _check(function: FunctionType, name: str, value: Any, hints: dict[str, Any]) -> None:
    if name in hints and not _fits(value, hints[name]):
        shape = getattr(value, "shape", value)
        raise WrongShape(f"{function.__qualname__}, {name}: {shape} is not {function.__annotations__[name]}")


def _fits(value: Any, hint: Any) -> bool:
    parts = get_args(hint)
    match get_origin(hint):
        case None:
            return isinstance(value, hint)
        case origin if origin in (Union, UnionType):
            return any(_fits(value, part) for part in parts)
        case collections.abc.Sequence:
            return isinstance(value, Sequence) and all(_fits(each, parts[0]) for each in value)
        case origin if origin is tuple:
            return len(value) == len(parts) and all(map(_fits, value, parts))
    raise TypeError(f"{hint} is no hint that can be checked here")
