"""One door to MLflow: open a run, log to it, close it.

What is logged goes into a journal on disk (`journal.py`), which takes microseconds, and from there to MLflow by a
thread (`delivery.py`). So a training neither waits for its tracking nor dies of it: where the store is away, or MLflow
is not installed, the run warns once, and ``latentloom sync`` delivers the journal later.

A killed training resumes from its last checkpoint, and computes again what it had logged since. Its run is opened again
and skips what its journal already holds, so its curves have neither gaps nor doubled steps.
"""

import hashlib
import io
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from latentloom.errors import notify
from latentloom.tracking import delivery
from latentloom.tracking.journal import Journal, journals, now
from latentloom.tracking.store import current_target, first_line
from latentloom.tracking.system_metrics import system_metrics

LONGEST_PARAM = 500  # characters: what servers before MLflow 2.8 take; later ones cut after 6,000


class TrackedRun:
    """A run to log to. Params, metrics and images that its journal holds are skipped; without a journal, all is."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._held = _held(journal) if journal else set()

    @property
    def key(self) -> str | None:
        """What names the run on this machine, from its first moment."""
        return self._journal.key if self._journal else None

    @property
    def id(self) -> str | None:
        """MLflow's id of the run; None as long as MLflow does not have it."""
        return self._journal.about["mlflow_run_id"] if self._journal else None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested params under dotted names, an entry of a list of sections as ``name.1``.

        A param that the run holds stays as it is; of one that is too long for MLflow, its hash ends it.
        """
        self._append_new("params", _flat(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all of ``metrics`` at ``step``."""
        self._append_new("metrics", {key: float(value) for key, value in metrics.items()}, int(step))

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Log an image, uint8 (H, W, 3), to the image grid under ``key``, at ``step``."""
        from PIL import Image

        if ("image", key, step) not in self._held:
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            self._append(kind="image", key=key, step=int(step), content=("image.png", png.getvalue()))

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Log a file as it is now, as an artifact in ``folder``."""
        self._append(kind="file", folder=folder, content=(path.name, path))

    def log_text(self, text: str, name: str) -> None:
        """Log ``text`` as the artifact ``name``."""
        self._append(kind="file", folder=None, content=(name, text.encode("utf-8", "surrogateescape")))

    def log_dataset(self, *, name: str, source: str, digest: str, rows: int, context: str) -> None:
        """Log a data set as an input of the run: where it is, a hash of its content, and its number of rows."""
        self._append(kind="dataset", name=name, source=source, digest=digest, rows=rows, context=context)

    def set_tags(self, tags: Mapping[str, str | None]) -> None:
        """Set tags; those whose value is None are left out."""
        self._append(kind="tags", values={key: str(value) for key, value in tags.items() if value is not None})

    def set_status(self, status: str) -> None:
        """Mark the run as ``RUNNING``, or as ended: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._append(kind="status", status=status)

    def _append_new(self, kind: str, values: dict[str, Any], step: int | None = None) -> None:
        if new := {key: value for key, value in values.items() if (kind, key, step) not in self._held}:
            self._append(kind=kind, values=new, step=step)

    def _append(self, *, content: tuple[str, bytes | Path] | None = None, **event: Any) -> None:
        if self._journal is None:
            return
        try:
            if content is not None:
                event["file"] = self._journal.keep(*content)
            self._journal.append(event)
        except OSError as error:
            warnings.warn(f"{event['kind']} could not be logged: {error}", stacklevel=3)


@contextmanager
def new_run(
    root: Path, *, name: str | None = None, key: str | None = None, parent: tuple[str, str] | None = None
) -> Iterator[TrackedRun]:
    """Open a run, in the experiment ``latentloom``; it ends as ``FINISHED``, ``FAILED`` or, at Ctrl-C, ``KILLED``.

    Args:
        root: where the journals are, and the store, unless the environment names another.
        name: of a new run.
        key: the run of an interrupted training that is resumed, or one that is named by what it holds. A run that the
            store has finished stays as it is.
        parent: a tag and its value, of the run that a new one is shown below.
    """
    try:
        journal = Journal(journals(root) / (key or uuid.uuid4().hex), wait=5, name=name, parent=parent)
        journal.update(target=current_target())  # a resumed run, and all of it, goes to the present store
    except (OSError, ValueError) as error:
        warnings.warn(f"nothing of this run is tracked ({first_line(error)})", stacklevel=3)
        yield TrackedRun()
        return
    run, started = TrackedRun(journal), journal.about["started"]
    run.set_status("RUNNING")
    stopping = threading.Event()
    work = (stopping, journal, root, lambda: run.log_metrics(system_metrics(), (now() - started) // 1000))
    thread = threading.Thread(target=delivery.deliver_until, args=work, name="tracking", daemon=True)
    thread.start()
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.set_status(status)
        stopping.set()
        thread.join(delivery.PATIENCE)
        if waiting := journal.waiting:
            notify(f"tracking: {waiting} entries of this run wait in {journal.folder}; `latentloom sync` delivers them")
        if not thread.is_alive():  # else the store hangs, and the thread is left to itself
            journal.close()


def _held(journal: Journal) -> set[tuple[str, str, int | None]]:
    """What the journal of a resumed run holds already: kind, name, step."""
    return {
        (event["kind"], name, event.get("step"))
        for event, _ in journal.events()
        for name in event.get("values", [event.get("key")])
    }


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": "1"}``; a list of mappings gets a param for each entry."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, entry in enumerate(value, start=1):
                said = ", ".join(f"{name} {own}" for name, own in entry.items() if own is not None)
                flat[f"{prefix}{key}.{number}"] = _short(said)
        else:
            flat[f"{prefix}{key}"] = _short(str(value))
    return flat


def _short(value: str) -> str:
    """A value that MLflow takes whole; of a longer one the beginning, and a hash, so that two that differ do."""
    if len(value) <= LONGEST_PARAM:
        return value
    end = f"… sha256 {hashlib.sha256(value.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    return value[: LONGEST_PARAM - len(end)] + end
