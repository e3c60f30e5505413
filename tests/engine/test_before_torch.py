"""The commands' threads wait without spinning, unless the person has said how they wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOK = (
    "import os, sys, modular_concepts.before_torch; assert 'torch' not in sys.modules; "
    "print(os.environ.get('OMP_WAIT_POLICY'))"
)


def run(code, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", code], env=clean | environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, "PASSIVE"),
        ({"OMP_NUM_THREADS": "1"}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "10"}, "None"),
        ({"KMP_BLOCKTIME": "20"}, "None"),
    ],
)
def test_the_wait_policy_is_set_before_torch_and_a_persons_own_is_kept(said, wanted):
    assert run(LOOK, **said)[0] == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP says its settings where GNU's is loaded")
def test_torchs_openmp_sees_it():
    """As `python -m modular_concepts` and the installed command import it: OpenMP itself says how it waits."""
    said = run("import modular_concepts.__main__; import torch", OMP_DISPLAY_ENV="VERBOSE")[1]
    assert "GOMP_SPINCOUNT = '0'" in said
    assert "GOMP_SPINCOUNT = '0'" not in run("import torch", OMP_DISPLAY_ENV="VERBOSE")[1]
