"""A node's input, made from the declaration of a setting."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..modular_concepts.settings.setting import Setting, Widget


def widget(setting: Setting, more: str | None = None, **differs: Any) -> io.Input:
    """The input that a setting has: its name, bounds, default and tooltip.

    more: what the tooltip goes on with here, in place of the setting's own.  differs: what this node has otherwise,
    `id` its name.
    """
    shown = setting.widget or Widget()
    looks: dict[str, Any] = {"default": setting.default, "tooltip": setting.tooltip}
    if more is not None:
        looks["tooltip"] = f"{setting.opening}{more}"
    if shown.advanced:
        looks["advanced"] = True
    if setting.choices:
        looks["options"] = list(setting.choices)
    if setting.is_number:
        least, most = (None if end is None else setting.kind(end) for end in setting.ends)
        looks |= {"min": least, "max": most, "step": shown.step}
    if setting.kind is float:
        looks["round"] = shown.round
    chosen = {"id": setting.widget_name, **looks, **differs}
    return _kind(setting).Input(chosen.pop("id"), **chosen)


def _kind(setting: Setting) -> Any:
    if setting.kind is bool:
        return io.Boolean
    if setting.choices:
        return io.Combo
    return io.Int if setting.kind is int else io.Float
