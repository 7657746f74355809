"""One door to MLflow: open a run, log to it, close it. Nothing of the training talks to MLflow in another way.

What is logged goes into a journal on disk (`journal.py`), which takes microseconds, and from there to MLflow by a
thread (`delivery.py`). So a training neither waits for its tracking nor dies of it: where the store is away, or MLflow
is not installed, the run warns once, and ``latentloom sync`` delivers the journal later.

A training that was killed goes on from its last checkpoint, and computes again what it had logged since. Its run is
opened again and leaves out what its journal already holds, so its curves have neither gaps nor doubled steps.
"""

import io
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentloom.tracking.delivery import Delivery, first_line
from latentloom.tracking.journal import Event, Journal, JournalInUseError
from latentloom.tracking.store import current_target
from latentloom.tracking.system_metrics import SystemMetrics

if TYPE_CHECKING:
    import pandas as pd

MAX_PARAM_LENGTH = 500
SHOWN_ROWS = 5  # of a data set, from which its schema is read


@dataclass(frozen=True)
class TrackedRun:
    """A run to log to; without a journal, one that takes everything and keeps nothing."""

    _journal: Journal | None = None
    _once: bool = False  # whether what the journal holds already is left out
    _known: set[tuple] = field(default_factory=set, repr=False)

    @property
    def key(self) -> str | None:
        """What names the run on this machine, from its first moment."""
        return self._journal.key if self._journal else None

    @property
    def id(self) -> str | None:
        """MLflow's id of the run; None as long as MLflow does not have it."""
        return self._journal.about["mlflow_run_id"] if self._journal else None

    @property
    def started(self) -> float:
        """When the run began, in seconds since 1970, before all interruptions."""
        return (self._journal.about["started"] if self._journal else _now()) / 1000

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested params under dotted names; a param that the run holds stays as it is."""
        values = {key: str(value)[:MAX_PARAM_LENGTH] for key, value in flatten(params).items()}
        if new := {key: value for key, value in values.items() if self._is_new("param", key)}:
            self._append(kind="params", values=new)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all of ``metrics`` at ``step``."""
        if new := {key: float(value) for key, value in metrics.items() if self._is_new("metric", key, step)}:
            self._append(kind="metrics", step=step, values=new)

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Log a picture, uint8 (H, W, 3), to the image grid under ``key``, at ``step``."""
        from PIL import Image

        if self._journal and self._is_new("image", key, step):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            self._append(kind="image", key=key, step=step, content=("picture.png", png.getvalue()))

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log a file as it is now, or a folder's files, as artifacts under ``folder``."""
        self._append(kind="file", folder=folder or (path.name if path.is_dir() else None), content=path)

    def log_text(self, text: str, name: str) -> None:
        """Log ``text`` as the artifact ``name``."""
        self._append(kind="file", folder=None, content=(name, text.encode("utf-8", "surrogateescape")))

    def log_dataset(self, frame: "pd.DataFrame", *, name: str, source: str, digest: str, context: str) -> None:
        """Log a data set as an input of the run: name, place, digest, and the frame's schema and size."""
        given = {"name": name, "source": source, "digest": digest, "context": context, "rows": len(frame)}
        if self._is_new("dataset", name, digest, context):
            self._append(kind="dataset", first_rows=frame.head(SHOWN_ROWS).to_dict("list"), **given)

    def set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Set tags; those whose value is None are left out."""
        if values := {key: str(value) for key, value in tags.items() if value is not None}:
            self._append(kind="tags", values=values)

    def describe(self, text: str) -> None:
        """Set what MLflow shows as the run's description, in Markdown."""
        self.set_tags({"mlflow.note.content": text})

    def set_status(self, status: str) -> None:
        """Say that the run is ``RUNNING``, or ended as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._append(kind="status", status=status)

    def _is_new(self, *what: object) -> bool:
        if not self._once:
            return True
        if not self._known and self._journal:
            self._known.update(_held(self._journal.events))
        new = what not in self._known
        self._known.add(what)
        return new

    def _append(self, *, content: Path | tuple[str, bytes] | None = None, **event: Any) -> None:
        if self._journal is None:
            return
        try:
            if content is not None:
                event["file"] = (
                    self._journal.keep_file(content)
                    if isinstance(content, Path)
                    else self._journal.keep_bytes(*content)
                )
            self._journal.append({"time": _now(), **event})
        except OSError as error:
            warnings.warn(f"{event['kind']} could not be logged: {error}", stacklevel=3)


@contextmanager
def new_run(root: Path, *, name: str | None = None, key: str | None = None) -> Iterator[TrackedRun]:
    """Open a run, in the experiment ``latentloom``; it ends as ``FINISHED``, ``FAILED`` or, at Ctrl-C, ``KILLED``.

    Args:
        root: where the journals are, and the store, unless the environment names another.
        name: the name of a new run.
        key: the run of an interrupted training that goes on. What it holds is not logged again.
    """
    about = {"name": name, "started": _now(), "target": current_target(), "mlflow_run_id": None}
    opened = _open(root, key or uuid.uuid4().hex, about, once=True)
    with opened as run, SystemMetrics(run.log_metrics, run.started):
        run.set_status("RUNNING")
        yield run


@contextmanager
def reopened_run(root: Path, key: str | None, mlflow_run_id: str | None = None) -> Iterator[TrackedRun]:
    """Open a finished run to add to it, whatever it holds; where the store does not have it, warn and keep nothing.

    Args:
        root: where the journals are, and the store, unless the environment names another.
        key: the run's; None keeps nothing.
        mlflow_run_id: MLflow's id, where it is known.
    """
    if not key:
        yield TrackedRun()
        return
    about = {"name": None, "started": None, "target": current_target(), "mlflow_run_id": mlflow_run_id}
    with _open(root, key, about, once=False) as run:
        yield run


def journals(root: Path) -> Path:
    """The folder of all runs' journals."""
    return root / ".state" / "tracking"


def sync(root: Path) -> Iterator[tuple[str, str]]:
    """Deliver the journals that wait; yield each one's key and what became of it, in a person's words.

    A run whose process was killed is marked ``KILLED``; one that goes on at the moment is left alone.
    """
    for folder in sorted(path for path in journals(root).glob("*") if (path / "about.json").exists()):
        try:
            journal = Journal(folder)
        except JournalInUseError:
            yield folder.name, "still running"
            continue
        try:
            yield folder.name, _sync(journal, root)
        finally:
            journal.close()


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
def _open(root: Path, key: str, about: dict[str, Any], *, once: bool) -> Iterator[TrackedRun]:
    """A run whose journal is open and delivered in the background; at the end all that can be delivered is."""
    try:
        journal = Journal(journals(root) / key, about)
    except (OSError, ImportError, JournalInUseError) as error:
        warnings.warn(f"nothing of this run is tracked ({first_line(error)})", stacklevel=4)
        yield TrackedRun()
        return
    run, delivery = TrackedRun(journal, once), Delivery(journal, root)
    delivery.start()
    try:
        yield run
    except KeyboardInterrupt:
        run.set_status("KILLED")
        raise
    except BaseException:
        run.set_status("FAILED")
        raise
    else:
        run.set_status("FINISHED")
    finally:
        delivery.stop()
        if waiting := len(journal.events) - journal.delivered:
            print(
                f"tracking: {waiting} entries of this run wait in {journal.folder}; `latentloom sync` delivers them",
                file=sys.stderr,
                flush=True,
            )
        journal.close()


def _sync(journal: Journal, root: Path) -> str:
    if (target := journal.about["target"]) != current_target():
        return f"waits for {target or 'the store of this project'}: set MLFLOW_TRACKING_URI accordingly"
    status = [event["status"] for event in journal.events if event["kind"] == "status"]
    if not status or status[-1] == "RUNNING":
        journal.append({"time": _now(), "kind": "status", "status": "KILLED"})
    waiting = len(journal.events) - journal.delivered
    if not waiting:
        return "nothing to deliver"
    try:
        Delivery(journal, root).deliver()
    except Exception as error:
        return f"{len(journal.events) - journal.delivered} entries still wait: {first_line(error)}"
    return f"delivered {waiting} entries"


def _held(events: list[Event]) -> Iterator[tuple]:
    for event in events:
        match event["kind"]:
            case "metrics":
                yield from (("metric", key, event["step"]) for key in event["values"])
            case "params":
                yield from (("param", key) for key in event["values"])
            case "image":
                yield "image", event["key"], event["step"]
            case "dataset":
                yield "dataset", event["name"], event["digest"], event["context"]


def _now() -> int:
    return int(time.time() * 1000)
