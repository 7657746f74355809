"""From a run's journal to MLflow, in order, and from a thread of its own while the run lasts.

A store that cannot be reached costs one warning. The thread tries again until the run ends; what is left then waits in
the journal for ``latentloom sync``, which is `sync`. What may have arrived before a connection broke is sent again,
which changes nothing: MLflow keeps one copy of a metric with the same time, step and value, params and tags have one
value, files have one name, data sets one digest, and for images it is asked first. To a run that another journal has
finished, nothing is sent.
"""

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import filelock

from latentloom.errors import UserError
from latentloom.tracking.journal import Event, Journal, journals
from latentloom.tracking.store import (
    current_target,
    experiment_id,
    first_line,
    has_error_code,
    open_client,
    search_runs,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

KEY_TAG, PARENT_TAG = "latentloom.key", "mlflow.parentRunId"
EVERY = 10.0  # seconds between two deliveries
PATIENCE = 60.0  # seconds that the end of a run waits for the last delivery
LARGEST_BATCH = 25  # events per request: MLflow takes 1,000 metrics, and a machine of eight GPUs has 36


class Synced(NamedTuple):
    """What became of a journal: a message for the user, and whether some of it still waits."""

    key: str
    message: str
    waits: bool = False


def deliver_until(stopping: threading.Event, journal: Journal, root: Path, measure: Callable[[], None]) -> None:
    """Deliver the journal every few seconds, and once more after ``stopping`` is set; ``measure`` in between."""
    last = warned = False
    while not last:
        last = stopping.is_set()
        try:
            deliver(journal, root)
        except Exception as error:
            if not warned:
                warnings.warn(
                    f"MLflow could not be written to ({first_line(error)}). The run continues; what it logs waits in "
                    f"{journal.folder}",
                    stacklevel=1,
                )
            warned = True
        if not stopping.wait(EVERY):
            measure()


def deliver(journal: Journal, root: Path) -> None:
    """Deliver all that the journal holds now to the store of the project at ``root``.

    Raises:
        Exception: whatever kept it from arriving; what did arrive is marked.
    """
    client = open_client(root)
    run_id = _run_id(client, journal, root)
    for batch, end in _batches(journal):
        if not journal.about["known"]:
            _send_or_leave_out(client, run_id, batch, journal.folder)
        journal.update(delivered=end)


def sync(root: Path) -> Iterator[Synced]:
    """Deliver the journals that wait, one after the other.

    A run whose process was killed is marked ``KILLED``; a run whose process is alive is left alone. Trainings, whose
    keys are hexadecimal digits alone, come before the evaluations that are linked to them.
    """
    folders = [path.parent for path in journals(root).glob("*/about.json")]
    for folder in sorted(folders, key=lambda folder: ("-" in folder.name, folder.name)):
        try:
            with closing(Journal(folder)) as journal:
                yield _sync(journal, root)
        except filelock.Timeout:
            yield Synced(folder.name, "still running")
        except (OSError, ValueError) as error:
            yield Synced(folder.name, f"cannot be read: {first_line(error)}", waits=True)


def _sync(journal: Journal, root: Path) -> Synced:
    if (target := journal.about["target"]) != current_target():
        message = f"waits for {target or 'the store of this project'}: set MLFLOW_TRACKING_URI accordingly"
        return Synced(journal.key, message, waits=True)
    if journal.status in (None, "RUNNING"):
        journal.append({"kind": "status", "status": "KILLED"})
    waiting = journal.waiting
    if not waiting:
        return Synced(journal.key, "nothing to deliver")
    try:
        deliver(journal, root)
    except Exception as error:
        return Synced(journal.key, f"{journal.waiting} entries still wait: {first_line(error)}", waits=True)
    return Synced(journal.key, f"delivered {waiting} entries")


def _run_id(client: "MlflowClient", journal: Journal, root: Path) -> str:
    """The run's id in the store, which is created if need be.

    It is found by our own key: MLflow's id may never have come back.
    """
    run, about = _find(client, KEY_TAG, journal.key), journal.about
    if run is None:
        tags, experiment = {KEY_TAG: journal.key, **_link(client, journal)}, experiment_id(client, root)
        run = client.create_run(experiment, start_time=about["started"], tags=tags, run_name=about["name"])
    if run.info.run_id != about["mlflow_run_id"]:  # a store that lost the run, or another one, gets all of it
        known = run.info.status == "FINISHED"  # by another journal, which is gone, or of which this is a copy
        journal.update(mlflow_run_id=run.info.run_id, delivered=0, known=known)
    return run.info.run_id


def _find(client: "MlflowClient", tag: str, value: str) -> "Run | None":
    """The newest run with that tag."""
    return next(iter(search_runs(client, f"tags.`{tag}` = '{value}'", most=1)), None)


def _link(client: "MlflowClient", journal: Journal) -> dict[str, str]:
    """The tag by which MLflow knows a run's parent; none where the store does not have that.

    Raises:
        UserError: when the parent waits to be delivered: once a run is created, nobody would link it.
    """
    if journal.about["parent"] is None:
        return {}
    tag, value = journal.about["parent"]
    if parent := _find(client, tag, value):
        return {PARENT_TAG: parent.info.run_id}
    if tag == KEY_TAG and (journal.folder.parent / value).exists():
        raise UserError(f"the run {value} that it belongs to is still to be delivered")
    return {}


def _batches(journal: Journal) -> Iterator[tuple[list[Event], int]]:
    """The events that wait, and where they end, as requests: metrics together, anything else alone."""
    for kind, waiting in groupby(journal.events(journal.about["delivered"]), key=lambda own: own[0]["kind"]):
        while batch := list(islice(waiting, LARGEST_BATCH if kind == "metrics" else 1)):
            yield [event for event, _ in batch], batch[-1][1]


def _send_or_leave_out(client: "MlflowClient", run_id: str, batch: list[Event], folder: Path) -> None:
    """Send events, with a warning where MLflow will not have them.

    It is asked twice: where two runs name a new data set at the same moment, it rejects the second, which then exists.
    """
    for last in (False, True):
        try:
            _send(client, run_id, batch, folder)
            return
        except Exception as error:
            if not has_error_code(error, "INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            if last:
                kind, reason = batch[0]["kind"], first_line(error)
                warnings.warn(f"MLflow rejected {kind} ({reason}); they are left out", stacklevel=3)


def _send(client: "MlflowClient", run_id: str, batch: list[Event], folder: Path) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    event = batch[0]
    if "file" in event and not (folder / event["file"]).exists():
        return  # another store had it, or a power cut lost it
    match event["kind"]:
        case "metrics":
            values = [(own, key, value) for own in batch for key, value in own["values"].items()]
            client.log_batch(
                run_id, metrics=[Metric(key, value, own["time"], own["step"]) for own, key, value in values]
            )
        case "params":
            client.log_batch(run_id, params=[Param(*param) for param in event["values"].items()])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in event["values"].items()])
        case "image":
            _send_image(client, run_id, event, folder / event["file"])
        case "file":
            client.log_artifact(run_id, str(folder / event["file"]), event["folder"])
        case "dataset":
            source, profile = json.dumps({"uri": event["source"]}), json.dumps({"num_rows": event["rows"]})
            dataset = Dataset(event["name"], event["digest"], "local", source, profile=profile)
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])])
        case "status" if event["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        case "status":
            client.set_terminated(run_id, event["status"], end_time=event["time"])


def _send_image(client: "MlflowClient", run_id: str, event: Event, path: Path) -> None:
    from PIL import Image

    key, step, timestamp = event["key"], event["step"], event["time"]
    # MLflow names an image so, and writes its small copy last: a kill may come in between.
    name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{timestamp}+"
    paths = (artifact.path for artifact in client.list_artifacts(run_id, "images"))
    if not any(path.startswith(name) and path.endswith("compressed.webp") for path in paths):
        with Image.open(path) as image:
            client.log_image(run_id, image, key=key, step=step, timestamp=timestamp, synchronous=True)
