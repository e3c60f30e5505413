"""An option of the shell, made from the declaration of a setting."""

from __future__ import annotations

import argparse
from typing import Any

from ..settings.setting import Setting
from ..typed import read_number

NONE = object()  # what "none" is read as: a value too, which takes back what a preset says


def add_option(
    parser: argparse.ArgumentParser,
    setting: Setting,
    default: object = None,
    usual: str | None = None,
    *,
    only: bool = False,
    **more: Any,
) -> None:
    """Add --NAME, in words the setting's own help and default.

    default: what the parser gives where the option is not typed.  usual: what the help says of it, if not the
    declaration's own.  only: begin with the methods that read it.  more: as argparse has it.
    """
    usual = say_usual(setting) if usual is None else usual
    for_whom = f"{', '.join(setting.read_by)}: " if only else ""
    text = f"{for_whom}{setting.help}{setting.in_shell} {usual}".strip()
    if setting.kind is bool:
        more.setdefault("action", argparse.BooleanOptionalAction)
    elif setting.choices:
        more["choices"] = setting.choices
    else:
        optional = setting.default is None and setting.kind is float
        more.setdefault("type", _read_number_or_none if optional else setting.kind)
    parser.add_argument(spell_flag(setting.name), default=default, help=text, **more)


def say_usual(setting: Setting) -> str:
    """What holds where the option is not given, as the help ends with it."""
    if setting.default is None:
        return f"(default: {setting.without})" if setting.without != "none" else "(default none)"
    return f"(default {say_value(setting.default)})"


def say_value(value: object) -> str:
    """A setting's value as the help says it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " and ".join(map(say_value, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def spell_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_typed(value: object) -> object:
    """A value as the engine takes it."""
    return None if value is NONE else value


def _read_number_or_none(text: str) -> object:
    return NONE if text.lower() == "none" else read_number(text)


_read_number_or_none.__name__ = "number"
