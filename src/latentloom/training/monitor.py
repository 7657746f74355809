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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from latentloom.diffusion.denoising_error import denoising_error
from latentloom.encoding.dataset import Caches, LatentDataset, Split
from latentloom.errors import WriteError
from latentloom.model_files import ModelConfig
from latentloom.params import Params
from latentloom.training.divergence import NORMS_COMPARED, check_divergence
from latentloom.training.loop import Step, learning_rate_at
from latentloom.training.preview import Previews, prompt_reader

# The last grid, at step 0: so those of trainings of any length are side by side in MLflow, which compares by step.
FINAL_SAMPLES = "final_samples"

Result = TypeVar("Result")


class Logger(Protocol):
    """Where a training sends what it measures. What was logged before, under the same name and step, stays as it is."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, image: np.ndarray, key: str, step: int) -> None:
        """Log an image, uint8 (H, W, 3)."""

    def log_text(self, text: str, name: str) -> None:
        """Log a text as the file ``name``."""

    def set_tags(self, tags: Mapping[str, str]) -> None: ...


class Curves:
    """``train.csv``, ``validation.csv`` and ``train_by_noise.csv``: one row per logged step, at full precision.

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


@dataclass
class Figures:
    """What has been measured so far, as JSON can hold it."""

    train_mae: float | None = None  # the mean over the steps between the last two logs
    val_mae: float | None = None  # of the averaged weights, when last measured; None without a validation split
    best_step: int | None = None  # where ``val_mae`` was lowest
    best_val_mae: float | None = None
    seconds: float = 0.0  # what the steps took, without validation, previews and checkpoints
    logged_step: int = 0  # of the last log
    logged_seconds: float = 0.0  # the ``seconds`` then


class TrainingMonitor:
    """Monitors one training. All processes measure; the main one alone shows, logs and writes.

    Args:
        average: the averaged weights, which the training updates.
        logger: None in all processes but the main one.
        dtype: for autocast; None computes in fp32.
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
        logger: Logger | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.figures = Figures()
        self._params, self._train, self._validation = params, caches.train, caches.validation
        self._average, self._accelerator = average, accelerator
        self._best = copy.deepcopy(average) if params.train.keep == "best" else None
        self._curves, self._logger, self._dtype = curves, logger, dtype
        # In every process, though one uses them: while one downloaded a VAE, the others would wait in their first step,
        # until they gave up.
        read = self._attempt("fetching the text encoder of previews.prompts", lambda: prompt_reader(params, config))
        prompts = self._attempt("embedding previews.prompts", read) if read and logger else None
        self._previews = self._attempt(
            "preparing the previews", lambda: Previews(params, config, caches, prompts, dtype)
        )
        if self._previews and logger:
            logger.log_text(self._previews.index(), "previews.json")
        # A row per step: loss, mae, gradient norm. The latest are on the device, of this process; all others on the
        # CPU, over all processes: those that are not logged yet, or that new gradient norms are compared with.
        self._latest: list[torch.Tensor] = []
        self._history = torch.empty(0, 3)
        self._actions: tuple[tuple[int, Callable[[int], None]], ...] = (
            (params.monitor.log_every, self._log),
            (params.monitor.validate_every, self._validate),
            (params.previews.every, self._preview),
        )
        self._clock = time.monotonic()

    @property
    def model(self) -> nn.Module:
        """The averaged weights that become the model: the last, or those of the lowest validation error."""
        return self._average if self._best is None else self._best

    def step(self, step: Step) -> None:
        """Take a step in, and do what is due after it."""
        self._latest.append(torch.stack([step.loss, step.mae, step.gradient_norm]))
        for every, action in self._actions:
            if step.step % every == 0:
                action(step.step)

    def finish(self) -> None:
        """After the last step, and after its checkpoint, from which a longer run resumes: do what is not due then."""
        for every, action in self._actions:
            if self._params.train.steps % every:
                action(self._params.train.steps)

    def check_divergence(self, step: int) -> None:
        """Check the steps since the last check, the last of which is ``step``.

        Raises:
            TrainingDivergedError: when the training has diverged.
        """
        if not self._latest:
            return
        rows = self._accelerator.reduce(torch.stack(self._latest), "mean").cpu()
        losses, _, norms = rows.unbind(1)
        check_divergence(losses, norms, self._history[:, 2], step)
        self._latest = []
        needed = max(NORMS_COMPARED, step - self.figures.logged_step)
        self._history = torch.cat([self._history, rows])[-needed:]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that resuming needs, right after `check_divergence`."""
        tensors = {"history": self._history}
        if self._best is not None:
            tensors |= {f"best.{name}": weight for name, weight in self._best.named_parameters()}
        return tensors

    def metadata(self) -> dict[str, Any]:
        """What else resuming needs, as JSON can hold it."""
        return asdict(self.figures)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Copy in what `tensors` and `metadata` gave, before the first step; the curves have been restarted already."""
        self.figures = Figures(**metadata)
        self._history = tensors["history"].clone()
        if self._best is not None:
            for name, weight in self._best.named_parameters():
                weight.copy_(tensors[f"best.{name}"])
        if self._logger:
            for row in self._curves.rows():  # the logger may have lost them
                self._logger.log_metrics(_as_metrics(row), row["step"])
        self._clock = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        device = self._accelerator.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.figures.seconds += time.monotonic() - self._clock
        try:
            yield
        finally:
            self._clock = time.monotonic()

    def _log(self, step: int) -> None:
        self.check_divergence(step)
        with self.paused():
            figures, settings = self.figures, self._params.train
            steps, seconds = step - figures.logged_step, figures.seconds - figures.logged_seconds
            loss, figures.train_mae, _ = self._history[-steps:].mean(0).tolist()
            figures.logged_step, figures.logged_seconds = step, figures.seconds
            rate = learning_rate_at(step - 1, settings)
            row = {"step": step, "train_mae": figures.train_mae, "train_learning_rate": rate}
            if settings.loss != "mae":
                row["train_loss"] = loss
            more = {
                "train/gradient_norm": float(self._history[-1, 2]),
                "train/images_per_second": steps * settings.batch_size / seconds,
            }
            self._record("train", row, more)

    def _validate(self, step: int) -> None:
        with self.paused():
            error = self._error(self._validation)
            if not error:
                return
            figures = self.figures
            figures.val_mae = error["mae"]
            if figures.best_val_mae is None or figures.val_mae < figures.best_val_mae:
                figures.best_step, figures.best_val_mae = step, figures.val_mae
                if self._best is not None:
                    self._best.load_state_dict(self._average.state_dict())
            self._record("validation", {"step": step} | {f"val_{name}": mae for name, mae in error.items()}, {})
            # Measured alike, so that what is between the two is what was memorised; the step's own error has dropout.
            known = {f"train_{name}": mae for name, mae in self._error(self._train).items() if name != "mae"}
            self._record("train_by_noise", {"step": step} | known, {})

    def _error(self, data: LatentDataset | Split) -> dict[str, float]:
        """The denoising error of the averaged weights, on as many images as a validation takes."""
        return denoising_error(
            self._average,
            data,
            schedule=self._params.diffusion.schedule,
            noise_levels=self._params.diffusion.noise_levels,
            images=self._params.monitor.validation_images,
            dtype=self._dtype,
            accelerator=self._accelerator,
        )

    def _preview(self, step: int) -> None:
        if self._logger and self._previews:
            with self.paused():
                image = self._attempt(f"the preview at step {step}", lambda: self._previews.generate(self._average))
                if image is not None:
                    self._logger.log_image(image, "samples", step)
                    if step == self._params.train.steps:
                        self._logger.log_image(image, FINAL_SAMPLES, 0)

    def _record(self, curve: str, row: Mapping[str, float], more: Mapping[str, float]) -> None:
        """Add a row to a curve; log it, and ``more`` that is no part of the curve."""
        if self._logger:
            self._curves.add(curve, row)
            self._logger.log_metrics(_as_metrics(row) | more, row["step"])

    def _attempt(self, what: str, action: Callable[[], Result]) -> Result | None:
        """What ``action`` gives; None and a warning where it fails: hours of training are worth more than a preview."""
        try:
            return action()
        except Exception as error:
            message = f"{type(error).__name__}: {error}".splitlines()[0]
        if self._logger:
            warnings.warn(f"{what} failed, the training continues ({message})", stacklevel=3)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # it may have run out of memory
        return None


def _as_metrics(row: Mapping[str, float]) -> dict[str, float]:
    """A row of a curve under the names that MLflow groups by: ``train_mae`` -> ``train/mae``."""
    return {name.replace("_", "/", 1): value for name, value in row.items() if name != "step"}
