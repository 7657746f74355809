"""The servers of a team, as a test runs them: real ones, on free ports of this machine, gone when the test ends.

What starts them is read from deploy/compose.yaml, so that a test runs the very commands that a team runs; folders,
addresses and ports alone are others.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from projects import ROOT

PATIENCE = 120  # seconds until a server counts as not starting
SCRIPTS = str(Path(sys.executable).parent)


def free_port() -> int:
    """A port that nothing listens on, and that nothing else takes before a server does.

    It lies below those that the system gives to connections, in a range of this process of pytest alone.
    """
    for port in _ports:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


_run, _worker = int(os.environ["LATENTLOOM_TESTS_PID"]), int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_ports = iter(range(20_000 + 2000 * (_run % 6) + 400 * (_worker % 5), 32_400))


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
        ready: whether it answers.
        folder: where it runs; its output goes to ``server.log`` there.
        user: who runs it; None is the one who runs the tests.
        environment: beside what the tests themselves have, without addresses and secrets of other servers.
    """

    def __init__(
        self,
        command: list[str],
        ready: Callable[[], bool],
        folder: Path,
        environment: Mapping[str, str],
        *,
        user: pwd.struct_passwd | None = None,
    ) -> None:
        foreign = ("PYTHONPATH", "MLFLOW_", "AWS_", "PG")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        inherited["PATH"] = os.pathsep.join([SCRIPTS, inherited["PATH"]])
        self.command, self.folder, self._ready, self._user = command, folder, ready, user
        lean = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        lean |= {"MLFLOW_WORKERS": "1"}  # of MLflow's pages: each of four would make all imports
        self.environment = inherited | lean | environment
        self._process: subprocess.Popen | None = None

    @property
    def log(self) -> str:
        """All that it printed, over all starts."""
        return (self.folder / "server.log").read_text(errors="replace")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with open(self.folder / "server.log", "a") as log:
            as_user = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if self._user else {}
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **as_user,
            )
        deadline = time.monotonic() + PATIENCE
        while not self._ready():
            assert self._process.poll() is None and time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill it and its workers at once, as a power cut would."""
        self._signal(signal.SIGKILL)
        while self._has_processes():
            time.sleep(0.01)

    def freeze(self) -> None:
        """Stop its time: it takes connections and answers none, as a server does that is far too busy."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let its time continue."""
        self._signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask it to stop, and see it and its workers go."""
        self._signal(number)
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
def serving(command: list[str], port: int, folder: Path, **environment: str) -> Iterator[Server]:
    """Run a web server until the block ends."""
    server = Server(command, lambda: answers(f"http://127.0.0.1:{port}/health"), folder, environment)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def composed(service: str, values: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """A service's command in deploy/compose.yaml, and its environment, with ``values`` for the variables there."""
    described = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))["services"][service]

    def filled(text: str) -> str:
        return re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: values[found[1]], text)

    environment = {name: filled(value) for name, value in described["environment"].items()}
    command = [*described.get("entrypoint", []), *described.get("command", [])]
    return [filled(word) for word in command], environment


@dataclass(frozen=True)
class ObjectStore:
    """An S3-compatible store. A bucket is made by the first write to it; before that, to list it is an error.

    Attributes:
        endpoint: its address, for ``endpointurl`` of a DVC remote.
        secret: the secret key.
        environment: what a client needs to know: the two keys, and the address.
        server: what runs it.
    """

    endpoint: str
    secret: str
    environment: dict[str, str]
    server: Server


@contextmanager
def seaweedfs(folder: Path) -> Iterator[ObjectStore]:
    """An S3-compatible store, empty, that keeps its data in ``folder``; up in three seconds."""
    kinds = ("master", "volume", "filer", "s3")
    ports = [free_port() for _ in range(2 * len(kinds))]
    secret = os.urandom(16).hex()
    command, keys = composed("store", {"S3_ACCESS_KEY": "latentloom", "S3_SECRET_KEY": secret})
    command += [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64"]
    command += [f"-{kind}.port={port}" for kind, port in zip(kinds, ports, strict=False)]
    command += [f"-{kind}.port.grpc={port}" for kind, port in zip(kinds, ports[len(kinds) :], strict=True)]
    endpoint = f"http://127.0.0.1:{ports[3]}"
    server = Server(command, lambda: answers(f"{endpoint}/healthz"), folder, keys)
    try:
        server.start()
        yield ObjectStore(endpoint, secret, keys | {"AWS_ENDPOINT_URL": endpoint}, server)
    finally:
        server.kill()  # asked to stop, it would take fifteen seconds
        for port in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


def postgres_programs() -> Path | None:
    """The folder of Postgres' programs, the newest that is installed; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


@contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """A Postgres with an empty database; the environment that clients find it by, its password included."""
    programs, port, password = postgres_programs(), free_port(), os.urandom(16).hex()
    _, image = composed("postgres", {"POSTGRES_PASSWORD": password})
    client = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": image["POSTGRES_USER"], "PGPASSWORD": password}
    user = _anyone_but_root()
    with TemporaryDirectory(prefix="postgres-") as temporary:
        folder = Path(temporary)
        (folder / "password").write_text(password)
        if user:
            for path in (folder, folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)

        def run(program: str, *arguments: str) -> bool:
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
            result = subprocess.run(
                [programs / program, *arguments], env=os.environ | client, cwd=folder, capture_output=True, **as_user
            )
            return result.returncode == 0

        data = folder / "data"
        made = run(
            "initdb",
            *("--pgdata", str(data), "--username", client["PGUSER"], "--pwfile", str(folder / "password")),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--no-sync"),
        )
        assert made, "initdb failed"
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        server = Server(command, lambda: run("pg_isready"), folder, {}, user=user)
        try:
            server.start()
            assert run("createdb", image["POSTGRES_DB"])
            yield client
        finally:
            server.stop(signal.SIGINT)  # without waiting for clients to go


def _anyone_but_root() -> pwd.struct_passwd | None:
    """Who may run Postgres, which root may not run; None: the present user."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


@dataclass(frozen=True)
class TrackingServer:
    """MLflow's server, with accounts.

    Attributes:
        address: for ``MLFLOW_TRACKING_URI``.
        admin: the environment in which a client is the administrator.
        secrets: what nobody else may come to know, by name.
        server: what runs it.
    """

    address: str
    admin: dict[str, str]
    secrets: dict[str, str]
    server: Server


@contextmanager
def mlflow_server(folder: Path, database: Mapping[str, str], store: ObjectStore) -> Iterator[TrackingServer]:
    """The MLflow server of deploy/compose.yaml, on a database and a store that run already."""
    port = free_port()
    secrets = {name: os.urandom(16).hex() for name in ("MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY")}
    values = secrets | {
        "ALLOWED_HOSTS": f"127.0.0.1:{port}",
        "POSTGRES_PASSWORD": database["PGPASSWORD"],
        "S3_ACCESS_KEY": store.environment["AWS_ACCESS_KEY_ID"],
        "S3_SECRET_KEY": store.secret,
    }
    command, environment = composed("mlflow", values)
    command += ["--host=127.0.0.1", f"--port={port}"]
    environment |= database | {
        "MLFLOW_S3_ENDPOINT_URL": store.endpoint,
        "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "deploy" / "basic_auth.ini"),
    }
    admin = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": secrets["MLFLOW_ADMIN_PASSWORD"]}
    with serving(command, port, folder, **environment) as server:
        address = f"http://127.0.0.1:{port}"
        yield TrackingServer(address, admin | {"MLFLOW_TRACKING_URI": address}, secrets, server)
