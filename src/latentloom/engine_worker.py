"""A worker of `latentloom.engine_ray`: it computes items on one machine, one after another.

Where the project's disk is not seen, it works on copies of the files, which come and go as bytes (`engine.here`).
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from latentloom import engine
from latentloom.errors import UserError, lacks_memory

LIBRARIES = ("numpy", "pillow", "torch", "diffusers", "transformers", "pyarrow", "resvg-py")  # decide the bytes
COPIES = 8  # files of the driver that are kept in Ray's memory, and on a machine without the project's disk


@dataclass
class Failure:
    """An error that a function raised, in place of a result."""

    error: Exception
    trace: str

    @property
    def of_memory(self) -> bool:
        return lacks_memory(self.error)


class Worker:
    """Computes items on one machine, one after another."""

    def start(self, job: tuple[Any, ...], cores: int) -> bool | Failure:
        """Make the state; say whether the project's disk is seen."""
        self._function, setup, folder, probe, versions = job
        self._state: Any = None
        self._scratch: Path | None = None
        os.environ[engine.WORKERS] = str(cores)
        with contextlib.suppress(OSError):
            os.chdir(folder)  # the stage's paths are relative to it
        try:
            own = versions_of_libraries()
            if differing := [name for name in versions if own[name] != versions[name]]:
                here, there = (", ".join(f"{name} {those[name]}" for name in differing) for those in (own, versions))
                raise UserError(f"it has {here}, the stage {there}")
            if probe is not None and not probe.is_file():
                self._scratch = Path(tempfile.mkdtemp(prefix="latentloom-"))
            if setup is not None:
                self._state = setup()
                self._function = partial(self._function, self._state)
        except Exception as error:
            return _failure(error)
        return self._scratch is None

    def leave(self) -> None:
        """Forget the state, and the copies of files."""
        self._function = self._state = None
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def work(self, items: Sequence[Any], inputs: dict[Path, Any], deaths: int) -> tuple[list[Any], dict[Path, bytes]]:
        """What comes of items, up to the first that fails; and the files they wrote, where the driver has to."""
        if deaths and hasattr(self._state, "halve_batches"):
            self._state.halve_batches(deaths)
        outcomes, written = [], {}
        for item in items:
            try:
                if self._scratch:
                    self._bring(item, inputs)
                outcomes.append(self._function(item))
                if self._scratch:
                    for path in files_of(item)[0]:
                        copy = engine.here(path)
                        written[path] = copy.read_bytes()
                        copy.unlink()
            except Exception as error:
                outcomes.append(_failure(error))
                break
        return outcomes, written

    def _bring(self, item: Any, inputs: dict[Path, Any]) -> None:
        import ray

        writes, reads = files_of(item)
        engine._copies.clear()
        for path in (*reads, *writes):
            folder = self._scratch / hashlib.sha256(str(path).encode()).hexdigest()[:16]
            folder.mkdir(exist_ok=True)
            engine._copies[path] = folder / Path(path).name
        for path in reads:
            copy = engine.here(path)
            if not copy.exists():
                copy.write_bytes(ray.get(inputs[path]))
        kept = sorted(self._scratch.iterdir(), key=lambda own: own.stat().st_mtime_ns)
        used = {copy.parent for copy in engine._copies.values()}
        for folder in [own for own in kept if own not in used][: max(len(kept) - COPIES, 0)]:
            shutil.rmtree(folder)


def files_of(item: Any) -> tuple[Sequence[Path], Sequence[Path]]:
    """The files that an item writes, and those that it reads."""
    return getattr(item, "writes", ()), getattr(item, "reads", ())


def _failure(error: Exception) -> Failure:
    from ray import cloudpickle

    trace = traceback.format_exc()
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = None
    return Failure(error, trace)


def versions_of_libraries() -> dict[str, str]:
    """Of Python and of what decides the bytes of a stage's outs, as they are installed."""
    versions = {"Python": ".".join(map(str, sys.version_info[:2]))}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "(none)"
    return versions
