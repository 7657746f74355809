"""Checkpoints: all that a training needs to resume as if it had never stopped.

    FOLDER/FINGERPRINT/step-000400/state.safetensors   weights, averages, optimizer, the latest measurements
    FOLDER/FINGERPRINT/step-000400/curves/             the curves up to this step
    FOLDER/FINGERPRINT/step-000400/state.json          the rest, the code that wrote it, the checksum of the tensors
    FOLDER/FINGERPRINT/run.json                        the run that the training logs to
    FOLDER/FINGERPRINT.lock                            held by the process that trains

The fingerprint covers what decides the weights: params, data and precision, but not the code. So a fix of the code
resumes what the old code began; the checkpoint names its code, so that the resumed training can say so. Of a
checkpoint's files ``state.json`` is written last: without it, there is no checkpoint. No pickle is written or read.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from latentloom.errors import UserError, notify
from latentloom.files import read_json, sha256_file, write_json, write_text
from latentloom.params import Params
from latentloom.tensor_files import read_tensors, save_tensors

FORMAT_VERSION = 3


@dataclass(frozen=True)
class CodeVersion:
    """The code of a training: the hash of the modules that decide its weights, the git commit, where known, and torch.

    Two are equal where they compute the same: another commit may have changed something else.
    """

    hash: str
    commit: str | None = field(default=None, compare=False)
    torch: str = torch.__version__

    def __str__(self) -> str:
        return f"commit {(self.commit or 'unknown')[:12]}, code {self.hash[:12]}, torch {self.torch}"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk: after ``step`` steps, with the ``metadata`` that was saved beside the tensors."""

    step: int
    metadata: dict[str, Any]
    code: CodeVersion
    folder: Path

    @property
    def curves(self) -> Path:
        """The folder of the curves up to this step."""
        return self.folder / "curves"

    def load_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, on the CPU: as large as the training's state, so let go of them soon."""
        return read_tensors(self.folder / "state.safetensors")[0]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training.

    Where other trainings' take more than ``limit`` bytes, the least recently used are deleted, but for those that run.
    """

    folder: Path  # named after the training's fingerprint; those of other trainings lie beside it
    code: CodeVersion  # that runs; each checkpoint records it
    keep: int  # so many of the last checkpoints
    pinned: int  # the step whose checkpoint stays besides, also after a success; 0: none
    limit: int

    @contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[None]:
        """Hold these checkpoints: no other training deletes them, and a second one of the same fingerprint waits.

        Args:
            wait: False gives up at once; the processes of a job cannot wait for their main process for long.

        Raises:
            UserError: when they are held and ``wait`` is False.
        """
        lock = _lock_of(self.folder)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            held = f"another training of the same params and data is running ({lock.lock_file})"
            if not wait:
                raise UserError(f"{held}; wait until it has ended, or stop it") from None
            notify(f"train: {held}; waiting until it has ended")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], metadata: dict[str, Any], curves: Path) -> None:
        """Write the checkpoint after ``step`` steps, then delete those that are one too many.

        ``metadata`` is what JSON can hold, ``curves`` a folder whose CSV files are copied.

        Raises:
            WriteError: when it cannot be written, naming the file and the room it needs; older checkpoints are kept.
        """
        folder = self.folder / f"step-{step:06d}"
        self._delete([folder])  # a damaged one
        try:
            save_tensors(folder / "state.safetensors", tensors)
            for curve in sorted(curves.glob("*.csv")):
                write_text(folder / "curves" / curve.name, curve.read_text(encoding="utf-8"))
            state = {
                "format_version": FORMAT_VERSION,
                "sha256": sha256_file(folder / "state.safetensors"),
                "code": asdict(self.code),
                "metadata": metadata,
            }
            write_json(folder / "state.json", state)
        except OSError:
            self._delete([folder])
            raise
        self._delete(path for path in self._newest_first()[self.keep :] if _step(path) != self.pinned)

    def latest(self, usable: Callable[[int, dict[str, Any]], bool] = lambda step, metadata: True) -> Checkpoint | None:
        """The newest whole checkpoint, of those that are ``usable`` by their step and metadata; None where none is.

        One that is damaged or of another format is skipped with a warning.
        """
        for path in self._newest_first():
            if not (path / "state.json").exists():
                continue
            try:
                state = _read_state(path)
                found = Checkpoint(_step(path), state["metadata"], CodeVersion(**state["code"]), path)
            except (ValueError, KeyError, OSError) as error:
                warnings.warn(f"{path} cannot be used and is skipped ({error})", stacklevel=2)
                continue
            if usable(found.step, found.metadata):
                return found
        return None

    def read_run(self) -> dict[str, Any]:
        """What `begin` or `end` recorded last; empty where nothing was, or it is damaged."""
        try:
            return read_json(self.folder / "run.json")
        except UserError:
            return {}

    def begin(self, run: dict[str, Any], resumed: Checkpoint | None) -> None:
        """Record which ``run`` this is, and delete checkpoints beyond ``resumed``, whole or not."""
        write_json(self.folder / "run.json", run)
        self._delete(path for path in self._newest_first() if _step(path) > (resumed.step if resumed else 0))
        with suppress(FileNotFoundError):  # another training ended just now, and deleted its own
            self._make_room()

    def end(self, run: dict[str, Any]) -> None:
        """After a success: delete all but the pinned checkpoint, beside which ``run`` is recorded; without one, all."""
        others = [path for path in self._newest_first() if _step(path) != self.pinned]
        if len(others) == len(self._newest_first()):
            others = [self.folder]
        else:
            write_json(self.folder / "run.json", run)
        self._delete(others)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=_step, reverse=True)

    def _make_room(self) -> None:
        others = [path for path in self.folder.parent.iterdir() if path.is_dir() and path != self.folder]
        kept = 0
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
            kept += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if kept > self.limit:
                with suppress(Timeout), _lock_of(path).acquire(blocking=False):  # unless that training is running
                    self._delete([path])

    @staticmethod
    def _delete(folders: Iterable[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def training_fingerprint(params: Params, inputs: Mapping[str, str], precision: str) -> str:
    """A hash of all but the code that decides what a training computes: 16 hexadecimal digits.

    Params that are not in use are left out. Where the learning rate does not depend on how many steps there will be,
    neither does the hash, so that a run can be extended.

    Args:
        params: the whole params; only the sections of the training count.
        inputs: the hashes of the caches, and of the model that it starts from, by name.
        precision: what ``train.precision`` comes to on this device.
    """
    deciding = params.model_dump(mode="json", include={"seed", "model", "diffusion", "train"})
    train = deciding["train"] | {"precision": precision}
    if params.train.lr_schedule != "cosine":
        del train["steps"]
    del train["init"], train["init_strict"]  # a name; the hash of what it names is an input
    del train["decay_steps"]  # where it is in use it moves the end alone, and a checkpoint knows whether it is before
    if params.train.loss != "huber":
        del train["huber_delta"]
    # As it was before there was a choice, so that a training that was begun then resumes.
    if params.train.reduce_precision == "fp32":
        del train["reduce_precision"]
    if params.train.block_rows is None:
        del train["block_rows"]
    if params.train.keep == "best":  # which weights are the best depends on when and on what they were measured
        train |= params.monitor.model_dump(include={"validate_every", "validation_images"})
    whole = [deciding | {"train": train}, dict(inputs)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _read_state(path: Path) -> dict[str, Any]:
    state = read_json(path / "state.json")
    if state["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {state['format_version']}, this code reads {FORMAT_VERSION}")
    if sha256_file(path / "state.safetensors") != state["sha256"]:
        raise ValueError("its checksum does not match")
    return state


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _lock_of(folder: Path) -> FileLock:
    # Not within the folder, which is deleted while the lock is held.
    return FileLock(folder.with_name(f"{folder.name}.lock"), thread_local=False)
