"""What a run logs, on disk before anything else: MLflow may be slow, away, or not installed, and nothing is lost.

    FOLDER/KEY/about.json    the run's name, the store that it is meant for, and its id there once it has one
    FOLDER/KEY/events.jsonl  what was logged, one JSON object a line, in order
    FOLDER/KEY/files/        copies of the files and pictures that are still to be delivered
    FOLDER/KEY/delivered     how many of the events the store has

A killed process leaves at worst half a last line, which is cut off. One process at a time holds a journal.
"""

import itertools
import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentloom.files import read_json, write_json, write_text

Event = dict[str, Any]


class JournalInUseError(RuntimeError):
    """Another process writes to the journal, or delivers it."""


class Journal:
    """The journal of one run, locked until it is closed.

    Args:
        folder: the run's own, ``FOLDER/KEY``; made where it is not there.
        about: for a new journal: ``name``, ``started`` (milliseconds since 1970), ``target`` and ``mlflow_run_id``.

    Raises:
        JournalInUseError: when another process holds it.
        OSError: when it cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        from filelock import FileLock, Timeout

        self.folder, self.key = folder, folder.name
        (folder / "files").mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")
        try:
            self._lock.acquire(timeout=5 if about is not None else 0)
        except Timeout:
            raise JournalInUseError(f"another process uses {folder}") from None
        if not (folder / "about.json").exists():
            write_json(folder / "about.json", dict(about or {}))
        self.about: dict[str, Any] = read_json(folder / "about.json")
        self.events = self._whole_events()
        delivered = folder / "delivered"
        self.delivered = int(delivered.read_text()) if delivered.exists() else 0
        self._numbers, self._writing = itertools.count(len(self.events)), threading.Lock()
        self._file = open(folder / "events.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def append(self, event: Event) -> None:
        """Add an event; it is on the system's side when this returns, safe from a kill."""
        with self._writing:
            self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
            self._file.flush()
            self.events.append(event)

    def keep_file(self, source: Path) -> str:
        """Copy a file, or a folder, into the journal; its path in the journal's folder."""
        kept = self._place(source.name)
        if source.is_dir():
            shutil.copytree(source, kept)
        else:
            shutil.copyfile(source, kept)
        return str(kept.relative_to(self.folder))

    def keep_bytes(self, name: str, data: bytes) -> str:
        """Write ``data`` into the journal under ``name``; its path in the journal's folder."""
        kept = self._place(name)
        kept.write_bytes(data)
        return str(kept.relative_to(self.folder))

    def describe(self, **about: Any) -> None:
        """Change what ``about.json`` says."""
        self.about |= about
        write_json(self.folder / "about.json", self.about)

    def mark_delivered(self, count: int) -> None:
        """The store has the first ``count`` events: their files are not needed here any more."""
        for event in self.events[self.delivered : count]:
            if "file" in event:
                shutil.rmtree((self.folder / event["file"]).parent, ignore_errors=True)
        self.delivered = count
        write_text(self.folder / "delivered", str(count))

    def close(self) -> None:
        """Let go of the journal; one that is delivered and whose run has finished is deleted."""
        self._file.close()
        status = next((event["status"] for event in reversed(self.events) if event["kind"] == "status"), None)
        finished = status == "FINISHED" and self.delivered == len(self.events)
        if finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _place(self, name: str) -> Path:
        folder = self.folder / "files" / f"{next(self._numbers):06d}"
        shutil.rmtree(folder, ignore_errors=True)  # of an event that a kill cut short
        folder.mkdir()
        return folder / name

    def _whole_events(self) -> list[Event]:
        path = self.folder / "events.jsonl"
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with open(path, "rb+") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.decode("utf-8").splitlines()]
