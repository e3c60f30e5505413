"""The tests in the real ComfyUI, all by pytest in its own interpreter: `make test-host`, or `run.py` for some of them.

Most import the host's modules and the pack and call them here, in pytest's own process, where the host is set up once
(`in_process.py`): whoever imports `comfy` or `modular_concepts_pack` is one of these.  `host_as_it_was` holds each file
to leaving the host as it found it.

A process of its own has what needs one, by `host.run(SCRIPT)`, and the file says why; a server (`served.py`) has what
is about the API, the page in a browser, cancelling and starting: whoever takes the fixture `server`.
"""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import in_process
import pytest
from finding import Host, NoSuchHost, find_host
from served import HostServer

_without_host: list[str] = []
# What takes longest begins first, so that files side by side end together.
LONGEST = ("architectures", "stable_diffusion", "workflows", "lean_training", "bench_train", "devices_in_host")


def pytest_configure(config: pytest.Config) -> None:
    try:
        found = find_host()
    except NoSuchHost as error:
        raise pytest.UsageError(str(error)) from None
    if isinstance(found, str):
        _without_host.append(found)
        sys.meta_path.insert(0, in_process.Without(f"HOST TESTS SKIPPED: {found}"))
    elif not found.runs_here:
        raise pytest.UsageError(
            "tests/host run in the host's own interpreter: make test-host, or for some of them "
            "python tests/host/run.py tests/host/FILE.py"
        )
    else:
        in_process.start(found.path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(scope="session")
def host() -> Host:
    found = find_host()
    if isinstance(found, str):
        pytest.skip(f"HOST TESTS SKIPPED: {found}")
    return found


@pytest.fixture(scope="session")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """One server for all tests that leave it answering; its folders hold nothing but a copy of the pack."""
    running = HostServer(host, tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture(scope="module", autouse=True)
def host_as_it_was() -> Iterator[None]:
    """A file leaves no model loaded, and what belongs to the whole process as it was."""
    if "comfy.model_management" not in sys.modules:
        yield
        return
    before = _state_of_process()
    yield
    sys.modules["comfy.model_management"].unload_all_models()
    gc.collect()
    assert _state_of_process() == before


def _state_of_process() -> dict:
    import comfy.model_management
    import comfy.utils
    import folder_paths
    import latent_preview
    import torch

    return {
        "numbers": (torch.get_default_dtype(), torch.get_num_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "folders": copy.deepcopy(folder_paths.folder_names_and_paths),
        "places": (folder_paths.models_dir, folder_paths.output_directory, folder_paths.temp_directory),
        "input": folder_paths.input_directory,
        "progress": (comfy.utils.PROGRESS_BAR_HOOK, comfy.model_management.interrupt_processing),
        "previews": latent_preview.get_previewer,
        "logging": list(logging.getLogger().handlers),
    }


@pytest.fixture(scope="module")
def replaced() -> Iterator[pytest.MonkeyPatch]:
    """What a whole file sees otherwise than it is."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(replaced: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that is the host's for all kinds of files, with the pack's kinds registered."""
    import folder_paths
    from modular_concepts_pack.host.files import folders

    place = tmp_path_factory.mktemp("host")
    replaced.setattr(folder_paths, "models_dir", str(place))
    for kind in ("output", "temp", "input"):
        replaced.setattr(folder_paths, f"{kind}_directory", str(place / kind))
    there = {
        kind: ([str(place / kind)], copy.copy(suffixes))
        for kind, (_, suffixes) in folder_paths.folder_names_and_paths.items()
        if kind not in folders.KINDS
    }
    replaced.setattr(folder_paths, "folder_names_and_paths", there)
    replaced.setattr(folder_paths, "filename_list_cache", {})
    for kind in (*folders.KINDS, "loras", "embeddings", "output", "input"):
        (place / kind).mkdir()
    folders.register()
    return place


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Name of a layout -> its tiny checkpoint (`tiny_models.py`), written when first asked for; all are two GB."""
    place = tmp_path_factory.mktemp("checkpoints")

    @cache
    def written(name: str) -> Path:
        import tiny_models

        return tiny_models.write(name, place)

    yield written
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def warnings() -> Iterator[list[str]]:
    """What the host and the pack warn of, as it comes."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    yield lines
    logging.getLogger().removeHandler(handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _without_host:
        terminalreporter.section("HOST TESTS SKIPPED", red=True, bold=True)
        terminalreporter.write_line(_without_host[0])
