"""Queue a workflow many times, with other values each time, and wait for the pictures.

Only Python's standard library is needed.  The workflow is in API format (`workflows/api/`, or the browser's menu
"Export (API)"); the server is a running ComfyUI.

    python scripts/queue_workflow.py workflows/api/2_train_three_and_merge.json \\
        --set "strength of tom.strength=0.4,0.8,1.2" --set "draw tom.seed=1,2" --save strengths

queues six prompts: every strength with every seed.  What a changed value does not touch is taken from the
server's cache, so the three concepts are trained once.  NODE in NODE.INPUT=VALUES is a node's title or its id.
Pictures are saved as strength=0.4_seed=1_NAME.png; index.jsonl beside them has a line of JSON for each.
"""

from __future__ import annotations

import argparse
import base64
import copy
import itertools
import json
import os
import re
import socket
import struct
import sys
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_BYTES = 200  # of a picture's name; file systems take 255, and some more is needed for a number
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")


class Refused(Exception):
    """The server did not queue a prompt.  `faults` has one (node id, node class, reason) for each thing amiss."""

    def __init__(self, answer: dict):
        nodes = answer.get("node_errors") or {}
        self.faults = [
            (node, found["class_type"], f"{fault['message']}: {fault['details']}")
            for node, found in nodes.items()
            for fault in found["errors"]
        ]
        error = answer.get("error") or {}
        whole = f"{error.get('message', answer)} {error.get('details', '')}".strip()
        super().__init__("; ".join(f"{kind} (node {node}): {reason}" for node, kind, reason in self.faults) or whole)


class Server:
    """A running ComfyUI.  address: host:port.  `client` is the name under which it sends us its messages."""

    def __init__(self, address: str = "127.0.0.1:8188"):
        self.address, self.client = address, uuid.uuid4().hex

    def get(self, path: str, **query: str) -> bytes:
        return self._ask(urllib.request.Request(f"http://{self.address}{path}?{urllib.parse.urlencode(query)}"))  # noqa: S310

    def post(self, path: str, body: dict) -> bytes:
        return self._ask(
            urllib.request.Request(  # noqa: S310
                f"http://{self.address}{path}",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
        )

    def queue(self, prompt: dict) -> str:
        """Put a prompt into the queue; its id.

        Raises Refused when the server finds fault with it, also with a part of it alone: the server would run the
        rest, and nobody would miss what was asked for.
        """
        try:
            answer = json.loads(self.post("/prompt", {"prompt": prompt, "client_id": self.client}))
            if answer.get("node_errors"):
                self.post("/queue", {"delete": [answer["prompt_id"]]})
                raise Refused(answer)
            return answer["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = error.read()
            raise Refused(
                json.loads(answer) if answer.startswith(b"{") else {"error": {"message": str(error)}}
            ) from None

    def outputs(self, prompt_id: str) -> dict:
        """What each node of an ended prompt showed: {node id: {"images": [{"filename": ...}], "text": [...]}}."""
        for _ in range(100):  # the server tells of the end a moment before it writes its history
            if prompt_id in (history := json.loads(self.get(f"/history/{prompt_id}"))):
                return history[prompt_id]["outputs"]
            time.sleep(0.1)
        raise TimeoutError(f"{self.address} does not remember prompt {prompt_id}")

    def picture(self, image: dict) -> bytes:
        """The file of one entry of "images"."""
        return self.get("/view", **{key: image[key] for key in ("filename", "subfolder", "type")})

    def _ask(self, request: urllib.request.Request) -> bytes:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return answer.read()


class Messages:
    """What the server tells over /ws: JSON texts as dicts, pictures as bytes.  RFC 6455, client side."""

    def __init__(self, server: Server, timeout: float | None = None):
        host, _, port = server.address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={server.client} HTTP/1.1\r\nHost: {server.address}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline().split()
        if status[1:2] != [b"101"]:
            raise ConnectionError(f"{server.address} does not speak WebSocket: {b' '.join(status).decode()}")
        while self._stream.readline().strip():
            pass

    def __iter__(self) -> Iterator[dict | bytes]:
        """Messages until the server goes away."""
        parts, kind = [], 0
        while frame := self._frame():
            final, code, data = frame
            if code == 8:  # closing
                return
            if code == 9:  # ping
                self.send(data, code=10)
            elif code < 8:
                kind = code or kind
                parts.append(data)
                if final:
                    whole, parts = b"".join(parts), []
                    yield json.loads(whole) if kind == 1 else whole

    def send(self, data: bytes, code: int = 1) -> None:
        mask = os.urandom(4)
        size = len(data)
        head = bytes([0x80 | code]) + (
            bytes([0x80 | size]) if size < 126 else struct.pack("!BH", 0xFE, size)
        )  # we send no more than 64 KiB
        self._socket.sendall(head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))

    def close(self) -> None:
        self._socket.close()

    def _frame(self) -> tuple[bool, int, bytes] | None:
        head = self._stream.read(2)
        if len(head) < 2:
            return None
        size = head[1] & 0x7F
        if size > 125:
            size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
        return bool(head[0] & 0x80), head[0] & 0x0F, self._stream.read(size)


def variants(workflow: dict, choices: Sequence[str]) -> Iterator[tuple[dict, dict]]:
    """({NODE.INPUT: value}, prompt) for every combination of the values in NODE.INPUT=VALUE,VALUE,..."""
    settings = []
    for choice in choices:
        target, sign, values = choice.partition("=")
        title, dot, name = target.rpartition(".")
        if not sign or not dot:
            raise SystemExit(f"--set {choice!r} is not NODE.INPUT=VALUES; write for instance 'draw tom.seed=1,2'")
        node = find_node(workflow, title)
        if name not in workflow[node]["inputs"]:
            raise SystemExit(f"{title!r} has no input {name!r}; it has {', '.join(workflow[node]['inputs'])}")
        known = workflow[node]["inputs"][name]
        settings.append([(node, name, target, _value(text, known, target)) for text in values.split(",")])
    for combination in itertools.product(*settings):
        prompt = copy.deepcopy(workflow)
        for node, name, _, value in combination:
            prompt[node]["inputs"][name] = value
        yield {target: value for _, _, target, value in combination}, prompt


def _value(text: str, known: object, target: str) -> object:
    """What `text` says, as JSON or as it stands; SystemExit where the workflow has a value of another kind."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = text
    if isinstance(known, str):
        return value if isinstance(value, str) else text
    numbers = type(known) in (int, float) and type(value) in (int, float)
    if isinstance(known, bool | int | float) and type(value) is not type(known) and not numbers:
        kind = "true or false" if isinstance(known, bool) else "a number"
        raise SystemExit(f"{target} is {kind}, {json.dumps(known)} in the workflow; {text!r} is not")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number that a server reads")


def find_node(workflow: dict, title: str) -> str:
    """The id of the node that has this id or title."""
    titled = [node for node, about in workflow.items() if _title(about) == title]
    if title in workflow:
        return title
    if len(titled) != 1:
        there = ", ".join(f"{node} ({_title(about)})" for node, about in workflow.items())
        raise SystemExit(f"{len(titled)} nodes are titled {title!r}; there are: {there}")
    return titled[0]


def _title(about: dict) -> str | None:
    """What a node is called, where anybody called it anything."""
    meta = about.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return title if isinstance(title, str) and title else None


def title_of(prompt: dict, node: str | None) -> str:
    """What the browser shows above a node, which is what --set takes; else its class or its id."""
    about = prompt.get(node, {})
    return _title(about) or about.get("class_type") or f"node {node}"


def described(values: dict) -> str:
    """NODE.INPUT=VALUE, NODE.INPUT=VALUE, ..."""
    return ", ".join(f"{target}={_text(value)}" for target, value in values.items()) or "as it is"


def file_name(values: dict, own: str) -> str:
    """INPUT=VALUE_INPUT=VALUE_OWN, in characters that every system takes; with the node where INPUT alone is unclear.

    own: the name that the server gave the picture.
    """
    inputs = [target.rpartition(".")[2] for target in values]
    parts = [
        f"{name if inputs.count(name) == 1 else target}={_text(value)[:40]}"
        for name, (target, value) in zip(inputs, values.items(), strict=True)
    ]
    return cut_front("_".join(re.sub(r"[^\w.=+-]+", "-", part) for part in [*parts, own]), MOST_BYTES)


def cut_front(text: str, bytes_left: int) -> str:
    """The end of a text in no more bytes than a file system takes for a name, on whole letters."""
    text = text.encode(errors="replace")[-bytes_left:].decode(errors="ignore")
    # A mark that was put on a letter which is gone.
    return text.lstrip("".join(mark for mark in text if unicodedata.combining(mark)))


def keep(folder: Path, name: str, picture: bytes, about: dict) -> None:
    """Write a picture whole, over no other one, and a line about it into index.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path = _place(folder, name, picture)
    except (OSError, ValueError) as error:  # a name that this file system does not take, if it takes a plain one
        plain = f"picture{Path(name).suffix if Path(name).suffix.isascii() and len(Path(name).suffix) < 9 else ''}"
        path = _place(folder, plain, picture)
        _say(f"{name!r} cannot be a name here ({getattr(error, 'strerror', None) or error}): saved as {path.name}")
    line = json.dumps({"file": path.name, **about}, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    with (folder / "index.jsonl").open("a+b") as index:
        if index.tell():
            index.seek(-1, os.SEEK_END)
            # What broke off in the middle of a line keeps a line of its own.
            line = line if index.read() == b"\n" else b"\n" + line
        index.write(line)
        index.flush()
        os.fsync(index.fileno())


def _place(folder: Path, name: str, picture: bytes) -> Path:
    """The file that a picture is in: the first of that name, or of one with a number, that is no other picture."""
    path, number = folder / name, 1
    while path.exists() and path.read_bytes() != picture:
        number += 1
        path = folder / f"{Path(name).stem}_{number}{Path(name).suffix}"
    if not path.exists():
        part = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with part.open("xb") as file:
                file.write(picture)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def run_all(server: Server, prompts: Sequence[tuple[dict, dict]], save: Path | None) -> int:
    """Queue everything, report as it goes, return the number of prompts that failed.  prompts: of `variants`."""
    messages = Messages(server)  # before the first prompt, so that nothing is missed
    waiting, failed = {}, 0
    for values, prompt in prompts:
        try:
            waiting[server.queue(prompt)] = values, prompt
        except Refused as refused:
            failed += 1
            faults = "; ".join(f"{title_of(prompt, node)}: {reason}" for node, _, reason in refused.faults)
            _say(f"{described(values)}: refused: {faults or refused}")
    total = len(prompts)
    for message in messages if waiting else ():
        if isinstance(message, bytes):
            continue  # a preview picture: 8 bytes, then a JPEG or PNG
        data = message["data"]
        prompt_id = data.get("prompt_id")
        if prompt_id not in waiting:
            continue
        values, prompt = waiting[prompt_id]
        name = described(values)
        if message["type"] == "progress":
            _say(f"\r{name}: {title_of(prompt, data['node'])}: {data['value']} of {data['max']}   ", end="")
        if message["type"] not in ENDINGS:
            continue
        del waiting[prompt_id]
        if message["type"] == "execution_success":
            images = [
                (node, image)
                for node, shown in server.outputs(prompt_id).items()
                for image in shown.get("images", [])
                if image["type"] == "output"
            ]
            _say(f"\r{name}: done, {len(images)} pictures ({total - len(waiting)} of {total})          ")
            for node, image in images if save else ():
                about = {"values": values, "node": title_of(prompt, node), "prompt_id": prompt_id}
                keep(save, file_name(values, Path(image["filename"]).name), server.picture(image), about)
        else:
            failed += 1
            reason = data.get("exception_message", "interrupted").strip()
            _say(f"\r{name}: {title_of(prompt, data.get('node_id'))}: {reason}")
        if not waiting:
            break
    else:
        failed += len(waiting)
        if waiting:
            _say(f"\nthe server went away with {len(waiting)} prompts unfinished")
    messages.close()
    return failed


def _say(text: str, end: str = "\n") -> None:
    letters = sys.stdout.encoding or "utf-8"  # a terminal that lacks some must not cost what is drawn
    sys.stdout.write(text.encode(letters, "backslashreplace").decode(letters) + end)
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Queue a workflow many times, with other values each time.")
    parser.add_argument("workflow", type=Path, help="a workflow in API format, such as workflows/api/*.json")
    parser.add_argument("--server", default="127.0.0.1:8188", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUES",
        help="values to try, separated by commas; several --set are combined",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="also download the pictures to this folder, with their values in their names and in index.jsonl",
    )
    chosen = parser.parse_args(arguments)
    try:
        workflow = copy.deepcopy(json.loads(chosen.workflow.read_text(encoding="utf-8-sig")))  # as each prompt is
    except OSError as error:
        parser.error(f"{chosen.workflow} cannot be read: {error.strerror}")
    except ValueError:
        parser.error(f"{chosen.workflow} is no workflow: it is not JSON")
    except RecursionError:
        parser.error(f"{chosen.workflow} is no workflow: its JSON is nested too deeply")
    if not isinstance(workflow, dict) or not all(
        isinstance(node, dict) and isinstance(node.get("inputs"), dict) for node in workflow.values()
    ):
        parser.error(
            f"{chosen.workflow} is not in API format; export it with Export (API) in the browser, or see workflows/api/"
        )
    prompts = list(variants(workflow, chosen.set))
    try:
        if chosen.save is not None:
            chosen.save.mkdir(parents=True, exist_ok=True)
        return min(run_all(Server(chosen.server), prompts, chosen.save), 1)
    except (ConnectionError, TimeoutError, urllib.error.URLError) as error:
        _say(f"no ComfyUI answers at {chosen.server}: {error}")
        return 1
    except (OSError, ValueError) as error:
        _say(f"{str(chosen.save)[:200]!r} cannot be written to: {getattr(error, 'strerror', None) or error}")
        return 1
    except KeyboardInterrupt:
        _say("\nstopped; what is queued goes on in ComfyUI")
        return 130


if __name__ == "__main__":
    sys.exit(main())
