"""Prompts in, pictures out: a model folder with the two encoders that its config names.

    prompts -> text encoder -> embeddings (P, dim) -> sampler -> latents (P, N, C, h, w) -> VAE -> uint8 (P, N, H, W, 3)

A sample is a function of the model, its prompt, the seed, its number and the settings, and of nothing else. So on a CPU
each is computed by itself: in a batch, sums would be rounded in another order with each other size. Samples of one
number start from the same noise whatever their prompt, so prompts can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentloom.devices import autocast_dtype, choose_device
from latentloom.encoding.text_encoder import TextEncoder, load_text_encoder
from latentloom.encoding.vae import Vae, load_vae
from latentloom.evaluation.drawing_code import drawing_code
from latentloom.evaluation.pictures import PictureFacts
from latentloom.evaluation.sampling import BATCH_SIZE, Sampler
from latentloom.files import read_json, write_json
from latentloom.model_files import EncoderReference, load_model, model_hash
from latentloom.params import load_params
from latentloom.training.preview import to_raw

SETTINGS_FILE = "sampling.json"


class SamplingSettings(BaseModel):
    """How to sample; the meaning of each is that of `PictureFacts`. ``auto`` precision is the device's choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: Annotated[int, Field(ge=2, le=1000)] = 70
    guidance: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 3.0
    sampler: Literal["ddim", "dpmpp_2m"] = "ddim"
    guidance_interval: tuple[
        Annotated[float, Field(ge=0.0, le=1.0)],
        Annotated[float, Field(ge=0.0, le=1.0)],
    ] = (0.0, 1.0)
    guidance_rescale: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    threshold: Annotated[float, Field(gt=50.0, le=100.0)] = 99.5
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def changed(self, **given: object) -> "SamplingSettings":
        """These settings with those that are given and not None in their place.

        Raises:
            ValueError: naming the setting, its value and what is allowed.
        """
        try:
            return SamplingSettings.model_validate(
                self.model_dump() | {name: value for name, value in given.items() if value is not None}
            )
        except ValidationError as error:
            first = error.errors()[0]
            name, message = first["loc"][0], first["msg"]
            raise ValueError(f"{name} = {first['input']}: {message[0].lower()}{message[1:]}") from error


def default_settings(model: Path, params: Path = Path("params.yaml")) -> SamplingSettings:
    """The settings of ``params`` where there is such a file, else those that the model folder carries, else our own.

    Raises:
        ValueError: when the params file is wrong.
    """
    if params.exists():
        loaded = load_params(params)
        evaluate = loaded.evaluate
        return SamplingSettings(
            steps=evaluate.sampling.diffusion_steps,
            guidance=evaluate.sampling.class_guidance,
            sampler=evaluate.sampling.sampler,
            guidance_interval=evaluate.sampling.guidance_interval,
            guidance_rescale=evaluate.sampling.guidance_rescale,
            threshold=evaluate.sampling.threshold_percentile,
            precision=evaluate.sampling.precision,
        )
    return stored_settings(model)


def stored_settings(model: Path) -> SamplingSettings:
    """The settings that a model folder carries, or our own."""
    path = model / SETTINGS_FILE
    return SamplingSettings().changed(**read_json(path)) if path.exists() else SamplingSettings()


def store_settings(model: Path, settings: SamplingSettings) -> None:
    """Let a model folder carry its settings."""
    write_json(model / SETTINGS_FILE, settings.model_dump(mode="json"))


@dataclass(frozen=True)
class TextToImage:
    """A model with its encoders, loaded, and the names by which a picture refers to them."""

    sampler: Sampler
    vae: Vae
    text_encoder: TextEncoder
    model_sha256: str
    mlflow_run_id: str | None

    @property
    def device(self) -> torch.device:
        return next(self.sampler.network.parameters()).device

    def draw(
        self, prompts: Sequence[str], settings: SamplingSettings, *, seed: int, count: int = 1, first: int = 0
    ) -> np.ndarray:
        """``count`` samples of each prompt, uint8 (P, count, H, W, 3); their numbers begin with ``first``."""
        numbers = [str(number) for number in range(first, first + count)]
        embeddings = torch.from_numpy(self.text_encoder.encode(prompts)).repeat_interleave(count, dim=0)
        together = 1 if self.device.type == "cpu" else BATCH_SIZE
        sampler = replace(
            self.sampler,
            guidance=settings.guidance,
            steps=settings.steps,
            threshold_percentile=settings.threshold,
            dtype=autocast_dtype(settings.precision, self.device),
            sampler=settings.sampler,
            guidance_interval=settings.guidance_interval,
            guidance_rescale=settings.guidance_rescale,
            batch_size=together,
        )
        latents = sampler.latents(embeddings, numbers * len(prompts), seed)
        images = self.vae.decode(to_raw(latents, sampler.config), batch_size=together)
        return images.reshape(len(prompts), count, *images.shape[1:])

    def facts(
        self, prompts: Sequence[str], settings: SamplingSettings, *, seed: int, count: int = 1, first: int = 0
    ) -> PictureFacts:
        """What to write into a picture of the samples that `draw` gives for the same arguments."""
        computed_in = autocast_dtype(settings.precision, self.device)
        return PictureFacts(
            prompts=tuple(prompts),
            seed=seed,
            first=first,
            count=count,
            **settings.model_dump(exclude={"precision"}),
            precision="fp32" if computed_in is None else "bf16",
            model_sha256=self.model_sha256,
            mlflow_run_id=self.mlflow_run_id,
            vae=self.vae.fingerprint,
            text_encoder=self.text_encoder.fingerprint,
            code=drawing_code(),
        )


def load_text_to_image(
    folder: Path, *, mlflow_run_id: str | None = None, device: torch.device | None = None
) -> TextToImage:
    """Load a model folder and its encoders: those that the folder carries, else those that its config refers to.

    Raises:
        ValueError: when a file is missing or damaged, or an encoder is not the one that the model was trained with.
    """
    device = device or choose_device()
    network, config = load_model(folder, device)
    vae = load_vae(_reference(folder, "vae", config.vae), device)
    _check("VAE", folder, config.vae, vae.fingerprint)
    text_encoder = load_text_encoder(_reference(folder, "text_encoder", config.text_encoder), device)
    _check("text encoder", folder, config.text_encoder, text_encoder.fingerprint)
    plain = SamplingSettings()
    sampler = Sampler(network, config, plain.guidance, plain.steps, plain.threshold, dtype=None)
    return TextToImage(sampler, vae, text_encoder, model_hash(folder), mlflow_run_id)


def _reference(folder: Path, name: str, wanted: EncoderReference) -> str:
    return str(folder / name) if (folder / name).is_dir() else wanted.reference


def _check(what: str, folder: Path, wanted: EncoderReference, found: str) -> None:
    if found != wanted.fingerprint:
        raise ValueError(
            f"{folder}: the {what} {wanted.reference} is not the one that this model was trained with: its fingerprint "
            f"is {found[:12]}…, config.json asks for {wanted.fingerprint[:12]}…. Put the files of that {what} back, or "
            "train on the new one (`dvc repro`)"
        )
