"""What a shell hands over is used with care: streams that are closed, full or broken off, a folder that is gone."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")


def shell(folder: Path, line: str, **more: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one line, in which `mc` is the program."""
    line = line.replace("mc ", f"{shlex.quote(sys.executable)} -m modular_concepts ")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    ran = subprocess.run(  # noqa: S603 - our own command
        ["/bin/sh", "-c", line], cwd=folder, env=env, capture_output=True, timeout=120
    )
    return ran.returncode, ran.stdout.decode(), ran.stderr.decode()


def test_who_stops_reading_does_not_stop_the_work(tmp_path):
    code, out, err = shell(tmp_path, "{ mc pictures tom; echo rc $? >&2; } | true")
    assert code == 0 and err == "rc 0\n" and len(list(tmp_path.rglob("*.png"))) == 16
    code, out, err = shell(tmp_path, "{ mc train --list-presets; echo rc $? >&2; } | head -n 1")
    assert out == "orthogonal adaptation\n" and err == "rc 0\n"


def test_a_closed_stream_lends_its_number_to_no_file(tmp_path):
    code, _, err = shell(tmp_path, "mc pictures tom <&- >&-")
    assert code == 0 and err == ""
    assert [path.read_bytes()[:4] for path in tmp_path.rglob("*.png")] == [b"\x89PNG"] * 16
    assert shell(tmp_path, "mc inspect nothing 2>&-")[0] == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without /dev/full")
def test_a_full_disk_behind_a_stream_is_said(tmp_path):
    code, _, err = shell(tmp_path, "mc pictures tom >/dev/full")
    assert code == 2 and err.startswith("error: what there was to say could not be written") and err.count("\n") == 1
    assert len(list(tmp_path.rglob("*.png"))) == 16
    assert shell(tmp_path, "mc pictures tim 2>/dev/full")[0] == 0


def test_letters_that_a_stream_cannot_hold_are_escaped(tmp_path):
    code, _, err = shell(tmp_path, "mc inspect höhle", PYTHONIOENCODING="ascii")
    assert code == 2 and err == "error: h\\xf6hle: there is no such file\n"


def test_a_folder_that_was_deleted_is_said(tmp_path):
    (tmp_path / "gone").mkdir()
    code, out, err = shell(tmp_path, "cd gone && rmdir ../gone && mc pictures tom")
    assert code == 2 and "the folder that you are in was deleted" in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("TQDM_MININTERVAL", "abc"), ("TQDM_NCOLS", "abc"), ("TQDM_ASCII", "x"), ("TQDM_BAR_FORMAT", "{nope}")),
        *(("TQDM_FILE", "log.txt"), ("TQDM_LOCK_ARGS", "abc"), ("TQDM_WRITE_BYTES", "1")),
    ],
)
def test_a_variable_with_which_there_is_no_progress_bar_is_ignored_in_one_sentence(monkeypatch, name, value):
    from modular_concepts.cli.environment import ignore_unusable_bars

    monkeypatch.setenv(name, value)
    monkeypatch.setenv("TQDM_COLOUR", "green")
    (sentence,) = ignore_unusable_bars()
    assert f"{name}={value}" in sentence and "COLOUR" not in sentence
    assert name not in os.environ and os.environ["TQDM_COLOUR"] == "green" and ignore_unusable_bars() == []


def test_variables_that_libraries_cannot_use_end_no_command_raw(tmp_path):
    draw = "mc sample man --steps 1 --cfg 1 --out a.png"
    code, _, err = shell(tmp_path, draw, TQDM_MININTERVAL="abc")
    assert code == 0 and (tmp_path / "a.png").exists() and err.count("note: ") == 1 and "TQDM_MININTERVAL=abc" in err
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "PYTORCH_JIT"):
        code, _, err = shell(tmp_path, "mc sample man --steps 1 --cfg 1 --out b.png", **{name: "abc"})
        assert code == 2 and f"{name}=abc" in err and err.count("\n") == 1, err


def test_a_switch_that_takes_torch_from_a_library_is_named(monkeypatch):
    from modular_concepts.cli.environment import explain_variables

    monkeypatch.setenv("USE_TORCH", "0")
    assert "USE_TORCH=0" in explain_variables(ImportError("it needs the PyTorch library, which was not found"))
    assert explain_variables(KeyError("a fault of our own")) == ""
