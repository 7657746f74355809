"""The servers of a team, as a test runs them: real ones, on free ports of this machine, gone when the test ends."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 120  # seconds until a server counts as not starting
SCRIPTS = str(Path(sys.executable).parent)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def free_port() -> int:
    """A port that nothing listens on."""
    return free_ports(1)[0]


def answers(address: str) -> bool:
    """Whether a GET of the address succeeds."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


class Server:
    """A server that can be killed, and started again: one process, and those that it starts.

    Args:
        command: what runs it; programs of the virtual environment are found.
        health: the address that answers once the server is ready.
        folder: where it runs; its output goes to ``server.log`` there.
        environment: beside what the tests themselves have, without addresses and secrets of other servers.
    """

    def __init__(self, command: list[str], health: str, folder: Path, **environment: str) -> None:
        foreign = ("PYTHONPATH", "MLFLOW_", "AWS_", "PG")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        inherited["PATH"] = os.pathsep.join([SCRIPTS, inherited["PATH"]])
        self.command, self.health, self.folder = command, health, folder
        self.environment = inherited | {"MLFLOW_DISABLE_TELEMETRY": "true"} | environment
        self._process: subprocess.Popen | None = None

    @property
    def log(self) -> str:
        """All that it printed, over all starts."""
        return (self.folder / "server.log").read_text(errors="replace")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with open(self.folder / "server.log", "a") as log:
            self._process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE
        while not answers(self.health):
            assert self._process.poll() is None and time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it and its workers at once, as a power cut would."""
        self._signal(signal.SIGKILL)
        while self._has_processes():
            time.sleep(0.01)

    def stop(self) -> None:
        """Ask it to stop, and see it and its workers go."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while self._has_processes():
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(0.05)

    def _signal(self, number: int) -> None:
        if self._has_processes():
            os.killpg(self._process.pid, number)

    def _has_processes(self) -> bool:
        if self._process is None:
            return False
        self._process.poll()  # or it would stay as a zombie
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def serving(command: list[str], port: int, folder: Path, *, health: str = "/health", **env: str) -> Iterator[Server]:
    """Run a server until the block ends."""
    server = Server(command, f"http://127.0.0.1:{port}{health}", folder, **env)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@dataclass(frozen=True)
class ObjectStore:
    """An S3-compatible store that makes a bucket at its first write.

    Attributes:
        endpoint: its address, for ``endpointurl`` of a DVC remote.
        secret: the secret key.
        environment: what a client needs to know: the two keys, and the address.
    """

    endpoint: str
    secret: str
    environment: dict[str, str]


@contextmanager
def seaweedfs(folder: Path) -> Iterator[ObjectStore]:
    """An S3-compatible store, empty, that keeps its data in ``folder``; up in three seconds."""
    kinds = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(kinds))
    secret = os.urandom(16).hex()
    keys = {"AWS_ACCESS_KEY_ID": "latentloom", "AWS_SECRET_ACCESS_KEY": secret}
    command = ["weed", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-{kind}.port={port}" for kind, port in zip(kinds, ports, strict=False)]
    command += [f"-{kind}.port.grpc={port}" for kind, port in zip(kinds, ports[len(kinds) :], strict=True)]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=0"]
    command += ["-master.volumeSizeLimitMB=64"]
    endpoint = f"http://127.0.0.1:{ports[3]}"
    server = Server(command, f"{endpoint}/healthz", folder, **keys)
    try:
        server.start()
        yield ObjectStore(endpoint, secret, keys | {"AWS_ENDPOINT_URL": endpoint})
    finally:
        server.kill()  # asked to stop, it would take fifteen seconds
        for port in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()
