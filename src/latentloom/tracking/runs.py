"""One door to MLflow: open a run, log to it, close it. Nothing else in the package talks to MLflow.

Where `MLFLOW_TRACKING_URI` is set, everything goes there; otherwise into an SQLite store at the project's root, by
absolute path, so that experiments that DVC runs in temporary copies land in the same place.

A training must never die of its tracking: when the store fails, or MLflow is not installed, the run warns once and goes
on without; its curves are in the stage's own files.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentloom.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.tracking import MlflowClient

EXPERIMENT = "latentloom"
# So that the UI opens on runs, charts and image grids; without it, it guesses a project of language-model prompts.
SHOWN_AS = {"mlflow.experimentKind": "custom_model_development"}
MAX_PARAM_LENGTH = 500

# MLflow reads these when it is imported. Its usage statistics are off unless the user turns them on; a server that is
# away costs seconds, not the minutes that MLflow would retry for.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


@dataclass
class TrackedRun:
    """An MLflow run to log to; where tracking failed, one that takes everything and keeps nothing."""

    client: "MlflowClient | None" = None
    id: str | None = None
    _warned: bool = field(default=False, repr=False)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested params under dotted names."""

        def log() -> None:
            from mlflow.entities import Param

            entities = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in flatten(params).items()]
            self.client.log_batch(self.id, params=entities)

        self._try(log)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all of ``metrics`` at ``step`` in one request."""

        def log() -> None:
            import time

            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self.client.log_batch(
                self.id, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()]
            )

        self._try(log)

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Log a picture, uint8 (H, W, 3), to the image grid under ``key``, at ``step``."""
        self._try(lambda: self.client.log_image(self.id, image, key=key, step=step))

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
def new_run(root: Path, *, name: str | None = None, tags: Mapping[str, str | None]) -> Iterator[TrackedRun]:
    """Open a new run in the project at ``root``; it ends as failed or killed when the block does so."""
    run = TrackedRun()
    try:
        client = _client(root)
        created = client.create_run(
            _experiment_id(client, root), run_name=name, tags={k: v for k, v in tags.items() if v is not None}
        )
        run = TrackedRun(client, created.info.run_id)
    except Exception as error:
        run._warn(error)
    with _ending(run):
        yield run


@contextmanager
def reopened_run(root: Path, run_id: str | None) -> Iterator[TrackedRun]:
    """Open the run ``run_id`` again, to add to it; where the store does not have it, warn and keep nothing."""
    run = TrackedRun()
    if run_id:
        try:
            client = _client(root)
            client.get_run(run_id)
            run = TrackedRun(client, run_id)
        except Exception as error:
            run._warn(error)
    with _ending(run):
        yield run


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the project's own SQLite store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


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


def _client(root: Path) -> "MlflowClient":
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from filelock import FileLock
    from mlflow.tracking import MlflowClient

    # The first to open a fresh SQLite store migrates it; several at once would break it.
    with FileLock(root / ".mlflow.lock"):
        store = root.resolve() / "mlflow.db"
        if not os.environ.get("MLFLOW_TRACKING_URI") and not store.exists():
            # MLflow cannot open a store whose migration was killed half-way, so it is made under another name.
            with atomic_path(store) as temporary:
                MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
        client = MlflowClient(tracking_uri(root))
        client.search_experiments(max_results=1)
    return client


def _experiment_id(client: "MlflowClient", root: Path) -> str:
    from filelock import FileLock

    with FileLock(root / ".mlflow.lock"):
        if found := client.get_experiment_by_name(EXPERIMENT):
            return found.experiment_id
        own_store = not os.environ.get("MLFLOW_TRACKING_URI")
        location = (root.resolve() / "mlartifacts").as_uri() if own_store else None
        return client.create_experiment(EXPERIMENT, artifact_location=location, tags=SHOWN_AS)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
