"""The training's choices on the command line: presets, and every setting as an option of its own."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import AdapterError
from ..settings.training import CHECKPOINTED, COMPANY_PICTURES, PRIOR, TARGET, TEXT_ENCODER, TRAINING
from ..training.presets import PRESETS, Preset, preset_named
from ..training.settings import TrainSettings
from .declared import add_option, read_typed, say_usual, say_value

# Which layers learn is asked before, how often there is a checkpoint beside the folder that they go to.
_SETTINGS = {name: setting for name, setting in TRAINING.items() if name not in ("method", "checkpoint_every")}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """--preset, --list-presets, --method, the layers, and an option for each setting; what is not given is None."""
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        metavar="NAME",
        help="a method as its paper publishes it, or as it is quick (--list-presets), on the toy base at rates that "
        "suit it; other options win over it",
    )
    parser.add_argument("--list-presets", action=_ListPresets, help="say what presets there are, and which to take")
    add_option(parser, TRAINING["method"])
    add_option(parser, TARGET, nargs="+")
    add_option(parser, TEXT_ENCODER)
    add_option(parser, PRIOR, metavar="N")
    for name, setting in _SETTINGS.items():
        more: dict[str, Any] = {"metavar": "N" if setting.kind is int else "X"} if setting.is_number else {}
        add_option(parser, setting, usual=_say_usual(name), **more)
    add_option(parser, COMPANY_PICTURES, metavar="N")
    parser.epilog = "Defaults hold without --preset; what a preset has instead is said by --list-presets."


def add_checkpoint_every(parser: argparse.ArgumentParser) -> None:
    """Beside a folder for checkpoints there is one every so often; without a folder there is none."""
    add_option(parser, TRAINING["checkpoint_every"], usual=f"(default {CHECKPOINTED})", metavar="STEPS")


def _say_usual(name: str) -> str:
    """What a setting is where no preset names it, on the toy base too, as the help ends with it."""
    from ..toy.presets import SETTINGS, UNDESCRIBED

    usual, toy, described = (say_value(getattr(each, name)) for each in (TrainSettings(), UNDESCRIBED, SETTINGS))
    if usual == toy == described:
        return say_usual(TRAINING[name])
    on_toy = toy if toy == described else f"{toy}, or {described} with --description"
    return f"(default {usual}; toy base {on_toy})"


def choose_preset(args: argparse.Namespace, usual: TrainSettings, suit: Callable[[Preset], Preset]) -> Preset:
    """What the options ask for, with `usual` settings where no preset is named.

    suit: what makes a preset's rates those of the base at hand.
    """
    if args.preset is not None:
        preset = suit(preset_named(args.preset))
    else:
        preset = Preset(usual, ("attention", "feed_forward"), "")
    names = ("method", *_SETTINGS)
    chosen = {name: read_typed(getattr(args, name)) for name in names if getattr(args, name) is not None}
    preset = replace(preset, settings=replace(preset.settings, **chosen))
    if preset.settings.method == "own_words" and args.preset is None:
        preset = replace(preset, targets=PRESETS["own words"].targets)
    if args.targets is not None:
        preset = replace(preset, targets=tuple(args.targets))
    if args.text_encoder is not None:
        preset = replace(preset, text_encoder_targets=("attention",) if args.text_encoder else None)
    if args.prior is not None:
        PRIOR.check(args.prior, "--prior")
        preset = replace(preset, prior=args.prior)
    if args.company_pictures is not None:
        COMPANY_PICTURES.check(args.company_pictures, "--company-pictures")
        preset = replace(preset, company_pictures=args.company_pictures)
    without = preset.settings.method in ("lora", "words") or (
        preset.settings.method == "own_words" and preset.settings.slot is None
    )
    if args.compact and without:
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
            sys.stdout.write(f"{name}\n{text}\n    {_shorten(preset)}\n\n")
        parser.exit()


def _shorten(preset: Preset) -> str:
    settings = preset.settings
    layers = {"words": "", "custom_diffusion": f"; layers {settings.adapter_lr:g}"}
    rates = layers.get(settings.method, f"; rank {settings.rank}; layers {settings.adapter_lr:g}")
    prior = f"; {preset.prior} class pictures" if preset.prior else ""
    return f"{settings.steps} steps of batch {settings.batch}{rates}; word {settings.token_lr:g}{prior}"
