"""One door to MLflow: open a run, log to it, close it. Nothing else in the package talks to MLflow.

A training must never die of its tracking: when the store fails, or MLflow is not installed, the run warns once and goes
on without; its curves are in the stage's own files.

A training that was killed goes on from its last checkpoint, and computes again what it had logged since. Its run is
opened again and leaves out what it already holds, so its curves have neither gaps nor doubled steps.
"""

import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentloom.tracking.store import experiment_id, open_client

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.tracking import MlflowClient

MAX_PARAM_LENGTH = 500


class LoggedBefore:
    """What a run held when it was opened again, asked of the store where it first matters, once."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._steps: dict[str, set[int]] = {}

    def has_metric(self, key: str, step: int) -> bool:
        if key not in self._steps:
            self._steps[key] = {metric.step for metric in self._client.get_metric_history(self._run_id, key)}
        return step in self._steps[key]

    def has_image(self, key: str, step: int) -> bool:
        return (key, step) in self._images

    def has_param(self, key: str) -> bool:
        return key in self._params

    @functools.cached_property
    def _params(self) -> set[str]:
        return set(self._client.get_run(self._run_id).data.params)

    @functools.cached_property
    def _images(self) -> set[tuple[str, int]]:
        # MLflow names them KEY+step+STEP+timestamp+..., and writes the small copy last: a kill may come in between.
        paths = (artifact.path for artifact in self._client.list_artifacts(self._run_id, "images"))
        names = (re.fullmatch(r"images/(.+?)[+%]step[+%](\d+)[+%].*compressed\.webp", path) for path in paths)
        return {(name[1].replace("~", "/"), int(name[2])) for name in names if name}


@dataclass
class TrackedRun:
    """An MLflow run to log to; where tracking failed, one that takes everything and keeps nothing.

    With ``before``, what the run already holds is not logged again: params by key, metrics and pictures by key and
    step. (A data set of the same digest the store itself keeps once.)
    """

    client: "MlflowClient | None" = None
    id: str | None = None
    before: LoggedBefore | None = None
    _warned: bool = field(default=False, repr=False)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested params under dotted names."""

        def log() -> None:
            from mlflow.entities import Param

            entities = [
                Param(key, str(value)[:MAX_PARAM_LENGTH])
                for key, value in flatten(params).items()
                if not (self.before and self.before.has_param(key))
            ]
            self.client.log_batch(self.id, params=entities)

        self._try(log)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all of ``metrics`` at ``step`` in one request."""

        def log() -> None:
            import time

            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            entities = [
                Metric(key, float(value), now, step)
                for key, value in metrics.items()
                if not (self.before and self.before.has_metric(key, step))
            ]
            if entities:
                self.client.log_batch(self.id, metrics=entities)

        self._try(log)

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Log a picture, uint8 (H, W, 3), to the image grid under ``key``, at ``step``."""

        def log() -> None:
            if not (self.before and self.before.has_image(key, step)):
                self.client.log_image(self.id, image, key=key, step=step)

        self._try(log)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or a folder's files, as artifacts under ``folder``."""

        def log() -> None:
            if path.is_dir():
                self.client.log_artifacts(self.id, str(path), folder or path.name)
            else:
                self.client.log_artifact(self.id, str(path), folder)

        self._try(log)

    def log_dataset(self, frame: "pd.DataFrame", *, name: str, source: str, digest: str, context: str) -> None:
        """Log a data set as an input of the run: name, place, digest, and the frame's schema and size."""

        def log() -> None:
            import mlflow.data
            from mlflow.entities import DatasetInput, InputTag

            with warnings.catch_warnings():  # hints about schemas and sources that a user can do nothing about
                warnings.simplefilter("ignore")
                dataset = mlflow.data.from_pandas(frame, source=source, name=name, digest=digest)
            tags = [InputTag("mlflow.data.context", context)]
            self.client.log_inputs(self.id, [DatasetInput(dataset._to_mlflow_entity(), tags)])

        self._try(log)

    def set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Set tags; those whose value is None are left out."""

        def log() -> None:
            from mlflow.entities import RunTag

            self.client.log_batch(
                self.id, tags=[RunTag(key, str(value)) for key, value in tags.items() if value is not None]
            )

        self._try(log)

    def end(self, status: str) -> None:
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._try(lambda: self.client.set_terminated(self.id, status))

    def _try(self, log) -> None:
        if self.client is None:
            return
        try:
            log()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"MLflow could not be written to ({_first_line(error)}); the stage goes on, its files have all figures",
                stacklevel=3,
            )


@contextmanager
def new_run(
    root: Path, *, name: str | None = None, tags: Mapping[str, str | None], run_id: str | None = None
) -> Iterator[TrackedRun]:
    """Open a run in the project at ``root``; it ends as failed or killed when the block does so.

    Args:
        root: where the store is, unless the environment names another.
        name: the name of a new run.
        tags: those whose value is None are left out.
        run_id: the run of an interrupted training that goes on. It is opened again, and what it holds is not logged
            again. Where the store no longer has it, a new run is made.
    """
    run = TrackedRun()
    try:
        client = open_client(root)
        if run_id and _has_run(client, run_id):
            client.update_run(run_id, status="RUNNING")
            run = TrackedRun(client, run_id, LoggedBefore(client, run_id))
            run.set_tags(tags)
        else:
            created = client.create_run(
                experiment_id(client, root), run_name=name, tags={k: v for k, v in tags.items() if v is not None}
            )
            run = TrackedRun(client, created.info.run_id)
    except Exception as error:
        run._warn(error)
    with _ending(run):
        yield run


@contextmanager
def reopened_run(root: Path, run_id: str | None) -> Iterator[TrackedRun]:
    """Open a finished run to add to it, whatever it holds; where the store does not have it, warn and keep nothing."""
    run = TrackedRun()
    if run_id:
        try:
            client = open_client(root)
            client.get_run(run_id)
            run = TrackedRun(client, run_id)
        except Exception as error:
            run._warn(error)
    with _ending(run):
        yield run


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def _ending(run: TrackedRun) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


def _has_run(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
