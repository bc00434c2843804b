"""A ComfyUI server of its own process, driven over HTTP on the loopback interface.

Knows nothing of pytest. Every wait is bounded, and the process ends with the ``with`` block.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PACK_FOLDER = "ComfyUI-TriLoRA"
START_SECONDS = 240
PROMPT_SECONDS = 600
STOP_SECONDS = 20


class HostError(Exception):
    """The server refused a prompt, a node of it failed, or the server itself ended or did not answer in time."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _identity(prompt: dict[str, dict], node: str) -> str:
    """A node and everything that it depends on, whatever the ids."""

    def resolved(value):
        linked = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in prompt
        return [_identity(prompt, value[0]), value[1]] if linked else value

    inputs = {name: resolved(value) for name, value in prompt[node]["inputs"].items()}
    return hashlib.sha256(json.dumps([prompt[node]["class_type"], inputs], sort_keys=True).encode()).hexdigest()


class StartedHost:
    """Starts ``main.py --cpu`` of the ComfyUI at ``path`` with ``base`` as its base directory.

    ``pack`` appears as ``<base>/custom_nodes/ComfyUI-TriLoRA`` and ``models`` as ``<base>/models``, both as links; None
    leaves them out. Attributes once started: ``url``, ``base``, ``object_info`` (node class -> description), ``log``.
    """

    def __init__(self, path: Path, base: Path, pack: Path | None = None, models: Path | None = None):
        self.path, self.base = Path(path), Path(base)
        for folder in ("custom_nodes", "input", "output", "temp", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        if pack:
            (self.base / "custom_nodes" / PACK_FOLDER).symlink_to(pack, target_is_directory=True)
        if models:
            (self.base / "models").symlink_to(models, target_is_directory=True)
        self.object_info: dict[str, dict] = {}
        self._shown: dict[str, dict] = {}  # what nodes have shown, by `_identity`
        self._log_file = self.base / "server.log"
        self._process: subprocess.Popen | None = None
        self._port = 0
        # A proxy in the environment must not see loopback requests.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def log(self) -> str:
        """Everything the server has printed so far."""
        return self._log_file.read_text(encoding="utf-8", errors="replace") if self._log_file.exists() else ""

    def __enter__(self) -> "StartedHost":
        self._port = free_port()
        command = [
            sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self._port),
            "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
            "--disable-auto-launch", "--disable-api-nodes",
        ]  # fmt: skip
        # one thread: on a busy machine two that wait for each other are thirty times slower than one
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.path, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process, by force if it does not go within STOP_SECONDS."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
        self._process = None

    def get(self, route: str, timeout: float = 60) -> bytes:
        """Body of ``GET route``; ``route`` starts with a slash."""
        with self._opener.open(self.url + route, timeout=timeout) as answer:
            return answer.read()

    def get_json(self, route: str, timeout: float = 60):
        return json.loads(self.get(route, timeout))

    def post_json(self, route: str, data, timeout: float = 60):
        """Answer of ``POST route`` with ``data`` as JSON; None if the answer is empty."""
        request = urllib.request.Request(
            self.url + route, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with self._opener.open(request, timeout=timeout) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def queue_prompt(self, prompt: dict[str, dict]) -> str:
        """Queues a prompt in API format and returns its id without waiting for it."""
        try:
            return self.post_json("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise HostError(f"the server refused the prompt ({error.code}): {error.read().decode()}") from error

    def wait_for(self, prompt_id: str, timeout: float = PROMPT_SECONDS) -> dict:
        """The history entry of a queued prompt once it is done: ``outputs`` by node id, and ``status``."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check_alive()
            entry = self.get_json(f"/history/{prompt_id}", timeout).get(prompt_id)  # a thrashing machine answers late
            if entry and entry["status"]["status_str"] == "success":
                return entry
            if entry:
                raise HostError(self._failure(entry))
            time.sleep(0.1)
        raise HostError(f"prompt {prompt_id} was not done after {timeout:.0f} s; log:\n{self.log[-4000:]}")

    def post_prompt(self, prompt: dict[str, dict], timeout: float = PROMPT_SECONDS) -> dict:
        """Runs a prompt in API format and returns its history entry; raises HostError with the failing node's error.

        Some hosts leave out of the history what cached nodes show: it is what they showed when they ran.
        """
        entry = self.wait_for(self.queue_prompt(prompt), timeout)
        for node in prompt:
            identity = _identity(prompt, node)
            if node in entry["outputs"]:
                self._shown[identity] = entry["outputs"][node]
            elif identity in self._shown:
                entry["outputs"][node] = self._shown[identity]
        return entry

    def view(self, file: dict) -> bytes:
        """Content of a file named in a history entry's outputs: {filename, subfolder, type}."""
        query = "&".join(f"{key}={urllib.request.quote(file[key])}" for key in ("filename", "subfolder", "type"))
        return self.get(f"/view?{query}")

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._check_alive()
            try:
                self.object_info = self.get_json("/object_info", timeout=30)
                return
            except OSError:  # refused while it is still importing
                time.sleep(0.25)
        raise HostError(f"the server did not answer within {START_SECONDS} s; log:\n{self.log[-4000:]}")

    def _check_alive(self) -> None:
        code = self._process.poll() if self._process else None
        if self._process is None or code is not None:
            raise HostError(f"the server has ended with exit code {code}; log:\n{self.log[-4000:]}")

    @staticmethod
    def _failure(entry: dict) -> str:
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                trace = "".join(message.get("traceback", []))
                return (
                    f"node {message['node_id']} ({message['node_type']}) failed: "
                    f"{message['exception_type']}: {message['exception_message']}\n{trace}"
                )
        return f"the prompt ended as {entry['status']['status_str']}: {entry['status']['messages']}"
