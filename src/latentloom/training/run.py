"""One whole training: from the caches, or from a checkpoint, to the model's folder."""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from latentloom.base_model import take_weights
from latentloom.devices import autocast_dtype
from latentloom.diffusion.text import Labels, pooled
from latentloom.diffusion.unet import UNet
from latentloom.encoding.dataset import Caches
from latentloom.encoding.shard_files import TOKENS
from latentloom.errors import UserError, notify
from latentloom.model_files import FORMAT_VERSION, EncoderReference, ModelConfig, save_model
from latentloom.params import Params, TrainParams
from latentloom.training.checkpoints import Checkpoint, Checkpoints
from latentloom.training.interruption import StopRequest, TrainingStopped
from latentloom.training.loop import Step, TrainingState, open_ended_steps, train
from latentloom.training.monitor import Curves, Logger, TrainingMonitor
from latentloom.training.progress import Progress

WHITENED_CAPTIONS = 10_000  # at most so many are measured
WHITENED_TOKENS = 50_000  # with their padding


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
    accelerator: Accelerator,
    checkpoints: Checkpoints | None,
    resumed: Checkpoint | None,
    model_folder: Path,
    curves_folder: Path,
    logger: Logger | None,
    base: Path | None = None,
) -> TrainingResult:
    """Train on ``caches`` and write the averaged weights to ``model_folder``. Every process of a job calls this.

    Args:
        caches: on this process's device.
        checkpoints: None in all processes but the main one, which alone writes; so are ``resumed`` and ``logger``.
        resumed: what to resume from; None starts anew.
        curves_folder: for the curves' CSV files; what it holds is replaced.
        base: the folder of the model that ``train.init`` names; None starts from noise.

    Raises:
        TrainingDivergedError: when the training has diverged; the checkpoints from before are kept.
        TrainingStopped: after SIGTERM or Ctrl-C, when the state is saved.
        UserError: when ``train.batch_size`` does not divide over the processes, the latents' size does not suit
            ``model.widths``, ``train.keep`` is ``best`` without a validation split, ``machine.compile`` asks for
            what is not there, or the base does not fit.
    """
    settings, device = params.train, accelerator.device
    _check_settings(params, caches, device)
    if accelerator.is_main_process and not caches.has_validation:
        notify("train: the validation split is empty, so no validation error is measured")
    dtype = autocast_dtype(settings.precision, device)
    torch.manual_seed(params.seed)
    config = model_config(params, caches)
    try:
        network = config.build().to(device, memory_format=torch.channels_last)
    except ValueError as error:
        raise UserError(
            f"model.widths = {params.model.widths}: {error}; use fewer widths, another ingest.image_size or a larger "
            "ingest.bucket_multiple"
        ) from error
    fit_whitening(network, caches)
    if base:
        carried = take_weights(network, config, base, settings.init, strict=settings.init_strict)
        if accelerator.is_main_process and not resumed:
            notify(f"train: starting from {settings.init}; {'; '.join(carried.lines())}")
    network.gradient_checkpointing = params.machine.gradient_checkpointing
    state = TrainingState.start(network, settings, dtype)
    curves = Curves(curves_folder)
    monitor = TrainingMonitor(
        params, config, caches, state.average, accelerator=accelerator, curves=curves, logger=logger, dtype=dtype
    )
    if accelerator.is_main_process:
        curves.restart(resumed.curves if resumed else None)
        if resumed:
            _announce(resumed, checkpoints, settings.steps, logger)
    _resume(resumed, state, monitor, accelerator)

    steps = train(
        state,
        caches.train,
        params=settings,
        diffusion=params.diffusion,
        seed=params.seed,
        dtype=dtype,
        accelerator=accelerator,
        compiled=params.machine.compile,
    )
    progress = Progress(state.step, settings.steps, shown=accelerator.is_main_process)
    with progress, StopRequest() as request:
        for step in steps:
            monitor.step(step)
            progress.step(step.step, monitor.figures.train_mae)
            signal = _asked_to_stop(request, accelerator, step, params.monitor.log_every)
            due = step.step % params.machine.checkpoint_every == 0
            if due or signal or step.step in (open_ended_steps(settings), settings.steps):
                monitor.check_divergence(step.step)
                with monitor.paused():
                    if checkpoints:
                        metadata = {"schedule": _schedule(settings), "monitor": monitor.metadata()}
                        checkpoints.save(step.step, state.tensors() | monitor.tensors(), metadata, curves_folder)
            if signal:
                raise TrainingStopped(
                    f"stopped at step {step.step} of {settings.steps}; the state is saved, the same command resumes "
                    "from there",
                    signal,
                )
        monitor.finish()
    if accelerator.is_main_process:
        save_model(model_folder, monitor.model.state_dict(), config)
    figures = monitor.figures
    metrics = {
        "train_mae": round(figures.train_mae, 4),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    if figures.best_val_mae is not None:
        metrics |= {"best_val_mae": round(figures.best_val_mae, 4), "best_step": figures.best_step}
    return TrainingResult(metrics, figures.val_mae, settings.steps * settings.batch_size / figures.seconds)


def fit_whitening(network: UNet, caches: Caches) -> None:
    """Fit the network's whitening of texts, and of token states, to primary captions of the training split."""
    data = caches.train

    def captions(at_most: int) -> Labels:
        rows = torch.linspace(0, len(data) - 1, min(len(data), at_most)).long()
        return data.primary_embeddings(rows)

    if network.token_dim is None:
        network.text_whitening.fit(pooled(captions(WHITENED_CAPTIONS)))
        return
    text = captions(max(WHITENED_TOKENS // data.text.shapes[TOKENS][0], 1))
    network.text_whitening.fit(text.pooled)
    network.token_whitening.fit(text.tokens[text.mask])


def usable_checkpoint(checkpoints: Checkpoints, params: Params) -> Checkpoint | None:
    """The newest checkpoint on the trajectory of a training with ``params``.

    A checkpoint from before a decay is on that of every longer run; one from within it only on that of the same run.
    """
    settings = params.train
    finished = checkpoints.read_run().get("finished_steps")
    if finished is not None and settings.steps <= finished:
        return None  # kept to be extended, not to save a run that was asked for again

    def on_trajectory(step: int, metadata: Mapping[str, Any]) -> bool:
        schedule = metadata["schedule"]
        if schedule == _schedule(settings):
            return step <= settings.steps
        return step <= min(open_ended_steps(settings), schedule["open_ended_steps"])

    return checkpoints.latest(on_trajectory)


def _schedule(settings: TrainParams) -> dict[str, int]:
    """What two runs of one fingerprint may differ in: where they end, and where their decay begins."""
    return {"steps": settings.steps, "open_ended_steps": open_ended_steps(settings)}


def _announce(resumed: Checkpoint, checkpoints: Checkpoints, steps: int, logger: Logger) -> None:
    notify(f"train: resuming from step {resumed.step} of {steps}")
    if resumed.code != checkpoints.code:
        warnings.warn(
            f"the checkpoint was written by other code ({resumed.code}) than the present ({checkpoints.code}): the "
            f"training resumes, the run is tagged, and other bytes may come out. To start anew instead, delete "
            f"{checkpoints.folder}",
            stacklevel=3,
        )
        logger.set_tags({"resumed.other_code": "true"})


def _resume(
    checkpoint: Checkpoint | None, state: TrainingState, monitor: TrainingMonitor, accelerator: Accelerator
) -> None:
    """Load the main process's checkpoint in every process; when this returns, nothing holds its tensors any more."""

    def shared(value: Any) -> Any:  # so that only the main process needs to reach the files
        return broadcast_object_list([value])[0]

    tensors = checkpoint.load_tensors() if checkpoint else {}
    saved = shared((checkpoint.step, checkpoint.metadata["monitor"], list(tensors)) if checkpoint else None)
    if saved is None:
        return
    step, metadata, names = saved
    tensors = {name: shared(tensors.get(name)) for name in names}  # one at a time, as they pass through the device
    state.load(tensors, step)
    monitor.load(tensors, metadata)


def _asked_to_stop(request: StopRequest, accelerator: Accelerator, step: Step, every: int) -> int:
    """The signal that any process got, else 0; several processes compare only every so many steps, as it takes time."""
    if accelerator.num_processes == 1:
        return request.number
    if step.step % every:
        return 0
    return int(accelerator.gather(torch.tensor([request.number], device=accelerator.device)).max())


def _check_settings(params: Params, caches: Caches, device: torch.device) -> None:
    if params.train.keep == "best" and not caches.has_validation:
        raise UserError(
            "train.keep = best: the validation split is empty, so no weights can be called the best; raise "
            "ingest.val_fraction, or set it to last"
        )
    if params.model.text == "tokens" and not caches.text_statistics["token_dim"]:
        raise UserError("model.text = tokens: the text cache has no token states; run `dvc repro encode_text`")
    if params.machine.compile == "cuda_graphs":
        if device.type != "cuda":
            raise UserError(
                f"machine.compile = cuda_graphs: graphs need a CUDA device, and this training computes on {device}; "
                "set it to false"
            )
        if len(caches.train.buckets) > 1:
            raise UserError(
                f"machine.compile = cuda_graphs: a graph is of one shape, and the latents have "
                f"{len(caches.train.buckets)} (ingest.shape, ingest.image_size); set it to true or false"
            )
    elif params.machine.compile and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError("machine.compile = True: torch.compile needs a C++ compiler; install g++, or set it to false")


def model_config(params: Params, caches: Caches) -> ModelConfig:
    """What the model is and needs, from the params and from what made its caches."""
    latents, text = caches.latent_statistics, caches.text_statistics
    return ModelConfig(
        format_version=FORMAT_VERSION,
        latent_shape=caches.latent_shape,
        latent_shapes=caches.train.shapes if len(caches.train.shapes) > 1 else None,
        widths=params.model.widths,
        block_depth=params.model.block_depth,
        emb_size=params.model.emb_size,
        text_dim=text["dim"],
        token_dim=text["token_dim"] if params.model.text == "tokens" else None,
        max_tokens=text["max_tokens"],
        schedule=params.diffusion.schedule,
        latent_mean=latents["mean"],
        latent_std=latents["std"],
        latent_bound=latents["bound"],
        vae=_encoder_reference(latents["vae"]),
        text_encoder=_encoder_reference(text["encoder"]),
        attribution=latents["attribution"],
        licence=latents["licence"],
    )


def _encoder_reference(made_by: dict[str, str]) -> EncoderReference:
    return EncoderReference(
        reference=made_by["reference"], class_name=made_by["class"], fingerprint=made_by["fingerprint"]
    )
