# ruff: noqa: F811 (fixtures of another file)
"""What is given is used, or the shell says so before it begins; numbers are taken as far as they make sense."""

import pytest
from laws import relative_error
from test_cli import DRAW, concept, files, here, made, run, weights  # noqa: F401

from modular_concepts.files import load_concept

pytest.importorskip("PIL.Image")


# --- strengths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", ["5", "-4", "0.33", "-100", "100"])
def test_strengths_are_taken_as_far_as_the_host_takes_them(made, here, capsys, strength):
    code, _, err = run(capsys, "merge", f"{concept(made)}:{strength}", "--out", "sum.safetensors")
    assert code == 0, err
    whole, merged = load_concept(concept(made)).layers, load_concept(here / "sum.safetensors").layers
    for layer, adapter in merged.items():
        assert relative_error(adapter.delta(), float(strength) * whole[layer].delta()) < 1e-6
    draw = ["sample", "a <tom>", *DRAW, "--concept", f"{concept(made)}:{strength}"]
    assert run(capsys, *draw)[0] == 0


@pytest.mark.parametrize("strength", ["100.1", "-101", "nan", "inf", "-inf", "1e9"])
def test_no_number_and_far_too_much_stay_refused(made, here, capsys, strength):
    for command in (["merge", "--out", "sum.safetensors"], ["sample", "a <tom>", *DRAW, "--concept"]):
        code, _, err = run(capsys, *command, f"{concept(made)}:{strength}")
        assert code == 2 and "from -100 to 100" in err and err.count("\n") == 1
    assert files(here) == {}
