"""Which method of which command reads which option: the table by which shell and nodes tell what changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .settings.drawing import SAMPLED
from .settings.merging import ACT_ON, BESIDE_MERGING, MERGING
from .settings.setting import Setting
from .settings.training import BESIDE_TRAINING, TRAINING


@dataclass(frozen=True)
class Read:
    """by: the methods that read an option, None for all.  needs: another option without which it means nothing."""

    by: tuple[str, ...] | None = None
    needs: str = ""


_ALWAYS = Read()
RECORDED = "a file that says how it was trained"


def _read_declarations(*groups: Mapping[str, Setting]) -> dict[str, Read]:
    """What the declarations say of who reads each setting."""
    settings = (setting for group in groups for setting in group.values())
    return {setting.name: Read(setting.read_by or None, setting.needs) for setting in settings}


TRAIN: Mapping[str, Read] = MappingProxyType(
    {
        **dict.fromkeys(("pictures", "name", "class_word", "description", "out", "overwrite", "base"), _ALWAYS),
        **dict.fromkeys(("preset", "list_presets", "size", "cache", "compact"), _ALWAYS),
        **dict.fromkeys(("checkpoints", "resume"), _ALWAYS),
        "accept_changes": Read(None, "resume"),
        **_read_declarations(TRAINING, BESIDE_TRAINING),
    }
)
MERGE: Mapping[str, Read] = MappingProxyType(
    {
        **dict.fromkeys(("concepts", "out", "overwrite", "base", "thumbnail"), _ALWAYS),
        **dict.fromkeys(("title", "author", "description", "license", "tags"), _ALWAYS),
        "moments": Read(("fusion",)),
        **_read_declarations(MERGING, BESIDE_MERGING),
    }
)
SAMPLE: Mapping[str, Read] = MappingProxyType(
    {
        **dict.fromkeys(("prompt", "concept", "region", "out", "base", "overwrite"), _ALWAYS),
        ACT_ON.name: Read(None, "concept"),
        **_read_declarations(SAMPLED),
    }
)
DEMO: Mapping[str, Read] = MappingProxyType(dict.fromkeys(("out", "overwrite"), _ALWAYS))
PICTURES: Mapping[str, Read] = MappingProxyType(dict.fromkeys(("concept", "out", "overwrite"), _ALWAYS))
INSPECT: Mapping[str, Read] = MappingProxyType({"concepts": _ALWAYS, "verbose": Read(None, RECORDED)})
EXPORT: Mapping[str, Read] = MappingProxyType(
    {
        **dict.fromkeys(("concept", "format", "out", "overwrite", "thumbnail"), _ALWAYS),
        **dict.fromkeys(("title", "author", "description", "license", "tags"), _ALWAYS),
    }
)
COMMANDS: Mapping[str, Mapping[str, Read]] = MappingProxyType(
    {
        "demo": DEMO,
        "pictures": PICTURES,
        "train": TRAIN,
        "merge": MERGE,
        "sample": SAMPLE,
        "inspect": INSPECT,
        "export": EXPORT,
    }
)


def find_unread(
    table: Mapping[str, Read],
    given: Collection[str],
    method: str = "",
    present: Collection[str] = (),
    called: Callable[[str], str] = str,
) -> list[str]:
    """A sentence for each option that was given and that nothing reads.

    given: options that a person set.  present: what options may need and what is there.  called: an option as the
    person knows it, `--token-noise` for instance.
    """
    sentences = []
    for name in given:
        read = table[name]
        if read.by is not None and method not in read.by:
            sentences.append(
                f"{called(name)} changes nothing: {method} does not read it, but {', '.join(read.by)} would"
            )
        elif read.needs and read.needs not in present:
            other = called(read.needs) if read.needs in table else read.needs
            sentences.append(f"{called(name)} changes nothing without {other}")
    return sentences
