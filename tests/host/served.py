"""The real host as a server on the CPU, with a copy of the pack in its custom_nodes and folders of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scripts.queue_workflow import ENDINGS, Messages, Refused, Server

PACK = Path(__file__).resolve().parents[2]
NOT_PACK = ("*.pyc", "__pycache__", ".*", "tests", "demo_output", "build", "node_modules")
STARTING = 400  # seconds; a busy machine imports torch slowly


@dataclass
class Run:
    """What the server told of one prompt.

    progress: node -> (value, max) as they came; previews: node -> pictures as they came, each as bytes;
    texts: node -> words that appeared on it.
    ran: the nodes that were not taken from the cache, in order.
    late: nodes whose progress was told of when they were no longer at work.
    """

    prompt: dict
    ending: str = ""
    cached: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    progress: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    previews: dict[str, list[bytes]] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    error: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        return self.ending == "execution_success"

    def of_class(self, *classes: str) -> list[str]:
        """The ids of the prompt's nodes of some classes."""
        return [node for node, found in self.prompt.items() if found["class_type"] in classes]


@dataclass(frozen=True)
class Fault:
    """Why a prompt did not finish: the node that is to blame, its class, the reason that the user reads."""

    node: str
    kind: str
    reason: str


class HostServer(Server):
    """A server of ours; `folder` is its base directory (models, input, output, custom_nodes)."""

    def __init__(self, host, folder: Path, copy_pack: bool = True):
        self.folder = folder
        self.output, self.models, self.input = (folder / name for name in ("output", "models", "input"))
        self._host = host
        place = folder / "custom_nodes" / "modular-concepts"
        if copy_pack and not place.exists():
            shutil.copytree(PACK, place, ignore=shutil.ignore_patterns(*NOT_PACK))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            super().__init__(f"127.0.0.1:{free.getsockname()[1]}")
        self.start()

    # -- process

    def start(self) -> None:
        """Start, or start again on the same folders, and wait until it answers."""
        command = [
            self._host.python,
            self._host.path / "main.py",
            "--cpu",
            "--disable-api-nodes",
            "--disable-auto-launch",
        ]
        command += ["--port", self.address.rpartition(":")[2], "--base-directory", self.folder]
        command += ["--preview-method", "latent2rgb", "--database-url", "sqlite:///:memory:"]
        self.log = self.folder / "server.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            )
        deadline = time.monotonic() + STARTING
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"the host ended while starting:\n{self.log_text()[-6000:]}"
            try:
                self.get("/system_stats")
                break
            except (ConnectionError, urllib.error.URLError):
                time.sleep(0.2)
        else:
            self.kill()
            raise AssertionError(f"the host did not answer within {STARTING} s:\n{self.log_text()[-6000:]}")
        self._runs: dict[str, Run] = {}
        self._changed = threading.Condition()
        self._messages = Messages(self)
        flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        self._messages.send(json.dumps(flags).encode())
        threading.Thread(target=self._listen, daemon=True).start()

    def kill(self) -> None:
        """End the server as a power cut would."""
        self._process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        self._process.wait(30)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    # -- prompts

    def begin(self, prompt: dict) -> str:
        """Queue a prompt; its id.  Raises Refused."""
        with self._changed:  # the listener waits, so no message comes before the run is known
            prompt_id = self.queue(prompt)
            self._runs[prompt_id] = Run(prompt)
        return prompt_id

    def wait(self, prompt_id: str, until: Callable[[Run], bool] = lambda run: bool(run.ending), timeout=600) -> Run:
        """The run of a prompt as soon as `until` holds of it: by default, once it has ended."""
        run = self._runs[prompt_id]
        with self._changed:
            reached = self._changed.wait_for(lambda: until(run) or self._process.poll() is not None, timeout)
        if not (reached and until(run)):
            state = "has ended" if self._process.poll() is not None else f"is at it since {timeout} s"
            raise AssertionError(f"the host {state}:\n{self.log_text()[-6000:]}")
        if run.ending and not run.outputs:
            run.outputs = self.outputs(prompt_id)
        return run

    def run(self, prompt: dict, timeout: float = 600) -> Run:
        """Queue and wait.  Whatever is amiss is an assertion with the server's own words."""
        try:
            run = self.wait(self.begin(prompt), timeout=timeout)
        except Refused as refused:
            raise AssertionError(f"the host refuses the prompt: {refused}") from refused
        assert run.succeeded, f"{run.ending}: {run.error}"
        return run

    def fault(self, prompt: dict) -> Fault:
        """Queue a prompt that must not finish; the first thing amiss, from the validation or from the run."""
        try:
            run = self.wait(self.begin(prompt))
        except Refused as refused:
            assert refused.faults, f"refused, but no node is named: {refused}"
            return Fault(*refused.faults[0])
        assert run.ending == "execution_error", f"{run.ending}; it should have failed"
        return Fault(run.error["node_id"], run.error["node_type"], run.error["exception_message"].strip())

    def node(self, kind: str, **inputs) -> dict:
        """A node for a prompt: `inputs`, and the default of each widget that is not among them."""
        about = self.object_info[kind]
        named = [
            (name, spec) for group in ("required", "optional") for name, spec in about["input"].get(group, {}).items()
        ]
        defaults = {name: spec[1]["default"] for name, spec in named if len(spec) > 1 and "default" in spec[1]}
        return {"class_type": kind, "inputs": defaults | inputs}

    @cached_property
    def object_info(self) -> dict:
        return json.loads(self.get("/object_info"))

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def pictures(self, run: Run, node: str | None = None) -> Tensor:
        """(N, 3, H, W) in 0..1: the pictures that a run saved or previewed, all or one node's."""
        shown = [run.outputs[node]] if node else run.outputs.values()
        files = [self.picture(image) for entry in shown for image in entry.get("images", [])]
        opened = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return torch.from_numpy(np.stack(opened)).permute(0, 3, 1, 2).float() / 255

    def _listen(self) -> None:
        try:
            for message in self._messages:
                with self._changed:
                    self._note(message)
                    self._changed.notify_all()
        except OSError:
            pass  # the server was killed
        with self._changed:
            self._changed.notify_all()

    def _note(self, message: dict | bytes) -> None:
        if isinstance(message, bytes):
            if message[:4] == b"\0\0\0\3":
                self._note_text(message[4:])
            if message[:4] != b"\0\0\0\4":  # a picture with metadata
                return
            size = int.from_bytes(message[4:8], "big")
            about = json.loads(message[8 : 8 + size])
            if run := self._runs.get(about["prompt_id"]):
                run.previews.setdefault(about["node_id"], []).append(message[8 + size :])
            return
        kind, data = message["type"], message["data"]
        run = self._runs.get(data.get("prompt_id"))
        if run is None:
            return
        if kind == "execution_cached":
            run.cached = data["nodes"]
        elif kind == "executing" and data["node"] is not None:
            run.ran.append(data["node"])
        elif kind == "progress":
            run.progress.setdefault(data["node"], []).append((data["value"], data["max"]))
            if run.ending or run.ran[-1:] != [data["node"]]:
                run.late.append(data["node"])
        elif kind in ENDINGS:
            run.ending = kind
            run.error = data if kind == "execution_error" else {}

    def _note_text(self, message: bytes) -> None:
        """Words on a node; the host does not tell of which prompt, and runs one at a time."""
        size = int.from_bytes(message[:4], "big")
        node, text = message[4 : 4 + size].decode(), message[4 + size :].decode()
        for run in self._runs.values():
            if not run.ending and node in run.ran:
                run.texts.setdefault(node, []).append(text)
