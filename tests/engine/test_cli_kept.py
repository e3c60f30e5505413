"""Nothing that was learned is lost and nothing of a person's replaced, whatever happens to a command."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_cli import files, refused, run

from modular_concepts.cli import main as cli
from modular_concepts.cli import progress as cli_progress
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.moments import moments_path
from modular_concepts.toy import model

Image = pytest.importorskip("PIL.Image")

ROOT = Path(cli.__file__).parents[1]
QUICK = ["--steps", "3", "--batch", "2", "--rank", "2", "--targets", "cross_attention", "--class-word", "man"]
DRAW = ["--steps", "1", "--cfg", "1"]
WINDOWS = ["CON", "NUL.txt", "aux.safetensors", "com1.x", "LPT9", "conin$", "x.", "x ", "nul .txt", "com¹"]


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("made")
        patch.setattr(model, "WEIGHTS", weights)
        patch.chdir(folder)
        assert cli.main(["pictures", "tom"]) == 0
        assert cli.main(train("tom")) == 0
    return folder


@pytest.fixture
def here(made, weights, tmp_path, monkeypatch) -> Path:
    """A working folder with pictures of tom and his concept; the last places to write to are beside it."""
    monkeypatch.setattr(model, "WEIGHTS", weights)
    place = tmp_path / "here"
    shutil.copytree(made, place)
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(place)
    return place


def train(name: str, *more) -> list:
    return ["train", "pictures/tom", "--name", name, *QUICK, *map(str, more)]


def at_step(monkeypatch, step: int, act) -> None:
    monkeypatch.setattr(cli_progress.Bar, "__call__", lambda self, done: act() if done == step else None)


# --- checkpoints of another training ------------------------------------------------------------------------


def test_another_trainings_checkpoints_are_refused_with_every_way_out(here, capsys, monkeypatch):
    assert run(capsys, *train("ann", "--checkpoints", "steps"))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(model, "WEIGHTS", here / "nowhere")  # refused before the base is loaded
        refused(
            capsys,
            here,
            train("bob", "--checkpoints", "steps"),
            "steps holds the checkpoints of another training ('ann', step 3 of 3)",
            "--resume steps, another --checkpoints, or --overwrite, which moves them to steps/before",
        )
    before = files(here / "steps")
    code, _, err = run(capsys, *train("bob", "--checkpoints", "steps", "--overwrite"))
    assert code == 0 and "note: steps holds the checkpoints of another training ('ann', step 3 of 3); they move" in err
    assert files(here / "steps/before") == before
    refused(
        capsys, here, train("bob", "--resume", "steps/before", "--out", "b.safetensors"), "name was ann, is now bob"
    )
    assert run(capsys, *train("ann", "--resume", "steps/before", "--overwrite"))[0] == 0


# --- what was learned finds a place -------------------------------------------------------------------------


def test_a_folder_that_vanishes_while_it_trains(here, capsys, monkeypatch):
    def vanish():
        shutil.rmtree("concepts")
        Path("concepts").write_text("in the way")

    at_step(monkeypatch, 2, vanish)
    code, out, err = run(capsys, *train("ann", "--checkpoints", "steps"))
    assert code == 2 and "wrote steps/ann.safetensors" in out
    assert "concepts" in err and "What was learned is in steps/ann.safetensors instead" in err
    assert load_concept("steps/ann.safetensors").recipe.training["finished"] is True


def test_a_full_disk_at_the_end_goes_to_the_first_place_that_has_room(here, capsys, monkeypatch):
    """The working folder's disk is full too: what was learned goes home, beside a file of that name there."""
    home = here.parent / "home"
    (home / "ann.safetensors").write_bytes(b"another's")
    real = os.open

    def full(path, mode="r", *rest, **options):
        if "x" in mode and str(path).endswith(".tmp") and "home" not in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real_open(path, mode, *rest, **options)

    import builtins

    real_open = builtins.open
    assert real is os.open
    at_step(monkeypatch, 3, lambda: monkeypatch.setattr(builtins, "open", full))
    code, _, err = run(capsys, *train("ann"))
    monkeypatch.setattr(builtins, "open", real_open)
    assert code == 2 and "the disk is full" in err and f"is in {home}/ann-2.safetensors instead" in err
    assert load_concept(home / "ann-2.safetensors").recipe.training["steps_done"] == 3
    assert (home / "ann.safetensors").read_bytes() == b"another's"


@pytest.mark.parametrize("more", [[], ["--checkpoints", "steps"]])
def test_a_disk_without_room_is_said_before_the_first_step(here, capsys, monkeypatch, more):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, 20_000))
    at_step(monkeypatch, 1, lambda: pytest.fail("it trained"))
    before = files(here)
    code, _, err = run(capsys, *train("ann", *more))
    assert code == 2 and "0.0 MB left" in err and "make room, or choose a folder on another disk" in err
    assert files(here) == before


def test_room_that_is_enough_is_as_much_as_is_written(here, capsys, monkeypatch):
    """What is asked for is no less than the files, and no more than what their headers may add."""
    asked = []
    real = shutil.disk_usage
    monkeypatch.setattr("modular_concepts.cli.train._announce", asking(asked))
    assert run(capsys, *train("ann", "--checkpoints", "steps", "--checkpoint-every", "1"))[0] == 0
    (estimate,) = asked
    concept = Path("concepts/ann.safetensors").stat().st_size
    steps = [path.stat().st_size for path in Path("steps").iterdir()]
    assert concept <= estimate.concept_bytes < concept + 150_000
    assert max(steps) <= estimate.checkpoint_bytes < max(steps) + 200_000
    assert real is shutil.disk_usage


def asking(asked: list):
    return lambda args, out, settings, estimate: asked.append(estimate)


def test_an_unexpected_fault_is_a_sentence_and_keeps_what_was_learned(here, capsys, monkeypatch):
    def stumble():
        raise RuntimeError("the machine\nstumbled")

    at_step(monkeypatch, 2, stumble)
    code, out, err = run(capsys, *train("ann", "--checkpoints", "steps"))
    assert code == 2 and "wrote concepts/ann-step2.safetensors" in out and "Traceback" not in err
    assert "an unexpected fault after step 2 (RuntimeError: the machine stumbled)" in err
    assert "is kept in concepts/ann-step2.safetensors" in err
    monkeypatch.undo()


def test_compact_is_refused_before_a_training_that_has_nothing_to_leave_out(here, capsys):
    refused(capsys, here, train("ann", "--method", "lora", "--compact"), "--compact", "method lora")


def test_moments_that_cannot_be_kept_are_used_all_the_same(here, capsys, monkeypatch):
    moments_path("concepts/tom.safetensors").mkdir()
    fuse = ["merge", "concepts/tom.safetensors", "--how", "fusion", "--base", "toy", "--out", "fused.safetensors"]
    code, out, err = run(capsys, *fuse)
    assert code == 0, err
    assert "wrote fused.safetensors" in out and "is used, but not kept" in err
    assert "there is a folder of that name" in err


# --- a person's files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["x.png", "x.txt", "x", "x.safetensors.bak"])
@pytest.mark.parametrize("command", ["train", "merge", "export"])
def test_a_concept_is_written_under_no_other_kinds_name(here, capsys, command, out):
    commands = {
        "train": train("ann"),
        "merge": ["merge", "concepts/tom.safetensors"],
        "export": ["export", "concepts/tom.safetensors"],
    }
    refused(capsys, here, [*commands[command], "--out", out], f"{out}: a concept is written as .safetensors")


def test_an_embedding_is_not_replaced_even_by_the_same_word(here, capsys):
    """It says who made it, and that is not what this export says."""
    export = ["export", "concepts/tom.safetensors", "--author"]
    assert run(capsys, *export, "ann")[0] == 0
    before = Path("exports/embeddings/tom.safetensors").read_bytes()
    code, out, _ = run(capsys, *export, "bob", "--format", "diffusers")
    assert code == 0 and "kept exports/embeddings/tom.safetensors" in out
    assert Path("exports/embeddings/tom.safetensors").read_bytes() == before
    assert run(capsys, *export, "bob", "--format", "diffusers", "--overwrite")[0] == 0
    assert Path("exports/embeddings/tom.safetensors").read_bytes() != before
    Path("exports/embeddings/tom.safetensors").write_bytes(b"a person's own")
    refused(capsys, here, ["export", "concepts/tom.safetensors", "--out", "exports/b.safetensors"], "is there already")


@pytest.mark.parametrize("at", [1, 2])
def test_an_export_is_whole_or_not_at_all(here, capsys, monkeypatch, at):
    real, renames = os.replace, []

    def fail(source, target):
        renames.append(target)
        if len(renames) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    def no_link(_source, _target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, "link", no_link)
    refused(capsys, here, ["export", "concepts/tom.safetensors"], "the disk is full")
    monkeypatch.setattr(os, "replace", real)
    assert run(capsys, "export", "concepts/tom.safetensors")[0] == 0
    before = files(here)
    renames.clear()
    monkeypatch.setattr(os, "replace", fail)
    refused(capsys, here, ["export", "concepts/tom.safetensors", "--author", "ann", "--overwrite"], "the disk is full")
    assert files(here) == before


def test_pictures_are_not_written_among_a_persons_own(here, capsys):
    Path("holiday").mkdir()
    Path("holiday/sea.jpg").write_bytes(b"a photo")
    refused(capsys, here, ["pictures", "tom", "--out", "holiday"], "holiday holds other files (sea.jpg)", "--overwrite")
    assert run(capsys, "pictures", "tom", "--out", "holiday", "--overwrite")[0] == 0
    assert Path("holiday/sea.jpg").read_bytes() == b"a photo"


def test_a_disk_that_fills_up_leaves_no_half_of_the_pictures(here, capsys, monkeypatch):
    real, synced = os.fsync, []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    refused(capsys, here, ["pictures", "tim"], "the disk is full")


def test_a_drawing_replaces_nothing_unasked(here, capsys):
    Path("sample.png").write_bytes(b"mine")
    Path("two-01.png").write_bytes(b"mine")
    assert run(capsys, "sample", "a man", *DRAW)[0] == 0
    assert Path("sample.png").read_bytes() == b"mine" and Image.open("sample-2.png").size == (32, 32)
    refused(
        capsys, here, ["sample", "a man", *DRAW, "--out", "sample.png"], "sample.png is there already", "--overwrite"
    )
    two = ["sample", "a man", *DRAW, "--count", "2", "--out", "two.png"]
    refused(capsys, here, two, "two-01.png is there already")
    assert run(capsys, *two, "--overwrite")[0] == 0 and Image.open("two-01.png").size == (32, 32)


def test_the_demo_replaces_no_file_but_a_demos(here, capsys, monkeypatch):
    Path("mine").mkdir()
    Path("mine/report.md").write_text("# My thesis")
    refused(capsys, here, ["demo", "--out", "mine"], "mine/report.md is there already", "--overwrite")
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(capsys, "demo", "--out", "begun")[0] == 130
        assert run(capsys, "demo", "--out", "begun")[0] == 130  # and not refused for what the first one left
    finally:
        signal.signal(signal.SIGINT, before)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WINDOWS)
def test_names_that_windows_keeps_for_itself_are_refused_in_every_part(here, capsys, name):
    for out in (f"{name}/x.safetensors", f"a/{name}/b/x.safetensors"):
        refused(capsys, here, train("ann", "--out", out), "Windows")
    refused(capsys, here, ["pictures", "tim", "--out", name], "Windows")
    refused(capsys, here, train("ann", "--checkpoints", f"steps/{name}"), "Windows", "another --checkpoints")


def test_a_folder_that_is_there_already_may_be_called_anything(here, capsys):
    Path("aux").mkdir()
    assert run(capsys, "export", "concepts/tom.safetensors", "--out", "aux/tom.safetensors")[0] == 0


@pytest.mark.parametrize(
    "path", ["x" * 300, "é" * 110, "/".join(["d" * 100] * 50), "a\0b", "a\nb", "x" * 5000], ids=lambda path: path[:3]
)
def test_paths_that_no_system_takes_are_one_sentence(here, capsys, path):
    out = f"{path}.safetensors"
    for command in (
        train("ann", "--out", out),
        ["merge", "concepts/tom.safetensors", "--out", out],
        ["export", "concepts/tom.safetensors", "--out", out],
        ["sample", "a man", *DRAW, "--out", f"{path}.png"],
        ["pictures", "tim", "--out", path],
        train("ann", "--checkpoints", path),
        train("ann", "--cache", path),
        ["demo", "--out", path],
    ):
        refused(capsys, here, command)
        capsys.readouterr()


@pytest.mark.parametrize("path", ["x" * 300, "x" * 5000, "a\0b"], ids=["long", "longer", "nul"])
def test_paths_to_read_that_no_system_has_are_one_sentence(here, capsys, path):
    for command in (
        ["inspect", path],
        ["merge", f"{path}:0.5", "--out", "x.safetensors"],
        ["export", path],
        ["sample", "a man", *DRAW, "--concept", path],
        ["sample", "a man", *DRAW, "--base", path],
        ["train", path, "--name", "ann", *QUICK],
        train("ann", "--resume", path),
        ["export", "concepts/tom.safetensors", "--thumbnail", path],
    ):
        code, _, err = run(capsys, *command)
        assert code == 2 and err.count("\n") == 1 and len(err) < 500, (command[0], err)


def test_a_name_that_is_changed_is_said_before_the_work(here, capsys, monkeypatch):
    at_step(monkeypatch, 1, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = run(capsys, *train("ann b"))
    assert code == 130 and err.startswith("note: --name 'ann b'") and "it is 'ann_b' here" in err
    code, out, err = run(capsys, "merge", "concepts/tom.safetensors", "--out", "a b.safetensors")
    assert code == 0 and "'a_b'" in err and load_concept("a b.safetensors").name == "a_b"
    assert run(capsys, *train("nul", "--overwrite"))[2].startswith("note: --name 'nul'")


# --- Ctrl-C -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent otherwise there")
@pytest.mark.parametrize(("share", "number"), [(0.15, "INT"), (0.5, "INT"), (0.9, "INT"), (0.5, "TERM"), (0.5, "HUP")])
def test_ctrl_c_while_everything_is_imported_is_one_line(share, number):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WAITS_FOR_TORCH, str(share)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own command
    assert process.stdout.readline() == "importing\n"
    time.sleep(share)
    process.send_signal(getattr(signal, f"SIG{number}"))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stopped\n")


# The very module that `python -m` runs, with an import of torch that takes as long as on a slow machine.
WAITS_FOR_TORCH = """
import builtins, runpy, signal, sys, time
real = builtins.__import__
def slow(name, *rest, **options):
    if name == "torch":
        print("importing", flush=True)
        try:
            time.sleep(30)
        except BaseException:
            raise ImportError("torch was not initialised") from None
    return real(name, *rest, **options)
builtins.__import__ = slow
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
sys.argv = ["modular_concepts", "inspect", "x"]
runpy.run_module("modular_concepts", run_name="__main__")
"""


def test_what_a_library_makes_of_ctrl_c_is_still_ctrl_c(here, capsys, monkeypatch):
    def library(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise SystemError("returned a result with an exception set") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("modular_concepts.cli.paths.concept_at", library)
    try:
        code, _, err = run(capsys, "inspect", "concepts/tom.safetensors")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, err) == (130, "stopped\n")


LONG = {
    "sample": (["sample", "a man", "--out", "a.png", "--steps", "2", "--cfg", "1"], "cli.progress.Bar.__call__"),
    "sample, while a file is written": (["sample", "a man", "--out", "a.png", *DRAW], "storage.atomic.sync_folder"),
    "merge": (["merge", "concepts/tom.safetensors", "--out", "m.st"], "merging.as_concept.merged_concept"),
    "merge, while a file is written": (
        ["merge", "concepts/tom.safetensors", "--out", "m.st"],
        "storage.atomic.os.fsync",
    ),
    "export": (["export", "concepts/tom.safetensors", "--out", "e.st"], "files.kohya.export_kohya"),
    "export, while a file is written": (
        ["export", "concepts/tom.safetensors", "--out", "e.st"],
        "storage.atomic.os.fsync",
    ),
    "inspect": (["inspect", "concepts/tom.safetensors"], "crosstalk.measures.delta_norm"),
    "pictures": (["pictures", "tim"], "storage.atomic.os.fsync"),
    "demo": (["demo", "--out", "demo"], "toy.demo.run_demo"),
    "train, before its first step": (train("ann"), "training.teach.check_training"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", LONG)
def test_whatever_ends_a_command_is_one_line_and_leaves_nothing_half(here, capsys, monkeypatch, command, number):
    line, place = LONG[command]

    def end_once(*_, **__):
        signal.raise_signal(number)

    inherited = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    left, before = None, files(here)
    try:
        monkeypatch.setattr(f"modular_concepts.{place}", end_once)
        code, _, err = run(capsys, *line)
        left = signal.getsignal(number)
    finally:
        signal.signal(number, inherited)
    assert code == 130 and err.endswith("stopped\n") and "Traceback" not in err, err
    assert left in (signal.default_int_handler, signal.SIG_DFL)
    new = {name for name in files(here) if name not in before}
    assert new <= {"a.png"} and not list(here.rglob(".*.tmp")), new


def test_what_is_said_of_an_end_is_said_whole(here, capsys, monkeypatch):
    """Also where the keys are pressed again while it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("modular_concepts.cli.paths.concept_at", lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("modular_concepts.cli.main.close_bars", lambda: signal.raise_signal(signal.SIGINT))
    try:
        code, _, err = run(capsys, "inspect", "concepts/tom.safetensors")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, err) == (130, "stopped\n")


def test_a_second_end_while_a_checkpoint_is_written_leaves_no_half_of_it(here, capsys, monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr("modular_concepts.training.checkpoint.os.fsync", lambda _: signal.raise_signal(signal.SIGTERM))
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        code, _, err = run(capsys, *train("ann", "--checkpoints", "steps"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130 and err.endswith("stopped\n")
    assert not list((here / "steps").glob(".*"))


def test_ctrl_c_while_the_concept_is_written_loses_nothing(here, capsys, monkeypatch):
    def slowly(concept, path, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        save_concept(concept, path, **options)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("modular_concepts.files.concept.save_concept", slowly)
    try:
        code, _, err = run(capsys, *train("ann"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 0 and "one moment" in err
    assert load_concept("concepts/ann.safetensors").recipe.training["finished"] is True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_is_closed_and_a_machine_that_shuts_down_keep_what_was_learned(
    here, capsys, monkeypatch, number
):
    at_step(monkeypatch, 2, lambda: signal.raise_signal(number))
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup has it ignored, and then so does a command
    try:
        code, out, _ = run(capsys, *train("ann"))
        left = signal.getsignal(number)
    finally:
        signal.signal(number, inherited)
    assert code == 130 and "wrote concepts/ann-step2.safetensors" in out and left is signal.SIG_DFL
    assert load_concept("concepts/ann-step2.safetensors").recipe.training["steps_done"] == 2
