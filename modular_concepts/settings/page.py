"""The page docs/settings.md: every setting, as it is declared.

python -m modular_concepts.settings > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterable

from . import basis, drawing, merging, training
from .setting import Setting

_TOP = """# All settings

Made of the declarations in `modular_concepts/settings/` by `python -m modular_concepts.settings`. The engine checks by
them, the shell's options (`batch` is `--batch`, `token_lr` is `--token-lr`) and the nodes' inputs are made of them.
*Values* are what works; a node's widget often ends nearer, which its column says, with its name where that is another
(- : no node asks for it). *Read by* names the methods that read a setting where others do not. Trainers start with
numbers of their own where their method's paper has such.
"""
_SECTIONS: tuple[tuple[str, str, Iterable[Setting]], ...] = (
    (
        "Training",
        "`train`, the trainers and *Training Options*; in Python `TrainSettings`, but for the last four.",
        [*training.TRAINING.values(), *training.BESIDE_TRAINING.values()],
    ),
    ("The shared basis", "*Load Orthogonal Basis*; in Python `OrthogonalBasis`.", basis.BASIS.values()),
    (
        "Merging",
        "`merge`, *Merge Concepts*, *Merge Block Concepts*, *Fuse Concepts* and *Make Concepts Orthogonal*; in Python "
        "the first four are `MergeOptions`. A concept's strength stands behind its file's name in the shell.",
        [*merging.MERGING.values(), *merging.BESIDE_MERGING.values(), *merging.RECORDING.values(), merging.WAY]
        + [merging.STRENGTH],
    ),
    (
        "Drawing",
        "`sample` and the regional samplers; in Python `SampleSettings` and `sample`.",
        [*drawing.SAMPLED.values(), drawing.BATCH, drawing.OVERLAP, drawing.DENOISE],
    ),
    ("A region", "*Concept Region* and *Regions From JSON*; in Python `Region`.", drawing.REGION.values()),
)


def write_page() -> str:
    """All of docs/settings.md."""
    return "\n".join([_TOP, *(_write_section(*section) for section in _SECTIONS)])


def _write_section(title: str, where: str, settings: Iterable[Setting]) -> str:
    head = "| setting | default | values | in nodes | read by | what it is |\n|---|---|---|---|---|---|"
    return "\n".join([f"## {title}\n\n{where}\n\n{head}", *map(_write_row, settings), ""])


def _write_row(setting: Setting) -> str:
    cells = (
        f"`{setting.name}`",
        _say_default(setting),
        _say_values(setting),
        _say_widget(setting),
        ", ".join(setting.read_by) + (f" with {setting.needs}" if setting.needs else ""),
        setting.tooltip,
    )
    return f"| {' | '.join(cell.strip() for cell in cells)} |"


def _say_default(setting: Setting) -> str:
    if setting.default is None:
        return "none" if setting.without == "none" else f"none: {setting.without}"
    if isinstance(setting.default, bool):
        return "on" if setting.default else "off"
    if isinstance(setting.default, tuple):
        return ", ".join(setting.default)
    return f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default) or "nothing"


def _say_values(setting: Setting) -> str:
    """What works, in words: the choices, or from where to where."""
    if setting.choices or setting.kind in (bool, str):
        return ", ".join(setting.choices) or ("on, off" if setting.kind is bool else "text")
    low = "" if setting.least is None else f"{setting.least:g}"
    low = low if setting.above is None else f"above {setting.above:g}"
    high = "" if setting.most is None else f" to {_spell_number(setting.most)}"
    high = high if setting.below is None else f" to below {setting.below:g}"
    but = "" if setting.never is None else f", not {setting.never:g}"
    return f"{low or 'any'}{high or (' or more' if setting.least is not None else '')}{but}"


def _spell_number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _say_widget(setting: Setting) -> str:
    if setting.widget is None:
        return "-"
    name = f"`{setting.widget.name}`" if setting.widget.name else ""
    ends = [
        f"{word} {_spell_number(end)}"
        for word, end in (("from", setting.widget.least), ("to", setting.widget.most))
        if end is not None
    ]
    return " ".join([name, *ends])
