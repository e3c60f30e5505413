"""The training's choices on the command line: presets, and every setting as an option of its own."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace

from ..choices import LAYOUTS, TARGETS
from ..errors import AdapterError
from ..training.presets import PRESETS, Preset, preset_named
from ..training.settings import METHODS, OPTIMIZERS, PRECISIONS, SCHEDULES, TOKEN_STARTS, TrainSettings
from ..typed import number_typed

# Option -> how it is read (a type, or the words to choose from) and what it says of itself.
_OPTIONS: dict[str, tuple[Callable | tuple[str, ...] | str, str]] = {
    "slot": (int, "the concept's own columns and rows (default none: columns follow from the name)"),
    "blocks": (int, "number of row blocks (block methods)"),
    "layout": (LAYOUTS, "whether a block's rows lie together or are spread (block methods)"),
    "erasure": (float, "probability to erase an output row (BlockLoRA)"),
    "rank": (int, "size of each layer's adapter"),
    "alpha": (float, "what an adapter adds is multiplied by alpha / rank (default: by 1)"),
    "steps": (int, "how many training steps"),
    "batch": (int, "pictures a step"),
    "seed": (int, "everything random follows from it"),
    "adapter_lr": (float, "step size of the layers"),
    "text_encoder_lr": ("number or none", "step size of the text encoder's layers (default: as the others)"),
    "token_lr": (float, "step size of the learned word"),
    "token_vectors": (int, "how many words' worth of meaning the trigger holds"),
    "token_start": (TOKEN_STARTS, "where the word starts: the class word or description, or first a random vector"),
    "token_noise": (float, "noise on a word that starts from one row, relative to its size"),
    "token_norm": ("number or none", "longest length of a vector (ED-LoRA: 0.55; default none)"),
    "warmup": (int, "steps in which the rates rise"),
    "schedule": (SCHEDULES, "how the rates fall after that"),
    "weight_decay": (float, "AdamW's, of the layers"),
    "clip_norm": (float, "longest gradient; 0 for no bound"),
    "noise_offset": (float, "noise shared by all pixels of a channel, for darker and brighter pictures"),
    "min_snr": ("number or none", "gamma of the min-SNR weight, usually 5 (default none)"),
    "attention_regularisation": (float, "weight of keeping the word's attention inside the masks, usually 0.01"),
    "prior_weight": (float, "weight of the pictures that the base drew"),
    "caption_dropout": (float, "probability of an empty caption"),
    "optimizer": (OPTIMIZERS, "adamw8bit needs bitsandbytes"),
    "precision": (PRECISIONS, "what the base computes in"),
    "keep_checkpoints": (int, "how many checkpoints to keep"),
}
MOST_PRIOR = 10_000
_SWITCHES = {
    "layerwise": "give the word rows of its own for each cross-attention layer (P+)",
    "shuffle_tags": "shuffle the parts of a caption between commas, but for the first",
    "flip": "mirror half of the pictures",
    "gradient_checkpointing": "less memory for about a third more time a step; the result is the same",
}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """--preset, --list-presets, --method, the layers, and a flag for each setting; what is not given is None."""
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        metavar="NAME",
        help="a method as its paper publishes it, or as it is quick (--list-presets), on the toy base at rates that "
        "suit it; other options win over it",
    )
    parser.add_argument("--list-presets", action=_ListPresets, help="say what presets there are, and which to take")
    parser.add_argument("--method", choices=METHODS, help="how the layers learn (default orthogonal)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="layers that learn (default attention and ff)")
    parser.add_argument(
        "--text-encoder",
        action=argparse.BooleanOptionalAction,
        help="adapt the text encoder's attention too (default off)",
    )
    parser.add_argument(
        "--prior",
        type=int,
        metavar="N",
        help="learn beside N pictures that the base draws itself, so that it keeps what it knows (default none)",
    )
    for name, (kind, text) in _OPTIONS.items():
        text = f"{text} {_default(name)}".strip()
        if isinstance(kind, tuple):
            parser.add_argument(_flag(name), choices=kind, help=text)
        else:
            read = _number_or_none if kind == "number or none" else kind
            parser.add_argument(_flag(name), type=read, metavar="N" if kind is int else "X", help=text)
    for name, text in _SWITCHES.items():
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=f"{text} (default off)")
    parser.epilog = "Defaults hold without --preset; what a preset has instead is said by --list-presets."


def _default(name: str) -> str:
    """What a setting is where no preset names it, as the help says it; nothing where the text says it already."""
    from ..toy.presets import SETTINGS, UNDESCRIBED

    usual, toy, described = (_value(getattr(own, name)) for own in (TrainSettings(), UNDESCRIBED, SETTINGS))
    if usual == toy == described:
        return "" if usual == "none" else f"(default {usual})"
    own = toy if toy == described else f"{toy}, or {described} with --description"
    return f"(default {usual}; toy base {own})"


def _value(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def chosen_preset(args: argparse.Namespace, usual: TrainSettings, suit: Callable[[Preset], Preset]) -> Preset:
    """What the options ask for, with `usual` settings where no preset is named.

    suit: what makes a preset's rates those of the base at hand.
    """
    if args.preset is not None:
        preset = suit(preset_named(args.preset))
    else:
        preset = Preset(usual, ("attention", "feed_forward"), "")
    given = {name: getattr(args, name) for name in (*_OPTIONS, *_SWITCHES) if getattr(args, name) is not None}
    # "none" is a value too: it takes back what the preset or the usual settings say.
    given = {name: None if value is _NONE else value for name, value in given.items()}
    if args.method is not None:
        given["method"] = args.method
    preset = replace(preset, settings=replace(preset.settings, **given))
    if args.targets is not None:
        preset = replace(preset, targets=tuple(args.targets))
    if args.text_encoder is not None:
        preset = replace(preset, text_encoder_targets=("attention",) if args.text_encoder else None)
    if args.prior is not None and not 0 <= args.prior <= MOST_PRIOR:
        raise AdapterError(f"--prior is {args.prior}; it must be from 0 to {MOST_PRIOR} pictures")
    if args.prior is not None:
        preset = replace(preset, prior=args.prior)
    if args.compact and preset.settings.method in ("lora", "words"):
        raise AdapterError(
            f"--compact leaves out what the recipe gives back, and method {preset.settings.method} has nothing of the "
            "kind; leave --compact away"
        )
    return preset


class _ListPresets(argparse.Action):
    """Like --help: says its piece and leaves."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        for name, preset in PRESETS.items():
            text = textwrap.indent(textwrap.fill(preset.help, 100), "    ")
            sys.stdout.write(f"{name}\n{text}\n    {_in_short(preset)}\n\n")
        parser.exit()


def _in_short(preset: Preset) -> str:
    own = preset.settings
    layers = {"words": "", "custom_diffusion": f"; layers {own.adapter_lr:g}"}
    rates = layers.get(own.method, f"; rank {own.rank}; layers {own.adapter_lr:g}")
    prior = f"; {preset.prior} class pictures" if preset.prior else ""
    return f"{own.steps} steps of batch {own.batch}{rates}; word {own.token_lr:g}{prior}"


_NONE = object()


def _number_or_none(text: str) -> object:
    return _NONE if text.lower() == "none" else number_typed(text)


_number_or_none.__name__ = "number"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
