"""Checkpoints: all that a training needs to resume as if it had never stopped.

    FOLDER/FINGERPRINT/step-000400/state.safetensors   weights, averages, optimizer, what is measured but not yet logged
    FOLDER/FINGERPRINT/step-000400/state.json          the rest, the code that wrote it, the checksum of the tensors
    FOLDER/FINGERPRINT/step-000400/curves/             the curves up to this step
    FOLDER/FINGERPRINT/run.json                        the run that the training logs to
    FOLDER/FINGERPRINT.lock                            held by the process that trains

The fingerprint covers what decides the weights: params, data and precision, but not the code. So a fix of the code
resumes what the old code began; the checkpoint names its code, so that the resumed training can say so. A checkpoint is
written under a temporary name and renamed when all of it is on the disk. No pickle is written or read.
"""

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from latentloom.errors import UserError, WriteError
from latentloom.files import read_json, sha256_file, write_json
from latentloom.model_files import save_tensors
from latentloom.params import Params

FORMAT_VERSION = 2
STEP = "step-"


@dataclass(frozen=True)
class CodeVersion:
    """The code of a training: the hash of the modules that decide its weights, and the git commit, where known."""

    hash: str
    commit: str | None = None

    def __str__(self) -> str:
        return f"commit {(self.commit or 'unknown')[:12]}, code {self.hash[:12]}"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk.

    Attributes:
        step: steps done.
        metadata: what was saved with the tensors, as JSON holds it.
        code: that wrote it.
        folder: of its files.
    """

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
        return load_file(self.folder / "state.safetensors")


class Checkpoints:
    """The checkpoints of one training, in ``folder/fingerprint``; the last ``keep`` are kept.

    Args:
        folder: for the checkpoints of all trainings.
        fingerprint: of this training.
        code: that runs; each checkpoint records it.
        keep: how many to keep.
        limit: bytes that other trainings' checkpoints may take; beyond it the least recently used trainings' are
            deleted, but for those that run.
    """

    def __init__(self, folder: Path, fingerprint: str, *, code: CodeVersion, keep: int, limit: int) -> None:
        self.folder, self.fingerprint, self.code, self.keep, self.limit = (
            folder / fingerprint,
            fingerprint,
            code,
            keep,
            limit,
        )
        self._pinned: int | None = None

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
            print(f"train: {held}; waiting until it has ended", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        metadata: dict[str, Any],
        *,
        curves: Path | None = None,
        pinned: bool = False,
    ) -> None:
        """Write a checkpoint, then delete those that are one too many; a ``pinned`` one stays.

        Args:
            step: steps done.
            tensors: by name, on any device.
            metadata: what JSON can hold.
            curves: a folder to copy.
            pinned: whether it stays when others are deleted.

        Raises:
            WriteError: when it cannot be written, naming the file and the room it needs; older checkpoints are kept.
        """
        final = self.folder / f"{STEP}{step:06d}"
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        try:
            save_tensors(temporary / "state.safetensors", tensors)
            if curves and curves.is_dir():
                shutil.copytree(curves, temporary / "curves")
            state = {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "step": step,
                "sha256": sha256_file(temporary / "state.safetensors"),
                "torch": torch.__version__,
                "code": self.code.hash,
                "commit": self.code.commit,
                "metadata": metadata,
            }
            write_json(temporary / "state.json", state)
            self._delete([final])  # a damaged one
            temporary.replace(final)
        except OSError as error:
            named = error if isinstance(error, WriteError) else f"could not write {final}: {error.strerror or error}"
            raise WriteError(error.errno, str(named).replace(temporary.name, final.name)) from error
        finally:
            self._delete([temporary])
        if pinned:
            self._pinned = step
        self._delete(path for path in self._newest_first()[self.keep :] if _step(path) != self._pinned)

    def latest(self, usable: Callable[[int, dict[str, Any]], bool] = lambda step, metadata: True) -> Checkpoint | None:
        """The newest whole checkpoint, of those that are ``usable`` by their step and metadata; None where none is.

        One that is damaged or of another format is skipped with a warning.
        """
        for path in self._newest_first():
            try:
                state = _read_state(path, self.fingerprint)
                found = Checkpoint(state["step"], state["metadata"], CodeVersion(state["code"], state["commit"]), path)
                if not usable(found.step, found.metadata):
                    continue
            except (ValueError, KeyError, OSError) as error:
                warnings.warn(f"{path} cannot be used and is skipped ({error})", stacklevel=2)
                continue
            if state["torch"] != torch.__version__:
                warnings.warn(
                    f"{path} was written with torch {state['torch']}, this is {torch.__version__}: the training "
                    "resumes, but will not end with the same bytes",
                    stacklevel=2,
                )
            return found
        return None

    def read_run(self) -> dict[str, Any]:
        """What `begin` or `end` recorded last; empty where nothing was, or it is damaged."""
        try:
            return read_json(self.folder / "run.json")
        except (OSError, ValueError):
            return {}

    def begin(self, run: dict[str, Any], resumed: Checkpoint | None) -> None:
        """Record which ``run`` this is, and delete checkpoints beyond ``resumed``."""
        write_json(self.folder / "run.json", run)
        self._delete(path for path in self._newest_first() if _step(path) > (resumed.step if resumed else 0))
        self._delete(self.folder.glob(f".{STEP}*.tmp"))  # of a killed process
        self._make_room()

    def end(self, run: dict[str, Any]) -> None:
        """After a success: delete all but the pinned checkpoint, beside which ``run`` is recorded; without one, all."""
        if self._pinned is None:
            self._delete([self.folder])
        else:
            write_json(self.folder / "run.json", run)
            self._delete(path for path in self._newest_first() if _step(path) != self._pinned)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(f"{STEP}*"), key=_step, reverse=True)

    def _make_room(self) -> None:
        others = [path for path in self.folder.parent.iterdir() if path.is_dir() and path != self.folder]
        kept = 0
        for path in sorted(others, key=_last_used, reverse=True):
            kept += sum(_size(file) for file in path.rglob("*"))
            if kept <= self.limit:
                continue
            try:
                with _lock_of(path).acquire(blocking=False):
                    self._delete([path])
            except Timeout:
                continue  # that training is running

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
        inputs: the hashes of the caches, by name.
        precision: what ``train.precision`` comes to on this device.
    """
    deciding = params.model_dump(mode="json", include={"seed", "model", "diffusion", "train"})
    train = deciding["train"] | {"precision": precision}
    if params.train.lr_schedule != "cosine":
        del train["steps"]
    del train["decay_steps"]  # where it is in use it moves the end alone, and a checkpoint knows whether it is before
    if params.train.loss != "huber":
        del train["huber_delta"]
    if params.train.keep == "best":  # which weights are the best depends on when and on what they were measured
        train |= params.monitor.model_dump(include={"validate_every", "validation_images"})
    whole = [deciding | {"train": train}, dict(inputs)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _read_state(path: Path, fingerprint: str) -> dict[str, Any]:
    state = read_json(path / "state.json")
    if state["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {state['format_version']}, this code reads {FORMAT_VERSION}")
    if state["fingerprint"] != fingerprint:
        raise ValueError("it belongs to another training")
    if state["step"] != _step(path):
        raise ValueError(f"its name says step {_step(path)}, its content step {state['step']}")
    if sha256_file(path / "state.safetensors") != state["sha256"]:
        raise ValueError("its checksum does not match")
    return state


def _step(path: Path) -> int:
    digits = path.name.removeprefix(STEP)
    return int(digits) if digits.isdigit() else -1


def _lock_of(folder: Path) -> FileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not within the folder, which is deleted while the lock is held.
    return FileLock(folder.with_name(f"{folder.name}.lock"), thread_local=False)


# Another training may delete what is listed at any moment.


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0
