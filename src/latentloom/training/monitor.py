"""What a training measures, shows and logs, and at which steps: errors, curves, previews, divergence.

It is part of the training's state: it can be saved, and resumes with what was measured but not yet logged.
"""

import copy
import csv
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from latentloom.diffusion.denoising_error import denoising_error
from latentloom.encoding.dataset import Caches
from latentloom.errors import WriteError
from latentloom.model_files import ModelConfig
from latentloom.params import Params
from latentloom.training.divergence import DivergenceCheck
from latentloom.training.loop import Step
from latentloom.training.preview import Previews


class Logger(Protocol):
    """Where a training sends what it measures. What was logged before, under the same name and step, stays as it is."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Log an image, uint8 (H, W, 3)."""

    def set_tags(self, tags: Mapping[str, str]) -> None: ...


class NullLogger:
    """A `Logger` that keeps nothing: for every process but the main one."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, image: np.ndarray, key: str, step: int) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...


class Curves:
    """``train.csv`` and ``validation.csv``: one row per logged step, at full precision.

    Rows are appended, so a killed training leaves its curves so far. They hold what the seed decides and nothing of the
    machine (no times): the same run gives the same files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def restart(self, saved: Path | None = None) -> None:
        """Start from the curves in the folder ``saved``, or from none."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if saved and saved.is_dir():
            shutil.copytree(saved, self.folder)

    def add(self, name: str, row: Mapping[str, float]) -> None:
        """Append a row to ``NAME.csv``, whose columns are those of its first row.

        Raises:
            WriteError: when it cannot be written.
        """
        path = self.folder / f"{name}.csv"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise WriteError(error.errno, f"could not write {path}: {error.strerror or error}") from error

    def rows(self) -> Iterator[dict[str, float]]:
        """All rows of all files."""
        for path in sorted(self.folder.glob("*.csv")):
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    yield {name: int(value) if name == "step" else float(value) for name, value in row.items()}


class TrainingMonitor:
    """Monitors one training. All processes measure; the main one alone shows, logs and writes.

    Args:
        params: the whole params.
        config: of the model.
        caches: both splits, on the device.
        average: the averaged weights that the training updates.
        accelerator: of this process.
        curves: the curves' files.
        logger: gets metrics and preview grids by step.
        dtype: for autocast; None computes in fp32.

    Attributes:
        train_mae: the mean over the steps between the last two logs.
        val_mae: the validation error of the averaged weights, when last measured; None without a validation split.
        best_step: where ``val_mae`` was lowest, and ``best_val_mae``, that error.
        seconds: what the steps took, without validation, previews and checkpoints.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        caches: Caches,
        average: nn.Module,
        *,
        accelerator: Accelerator,
        curves: Curves,
        logger: Logger,
        dtype: torch.dtype | None,
    ) -> None:
        self.settings, self.monitor, self.diffusion = params.train, params.monitor, params.diffusion
        self.validation = caches.validation
        self.train_mae: float | None = None
        self.val_mae: float | None = None
        self.best_step: int | None = None
        self.best_val_mae: float | None = None
        self.seconds = 0.0
        self._average, self._accelerator = average, accelerator
        self._best = copy.deepcopy(average) if self.settings.keep == "best" else None
        self._curves, self._logger, self._dtype = curves, logger, dtype
        self._previews = Previews(
            config,
            caches,
            count=self.monitor.sample_count,
            guidance=self.monitor.sample_guidance,
            seed=params.seed,
            dtype=dtype,
        )
        self._divergence = DivergenceCheck()
        self._unlogged: list[torch.Tensor] = []  # (loss, mae, gradient norm) per step, of this process
        self._checked = 0  # how many of them were checked for divergence
        self._logged_seconds = 0.0
        self._clock = time.monotonic()
        self._progress = tqdm(
            total=self.settings.steps * self.settings.batch_size,
            desc="train",
            unit="image",
            unit_scale=True,
            disable=None if accelerator.is_main_process else True,
        )

    def __enter__(self) -> "TrainingMonitor":
        self._clock = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()

    @property
    def model(self) -> nn.Module:
        """The averaged weights that become the model: the last, or those of the lowest validation error."""
        return self._average if self._best is None else self._best

    def step(self, step: Step) -> None:
        """Take a step in, and do what is due after it."""
        self._unlogged.append(torch.stack([step.loss, step.mae, step.gradient_norm]))
        for every, action in self._actions():
            if step.step % every == 0:
                action(step.step, step.learning_rate)

    def finish(self, last_rate: float) -> None:
        """After the last step, do what its number alone does not make due."""
        for every, action in self._actions():
            if self.settings.steps % every:
                action(self.settings.steps, last_rate)

    def check_divergence(self, step: int) -> None:
        """Check the steps since the last check, the last of which is ``step``.

        Raises:
            TrainingDivergedError: when the training has diverged.
        """
        if unchecked := self._unlogged[self._checked :]:
            losses, _, norms = self._accelerator.reduce(torch.stack(unchecked), "mean").cpu().unbind(1)
            self._divergence.check(losses, norms, step)
            self._checked = len(self._unlogged)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that resuming needs; all processes must ask for them together."""
        tensors = {"gradient_norms": self._divergence.norms}
        if self._unlogged:
            tensors["unlogged"] = self._accelerator.reduce(torch.stack(self._unlogged), "mean")
        if self._best is not None:
            tensors |= {f"best.{name}": weight for name, weight in self._best.named_parameters()}
        return tensors

    def metadata(self) -> dict[str, Any]:
        """What else resuming needs, as JSON can hold it."""
        return {
            "train_mae": self.train_mae,
            "val_mae": self.val_mae,
            "best_step": self.best_step,
            "best_val_mae": self.best_val_mae,
            "seconds": self.seconds,
            "logged_seconds": self._logged_seconds,
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], step: int) -> None:
        """Copy in what `tensors` and `metadata` gave after ``step`` steps; the curves have been restarted already."""
        self.train_mae, self.val_mae = metadata["train_mae"], metadata["val_mae"]
        self.best_step, self.best_val_mae = metadata["best_step"], metadata["best_val_mae"]
        self.seconds, self._logged_seconds = metadata["seconds"], metadata["logged_seconds"]
        self._divergence.norms = tensors["gradient_norms"].cpu().clone()
        if "unlogged" in tensors:
            self._unlogged = list(tensors["unlogged"].clone().to(self._accelerator.device).unbind())
        self._checked = len(self._unlogged)
        if self._best is not None:
            for name, weight in self._best.named_parameters():
                weight.copy_(tensors[f"best.{name}"])
        if self._accelerator.is_main_process:
            for row in self._curves.rows():  # the logger may have lost them
                self._logger.log_metrics(_as_metrics(row), row["step"])
        self._progress.update((step - len(self._unlogged)) * self.settings.batch_size)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        device = self._accelerator.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.monotonic() - self._clock
        try:
            yield
        finally:
            self._clock = time.monotonic()

    def _actions(self) -> tuple[tuple[int, Callable[[int, float], None]], ...]:
        monitor = self.monitor
        return (
            (monitor.log_every, self._log),
            (monitor.validate_every, self._validate),
            (monitor.sample_every, self._preview),
        )

    def _log(self, step: int, learning_rate: float) -> None:
        self.check_divergence(step)
        loss, mae, _ = self._accelerator.reduce(torch.stack(self._unlogged).mean(0), "mean").tolist()
        with self.paused():
            images = len(self._unlogged) * self.settings.batch_size
            seconds = self.seconds - self._logged_seconds
            self.train_mae, self._logged_seconds = mae, self.seconds
            self._unlogged, self._checked = [], 0
            if not self._accelerator.is_main_process:
                return
            row = {"step": step, "train_mae": mae, "train_learning_rate": learning_rate}
            if self.settings.loss != "mae":
                row["train_loss"] = loss
            self._curves.add("train", row)
            others = {
                "train/gradient_norm": float(self._divergence.norms[-1]),
                "train/images_per_second": images / seconds,
            }
            self._logger.log_metrics(_as_metrics(row) | others, step)
            self._progress.set_postfix(mae=f"{mae:.3f}", refresh=False)
            self._progress.update(images)

    def _validate(self, step: int, learning_rate: float) -> None:
        with self.paused():
            error = denoising_error(
                self._average,
                self.validation,
                schedule=self.diffusion.schedule,
                noise_levels=self.diffusion.noise_levels,
                images=self.monitor.validation_images,
                dtype=self._dtype,
                accelerator=self._accelerator,
            )
            if not error:
                return
            self.val_mae = error["mae"]
            if self.best_val_mae is None or self.val_mae < self.best_val_mae:
                self.best_step, self.best_val_mae = step, self.val_mae
                if self._best is not None:
                    with torch.no_grad():
                        torch._foreach_copy_(list(self._best.parameters()), list(self._average.parameters()))
            if self._accelerator.is_main_process:
                row = {"step": step} | {f"val_{name}": mae for name, mae in error.items()}
                self._curves.add("validation", row)
                self._logger.log_metrics(_as_metrics(row), step)

    def _preview(self, step: int, learning_rate: float) -> None:
        if not self._accelerator.is_main_process:
            return
        with self.paused():
            try:
                image = self._previews.generate(self._average)
            except Exception as error:  # whatever it is, hours of training are worth more than a preview
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"the preview at step {step} failed, the training continues ({message})", stacklevel=2)
                image = None
            if image is not None:
                self._logger.log_image(image, "samples", step)
            elif torch.cuda.is_available():
                torch.cuda.empty_cache()  # it may have run out of memory


def _as_metrics(row: Mapping[str, float]) -> dict[str, float]:
    """A row of a curve under the names that MLflow groups by: ``train_mae`` -> ``train/mae``."""
    return {name.replace("_", "/", 1): value for name, value in row.items() if name != "step"}
