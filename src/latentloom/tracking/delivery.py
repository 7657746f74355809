"""From a run's journal to MLflow: in order, in batches, from a thread of its own.

A store that cannot be reached costs one warning; the thread tries again until the run ends, and what is left then waits
in the journal for ``latentloom sync``. What may have arrived before a connection broke is sent again, which changes
nothing: MLflow keeps one copy of a metric with the same time, step and value, params and tags have one value, files
have one name, and for pictures it is asked first.
"""

import itertools
import json
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentloom.tracking.charts import TAG, saved_view
from latentloom.tracking.journal import Event, Journal
from latentloom.tracking.store import current_target, experiment_id, open_client

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput
    from mlflow.tracking import MlflowClient

KEY_TAG = "latentloom.key"
EVERY = 10.0  # seconds between two deliveries
LONGEST_PAUSE = 60.0  # seconds between two tries to reach a store that is away
LARGEST_BATCH = 100  # of a request: MLflow takes no more tags or params, and ten times as many metrics


class Delivery:
    """Delivers one journal.

    Args:
        journal: what was logged.
        root: the project's root, for the store.
    """

    def __init__(self, journal: Journal, root: Path) -> None:
        self.journal, self.root = journal, root
        self.error: Exception | None = None  # of the last try
        self._client: MlflowClient | None = None
        self._pictures: set[tuple[str, int, int]] | None = None
        self._wake, self._stopping, self._warned = threading.Event(), False, False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Deliver from now on, in the background."""
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Deliver what is left, or try once more and give up."""
        self._stopping = True
        self._wake.set()
        if self._thread:
            self._thread.join()

    def deliver(self) -> None:
        """Deliver all that the journal holds now.

        Raises:
            Exception: whatever kept it from arriving; what did arrive is marked.
        """
        if self._client is None:
            client = open_client(self.root)
            self._find_run(client)
            self._client, self._pictures = client, None
        if self.journal.about["mlflow_run_id"] is None:
            self._warn(f"MLflow has no run {self.journal.key}: nothing is added to it")
            self.journal.mark_delivered(len(self.journal.events))
        while self.journal.delivered < len(self.journal.events):
            count = self.journal.delivered
            batch = _batch(self.journal.events, count)
            try:
                self._send(batch)
            except Exception as error:
                if not _is_refused(error):
                    raise
                self._warn(f"MLflow refused {batch[0]['kind']} ({first_line(error)}); they are left out")
            self.journal.mark_delivered(count + len(batch))

    def _run(self) -> None:
        pause = 0.0
        while True:
            self._wake.wait(pause)
            last = self._stopping
            try:
                self.deliver()
                self.error, pause = None, EVERY
            except Exception as error:
                self.error, self._client = error, None
                pause = min(2 * max(pause, 1.0), LONGEST_PAUSE)
                self._warn(
                    f"MLflow could not be written to ({first_line(error)}). The work goes on; what it logs waits in "
                    f"{self.journal.folder}"
                )
            if last:
                return

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)

    def _find_run(self, client: "MlflowClient") -> None:
        journal = self.journal
        if journal.about["target"] != current_target():  # begun for another store: all of it goes to this one
            journal.mark_delivered(0)
            journal.describe(target=current_target(), mlflow_run_id=None)
        if (run_id := journal.about["mlflow_run_id"]) and _has_run(client, run_id):
            return
        experiment = experiment_id(client, self.root)
        # A run that was made, and whose id never came back, is found by our own key.
        if found := client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{journal.key}'", max_results=1):
            journal.describe(mlflow_run_id=found[0].info.run_id)
            return
        if journal.about["started"] is None:  # it only adds to a run, and that is gone
            journal.describe(mlflow_run_id=None)
            return
        created = client.create_run(
            experiment,
            start_time=journal.about["started"],
            tags={KEY_TAG: journal.key},
            run_name=journal.about["name"],
        )
        journal.mark_delivered(0)
        journal.describe(mlflow_run_id=created.info.run_id)

    def _send(self, batch: list[Event]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, run_id, event = self._client, self.journal.about["mlflow_run_id"], batch[0]
        match event["kind"]:
            case "metrics":
                logged = [(each, *metric) for each in batch for metric in each["values"].items()]
                for part in _parts([Metric(key, value, each["time"], each["step"]) for each, key, value in logged]):
                    client.log_batch(run_id, metrics=part)
            case "params":
                for part in _parts([Param(*param) for param in event["values"].items()]):
                    client.log_batch(run_id, params=part)
            case "tags":
                for part in _parts([RunTag(*tag) for tag in event["values"].items()]):
                    client.log_batch(run_id, tags=part)
            case "image":
                self._send_image(event)
            case "file":
                path = self.journal.folder / event["file"]
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), event["folder"])
                elif path.exists():
                    client.log_artifact(run_id, str(path), event["folder"])
            case "dataset":
                client.log_inputs(run_id, [_dataset_input(event)])
            case "status" if event["status"] == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            case "status":
                client.set_terminated(run_id, event["status"], end_time=event["time"])

    def _send_image(self, event: Event) -> None:
        from PIL import Image

        path, run_id = self.journal.folder / event["file"], self.journal.about["mlflow_run_id"]
        if self._pictures is None:
            self._pictures = _pictures(self._client, run_id)
        if path.exists() and (event["key"], event["step"], event["time"]) not in self._pictures:
            at = {"key": event["key"], "step": event["step"], "timestamp": event["time"]}
            with Image.open(path) as image:
                self._client.log_image(run_id, image, **at, synchronous=True)
            self._show(event)

    def _show(self, event: Event) -> None:
        """Let MLflow's page open on the newest pictures; a server may not allow us to, and that is all right."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):
            experiment = self._client.get_run(self.journal.about["mlflow_run_id"]).info.experiment_id
            self._client.set_experiment_tag(experiment, TAG, saved_view(event["step"], event["time"]))


def first_line(error: Exception) -> str:
    """An error in one line, without what an address in it says of user and password."""
    line = next(iter(str(error).strip().splitlines()), "")
    return re.sub(r"://[^/@\s]*@", "://", f"{type(error).__name__}: {line}")


def _batch(events: list[Event], start: int) -> list[Event]:
    """The event at ``start``, with those after it that go into the same request."""
    batch = [events[start]]
    if batch[0]["kind"] == "metrics":
        metrics = itertools.takewhile(lambda event: event["kind"] == "metrics", itertools.islice(events, start, None))
        batch = list(itertools.islice(metrics, LARGEST_BATCH))
    return batch


def _parts(entities: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(entities), LARGEST_BATCH):
        yield entities[start : start + LARGEST_BATCH]


def _has_run(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _is_refused(error: Exception) -> bool:
    """Whether sending the same again could only fail again."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _pictures(client: "MlflowClient", run_id: str) -> set[tuple[str, int, int]]:
    """The pictures that a run has whole: key, step, time."""
    # MLflow names them KEY+step+STEP+timestamp+TIME+..., and writes the small copy last: a kill may come in between.
    pattern = re.compile(r"images/(.+?)[+%]step[+%](\d+)[+%]timestamp[+%](\d+)[+%].*compressed\.webp")
    names = (pattern.fullmatch(artifact.path) for artifact in client.list_artifacts(run_id, "images"))
    return {(name[1].replace("~", "/"), int(name[2]), int(name[3])) for name in names if name}


def _dataset_input(event: Event) -> "DatasetInput":
    import mlflow.data
    import pandas as pd
    from mlflow.entities import Dataset, DatasetInput, InputTag

    with warnings.catch_warnings():  # hints about schemas and sources that a user can do nothing about
        warnings.simplefilter("ignore")
        given = mlflow.data.from_pandas(
            pd.DataFrame(event["first_rows"]), source=event["source"], name=event["name"], digest=event["digest"]
        )
        described = given.to_dict() | {"profile": json.dumps({"num_rows": event["rows"]})}
    return DatasetInput(Dataset(**described), [InputTag("mlflow.data.context", event["context"])])
