"""From a run's journal to MLflow: in order, in batches, from a thread of its own.

A store that cannot be reached costs one warning. The thread tries again until the run ends; what is left then waits in
the journal for ``latentloom sync``. What may have arrived before a connection broke is sent again, which changes
nothing: MLflow keeps one copy of a metric with the same time, step and value, params and tags have one value, files
have one name, data sets one digest, and for images it is asked first.
"""

import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentloom.tracking.journal import Event, Journal
from latentloom.tracking.store import experiment_id, first_line, open_client

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY_TAG = "latentloom.key"
EVERY = 10.0  # seconds between two deliveries
PATIENCE = 60.0  # seconds without a delivered event after which the end of a run stops waiting
LARGEST_BATCH = 100  # events or entries per request: MLflow takes no more tags or params, and ten times as many metrics


class Delivery:
    """Delivers one journal.

    Args:
        journal: what was logged.
        root: the project's root, for the store.
    """

    def __init__(self, journal: Journal, root: Path) -> None:
        self.journal, self.root = journal, root
        self._client: MlflowClient | None = None
        self._images: set[tuple[str, int, int]] | None = None
        self._stop, self._warned = threading.Event(), False
        self._thread: threading.Thread | None = None

    def start(self, measure: Callable[[], None]) -> None:
        """Deliver from now on, in the background, and call ``measure`` before each delivery but the first and last."""
        self._thread = threading.Thread(target=self._run, args=(measure,), name="tracking", daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """Deliver what is left, or try once more; False when a store hangs and the thread is left to itself."""
        self._stop.set()
        delivered = None
        while self._thread.is_alive() and self.journal.about["delivered"] != delivered:
            delivered = self.journal.about["delivered"]
            self._thread.join(PATIENCE)
        return not self._thread.is_alive()

    def deliver(self) -> None:
        """Deliver all that the journal holds now.

        Raises:
            Exception: whatever kept it from arriving; what did arrive is marked.
        """
        if self._client is None:
            client = open_client(self.root)
            self._find_run(client)
            self._client, self._images = client, None
        if self.journal.about["mlflow_run_id"] is None:
            self._warn(f"MLflow has no run {self.journal.key}: nothing is added to it")
        for batch, end in self._batches():
            try:
                if self.journal.about["mlflow_run_id"] is not None:
                    self._send(batch)
            except Exception as error:
                if not _is_rejection(error):
                    raise
                self._warn(f"MLflow rejected {batch[0]['kind']} ({first_line(error)}); they are left out")
            self.journal.mark_delivered(batch, end)

    def _run(self, measure: Callable[[], None]) -> None:
        pause = 0.0
        while True:
            stopping = self._stop.wait(pause)
            if pause and not stopping:
                measure()
            try:
                self.deliver()
            except Exception as error:
                self._client = None
                self._warn(
                    f"MLflow could not be written to ({first_line(error)}). The run continues; what it logs waits in "
                    f"{self.journal.folder}"
                )
            if stopping:
                return
            pause = EVERY

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)

    def _find_run(self, client: "MlflowClient") -> None:
        """Make ``mlflow_run_id`` the run's id in the store; None for a run that was only added to, and is gone."""
        from mlflow.entities import LifecycleStage
        from mlflow.exceptions import MlflowException

        journal = self.journal
        if run_id := journal.about["mlflow_run_id"]:
            try:
                if client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE:
                    return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment, name, started = experiment_id(client, self.root), journal.about["name"], journal.about["started"]
        # A run that was created, and whose id never came back, is found by our own key.
        if found := client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{journal.key}'", max_results=1):
            journal.update(mlflow_run_id=found[0].info.run_id)
        elif started is None:
            journal.update(mlflow_run_id=None)
        else:
            journal.update(delivered=0)  # a store that lost the run, or another one, gets all of it
            created = client.create_run(experiment, start_time=started, tags={KEY_TAG: journal.key}, run_name=name)
            journal.update(mlflow_run_id=created.info.run_id)

    def _batches(self) -> Iterator[tuple[list[Event], int]]:
        """The events that wait, and where they end, as requests: metrics together, anything else alone."""
        while True:
            batch: list[Event] = []
            end = 0
            for event, event_end in self.journal.events(self.journal.about["delivered"]):
                together = event["kind"] == "metrics" and len(batch) < LARGEST_BATCH
                if batch and not (together and batch[0]["kind"] == "metrics"):
                    break
                batch.append(event)
                end = event_end
            if not batch:
                return
            yield batch, end

    def _send(self, batch: list[Event]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        client, run_id, event = self._client, self.journal.about["mlflow_run_id"], batch[0]
        match event["kind"]:
            case "metrics":
                self._log_batch(
                    metrics=[
                        Metric(key, value, each["time"], each["step"])
                        for each in batch
                        for key, value in each["values"].items()
                    ]
                )
            case "params":
                self._log_batch(params=[Param(*param) for param in event["values"].items()])
            case "tags":
                self._log_batch(tags=[RunTag(*tag) for tag in event["values"].items()])
            case "image":
                self._send_image(event)
            case "file":
                path = self.journal.folder / event["file"]
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), event["folder"])
                elif path.exists():
                    client.log_artifact(run_id, str(path), event["folder"])
            case "dataset":
                source, profile = json.dumps({"uri": event["source"]}), json.dumps({"num_rows": event["rows"]})
                dataset = Dataset(event["name"], event["digest"], "local", source, profile=profile)
                client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])])
            case "status" if event["status"] == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            case "status":
                client.set_terminated(run_id, event["status"], end_time=event["time"])

    def _log_batch(self, **entities: list[Any]) -> None:
        ((kind, listed),) = entities.items()
        for start in range(0, len(listed), LARGEST_BATCH):
            part = {kind: listed[start : start + LARGEST_BATCH]}
            self._client.log_batch(self.journal.about["mlflow_run_id"], **part)

    def _send_image(self, event: Event) -> None:
        from PIL import Image

        path, run_id = self.journal.folder / event["file"], self.journal.about["mlflow_run_id"]
        if self._images is None:
            self._images = _whole_images(self._client, run_id)
        if path.exists() and (event["key"], event["step"], event["time"]) not in self._images:
            at = {"key": event["key"], "step": event["step"], "timestamp": event["time"]}
            with Image.open(path) as image:
                self._client.log_image(run_id, image, **at, synchronous=True)


def _is_rejection(error: Exception) -> bool:
    """Whether sending the same again could only fail again."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _whole_images(client: "MlflowClient", run_id: str) -> set[tuple[str, int, int]]:
    """The images that a run has whole: key, step, time."""
    # MLflow names them KEY+step+STEP+timestamp+TIME+..., and writes the small copy last: a kill may come in between.
    pattern = re.compile(r"images/(.+?)[+%]step[+%](\d+)[+%]timestamp[+%](\d+)[+%].*compressed\.webp")
    names = (pattern.fullmatch(artifact.path) for artifact in client.list_artifacts(run_id, "images"))
    return {(name[1].replace("~", "/"), int(name[2]), int(name[3])) for name in names if name}
