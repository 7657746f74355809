"""A training of the largest preset that fits into the time, by the package's own training code, from carried caches.

It needs neither DVC nor MLflow. A training that a former call began with the same ``--work`` resumes from its last
checkpoint, with its own number of steps. One that outlasts its time is stopped as by Ctrl-C; its averaged weights are
taken along all the same.
"""

import os
import shutil
import signal
import threading
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_step
import yaml
from train_step import Settings

from gpu import weights
from gpu.parts import Job, Preset, Record, Unmeasurable
from latentloom.devices import autocast_dtype, choose_device
from latentloom.diffusion.text import pooled
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.dataset import Caches, load_caches
from latentloom.encoding.text_encoder import EncodedText
from latentloom.encoding.vae import load_vae
from latentloom.evaluation.report import evaluate
from latentloom.evaluation.sheet import save_sheet
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.model_files import load_model, model_hash, save_model
from latentloom.params import Params
from latentloom.params_file import load_params
from latentloom.training.checkpoints import Checkpoints, CodeVersion, training_fingerprint
from latentloom.training.interruption import TrainingStopped
from latentloom.training.processes import make_accelerator
from latentloom.training.run import fit_whitening, model_config, run_training, usable_checkpoint

SPARE = 0.9  # of the time is planned for, since a training also validates and saves
CHECKPOINT_BYTES = 50 * 2**30


def training(job: Job, record: Record) -> None:
    """The training, then what is taken along: curves, weights, the sheet of samples."""
    if job.carry is None:
        raise Unmeasurable("no folder of caches was given (--carry)")
    device, data = choose_device(), job.carry / "data"
    caches = load_caches(data / "latents", data / "text", device=device)
    closing = min(job.sizes.closing, record.left() / 2)
    params = _params(job, record, closing)
    model, curves = job.work / "model", job.work / "curves"
    figures = _train(params, caches, job, model, curves, record.left() - closing)
    record.add("training", **figures)
    for path in sorted(curves.glob("*.csv")):
        shutil.copy(path, job.out)
    parts = weights.split(model, job.weights)
    record.add("weights in fp16", files=len(parts), MiB=round(sum(path.stat().st_size for path in parts) / 2**20, 1))
    record.measure("evaluation", lambda: _evaluate(params, caches, model, data / "images", job.out / "samples.png"))


def _params(job: Job, record: Record, closing: float) -> Params:
    """Those of a training that was begun in this folder; else of the largest preset that fits into the time."""
    begun = job.work / "params.yaml"
    if begun.exists():
        return load_params(begun)
    device = choose_device()
    for preset in job.sizes.presets:
        sections = _sections(preset)
        params = Params.model_validate(sections)
        batch, dtype = params.train.batch_size, autocast_dtype(params.train.precision, device)
        settings = Settings(
            tuple(params.model.widths), params.model.block_depth, batch, dtype, device, False, job.sizes.rows
        )
        contender = train_step.ours(settings)
        train_step.seconds(contender.step, 3, device)
        rate = 5 / train_step.seconds(contender.step, 5, device)
        steps = int((record.left() - closing) * SPARE * rate)
        record.add(preset.path.name, **{"images/s": round(rate * batch, 1), "steps in the time left": steps})
        if steps >= job.sizes.fewest_steps:
            shortened = _of_length(sections, min(steps, params.train.steps))
            begun.write_text(yaml.safe_dump(shortened), encoding="utf-8")
            return load_params(begun)
    raise Unmeasurable(f"no preset's {job.sizes.fewest_steps} steps fit into {record.left():.0f} s")


def _sections(preset: Preset) -> dict[str, Any]:
    sections = yaml.safe_load(preset.path.read_text(encoding="utf-8"))
    for name, values in preset.changed.items():
        sections[name] |= values
    return sections


def _of_length(sections: dict[str, Any], steps: int) -> dict[str, Any]:
    """The params of a training of so many steps: what is counted in steps or images keeps its share of them."""
    train, every = sections["train"], max(steps // 10, 1)
    share = steps / train["steps"]
    shorter = {
        "steps": steps,
        "warmup_steps": int(train["warmup_steps"] * share),
        "decay_steps": max(int(train["decay_steps"] * share), 1),
        "ema_images": train["ema_images"] * share,
    }
    # One preview, at the end: the sheet shows more.
    monitor = {"log_every": max(steps // 200, 1), "validate_every": every}
    return sections | {
        "train": train | shorter,
        "monitor": sections["monitor"] | monitor,
        "previews": sections["previews"] | {"every": 10 * steps, "prompts": []},
        "machine": sections["machine"] | {"checkpoint_every": 2 * every},
    }


def _train(params: Params, caches: Caches, job: Job, model: Path, curves: Path, seconds: float) -> dict[str, Any]:
    accelerator = make_accelerator(choose_device())
    precision = str(autocast_dtype(params.train.precision, accelerator.device))
    checkpoints = Checkpoints(
        job.work / "checkpoints" / training_fingerprint(params, caches.digests, precision),
        code=CodeVersion("benchmark"),
        keep=1,
        pinned=0,
        limit=CHECKPOINT_BYTES,
    )
    with checkpoints.locked(wait=False):
        resumed = usable_checkpoint(checkpoints, params)
        checkpoints.begin({}, resumed)
        figures: dict[str, Any] = {
            "steps": params.train.steps,
            "batch": params.train.batch_size,
            "images": len(caches.train),
            "resumed at step": resumed.step if resumed else 0,
        }
        alarm = threading.Timer(max(seconds, 1.0), os.kill, (os.getpid(), signal.SIGTERM))
        alarm.start()
        try:
            result = run_training(
                params,
                caches,
                accelerator=accelerator,
                checkpoints=checkpoints,
                resumed=resumed,
                model_folder=model,
                curves_folder=curves,
                logger=Unlogged(),
            )
        except TrainingStopped as stopped:
            return figures | {"stopped": str(stopped)} | _save_last(checkpoints, params, caches, model)
        finally:
            alarm.cancel()
    (job.work / "params.yaml").unlink()  # another call begins another training
    return figures | result.metrics | {"val_mae": result.val_mae, "images/s": round(result.images_per_second, 1)}


def _save_last(checkpoints: Checkpoints, params: Params, caches: Caches, model: Path) -> dict[str, Any]:
    """Make the averaged weights of the last checkpoint the model."""
    checkpoint = checkpoints.latest()
    config = model_config(params, caches)
    network, tensors = config.build().to(caches.train.device), checkpoint.load_tensors()
    fit_whitening(network, caches)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(tensors[f"average.{name}"])
    save_model(model, network.state_dict(), config)
    return {"steps done": checkpoint.step, "val_mae": checkpoint.metadata["monitor"]["val_mae"]}


class Unlogged:
    """In the place of MLflow: the curves' files and the sheet hold all that is kept."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, image: np.ndarray, key: str, step: int) -> None: ...

    def log_text(self, text: str, name: str) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...


class CachedTexts:
    """In the place of a text encoder: the embeddings of captions that the text cache holds."""

    def __init__(self, caches: Caches) -> None:
        self.rows = {text: row for row, text in enumerate(chain.from_iterable(caches.train.texts.parts()))}
        self.embeddings_at, self.device = caches.train.embeddings_at, caches.train.device

    def encode(self, captions: list[str]) -> np.ndarray:
        """Embeddings (N, dim) of captions that all are in the cache."""
        rows = torch.tensor([self.rows[caption] for caption in captions], device=self.device)
        return pooled(self.embeddings_at(rows)).cpu().numpy()

    def encode_tokens(self, captions: list[str]) -> EncodedText:
        """These and the token states, where the cache holds them."""
        rows = torch.tensor([self.rows[caption] for caption in captions], device=self.device)
        text = self.embeddings_at(rows).to("cpu")
        states = [own[mask].numpy() for own, mask in zip(text.tokens, text.mask, strict=True)]
        return EncodedText(text.pooled.numpy(), states)


def _evaluate(params: Params, caches: Caches, model: Path, images: Path, sheet: Path) -> dict[str, Any]:
    """The metrics and the sheet of the stage `evaluate`; of its prompts, those whose embedding is in the cache."""
    network, config = load_model(model, caches.train.device)
    try:
        vae = load_vae(config.vae.reference, caches.train.device)
    except ImportError as error:
        raise Unmeasurable(f"the VAE needs diffusers ({error})") from error
    texts = CachedTexts(caches)
    prompts = [prompt for prompt in params.evaluate.prompts if prompt in texts.rows]
    prompts = prompts or caches.train.take(len(params.evaluate.prompts)).primary_texts()
    codec = LatentCodec(config.latent_mean, config.latent_std, lambda: vae)
    text_to_image = TextToImage(network, config, codec, texts, model_hash(model))
    shown = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"prompts": prompts})})
    evaluation = evaluate(shown, text_to_image, caches, images)
    save_sheet(evaluation.sheet, sheet)
    return evaluation.metrics
