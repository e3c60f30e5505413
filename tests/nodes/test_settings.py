"""Every setting is declared once; the engine's check, the shell's options, nodes' inputs and docs are made of it."""

from __future__ import annotations

import argparse
import ast
import math
from dataclasses import fields
from pathlib import Path

import pytest

from modular_concepts.cli import main as cli
from modular_concepts.errors import AdapterError
from modular_concepts.merging import METHOD_HELP, MergeOptions
from modular_concepts.merging.methods import METHODS
from modular_concepts.sampling import SampleSettings
from modular_concepts.settings import basis, drawing, merging, training
from modular_concepts.settings.page import write_page
from modular_concepts.settings.setting import Setting
from modular_concepts.training.settings import TrainSettings
from modular_concepts.unread import COMMANDS

ROOT = Path(__file__).parents[2]
DECLARED = {
    f"{module.__name__.rpartition('.')[2]}.{name}": value
    for module in (training, basis, merging, drawing)
    for name, value in vars(module).items()
    if isinstance(value, Setting)
}
# Options of the shell that stand for no declared setting, and why.
BY_HAND = {
    "--version": "no setting",
    **dict.fromkeys(("--out", "--overwrite", "--cache", "--checkpoints", "--resume", "--moments"), "a place for files"),
    **dict.fromkeys(("--base", "--concept", "--thumbnail"), "what is loaded"),
    **dict.fromkeys(("--name", "--class-word", "--description"), "texts about what is taught"),
    **dict.fromkeys(("--preset", "--list-presets"), "many settings under one name"),
    **dict.fromkeys(("--size", "--region"), "several numbers in one text"),
    "--compact": "how a file is written; Save Concept has it among its formats",
    "--format": "how a file is written; Save Concept calls the formats what they are for",
    "--accept-changes": "what to do with a checkpoint; the trainers' on_change",
    "--verbose": "how much is shown",
}
# Inputs of nodes that stand for no declared setting, and why.
WITHOUT_DECLARATION = {
    **dict.fromkeys(("bases.basis", "concepts.concept", "toy.concept"), "what there is to load"),
    **dict.fromkeys(("toy.count", "toy.seed"), "of pictures that are made, not of a training"),
    **dict.fromkeys(("datasets.width", "datasets.height"), "0 is the first picture's; the shell has --size"),
    **dict.fromkeys(("concepts.format", "concepts.replace"), "how a file is written"),
    "merging.strengths": "words for what the shell calls --literal",
    "merging.anew": "recording, which the shell does where it must",
    "types.apply": "the host's two ways to hold a merge",
    "reports.signs": "how much is looked at",
    **dict.fromkeys(("training_form.resume", "training_form.on_change"), "what to do with a checkpoint"),
    "training_form.preview_every": "the host shows previews, the shell none",
    "training_options.keep_latents": "the shell has a folder for it, --cache",
    "baselines.word": "two methods of one node",
    **dict.fromkeys(("regions.sampler_name", "regions.scheduler"), "the host's own lists"),
}


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (action.choices for action in cli._parser()._actions if action.choices is not None)
    return choices


def calls(folder: str, apart: str):
    """(file without its ending, call) of all calls in a folder's files but for one."""
    for path in sorted((ROOT / folder).glob("*.py")):
        if path.name != apart:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path.stem, node


def test_the_page_is_what_the_declarations_say():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == write_page(), "python -m modular_concepts.settings > docs/settings.md"


def test_every_declaration_stands_on_the_page():
    left_out = {"drawing.EDGE", "drawing.CANVAS"}  # widgets of a box and of an empty picture
    page = write_page()
    assert not [name for name, each in DECLARED.items() if name not in left_out and f"| `{each.name}` |" not in page]


@pytest.mark.parametrize(
    ("kind", "declared", "more"),
    [
        (TrainSettings, training.TRAINING, {"name"}),
        (MergeOptions, merging.MERGING, set()),
        (SampleSettings, drawing.DRAWING, set()),
    ],
)
def test_what_the_engine_takes_is_what_is_declared(kind, declared, more):
    assert {field.name for field in fields(kind)} - more == set(declared)
    assert all(getattr(kind(), name) == setting.default for name, setting in declared.items())


def test_every_option_of_the_shell_is_declared_or_has_a_reason():
    written = {
        argument.value
        for _, call in calls("modular_concepts/cli", "declared.py")
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant) and argument.value.startswith("--")
    }
    assert written == set(BY_HAND)
    said = {f"--{name}" for name in ("title", "author", "description", "license", "tags")}  # of a file, in a loop
    names = {f"--{each.name.replace('_', '-')}" for each in DECLARED.values()}
    for command, parser in commands().items():
        options = {text for text in parser._option_string_actions if text.startswith("--") and text != "--help"}
        plain = {text for text in options if not text.startswith("--no-")}
        assert plain <= names | set(BY_HAND) | said, command


def test_every_input_of_a_node_is_declared_or_has_a_reason():
    written = {
        f"{file}.{call.args[0].value}"
        for file, call in calls("nodes", "widgets.py")
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "Input"
        and isinstance(call.func.value, ast.Attribute)
        and call.func.value.attr in ("Int", "Float", "Combo", "Boolean")
        and isinstance(call.args[0], ast.Constant)
    }
    assert written == set(WITHOUT_DECLARATION)


def test_what_reads_a_setting_is_a_method_or_an_option_that_there_is():
    for group, methods, options in (
        (training, training.METHODS, COMMANDS["train"]),
        (merging, METHODS, COMMANDS["merge"]),
        (drawing, (), COMMANDS["sample"]),
    ):
        for setting in (value for value in vars(group).values() if isinstance(value, Setting)):
            assert set(setting.read_by) <= set(methods), setting.name
            assert not setting.needs or setting.needs in options or " " in setting.needs, setting.name


def test_merge_methods_have_a_sentence_each():
    assert merging.HOW.choices == tuple(METHOD_HELP) and set(METHODS) == set(METHOD_HELP)


@pytest.mark.parametrize("name", DECLARED)
def test_a_default_works_and_a_widget_offers_nothing_that_does_not(name):
    setting = DECLARED[name]
    for value in setting.default if isinstance(setting.default, tuple) else (setting.default,):
        setting.check(value)
    assert setting.help and not setting.help.endswith(".") and setting.tooltip.endswith(setting.more)
    beyond = setting is drawing.SEED or setting.default is None  # whose widget offers the host's numbers, or 0 for off
    for end in () if beyond else setting.ends:
        if end is not None and setting.is_number and setting.widget is not None:
            setting.check(setting.kind(end))


@pytest.mark.parametrize("name", DECLARED)
def test_what_lies_beyond_is_refused_in_a_sentence(name):
    setting = DECLARED[name]
    wrong: list[object] = [object(), [1]] if setting.kind is not str or setting.choices else [1]
    if setting.choices:
        wrong += ["no such choice", ""]
    if setting.kind in (int, float):
        wrong += [math.nan, math.inf, -math.inf, True, "1"]
        smallest = 1 if setting.kind is int else 1e-9
        wrong += [setting.kind(setting.least) - smallest] if setting.least is not None else []
        wrong += [setting.kind(setting.most) * (1 + 1e-9) + smallest] if setting.most is not None else []
        wrong += [each for each in (setting.above, setting.below, setting.never) if each is not None]
    wrong += [2.5] if setting.kind is int else [1, "on"] if setting.kind is bool else []
    for value in wrong:
        with pytest.raises(AdapterError) as caught:
            setting.check(value, "--what-was-typed")
        assert str(caught.value).startswith("--what-was-typed is ") and "; " in str(caught.value), value
    if setting.default is not None:
        with pytest.raises(AdapterError):
            setting.check(None)


def test_a_seed_is_told_apart_to_its_last_digit():
    training.SEED.check(2**63 - 1)
    with pytest.raises(AdapterError, match="at most 9223372036854775807"):
        training.SEED.check(2**63)
    with pytest.raises(AdapterError, match="at most"):
        training.SEED.check(10**400)


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (TrainSettings, {"rank": "8"}, "rank is '8'; it must be a whole number"),
        (TrainSettings, {"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        (TrainSettings, {"batch": True}, "batch is True; it must be a whole number"),
        (TrainSettings, {"adapter_lr": "fast"}, "adapter_lr is 'fast'; it must be a number"),
        (TrainSettings, {"steps": math.nan}, "steps is nan; it must be a whole number"),
        (MergeOptions, {"rank": 2.5}, "rank is 2.5; it must be a whole number"),
        (MergeOptions, {"density": None}, "density is None; it must be a number"),
        (SampleSettings, {"steps": "20"}, "steps is '20'; it must be a whole number"),
        (SampleSettings, {"negative": None}, "negative is None; it must be text"),
    ],
)
def test_the_engine_refuses_what_is_no_number_at_all(kind, wrong, words):
    with pytest.raises(AdapterError, match=words):
        kind(**wrong)


def test_declarations_load_no_library():
    import subprocess
    import sys

    code = (
        "import sys, modular_concepts.settings.page; "
        "print([name for name in ('torch', 'numpy', 'safetensors') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)  # noqa: S603 - our own command
    assert ran.stdout == "[]\n", ran.stderr
