"""What a training measures, shows and logs on its way, at which steps; it can be saved and goes on where it was."""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from latentloom.encoding.dataset import Caches
from latentloom.model_files import ModelConfig
from latentloom.params import Params
from latentloom.tracking.runs import TrackedRun
from latentloom.training.curves import Curves
from latentloom.training.denoising_error import denoising_error
from latentloom.training.divergence import DivergenceGuard
from latentloom.training.loop import Step
from latentloom.training.preview import Decoder, draw_preview, preview_subjects


class TrainingWatch:
    """Watches one training. All processes measure; the main one alone shows, logs and writes.

    Args:
        params: the whole params.
        config: of the model.
        caches: both splits, on the device.
        average: the averaged weights that the training updates.
        accelerator: of this process.
        curves: the curves' files.
        tracked: gets metrics and preview grids by step.
        dtype: for autocast; None computes in fp32.
        load_decoder: loads the VAE's decoder; called once, when the first preview is due.

    Attributes:
        train_mae: the mean over the steps since the last but one log.
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
        tracked: TrackedRun,
        dtype: torch.dtype | None,
        load_decoder: Callable[[], Decoder],
    ) -> None:
        self.settings, self.monitor, self.diffusion, self.config, self.caches = (
            params.train,
            params.monitor,
            params.diffusion,
            config,
            caches,
        )
        self.train_mae: float | None = None
        self.val_mae: float | None = None
        self.best_step: int | None = None
        self.best_val_mae: float | None = None
        self.seconds = 0.0
        self._average, self._accelerator = average, accelerator
        self._best = copy.deepcopy(average) if self.settings.keep == "best" else None
        self._curves, self._tracked, self._dtype = curves, tracked, dtype
        self._decoder = functools.cache(load_decoder)
        self._subjects = preview_subjects(caches, self.monitor.sample_count, params.seed)
        self._guard = DivergenceGuard()
        self._unlogged: list[torch.Tensor] = []  # (loss, mae, gradient norm) a step, of this process
        self._judged = 0  # how many of them the guard has seen
        self._logged_seconds = 0.0
        self._clock = time.monotonic()
        self._progress = tqdm(
            total=self.settings.steps * self.settings.batch_size,
            desc="train",
            unit="image",
            unit_scale=True,
            disable=None if accelerator.is_main_process else True,
        )

    def __enter__(self) -> "TrainingWatch":
        self._clock = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()

    @property
    def model(self) -> nn.Module:
        """The averaged weights that become the model: the last, or those of the lowest validation error."""
        return self._average if self._best is None or self.best_step is None else self._best

    def step(self, step: Step) -> None:
        """Take a step in; do what is due every so many steps."""
        self._unlogged.append(torch.stack([step.loss, step.mae, step.gradient_norm]))
        for every, action in self._actions():
            if step.step % every == 0:
                action(step.step, step.learning_rate)

    def finish(self, last_rate: float) -> None:
        """After the last step, do what is not due by the count of steps alone."""
        for every, action in self._actions():
            if self.settings.steps % every:
                action(self.settings.steps, last_rate)

    def judge(self, step: int) -> None:
        """Look at the steps since the last look.

        Raises:
            TrainingDivergedError: when the training has gone wrong.
        """
        if unseen := self._unlogged[self._judged :]:
            losses, _, norms = self._accelerator.reduce(torch.stack(unseen), "mean").cpu().unbind(1)
            self._guard.check(losses, norms, step)
            self._judged = len(self._unlogged)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that going on needs; all processes must ask for them together."""
        tensors = {"gradient_norms": self._guard.norms}
        if self._unlogged:
            tensors["unlogged"] = self._accelerator.reduce(torch.stack(self._unlogged), "mean")
        if self._best is not None:
            tensors |= {f"best.{name}": weight for name, weight in self._best.named_parameters()}
        return tensors

    def facts(self) -> dict[str, Any]:
        """What else going on needs, as JSON can hold it."""
        return {
            "train_mae": self.train_mae,
            "val_mae": self.val_mae,
            "best_step": self.best_step,
            "best_val_mae": self.best_val_mae,
            "seconds": self.seconds,
            "logged_seconds": self._logged_seconds,
            "curves": self._curves.rows,
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], step: int) -> None:
        """Take over what `tensors` and `facts` gave after ``step`` steps."""
        self.train_mae, self.val_mae = facts["train_mae"], facts["val_mae"]
        self.best_step, self.best_val_mae = facts["best_step"], facts["best_val_mae"]
        self.seconds, self._logged_seconds = facts["seconds"], facts["logged_seconds"]
        self._guard.norms = tensors["gradient_norms"].cpu()
        device = next(self._average.parameters()).device
        self._unlogged = list(tensors["unlogged"].to(device).unbind()) if "unlogged" in tensors else []
        self._judged = len(self._unlogged)
        for name, weight in self._best.named_parameters() if self._best is not None else ():
            weight.copy_(tensors[f"best.{name}"])
        if self._accelerator.is_main_process:
            self._curves.restore(facts["curves"])
            for rows in facts["curves"].values():
                for row in rows:  # an MLflow run that has them already keeps its own
                    self._tracked.log_metrics(_as_metrics(row), row["step"])
        self._progress.update((step - len(self._unlogged)) * self.settings.batch_size)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        device = next(self._average.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.monotonic() - self._clock
        try:
            yield
        finally:
            self._clock = time.monotonic()

    def _actions(self) -> tuple[tuple[int, Callable[[int, float], None]], ...]:
        settings = self.monitor
        return (
            (settings.log_every, self._log),
            (settings.validate_every, self._validate),
            (settings.sample_every, self._preview),
        )

    def _log(self, step: int, learning_rate: float) -> None:
        self.judge(step)
        loss, mae, _ = self._accelerator.reduce(torch.stack(self._unlogged).mean(0), "mean").tolist()
        last_norm = float(self._guard.norms[-1])
        with self.paused():
            images = len(self._unlogged) * self.settings.batch_size
            seconds = self.seconds - self._logged_seconds
            self.train_mae, self._logged_seconds = mae, self.seconds
            self._unlogged, self._judged = [], 0
            if not self._accelerator.is_main_process:
                return
            row = {"step": step, "train_mae": mae, "train_learning_rate": learning_rate}
            if self.settings.loss != "mae":
                row["train_loss"] = loss
            self._curves.add("train", row)
            speed = {"train/gradient_norm": last_norm, "train/images_per_second": images / seconds}
            self._tracked.log_metrics(_as_metrics(row) | speed, step)
            self._progress.set_postfix(mae=f"{mae:.3f}", refresh=False)
            self._progress.update(images)

    def _validate(self, step: int, learning_rate: float) -> None:
        with self.paused():
            error = denoising_error(
                self._average,
                self.caches.validation,
                schedule=self.diffusion.schedule,
                noise_levels=self.diffusion.noise_levels,
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
                self._tracked.log_metrics(_as_metrics(row), step)

    def _preview(self, step: int, learning_rate: float) -> None:
        if not self._accelerator.is_main_process:
            return
        with self.paused():
            picture = draw_preview(
                self._average,
                self.config,
                self._subjects,
                self._decoder(),
                guidance=self.monitor.sample_guidance,
                dtype=self._dtype,
            )
            self._tracked.log_image(picture, "samples", step)


def _as_metrics(row: dict[str, float]) -> dict[str, float]:
    """A row of a curve under the names that MLflow groups by: ``train_mae`` -> ``train/mae``."""
    return {name.replace("_", "/", 1): value for name, value in row.items() if name != "step"}
