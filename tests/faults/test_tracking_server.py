"""A tracking server that is down, is killed, comes back or hangs: the training goes on, and all of it arrives, once."""

import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from projects import Project
from servers import Server, answers, free_port
from stages import copy_project, end, finish, printed, read_outs, start
from tiny_models import save_clip
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.tracking.runs import new_run

pytestmark = pytest.mark.fault

STEPS = 60
PAUSE = 0.2  # seconds after each step: time for a server to go and come back
DISTURBED = ("killed for good", "down at first, killed, and back", "hanging")
WARNING = "MLflow could not be written to"
WAITS = "`latentloom sync` delivers them"


@dataclass(frozen=True)
class Training:
    """What a training printed and made, and the key of its run."""

    printed: str
    outs: dict[str, bytes]
    key: str


@dataclass(frozen=True)
class Day:
    """What the server went through: the trainings by their disturbance, where the server is, and what `sync` said."""

    trainings: dict[str, Training]
    address: str
    artifacts: Path
    synced: str
    resynced: str


def sync(project: Project, address: str) -> str:
    """What `latentloom sync` says in a project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        patch.setenv("MLFLOW_TRACKING_URI", address)
        result = CliRunner().invoke(app, ["sync"])
    assert result.exit_code == 0, result.output
    return result.output


def restart(server: Server, training: BaseProcess) -> None:
    """Start the server again in a moment, as the training sees it."""
    os.kill(training.pid, signal.SIGSTOP)
    server.start()
    os.kill(training.pid, signal.SIGCONT)


def journal(project: Project) -> Path:
    (folder,) = project.folder.glob(".state/tracking/*")
    return folder


def delivered(project: Project) -> int:
    counts = list(project.folder.glob(".state/tracking/*/delivered"))
    return int(counts[0].read_text()) if counts else 0


def logged(project: Project) -> int:
    return (journal(project) / "events.jsonl").read_text().count("\n")


def wait(project: Project, training: BaseProcess, moment: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not moment():
        assert training.is_alive(), f"the training ended too early: {end(project, training)}"
        assert time.monotonic() < deadline, printed(project)
        time.sleep(0.01)


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def prepared(make_project, tmp_path_factory) -> Project:
    """A project that has its caches, and nothing trained."""
    project = make_project("tracked-from-afar")
    project.set_params(
        ingest__image_size=32,
        encode_text__model=str(save_clip(tmp_path_factory.mktemp("clip"), dim=16)),
        train__steps=STEPS,
        train__precision="fp32",
        monitor__log_every=1,
        monitor__validate_every=STEPS // 4,
        monitor__sample_every=STEPS // 2,
    )
    for stage in ("ingest", "encode_images", "encode_text"):
        finish(project, stage)
    return project


@pytest.fixture(scope="module")
def day(prepared, tmp_path_factory) -> Day:
    home, port = tmp_path_factory.mktemp("server"), free_port()
    address, artifacts = f"http://127.0.0.1:{port}", home / "artifacts"
    command = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", str(artifacts)),
    ]
    server = Server(command, lambda: answers(f"{address}/health"), home, {})
    projects: dict[str, Project] = {}
    trainings: dict[str, Training] = {}

    def begin(name: str, pause: float = PAUSE, timeout: int = 60) -> tuple[Project, BaseProcess]:
        projects[name] = copy_project(prepared, home / name / "project")
        environment = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout)}
        return projects[name], start(projects[name], "train", deliver_every=0.1, pause=pause, **environment)

    def finished(name: str, training: BaseProcess) -> None:
        project = projects[name]
        said = end(project, training)
        key = (
            json.loads((project.folder / "reports/train/run.json").read_text())["run"] if not training.exitcode else ""
        )
        trainings[name] = Training(said, read_outs(project, "train"), key)

    try:
        server.start()
        _, training = begin("undisturbed", pause=0.0)
        finished("undisturbed", training)

        name = "killed for good"
        project, training = begin(name)
        wait(project, training, lambda: delivered(project) > 15)
        server.kill()
        finished(name, training)

        name = "down at first, killed, and back"
        project, training = begin(name)
        wait(project, training, lambda: WARNING in printed(project))
        restart(server, training)
        wait(project, training, lambda: delivered(project) > 15)
        server.kill()
        away = logged(project)
        wait(project, training, lambda: logged(project) > away + 5)
        restart(server, training)
        wait(project, training, lambda: delivered(project) > away)
        finished(name, training)

        name = "hanging"
        project, training = begin(name, timeout=2)
        wait(project, training, lambda: delivered(project) > 15)
        server.freeze()
        finished(name, training)
        server.thaw()

        synced = [sync(projects[name], address) for name in ("killed for good", "hanging", "hanging")]
        yield Day(trainings, address, artifacts, "".join(synced[:2]), synced[2])
    finally:
        server.thaw()
        server.kill()


def stored(day: Day, key: str) -> dict:
    """All that the server has of a run, as far as it is the same for two runs of one training."""
    client = MlflowClient(day.address)
    experiment = client.get_experiment_by_name("latentloom")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`latentloom.key` = '{key}'")
    metrics = {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        assert max(Counter((metric.step, metric.timestamp) for metric in history).values()) == 1, name
        changing = name == "train/images_per_second"
        if not name.startswith("system/"):
            metrics[name] = [(metric.step, None if changing else metric.value) for metric in history]
    root = day.artifacts / experiment.experiment_id / run.info.run_id / "artifacts"
    files = Counter(
        (re.sub(r"timestamp.*(?=\.png|compressed|\.webp)", "", str(path.relative_to(root))), path.read_bytes())
        for path in root.rglob("*")
        if path.is_file()
    )
    own = ("latentloom.key", "mlflow.runName")
    return {
        "status": run.info.status,
        "metrics": metrics,
        "params": run.data.params,
        "tags": {name: value for name, value in run.data.tags.items() if name not in own},
        "data sets": Counter((given.dataset.name, given.dataset.digest) for given in run.inputs.dataset_inputs),
        "files": files,
    }


@pytest.fixture(scope="module")
def whole(day) -> dict:
    return stored(day, day.trainings["undisturbed"].key)


def test_an_undisturbed_training_is_on_the_server_whole(day, whole):
    assert WARNING not in day.trainings["undisturbed"].printed
    assert [step for step, _ in whole["metrics"]["train/mae"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in whole["metrics"]["val/mae"]] == [STEPS // 4 * part for part in (1, 2, 3, 4)]
    names = [name for name, _ in whole["files"]]
    assert sum(name.startswith("images/samples") and name.endswith(".png") for name in names) == 2
    assert {"params.yaml", "model/config.json"} <= set(names)
    assert whole["status"] == "FINISHED"
    assert sum(whole["data sets"].values()) == 2


@pytest.mark.parametrize("disturbance", DISTURBED)
def test_the_training_goes_on_and_makes_the_same_model(day, disturbance):
    disturbed, undisturbed = day.trainings[disturbance], day.trainings["undisturbed"]
    assert len(undisturbed.outs["models/unet/model.safetensors"]) > 1000
    assert disturbed.outs == undisturbed.outs


@pytest.mark.parametrize("disturbance", DISTURBED)
def test_there_is_one_warning(day, disturbance):
    assert day.trainings[disturbance].printed.count(WARNING) == 1


def test_what_a_server_missed_that_came_back_is_delivered_by_the_training_itself(day):
    assert WAITS not in day.trainings["down at first, killed, and back"].printed


def test_what_a_server_missed_that_stayed_away_waits_on_the_disk_and_is_delivered_by_sync(day):
    for disturbance in ("killed for good", "hanging"):
        training = day.trainings[disturbance]
        assert WAITS in training.printed
        assert re.search(rf"{training.key}: delivered \d+ entries", day.synced)
    assert day.resynced == ""


@pytest.mark.parametrize("disturbance", DISTURBED)
def test_nothing_is_lost_and_nothing_doubled(day, whole, disturbance):
    arrived = stored(day, day.trainings[disturbance].key)
    for what in whole:
        assert arrived[what] == whole[what], what


class LosesTheFirstAnswer(BaseHTTPRequestHandler):
    """Passes requests on to the server; of the first run that is made, the answer is lost, as when a line breaks."""

    server_address = ""
    lost = 0

    def do_GET(self) -> None:
        given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"{self.server_address}{self.path}"
        request = urllib.request.Request(address, given or None, dict(self.headers), method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as refused:
            status, body = refused.code, refused.read()
        if self.path.endswith("/runs/create") and not type(self).lost:
            type(self).lost += 1
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_run_that_the_server_made_and_whose_answer_was_lost_is_not_made_twice(day, tmp_path, monkeypatch):
    handler = type("Handler", (LosesTheFirstAnswer,), {"server_address": day.address})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{line.server_port}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "a broken line")
        with pytest.warns(UserWarning, match=WARNING), new_run(tmp_path) as run:
            run.log_metrics({"train/mae": 0.5}, 1)
            wait_until(lambda: handler.lost)
        line.shutdown()
    assert handler.lost == 1
    client = MlflowClient(day.address)
    (made,) = client.search_runs([client.get_experiment_by_name("a broken line").experiment_id])
    assert (made.info.run_id, made.info.status, made.data.metrics["train/mae"]) == (run.id, "FINISHED", 0.5)


def test_there_is_one_run_for_each_training(day):
    client = MlflowClient(day.address)
    runs = client.search_runs([client.get_experiment_by_name("latentloom").experiment_id])
    assert len(runs) == len(day.trainings) == 1 + len(DISTURBED)
