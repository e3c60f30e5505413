"""Stand-ins for packages that the host imports and this machine lacks, where nothing is ever asked of them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType


class _Anything(type):
    """A class whose every attribute is such a class, and who makes nothing but itself."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *_args, **_settings):
        return cls


class _Empty(ModuleType):
    """Any name in it is a class of no use."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, _path=None, _target=None):
        if name.partition(".")[0] == self.package:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, _module) -> None:
        pass


def stand_in_for(package: str) -> None:
    """Let `import package` and its submodules succeed where it is not installed."""
    if importlib.util.find_spec(package) is None:
        sys.meta_path.append(_Finder(package))
