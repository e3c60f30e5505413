"""Which method of which command reads which option: the table by which shell and nodes tell what changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

_LAYERED = ("lora", "orthogonal", "block", "block_orthogonal", "custom_diffusion")
_FACTORED = _LAYERED[:-1]
_BLOCKS = ("block", "block_orthogonal")


@dataclass(frozen=True)
class Read:
    """by: the methods that read an option, None for all.  needs: another option without which it means nothing."""

    by: tuple[str, ...] | None = None
    needs: str = ""


_ALWAYS = Read()
NOISE = "a noise schedule, which flow models lack"
ONE_ROW = "a word that starts from one row"
RECORDED = "a file that says how it was trained"
GUIDANCE = "guidance (cfg above 1)"

TRAIN: Mapping[str, Read] = MappingProxyType(
    {
        **dict.fromkeys(("pictures", "name", "class_word", "description", "out", "overwrite", "base"), _ALWAYS),
        **dict.fromkeys(("preset", "list_presets", "method", "prior", "size", "buckets", "cache", "compact"), _ALWAYS),
        **dict.fromkeys(("checkpoints", "resume", "steps", "batch", "seed", "token_lr", "token_vectors"), _ALWAYS),
        **dict.fromkeys(("token_start", "token_norm", "warmup", "schedule", "clip_norm", "noise_offset"), _ALWAYS),
        **dict.fromkeys(("attention_regularisation", "caption_dropout", "optimizer", "precision"), _ALWAYS),
        **dict.fromkeys(("layerwise", "shuffle_tags", "flip", "gradient_checkpointing"), _ALWAYS),
        "slot": Read(("orthogonal", *_BLOCKS)),
        "blocks": Read(_BLOCKS),
        "layout": Read(_BLOCKS),
        "erasure": Read(_LAYERED),
        "rank": Read(_FACTORED),
        "alpha": Read(_FACTORED),
        "targets": Read(_LAYERED),
        "text_encoder": Read(_LAYERED),
        "adapter_lr": Read(_LAYERED),
        "text_encoder_lr": Read(_LAYERED, "text_encoder"),
        "weight_decay": Read(_LAYERED),
        "token_noise": Read(None, ONE_ROW),
        "prior_weight": Read(None, "prior"),
        "min_snr": Read(None, NOISE),
        "checkpoint_every": Read(None, "checkpoints"),
        "keep_checkpoints": Read(None, "checkpoints"),
        "accept_changes": Read(None, "resume"),
    }
)
MERGE: Mapping[str, Read] = MappingProxyType(
    {
        **dict.fromkeys(("concepts", "out", "overwrite", "how", "base", "thumbnail"), _ALWAYS),
        **dict.fromkeys(("title", "author", "description", "license", "tags"), _ALWAYS),
        "literal": Read(("block",)),
        "density": Read(("magnitude", "dare", "ties")),
        "rank": Read(("svd",)),
        "seed": Read(("dare",)),
        "ridge": Read(("fusion",)),
        "exact": Read(("fusion",)),
        "moments": Read(("fusion",)),
    }
)
SAMPLE: Mapping[str, Read] = MappingProxyType(
    {
        **dict.fromkeys(("prompt", "concept", "region", "out", "base", "width", "height", "steps"), _ALWAYS),
        **dict.fromkeys(("cfg", "seed", "count", "zoom", "overwrite"), _ALWAYS),
        "units": Read(None, "region"),
        "mode": Read(None, "region"),
        "negative": Read(None, GUIDANCE),
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


def unread(
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
