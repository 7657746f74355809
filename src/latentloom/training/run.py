"""One whole training: the network, the loop, and what is measured and shown on the way."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from latentloom.devices import autocast_dtype
from latentloom.params import Params
from latentloom.tracking.runs import TrackedRun
from latentloom.training.curves import Curves
from latentloom.training.dataset import Caches, LatentDataset
from latentloom.training.denoising_error import denoising_error
from latentloom.training.loop import StepState, train
from latentloom.training.model_files import FORMAT_VERSION, EncoderReference, ModelConfig, save_model
from latentloom.training.preview import Decoder, draw_preview, preview_subjects

BOUND_PERCENTILE = 0.995
BOUND_SHARE = 0.99


@dataclass(frozen=True)
class TrainingResult:
    """The figures of a finished training; ``images_per_second`` alone depends on the machine."""

    metrics: dict[str, float]
    val_mae: float | None
    images_per_second: float


def run_training(
    params: Params,
    caches: Caches,
    *,
    device: torch.device,
    model_folder: Path,
    curves_folder: Path,
    tracked: TrackedRun,
    load_decoder: Callable[[], Decoder],
) -> TrainingResult:
    """Train on ``caches`` and write the averaged weights to ``model_folder``.

    Args:
        params: the whole params.
        caches: both splits, on any device.
        device: where to train.
        model_folder: for ``config.json`` and ``model.safetensors``.
        curves_folder: for the curves' CSV files.
        tracked: gets metrics and preview grids by step.
        load_decoder: loads the VAE's decoder; called once, when the first preview is due.

    Raises:
        TrainingDivergedError: when the loss is no longer finite.
    """
    settings = params.train
    dtype = autocast_dtype(settings.precision, device)
    torch.manual_seed(params.seed)
    config = model_config(params, caches)
    network = config.build().to(device, memory_format=torch.channels_last)
    watch = TrainingWatch(params, config, caches.to(device), Curves(curves_folder), tracked, dtype, load_decoder)
    steps = train(
        network, watch.caches.train, params=settings, diffusion=params.diffusion, seed=params.seed, dtype=dtype
    )
    for state in watch.timed(steps):
        watch.step(state)
    save_model(model_folder, state.average, config)
    return TrainingResult(
        {
            "train_mae": round(watch.train_mae, 5),
            "steps": settings.steps,
            "images_seen": settings.steps * settings.batch_size,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        watch.val_mae,
        settings.steps * settings.batch_size / watch.seconds,
    )


class TrainingWatch:
    """Watches a training: what is measured, drawn and logged at which steps."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        caches: Caches,
        curves: Curves,
        tracked: TrackedRun,
        dtype: torch.dtype | None,
        load_decoder: Callable[[], Decoder],
    ) -> None:
        self.settings, self.diffusion, self.config, self.caches = params.train, params.diffusion, config, caches
        self.train_mae = float("nan")
        self.val_mae: float | None = None
        self.seconds = 0.0
        self._curves, self._tracked, self._dtype = curves, tracked, dtype
        self._decoder = functools.cache(load_decoder)
        self._subjects = preview_subjects(caches, self.settings.sample_count, params.seed)
        self._unlogged: list[torch.Tensor] = []
        self._logged_seconds = 0.0
        images = self.settings.steps * self.settings.batch_size
        self._progress = tqdm(total=images, desc="train", unit="image", unit_scale=True)

    def timed(self, steps: Iterator[StepState]) -> Iterator[StepState]:
        """The same steps; ``seconds`` adds up what they alone take."""
        with self._progress:
            while True:
                started = time.monotonic()
                state = next(steps, None)
                self.seconds += time.monotonic() - started
                if state is None:
                    return
                yield state

    def step(self, state: StepState) -> None:
        """Do what is due after this step."""
        self._unlogged.append(state.mae)
        for every, action in (
            (self.settings.log_every, self._log),
            (self.settings.validate_every, self._validate),
            (self.settings.sample_every, self._preview),
        ):
            if state.step % every == 0 or state.step == self.settings.steps:
                action(state)

    def _log(self, state: StepState) -> None:
        self.train_mae = float(torch.stack(self._unlogged).mean())
        images = len(self._unlogged) * self.settings.batch_size
        self._curves.add(
            "train", {"step": state.step, "train_mae": self.train_mae, "learning_rate": state.learning_rate}
        )
        self._tracked.log_metrics(
            {
                "train/mae": self.train_mae,
                "train/learning_rate": state.learning_rate,
                "train/gradient_norm": float(state.gradient_norm),
                "train/images_per_second": images / (self.seconds - self._logged_seconds),
            },
            state.step,
        )
        self._progress.set_postfix(mae=f"{self.train_mae:.3f}", refresh=False)
        self._progress.update(images)
        self._logged_seconds = self.seconds
        self._unlogged.clear()

    def _validate(self, state: StepState) -> None:
        error = denoising_error(
            state.average,
            self.caches.validation,
            schedule=self.diffusion.schedule,
            noise_levels=self.diffusion.noise_levels,
            dtype=self._dtype,
        )
        if error:
            self.val_mae = error["mae"]
            self._curves.add("validation", {"step": state.step} | {f"val_{name}": mae for name, mae in error.items()})
            self._tracked.log_metrics({f"val/{name}": mae for name, mae in error.items()}, state.step)

    def _preview(self, state: StepState) -> None:
        picture = draw_preview(
            state.average,
            self.config,
            self._subjects,
            self._decoder(),
            guidance=self.settings.sample_guidance,
            dtype=self._dtype,
        )
        self._tracked.log_image(picture, "samples", state.step)


def model_config(params: Params, caches: Caches) -> ModelConfig:
    """What the model is and needs, from the params and from what made its caches.

    Raises:
        ValueError: when the latents' size does not suit ``model.widths``.
    """
    latents, text = caches.latent_statistics, caches.text_statistics
    shape = caches.train.latent_shape
    halvings = len(params.model.widths) - 1
    if shape[1] != shape[2] or shape[1] % 2**halvings:
        raise ValueError(
            f"model.widths = {params.model.widths}: so many widths halve the latent {halvings} times, but latents "
            f"are {shape[1]}x{shape[2]}; use fewer widths or another ingest.image_size"
        )
    return ModelConfig(
        format_version=FORMAT_VERSION,
        latent_shape=shape,
        widths=params.model.widths,
        block_depth=params.model.block_depth,
        emb_size=params.model.emb_size,
        text_dim=text["dim"],
        schedule=params.diffusion.schedule,
        latent_mean=latents["mean"],
        latent_std=latents["std"],
        latent_bound=latent_bound(caches.train),
        vae=_encoder_reference(latents["vae"]),
        text_encoder=_encoder_reference(text["encoder"]),
        attribution=latents["attribution"],
        licence=latents["licence"],
    )


def latent_bound(data: LatentDataset) -> float:
    """The bound for dynamic thresholding: 99 % of the training latents have their 99.5th percentile of |z| below it.

    Imagen's bound of 1 presumes data in [-1, 1] (Saharia et al. 2022, section 2.3); standardised
    latents reach further.
    """
    percentiles = torch.quantile(data.mean.flatten(1).abs(), BOUND_PERCENTILE, dim=1)
    return round(float(torch.quantile(percentiles, BOUND_SHARE)), 4)


def _encoder_reference(made_by: dict[str, str]) -> EncoderReference:
    return EncoderReference(
        reference=made_by["reference"], class_name=made_by["class"], fingerprint=made_by["fingerprint"]
    )
