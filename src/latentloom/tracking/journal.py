"""What a run logs, on disk before anything else: MLflow may be slow, away or not installed, and nothing is lost.

    FOLDER/KEY/about.json    the run's name, parent and store, its id there once it has one, how much the store has
    FOLDER/KEY/events.jsonl  what was logged, one JSON object per line, in order
    FOLDER/KEY/files/        copies of the files and images, until the store has all of the run

Events are read back from the disk, so a long run takes no memory. A killed process leaves at worst half a last line,
which is cut off. One process at a time holds a journal.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from latentloom.files import read_json, write_json

Event = dict[str, Any]


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def journals(root: Path) -> Path:
    """The folder of all runs' journals."""
    return root / ".state" / "tracking"


class Journal:
    """The journal of one run, locked until it is closed.

    Args:
        folder: the run's own, ``FOLDER/KEY``; made where it is not there.
        wait: seconds, for another process that writes to it or delivers it.
        name: of a new run.
        parent: of a new run: the tag and its value by which the store knows the run that it belongs to; None: to none.

    Raises:
        filelock.Timeout: when another process holds it.
        OSError: when it cannot be written.
        UserError: when its ``about.json`` cannot be read.
    """

    def __init__(
        self, folder: Path, *, wait: float = 0, name: str | None = None, parent: tuple[str, str] | None = None
    ) -> None:
        self.folder, self.key = folder, folder.name
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock", timeout=wait)
        self._lock.acquire()
        if not (folder / "about.json").exists():
            write_json(folder / "about.json", {"name": name, "started": now(), "parent": parent})
        self._file = open(folder / "events.jsonl", "ab")  # noqa: SIM115
        end = max((end for _, end in self.events()), default=0)
        self._file.truncate(end)
        unknown = {"parent": None, "target": None, "mlflow_run_id": None, "delivered": 0, "known": False}
        self.about: dict[str, Any] = unknown | read_json(folder / "about.json")
        self.about["delivered"] = min(self.about["delivered"], end)  # bytes of events.jsonl; a power cut may lose some

    @property
    def status(self) -> str | None:
        """The run's last status; None before the first."""
        status = None
        for event, _ in self.events():
            status = event.get("status", status)
        return status

    @property
    def waiting(self) -> int:
        """How many events the store does not have."""
        return sum(1 for _ in self.events(self.about["delivered"]))

    def append(self, event: Event) -> None:
        """Add an event of now; the operating system has it when this returns, so a kill does not lose it."""
        # Names from git or the disk that are not UTF-8 come as lone surrogates, which no store takes.
        self._file.write(json.dumps({"time": now(), **event}, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()

    def events(self, start: int = 0) -> Iterator[tuple[Event, int]]:
        """The events from byte ``start`` of the file on, in order, each with the byte where it ends."""
        path = self.folder / "events.jsonl"
        if not path.exists():  # `.state` may be deleted at any time
            return
        with open(path, "rb") as file:
            file.seek(start)
            while (line := file.readline()).endswith(b"\n"):  # the last may be half written
                try:
                    yield json.loads(line), file.tell()
                except ValueError:
                    continue  # a power cut broke it

    def keep(self, name: str, content: bytes | Path) -> str:
        """Keep bytes, or a copy of a file, under ``name``; its path within the journal's folder."""
        (self.folder / "files").mkdir(exist_ok=True)
        kept = Path(tempfile.mkdtemp(dir=self.folder / "files")) / name
        kept.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return str(kept.relative_to(self.folder))

    def update(self, **about: Any) -> None:
        """Change ``about.json``."""
        self.about |= about
        write_json(self.folder / "about.json", self.about)

    def close(self) -> None:
        """Release the journal. What the store has is deleted: the files, and all when the run has finished."""
        self._file.close()
        if not self.waiting:
            shutil.rmtree(self.folder if self.status == "FINISHED" else self.folder / "files", ignore_errors=True)
        self._lock.release()
