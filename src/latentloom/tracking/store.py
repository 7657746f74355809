"""Which MLflow store holds our runs, how it is opened, and the experiment in it.

Where `MLFLOW_TRACKING_URI` is set, everything goes there; otherwise into an SQLite store at the project's root, by
absolute path, so that experiments that DVC runs in temporary copies are stored in the same place. The files of its runs
lie beside it, in ``mlartifacts``: where a project was copied or moved, the store follows.
"""

import logging
import os
import re
import shlex
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from latentloom.errors import UserError, notify
from latentloom.files import atomic_path

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "latentloom"
# So that the UI opens on runs, charts and image grids; without it, it assumes a project of language-model prompts.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
TIMEOUT = 10  # seconds
ARTIFACTS = "mlartifacts"
# Where MLflow keeps absolute addresses of files: tables and columns, those of new runs first.
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_CREDENTIALS = re.compile(r"://[^/\s]*@")

# MLflow reads these when it is imported. Its usage statistics are off unless the user turns them on. A server that is
# away costs seconds, not the minutes that MLflow would retry for. MLflow would also send a request again whose answer
# was lost, and so create a run twice; `delivery.py` tries again itself, and first looks at what has arrived.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT),
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def _given() -> str | None:
    """The store that the environment names; None: the project's own."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the project's own SQLite store."""
    return _given() or _sqlite_uri(root.resolve() / "mlflow.db")


def ui_address(server: str, experiment_id: str) -> str:
    """Where MLflow's page of the experiment's runs opens in a browser, on its charts and images."""
    # Without the workflow, MLflow 3 opens on its pages for language models.
    shown = "compareRunsMode=CHART&workflowType=machine_learning"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{shown}"


def without_credentials(uri: str) -> str:
    """An address as it may be shown: no user, no password, no query."""
    return _CREDENTIALS.sub("://", uri).partition("?")[0]


def first_line(error: Exception) -> str:
    """An error in one line, without the user and password of an address in it."""
    line = next(iter(str(error).strip().splitlines()), "")
    return _CREDENTIALS.sub("://", f"{type(error).__name__}: {line}")


def has_error_code(error: Exception, *codes: str) -> bool:
    """Whether MLflow gave one of these codes as the error's reason."""
    return getattr(error, "error_code", None) in codes


def current_target() -> str | None:
    """The store that the environment names, without credentials; None for the project's own."""
    return without_credentials(_given()) if _given() else None


def open_client(root: Path) -> "MlflowClient":
    """A client of the store; the project's own store is created if need be.

    Raises:
        ImportError: when MLflow, or a database's driver, is not installed.
        mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError: when the store cannot be reached.
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
        if not _given() and not store.exists():
            # MLflow cannot open a store whose migration was killed half-way, so it is created under another name.
            with atomic_path(store) as temporary:
                MlflowClient(_sqlite_uri(temporary)).search_experiments(max_results=1)
        _check_database(tracking_uri(root))
        client = MlflowClient(tracking_uri(root))
        client.search_experiments(max_results=1)
        if not _given():
            _prepare(store, _artifacts(root))
    return client


def existing_store(root: Path) -> "MlflowClient":
    """`open_client`, of a store that is there: no store is created to look something up.

    Raises:
        UserError: when the project has no store, or there is no project, and the environment names no store; when
            MLflow, or the driver of a database, is not installed.
    """
    if not _given() and not (root / "mlflow.db").exists():
        raise UserError(
            f"{root} has no MLflow store (mlflow.db): run this in the project's root, after a training, or set "
            "MLFLOW_TRACKING_URI"
        )
    try:
        return open_client(root)
    except ImportError as error:
        store = without_credentials(tracking_uri(root))
        raise UserError(f"{store} cannot be opened: {error}; install that in this environment") from error


def search_runs(client: "MlflowClient", condition: str, most: int = 100) -> "list[Run]":
    """Runs of all experiments, the newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, condition, max_results=most))


def experiment_id(client: "MlflowClient", root: Path) -> str:
    """The id of our runs' experiment: `MLFLOW_EXPERIMENT_NAME`, or ``latentloom``; created if need be.

    Raises:
        UserError: when it was deleted, for MLflow neither writes to such an experiment nor gives its name away again.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage == "deleted":
            store = f"MLFLOW_TRACKING_URI={shlex.quote(tracking_uri(root))} " if not _given() else ""
            raise UserError(
                f"the MLflow experiment {name} was deleted; bring it back (`{store}mlflow experiments restore -x "
                f"{found.experiment_id}`) or set MLFLOW_EXPERIMENT_NAME to another name"
            )
        return found.experiment_id
    location = None if _given() else _artifacts(root).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
    except Exception as error:
        if not has_error_code(error, "RESOURCE_ALREADY_EXISTS"):
            raise
        return client.get_experiment_by_name(name).experiment_id  # another process was first


def _artifacts(root: Path) -> Path:
    """Where the runs of the project's own store keep their files; beside the store itself where it is a link."""
    return (root / "mlflow.db").resolve().parent / ARTIFACTS


def _prepare(store: Path, files: Path) -> None:
    """Let readers and a writer use the project's own store at once, and let it name the files beside it.

    MLflow keeps absolute addresses, so a copied project's runs would write into the folder that it was copied from.
    """
    here = files.as_uri()
    with closing(sqlite3.connect(store, timeout=TIMEOUT)) as connection, connection:
        with suppress(sqlite3.OperationalError):  # a disk that cannot (NFS)
            connection.execute("PRAGMA journal_mode=WAL")
        for (there,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
            if there == here or not there.startswith("file://") or not there.endswith(f"/{ARTIFACTS}"):
                continue
            # Where the store alone was copied, the files of its runs are only where they were.
            for table, column in ADDRESSES if files.is_dir() else ADDRESSES[:1]:
                connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (there, here))
            notify(
                f"MLflow: {store} came here with a copied or moved project; its runs keep their files in {here} from "
                f"now on, no longer in {there}"
            )


def _sqlite_uri(path: Path) -> str:
    """The address of an SQLite file. SQLAlchemy decodes ``%XX`` in it and takes ``?`` as the start of a query."""
    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    # With a driver in the address, MLflow does not create a folder by the quoted name.
    return f"{'sqlite' if quoted == str(path) else 'sqlite+pysqlite'}:///{quoted}"


def _check_database(uri: str) -> None:
    """Connect once to a database: MLflow tries for minutes, with a page of warnings."""
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in ("sqlite", "postgresql", "mysql"):
        return
    import sqlalchemy

    if scheme == "sqlite" and (path := sqlalchemy.make_url(uri).database):
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    options = {} if scheme == "sqlite" else {"connect_timeout": TIMEOUT}
    sqlalchemy.create_engine(uri, connect_args=options, poolclass=sqlalchemy.NullPool).connect().close()
