"""Which MLflow store holds our runs, how it is opened, and the experiment in it.

Where `MLFLOW_TRACKING_URI` is set, everything goes there; otherwise into an SQLite store at the project's root, by
absolute path, so that experiments that DVC runs in temporary copies land in the same place.
"""

import logging
import os
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from latentloom.files import atomic_path
from latentloom.tracking.charts import TAG, saved_view

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "latentloom"
# So that the UI opens on runs, charts and image grids; without it, it guesses a project of language-model prompts.
SHOWN_AS = {"mlflow.experimentKind": "custom_model_development"}

# MLflow reads these when it is imported. Its usage statistics are off unless the user turns them on; a server that is
# away costs seconds, not the minutes that MLflow would retry for. MLflow would also send a request again whose answer
# was lost, and so make a run twice; `delivery.py` tries again by itself, and looks first at what has arrived.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the project's own SQLite store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def without_credentials(uri: str) -> str:
    """An address as it may be shown: no user, no password, no query."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc and not parts.query:
        return uri
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def current_target() -> str | None:
    """The store that the environment names, without credentials; None for the project's own."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return without_credentials(uri) if uri else None


def open_client(root: Path) -> "MlflowClient":
    """A client of the store, which is made where it is the project's own and not there yet.

    Raises:
        ImportError: when MLflow is not installed.
        mlflow.exceptions.MlflowException: when the store cannot be reached.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each try is not worth a line
    from filelock import FileLock
    from mlflow.tracking import MlflowClient

    # The first to open a fresh SQLite store migrates it; several at once would break it.
    with FileLock(root / ".mlflow.lock"):
        store = root.resolve() / "mlflow.db"
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            if not store.exists():
                # MLflow cannot open a store whose migration was killed half-way, so it is made under another name.
                with atomic_path(store) as temporary:
                    MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
            _write_ahead(store)
        client = MlflowClient(tracking_uri(root))
        client.search_experiments(max_results=1)
    return client


def experiment_id(client: "MlflowClient", root: Path) -> str:
    """The id of the experiment that holds our runs: `MLFLOW_EXPERIMENT_NAME`, or ``latentloom``; made if need be."""
    from filelock import FileLock
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    with FileLock(root / ".mlflow.lock"):
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        own_store = not os.environ.get("MLFLOW_TRACKING_URI")
        location = (root.resolve() / "mlartifacts").as_uri() if own_store else None
        tags = SHOWN_AS | {TAG: saved_view(step=0, time=int(time.time() * 1000))}
        try:
            return client.create_experiment(name, artifact_location=location, tags=tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return client.get_experiment_by_name(name).experiment_id  # on a team's server another machine was first


def _write_ahead(store: Path) -> None:
    """Let readers and a writer use the store at the same time; where the disk cannot (NFS), it stays as it is."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(store, timeout=5)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
