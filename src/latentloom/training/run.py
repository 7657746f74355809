"""One whole training: from the caches, or from a checkpoint, to the model's folder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list

from latentloom.devices import autocast_dtype
from latentloom.encoding.dataset import Caches
from latentloom.model_files import FORMAT_VERSION, EncoderReference, ModelConfig, save_model
from latentloom.params import Params
from latentloom.tracking.runs import TrackedRun
from latentloom.training.checkpoints import Checkpoint, Checkpoints
from latentloom.training.curves import Curves
from latentloom.training.interruption import StopRequest, TrainingStopped
from latentloom.training.learning_rate import learning_rate_at, open_ended_steps
from latentloom.training.loop import Step, TrainingState, train
from latentloom.training.preview import Decoder
from latentloom.training.watch import TrainingWatch


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
    checkpoints: Checkpoints,
    resumed: Checkpoint | None,
    model_folder: Path,
    curves_folder: Path,
    tracked: TrackedRun,
    load_decoder: Callable[[], Decoder],
) -> TrainingResult:
    """Train on ``caches`` and write the averaged weights to ``model_folder``. Every process of a job calls this.

    Args:
        params: the whole params.
        caches: both splits, on this process's device.
        accelerator: of this process; the main one alone writes.
        checkpoints: where the state is saved on the way.
        resumed: what to go on from, in the main process; None starts anew.
        model_folder: for ``config.json`` and ``model.safetensors``.
        curves_folder: for the curves' CSV files.
        tracked: gets metrics and preview grids by step.
        load_decoder: loads the VAE's decoder; called once, when the first preview is due.

    Raises:
        TrainingDivergedError: when the training has gone wrong; the checkpoints from before are kept.
        TrainingStopped: after SIGTERM or Ctrl-C, when the state is saved.
        ValueError: when ``train.batch_size`` does not divide over the processes, or no compiler is there.
    """
    settings, device = params.train, accelerator.device
    dtype = autocast_dtype(settings.precision, device)
    if params.machine.compile:
        _check_compiler()
    torch.manual_seed(params.seed)
    config = model_config(params, caches)
    network = config.build().to(device, memory_format=torch.channels_last)
    network.gradient_checkpointing = params.machine.gradient_checkpointing
    state = TrainingState.start(network, settings)
    watch = TrainingWatch(
        params,
        config,
        caches,
        state.average,
        accelerator=accelerator,
        curves=Curves(curves_folder),
        tracked=tracked,
        dtype=dtype,
        load_decoder=load_decoder,
    )
    if resumed := _in_every_process(resumed, accelerator):
        state.load(resumed.tensors, resumed.step)
        watch.load(resumed.tensors, resumed.facts["watch"], resumed.step)

    def save(step: int) -> None:
        watch.judge(step)
        with watch.paused():
            checkpoint = Checkpoint(step, state.tensors() | watch.tensors(), _facts(params, watch))
            if accelerator.is_main_process:
                checkpoints.save(checkpoint, pinned=step == open_ended_steps(settings))

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
    with watch, StopRequest() as request:
        for step in steps:
            watch.step(step)
            signal = _asked_to_stop(request, accelerator, step, params.monitor.log_every)
            if (
                signal
                or step.step % params.machine.checkpoint_every == 0
                or step.step in (open_ended_steps(settings), settings.steps)
            ):
                save(step.step)
            if signal:
                raise TrainingStopped(
                    f"stopped at step {step.step} of {settings.steps}; the state is saved, the same command goes on "
                    "from there",
                    signal,
                )
        watch.finish(learning_rate_at(settings.steps - 1, settings))
    if accelerator.is_main_process:
        save_model(model_folder, watch.model, config)
    metrics = {
        "train_mae": round(watch.train_mae, 4),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    if watch.best_val_mae is not None:
        metrics |= {"best_val_mae": round(watch.best_val_mae, 4), "best_step": watch.best_step}
    return TrainingResult(metrics, watch.val_mae, settings.steps * settings.batch_size / watch.seconds)


def usable_checkpoint(checkpoints: Checkpoints, params: Params) -> Checkpoint | None:
    """The newest checkpoint that a training with ``params`` would have come by.

    A checkpoint from before a decay is on the way of every longer run; one from within it only of the same run.
    """
    settings = params.train
    finished = checkpoints.read_run().get("finished_steps")
    if finished is not None and settings.steps <= finished:
        return None  # kept to be extended, not to save a run that was asked for again

    def on_the_way(step: int, facts: dict) -> bool:
        same = (facts["steps"], facts["decay_steps"]) == (settings.steps, settings.decay_steps)
        return step <= (settings.steps if same else open_ended_steps(settings)) and (
            same or step <= facts["open_ended_steps"]
        )

    return checkpoints.latest(on_the_way)


def _facts(params: Params, watch: TrainingWatch) -> dict:
    settings = params.train
    return {
        "steps": settings.steps,
        "decay_steps": settings.decay_steps,
        "open_ended_steps": open_ended_steps(settings),
        "watch": watch.facts(),
    }


def _in_every_process(checkpoint: Checkpoint | None, accelerator: Accelerator) -> Checkpoint | None:
    """The main process's checkpoint in all of them, so that only it needs to reach the files."""
    if accelerator.num_processes == 1:
        return checkpoint
    described = [None]
    if checkpoint:
        kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in checkpoint.tensors.items()}
        described = [(checkpoint.step, checkpoint.facts, kinds)]
    broadcast_object_list(described)
    if described[0] is None:
        return None
    step, facts, kinds = described[0]
    empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
    tensors = checkpoint.tensors if checkpoint else empty
    return Checkpoint(step, {name: broadcast(tensors[name].to(accelerator.device)) for name in kinds}, facts)


def _asked_to_stop(request: StopRequest, accelerator: Accelerator, step: Step, every: int) -> int:
    """The signal that any process got, else 0; several processes ask each other only now and then, as it takes time."""
    if accelerator.num_processes == 1:
        return request.number
    if step.step % every:
        return 0
    return int(accelerator.gather(torch.tensor([request.number], device=accelerator.device)).max())


def _check_compiler() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ValueError("machine.compile = True: torch.compile needs a C++ compiler; install g++, or set it to false")


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
        latent_bound=caches.latent_statistics["bound"],
        vae=_encoder_reference(latents["vae"]),
        text_encoder=_encoder_reference(text["encoder"]),
        attribution=latents["attribution"],
        licence=latents["licence"],
    )


def _encoder_reference(made_by: dict[str, str]) -> EncoderReference:
    return EncoderReference(
        reference=made_by["reference"], class_name=made_by["class"], fingerprint=made_by["fingerprint"]
    )
