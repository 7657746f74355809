"""One whole training: the network, the loop, and what is measured and shown on the way."""

import time
from collections.abc import Callable
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
    caches = caches.to(device)
    subjects = preview_subjects(caches, settings.sample_count, params.seed)
    curves = Curves(curves_folder)
    decoder: Decoder | None = None
    metrics: dict[str, float] = {}
    recent: list[torch.Tensor] = []
    computing, since = 0.0, time.monotonic()

    steps = train(network, caches.train, params=settings, diffusion=params.diffusion, seed=params.seed, dtype=dtype)
    progress = tqdm(total=settings.steps * settings.batch_size, desc="train", unit="image", unit_scale=True)
    state: StepState | None = None
    for state in steps:
        recent.append(state.mae)
        last = state.step == settings.steps
        if state.step % settings.log_every == 0 or last:
            mae = float(torch.stack(recent).mean())
            elapsed = time.monotonic() - since
            computing += elapsed
            curves.add("train", {"step": state.step, "train_mae": mae, "learning_rate": state.learning_rate})
            tracked.log_metrics(
                {
                    "train/mae": mae,
                    "train/learning_rate": state.learning_rate,
                    "train/gradient_norm": float(state.gradient_norm),
                    "train/images_per_second": len(recent) * settings.batch_size / elapsed,
                },
                state.step,
            )
            metrics["train_mae"] = mae
            progress.update(state.step * settings.batch_size - progress.n)
            progress.set_postfix(mae=f"{mae:.3f}", refresh=False)
            recent.clear()
            since = time.monotonic()
        if state.step % settings.validate_every == 0 or last:
            error = denoising_error(
                state.average,
                caches.validation,
                schedule=params.diffusion.schedule,
                noise_levels=params.diffusion.noise_levels,
                dtype=dtype,
            )
            if error:
                metrics |= {f"val_{name}": value for name, value in error.items()}
                curves.add(
                    "validation", {"step": state.step, **{f"val_{name}": value for name, value in error.items()}}
                )
                tracked.log_metrics({f"val/{name}": value for name, value in error.items()}, state.step)
            since = time.monotonic()
        if state.step % settings.sample_every == 0 or last:
            decoder = decoder or load_decoder()
            picture = draw_preview(
                state.average, config, subjects, decoder, guidance=settings.sample_guidance, dtype=dtype
            )
            tracked.log_image(picture, "samples", state.step)
            since = time.monotonic()
    progress.close()
    save_model(model_folder, state.average, config)
    rounded = {name: round(value, 5) for name, value in metrics.items()}
    seen = settings.steps * settings.batch_size
    return TrainingResult(
        {
            **rounded,
            "steps": settings.steps,
            "images_seen": seen,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        seen / computing,
    )


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
