"""A tracking server that is down, killed, back again, or hangs: no run waits for it, and all of it arrives, once."""

import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from logged_runs import log_training, stored
from servers import Server, answers, free_port
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.tracking import delivery
from latentloom.tracking.delivery import KEY_TAG
from latentloom.tracking.journal import journals
from latentloom.tracking.runs import new_run
from latentloom.tracking.store import experiment_id, open_client

pytestmark = pytest.mark.fault

STEPS = 40
TIMEOUT = 4  # seconds that a request waits for a server that hangs: far more than a machine under load logs for
DISTURBED = ("killed for good", "down at first, killed, and back", "hanging")
WARNING = "MLflow could not be written to"
WAITS = "`latentloom sync` delivers them"


@dataclass
class Training:
    """A process that logs what a training does, as many steps as it is asked for."""

    root: Path
    steps: int = 0
    seconds: list[float] = field(default_factory=list)  # that the calls to log took

    def begin(self) -> None:
        self.root.mkdir()
        context = get_context("fork")
        self.orders, inner = context.Pipe()
        self.process = context.Process(target=_train, args=(self.root, inner))
        self.process.start()

    def log(self, steps: int) -> None:
        """Log so many steps, and see the process continue at once."""
        began = time.monotonic()
        self.orders.send(range(self.steps + 1, self.steps + steps + 1))
        self.orders.recv()
        self.steps += steps
        self.seconds.append(time.monotonic() - began)

    def finish(self) -> None:
        self.log(STEPS - self.steps)
        self.orders.send(None)
        self.process.join(60)
        assert self.process.exitcode == 0, self.printed

    @property
    def printed(self) -> str:
        return (self.root / "printed.txt").read_text()

    @property
    def delivered(self) -> int:
        """How many bytes of its journal the server has."""
        (about,) = journals(self.root).glob("*/about.json")
        found = re.search(r'"delivered": (\d+)', about.read_text())
        return int(found[1]) if found else 0

    @property
    def key(self) -> str:
        return (self.root / "key.txt").read_text()

    def wait_until(self, moment: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not moment():
            assert self.process.is_alive() and time.monotonic() < deadline, self.printed
            time.sleep(0.01)

    def wait_for_delivery(self) -> None:
        """Log a few steps and see them arrive."""
        self.log(5)
        logged = next(journals(self.root).glob("*/events.jsonl")).stat().st_size
        self.wait_until(lambda: self.delivered >= logged)


def _train(root: Path, orders: Connection) -> None:
    delivery.EVERY = 0.1
    with open(root / "printed.txt", "w", buffering=1) as printed, redirect_stderr(printed):
        warnings.showwarning = lambda message, *_: print(message, file=printed)  # pytest would keep it
        with new_run(root) as run:
            (root / "key.txt").write_text(run.key)
            while (steps := orders.recv()) is not None:
                log_training(run, steps)
                orders.send("logged")


@dataclass(frozen=True)
class Day:
    """What the server went through: the trainings by their disturbance, what is stored of them, what `sync` said."""

    trainings: dict[str, Training]
    stored: dict[str, dict]
    runs: int
    synced: str
    synced_again: str


def sync(training: Training) -> str:
    """What `latentloom sync` says in a training's project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(training.root)
        result = CliRunner().invoke(app, ["sync"])
    assert result.exit_code == 0, result.output
    return result.output


def everything(training: Training, artifacts: Path) -> dict:
    """All that the server has of a training's run."""
    client = open_client(training.root)
    experiment = experiment_id(client, training.root)
    (run,) = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{training.key}'")
    found = stored(client, run.info.run_id, artifacts / experiment / run.info.run_id / "artifacts")
    found["metrics"] = {key: values for key, values in found["metrics"].items() if not key.startswith("system/")}
    return found


@pytest.fixture(scope="module")
def day(tmp_path_factory) -> Iterator[Day]:
    home, port = tmp_path_factory.mktemp("server"), free_port()
    address, artifacts = f"http://127.0.0.1:{port}", home / "artifacts"
    command = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", str(artifacts)),
    ]
    server = Server(command, lambda: answers(f"{address}/health"), home, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", address)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT))
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        trainings = {name: Training(home / name) for name in ("undisturbed", *DISTURBED)}
        undisturbed, killed, back, hanging = trainings.values()
        try:
            back.begin()
            back.log(5)
            back.wait_until(lambda: WARNING in back.printed)
            server.start()
            back.wait_for_delivery()

            undisturbed.begin()
            undisturbed.finish()

            hanging.begin()
            hanging.wait_for_delivery()
            server.freeze()
            hanging.finish()
            server.thaw()

            killed.begin()
            killed.wait_for_delivery()
            server.kill()
            back.log(10)
            killed.finish()
            server.start()
            back.wait_for_delivery()
            back.finish()

            synced, again = ("".join(sync(training) for training in (killed, hanging)) for _ in range(2))
            found = {name: everything(training, artifacts) for name, training in trainings.items()}
            client = open_client(home)
            runs = len(client.search_runs([experiment_id(client, home)]))
            yield Day(trainings, found, runs, synced, again)
        finally:
            server.thaw()
            server.kill()


def test_an_undisturbed_run_is_on_the_server_whole(day):
    whole = day.stored["undisturbed"]
    assert day.trainings["undisturbed"].printed == ""
    assert [step for step, _ in whole["metrics"]["train/mae"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in whole["metrics"]["val/mae"]] == list(range(2, STEPS + 1, 2))
    images = [name for name, _ in whole["files"] if name.startswith("images/samples") and name.endswith(".png")]
    assert len(images) == STEPS / 2
    assert whole["status"] == "FINISHED"
    assert sum(whole["data sets"].values()) == 2


@pytest.mark.parametrize("disturbance", DISTURBED)
def test_the_run_neither_stops_nor_waits(day, disturbance):
    training = day.trainings[disturbance]
    assert training.steps == STEPS
    assert max(training.seconds) < TIMEOUT


@pytest.mark.parametrize("disturbance", DISTURBED)
def test_there_is_one_warning(day, disturbance):
    assert day.trainings[disturbance].printed.count(WARNING) == 1


def test_what_a_server_missed_that_came_back_is_delivered_by_the_run_itself(day):
    assert WAITS not in day.trainings["down at first, killed, and back"].printed


def test_what_a_server_missed_that_stayed_away_waits_on_the_disk_and_is_delivered_by_sync(day):
    for disturbance in ("killed for good", "hanging"):
        training = day.trainings[disturbance]
        assert WAITS in training.printed
        assert re.search(rf"{training.key}: delivered \d+ entries", day.synced)
    assert day.synced_again == ""


@pytest.mark.parametrize("disturbance", DISTURBED)
def test_nothing_is_lost_and_nothing_doubled(day, disturbance):
    assert day.stored[disturbance] == day.stored["undisturbed"]


def test_there_is_one_run_per_training(day):
    assert day.runs == len(day.trainings)
