"""Checkpoints: all that a training needs to go on as if it had never stopped.

    FOLDER/FINGERPRINT/step-000400/state.safetensors   weights, averages, optimizer, what is measured but not yet logged
    FOLDER/FINGERPRINT/step-000400/state.json          the rest, and the checksum of the file beside it
    FOLDER/FINGERPRINT/run.json                        the MLflow run that the training logs to

The fingerprint covers params, inputs and code, so a run never meets another run's checkpoints. A checkpoint is written
under a temporary name and renamed when all of it is on the disk. No pickle is written or read.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import latentloom
from latentloom.files import atomic_path, read_json, sha256_file, write_json
from latentloom.params import Params

FORMAT_VERSION = 1
STEP = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A state after ``step`` steps: tensors by name, and facts that JSON can hold."""

    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training, in ``folder/fingerprint``; the last ``keep`` are kept.

    Args:
        folder: for the checkpoints of all trainings.
        fingerprint: of this training.
        keep: how many to keep.
        limit: bytes that other trainings' checkpoints may take; beyond it the least recently used trainings' go.
    """

    def __init__(self, folder: Path, fingerprint: str, *, keep: int, limit: int) -> None:
        self.folder, self.fingerprint, self.keep, self.limit = folder / fingerprint, fingerprint, keep, limit
        self._pinned: int | None = None

    def save(self, checkpoint: Checkpoint, *, pinned: bool = False) -> None:
        """Write a checkpoint, then delete those that are one too many; a ``pinned`` one stays.

        Raises:
            OSError: when it cannot be written, naming the file and the room it needs; older checkpoints are kept.
        """
        final = self.folder / f"{STEP}{checkpoint.step:06d}"
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()})
        try:
            with atomic_path(temporary / "state.safetensors", room=len(data)) as path:
                path.write_bytes(data)
            about = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, "step": checkpoint.step}
            about |= {"sha256": hashlib.sha256(data).hexdigest(), "torch": torch.__version__}
            write_json(temporary / "state.json", about | {"facts": checkpoint.facts})
            self._delete([final])  # a damaged one
            temporary.replace(final)
        except OSError as error:
            raise OSError(error.errno, str(error.strerror).replace(temporary.name, final.name)) from error
        finally:
            self._delete([temporary])
        if pinned:
            self._pinned = checkpoint.step
        self._delete(path for path in self._newest_first()[self.keep :] if _step(path) != self._pinned)

    def latest(self, usable: Callable[[int, dict[str, Any]], bool] = lambda step, facts: True) -> Checkpoint | None:
        """The newest whole checkpoint, of those that are ``usable`` by their step and facts; None where there is none.

        A damaged one is passed over with a warning.
        """
        for path in self._newest_first():
            try:
                about = _read_about(path, self.fingerprint)
                if not usable(about["step"], about["facts"]):
                    continue
                tensors = load_file(path / "state.safetensors")
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                warnings.warn(f"{path} is damaged and passed over ({error})", stacklevel=2)
                continue
            if about["torch"] != torch.__version__:
                warnings.warn(
                    f"{path} was written with torch {about['torch']}, this is {torch.__version__}: the training goes "
                    "on, but not bit for bit as it would have",
                    stacklevel=2,
                )
            return Checkpoint(about["step"], tensors, about["facts"])
        return None

    def read_run(self) -> dict[str, Any]:
        """What `begin` or `end` noted last; empty where nothing was, or it is damaged."""
        try:
            return read_json(self.folder / "run.json")
        except (OSError, ValueError):
            return {}

    def begin(self, run: dict[str, Any], resumed: Checkpoint | None) -> None:
        """Note which ``run`` this is, and that it goes on from ``resumed``: what lies beyond is deleted."""
        write_json(self.folder / "run.json", run)
        self._delete(path for path in self._newest_first() if _step(path) > (resumed.step if resumed else 0))
        self._delete(self.folder.glob(f".{STEP}*.tmp"))  # of a killed process
        self._make_room()

    def end(self, run: dict[str, Any]) -> None:
        """After a success: delete all but the pinned checkpoint, beside which ``run`` is noted; without one, all."""
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
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
            kept += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if kept > self.limit:
                self._delete([path])

    @staticmethod
    def _delete(folders: Iterable[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def training_fingerprint(params: Params, inputs: dict[str, str], code: str, precision: str) -> str:
    """A hash of all that decides what a training computes: 16 hexadecimal digits.

    Where the learning rate does not depend on how many steps there will be, neither does the hash, so that a run can be
    extended.

    Args:
        params: the whole params; only the sections of the training count.
        inputs: the hashes of the caches, by name.
        code: `code_hash`.
        precision: what ``train.precision`` comes to on this device.
    """
    decides = params.model_dump(mode="json", include={"seed", "model", "diffusion", "train"})
    if params.train.lr_schedule != "cosine":
        del decides["train"]["steps"], decides["train"]["decay_steps"]
    whole = [decides, inputs, code, precision, FORMAT_VERSION]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def code_hash(script: Path) -> str:
    """A hash of the code that a training runs: the packages `diffusion` and `training`, and the stage's ``script``."""
    package = Path(latentloom.__file__).parent
    digest = hashlib.sha256()
    modules = [path for name in ("diffusion", "training") for path in sorted((package / name).glob("*.py"))]
    for path in [script, *modules]:
        digest.update(f"{path.name}:{sha256_file(path)};".encode())
    return digest.hexdigest()


def _read_about(path: Path, fingerprint: str) -> dict[str, Any]:
    about = read_json(path / "state.json")
    if about["format_version"] != FORMAT_VERSION or about["fingerprint"] != fingerprint:
        raise ValueError("it is of another training or format")
    if about["step"] != _step(path):
        raise ValueError(f"its name says step {_step(path)}, its content step {about['step']}")
    if sha256_file(path / "state.safetensors") != about["sha256"]:
        raise ValueError("its checksum is another")
    return about


def _step(path: Path) -> int:
    digits = path.name.removeprefix(STEP)
    return int(digits) if digits.isdigit() else -1
