"""Checkpoints: the whole state of a run in one safetensors file, so that resuming continues bit for bit.

Tensors: trained factors and tokens, their optimizer state, generators (uint8), data order, losses.
Metadata: step, format, and the identity (settings, data set, base, basis) that a resumed run must share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..concept import clip
from ..errors import AdapterError
from ..storage.atomic import sync_folder
from ..storage.names import nameable
from ..storage.safetensors import read_header, read_safetensors
from .checkpoint_checks import Origin, check_state, optimizer_parts, read_origin
from .optimizers import optimizer_state, set_optimizer_state
from .ownership import DTYPES, checkpoints_in, prune, refuse_two_runs, remove_if_possible
from .run import Run
from .settings import changes

FORMAT = "modular-concepts-checkpoint-1"


class Changed(AdapterError):
    """A checkpoint is of other settings, pictures or another base than the training that would resume it."""


class NoCheckpoint(AdapterError):
    """A file is sound but no checkpoint."""


def save_checkpoint(folder: Path | str, run: Run) -> Path:
    """Write step-NNNNNNNN.safetensors, whole or not at all, and keep the newest `keep_checkpoints` of this run."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(
            f"the folder {folder} cannot be made ({error.strerror}); choose another for checkpoints"
        ) from error
    metadata = {
        "format": FORMAT,
        "run": run.id,
        "step": str(run.step),
        "identity": json.dumps(run.identity, sort_keys=True),
    }
    path = folder / f"step-{run.step:08d}.safetensors"
    _write_whole(path, save(_state(run), metadata))
    prune(folder, run.id, run.settings.keep_checkpoints)
    return path


def restore_checkpoint(path: Path | str, run: Run, accept_changes: bool = False) -> None:
    """Bring a fresh run to a checkpoint's state.

    path: a checkpoint, or a folder for its newest.
    Raises AdapterError for a file that cannot be read, Changed for one of another training unless `accept_changes`.
    """
    path = newest_checkpoint(path)
    origin, tensors = _read(path)
    differing = _refuse_changed(path, origin, run, accept_changes)
    if origin.step > run.settings.steps:
        raise AdapterError(
            f"{path.name} has {origin.step} steps behind it, and steps is {run.settings.steps}; ask for more steps, or "
            "resume from an older checkpoint"
        )
    _check_optimizer(path, origin.identity["settings"], run)
    _check_shapes(path, tensors, run)
    with _older_instead(path):
        check_state(tensors, origin.step, run, changed=bool(differing))
    parts = optimizer_parts(tensors)
    with torch.no_grad():
        for name, parameter in run.parameters().items():
            parameter.copy_(tensors[name])
            set_optimizer_state(run.optimizer, parameter, parts.get(name, {}))
    run.id = origin.run
    run.set_random_state(tensors)
    if run.loss_scale is not None and "loss_scale" in tensors:
        run.loss_scale.set_state(tensors["loss_scale"])
    run.losses, run.step = [], 0
    for loss in tensors["losses"].tolist():
        run.record(loss)


def check_resumable(path: Path | str, run: Run, accept_changes: bool = False) -> None:
    """Raise Changed for a checkpoint of another training than `run`, of which its header alone tells."""
    path = newest_checkpoint(path)
    _refuse_changed(path, _read_origin(path), run, accept_changes)


def _refuse_changed(path: Path, origin: Origin, run: Run, accept_changes: bool) -> list[str]:
    """What differs, in words; refused unless it is accepted."""
    differing = _differences(origin.identity, run.identity)
    if differing and not accept_changes:
        raise Changed(
            f"{path.name} cannot be resumed: {'; '.join(differing)}. "
            "Put that back as it was, or start a new training without resuming"
        )
    return differing


def check_checkpoint(path: Path | str) -> Path:
    """The checkpoint that `path` names (`newest_checkpoint`), once its header says that it is one."""
    path = newest_checkpoint(path)
    _read_origin(path)
    return path


def newest_checkpoint(path: Path | str) -> Path:
    """The checkpoint itself, or the newest in a folder.  Raises AdapterError when there is none."""
    path = nameable(path)
    if not path.exists():
        raise AdapterError(f"{path}: there is no such checkpoint or folder; start the training without resuming")
    if not path.is_dir():
        return path
    refuse_two_runs(path)
    checkpoints = checkpoints_in(path)
    if not checkpoints:
        raise AdapterError(f"{path} holds no checkpoint to resume from; start the training without resuming")
    return checkpoints[-1]


def checkpoint_settings(path: Path | str) -> dict:
    """The settings of the training that a checkpoint, or the newest of a folder, is of."""
    return _read_origin(newest_checkpoint(path)).identity["settings"]


def checkpoint_step(path: Path | str) -> int:
    """How many steps it has behind it."""
    return _read_origin(newest_checkpoint(path)).step


def _state(run: Run) -> dict[str, Tensor]:
    tensors = dict(run.random_state())
    for name, parameter in run.parameters().items():
        tensors[name] = parameter
        parts = optimizer_state(run.optimizer, parameter)
        tensors |= {f"optimizer.{name}.{part}": value for part, value in parts.items()}
    if run.loss_scale is not None:
        tensors["loss_scale"] = run.loss_scale.state()
    tensors["losses"] = torch.tensor(run.losses, dtype=torch.float64)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _read_origin(path: Path) -> Origin:
    """Of which training and step a checkpoint is, from its header alone."""
    with _older_instead(path):
        return _origin(path, read_header(path, DTYPES, empty=True).metadata)


def _read(path: Path) -> tuple[Origin, dict[str, Tensor]]:
    with _older_instead(path):
        tensors, metadata = read_safetensors(path, DTYPES, empty=True)
        return _origin(path, metadata), tensors


def _origin(path: Path, metadata: Mapping[str, str]) -> Origin:
    if metadata.get("format") != FORMAT:
        raise NoCheckpoint(f"{path.name} is not a checkpoint of a training; choose a step-….safetensors file")
    return read_origin(metadata)


@contextmanager
def _older_instead(path: Path) -> Generator[None]:
    """Whatever is wrong with a checkpoint's contents is said with the file's name and the way out."""
    try:
        yield
    except NoCheckpoint:
        raise
    except AdapterError as error:
        fault = str(error).removeprefix(f"{path.name}: ").removesuffix("; the file is damaged")
        raise AdapterError(
            f"{path.name} cannot be read as a checkpoint: {fault}; resume from an older one, or start the training "
            "anew without resuming"
        ) from error


def _differences(before: Mapping, now: Mapping) -> list[str]:
    """What of the training that a checkpoint is of is otherwise now, in words."""
    others = [
        words
        for key, words in (
            ("base", "the base model is another one"),
            ("basis", "the orthogonal basis is another one"),
        )
        if before[key] != now[key]
    ]
    (then, *then_prior), (pictures, *prior) = (identity["dataset"].split("+") for identity in (before, now))
    if then != pictures:
        others = ["the pictures, captions or masks have changed, or the size that they are trained at", *others]
    if then_prior != prior:
        others = [*others, "the base's own class pictures are others, or none, or more"]
    # Who lacks it had none, which the settings say.
    if "company" in before and "company" in now and before["company"] != now["company"]:
        others = [*others, "the pictures of company are others, or more"]
    settings = changes(before["settings"], now["settings"])
    # Checkpoints of before did not say it; other settings of the word are other words too.
    if not settings and before.get("words", now["words"]) != now["words"]:
        others = ["the class word, the description or the trigger word is another one", *others]
    differing = settings + others
    if not differing and before["frozen"] != now["frozen"]:
        return ["the layers that are trained, or their frozen factors, are others"]
    return differing


def _check_optimizer(path: Path, before: Mapping, run: Run) -> None:
    """Whatever changes are accepted, one optimizer cannot go on from another's state."""
    optimizer = before.get("optimizer", "adamw")
    if optimizer != run.settings.optimizer:
        raise AdapterError(
            f"{path.name} cannot be resumed: its training had optimizer {clip(optimizer)}, from whose state "
            f"{run.settings.optimizer} cannot go on; choose the same, or start a new training without resuming"
        )


def _check_shapes(path: Path, tensors: dict[str, Tensor], run: Run) -> None:
    expected = {name: parameter.shape for name, parameter in run.parameters().items()}
    trained = {name for name in tensors if name.startswith(("adapters.", "tokens."))}
    differing = sorted(trained ^ set(expected)) or sorted(
        name for name, shape in expected.items() if tensors[name].shape != shape
    )
    if differing:
        raise AdapterError(
            f"{path.name} cannot be resumed: {differing[0]} does not fit ({len(differing)} differ); "
            "method, rank, layers and trigger words must be those of the checkpoint"
        )


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside the target, sync, rename: a crash at any moment leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise AdapterError(
            f"{path} could not be written ({error.strerror}); the checkpoint before it is kept"
        ) from error
    finally:
        remove_if_possible([beside])
