"""What the shell says of itself: quickly, in full, and with a row for every option that there is."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from modular_concepts.cli import main as cli
from modular_concepts.unread import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "safetensors", "diffusers", "transformers", "PIL", "matplotlib", "tqdm")


def commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (action.choices for action in cli._parser()._actions if action.choices is not None)
    return choices


@pytest.mark.parametrize(
    "line", ["--help", "--version", *(f"{name} --help" for name in COMMANDS), "train --list-presets", "nothing"]
)
def test_help_loads_no_library(line):
    code = (
        "import sys\nfrom modular_concepts.cli import main as cli\n"
        f"try:\n    cli.main({line.split()!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.stderr.endswith("[]\n") and (ran.stdout or "invalid choice" in ran.stderr), ran.stderr


def test_every_command_says_what_it_is():
    for name, parser in commands().items():
        assert parser.description and parser.description[0].isupper(), name
        assert "\n" not in parser.description or name == "merge", name


def test_every_option_has_a_row_that_says_what_reads_it():
    assert set(commands()) == set(COMMANDS)
    for name, parser in commands().items():
        options = {action.dest for action in parser._actions} - {"help"}
        options |= {"list_presets"} & {text.lstrip("-").replace("-", "_") for text in parser._option_string_actions}
        options.discard(argparse.SUPPRESS)
        assert options == set(COMMANDS[name]), name


def test_the_names_in_the_help_are_the_standard_concepts():
    from modular_concepts.toy.standard import BY_NAME
    from modular_concepts.toy.vocabulary import STANDARD_NAMES

    assert tuple(BY_NAME) == STANDARD_NAMES
    assert all(name in commands()["pictures"].format_help() for name in BY_NAME)


def test_the_defaults_in_the_help_of_merge_are_those_of_a_merge():
    from modular_concepts.merging import MergeOptions

    text, usual = " ".join(commands()["merge"].format_help().split()), MergeOptions()
    for value in (usual.density, usual.rank, usual.seed, usual.ridge):
        assert f"(default {value})" in text
