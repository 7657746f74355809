"""The model on disk: ``config.json`` says what it is and what it needs, ``model.safetensors`` holds its weights.

The folder stands alone: with the VAE and the text encoder that the config names, it samples. Loading runs no code from
the files.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from latentloom.diffusion.unet import UNet
from latentloom.errors import UserError
from latentloom.files import read_json, sha256_file, write_json
from latentloom.tensor_files import read_tensors, save_tensors

FORMAT_VERSION = 2
MODEL_FILES = ("config.json", "model.safetensors")


class EncoderReference(BaseModel):
    """Which encoder made a cache: how it was named, its class, and the hash of its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reference: str
    class_name: str
    fingerprint: str


class ModelConfig(BaseModel):
    """Everything that sampling needs besides the weights.

    ``latent_mean`` and ``latent_std`` turn standardised latents back into the VAE's own; ``latent_bound`` is the bound
    for dynamic thresholding, in standardised units, measured on the training latents. ``token_dim`` is None where the
    network reads pooled embeddings alone; of a prompt, as of a caption in training, ``max_tokens`` are read.
    ``latent_shape`` (C, h, w) is sampled where no size is asked for; ``latent_shapes`` are all that the model was
    trained on, None (and left out of the file) where that is the only one.
    ``weights_sha256`` is of ``model.safetensors``; None before it is saved, and in models of earlier versions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int
    latent_shape: tuple[int, int, int]
    widths: tuple[int, ...]
    block_depth: int
    emb_size: int
    text_dim: int
    token_dim: int | None = None
    schedule: str
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    latent_bound: float
    vae: EncoderReference
    text_encoder: EncoderReference
    max_tokens: int | None = None
    attribution: str | None
    licence: str | None
    weights_sha256: str | None = None
    latent_shapes: tuple[tuple[int, int, int], ...] | None = None

    @property
    def trained_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The latents (C, h, w) that the model was trained on, at least one."""
        return self.latent_shapes or (self.latent_shape,)

    def network(self) -> UNet:
        """The network that the config describes, with fresh weights; one of several shapes is told the size."""
        sizes = self.widths, self.block_depth, self.emb_size, self.text_dim, self.token_dim
        return UNet(self.latent_shape[0], *sizes, size_condition=self.latent_shapes is not None)

    def build(self) -> UNet:
        """As `network`, checked to fit the latents.

        Raises:
            ValueError: when the widths would halve a latent more often than its size allows.
        """
        network = self.network()
        for _, *sides in self.trained_shapes:
            network.check_sides(*sides)
        return network


def save_model(folder: Path, weights: Mapping[str, torch.Tensor], config: ModelConfig) -> None:
    """Write a model folder; the same weights (a state dict) and config give the same bytes.

    Raises:
        WriteError: when a file cannot be written, naming it and the room it needs.
    """
    path = folder / "model.safetensors"
    save_tensors(path, weights)
    whole = config.model_copy(update={"weights_sha256": sha256_file(path)})
    left_out = {"latent_shapes"} if whole.latent_shapes is None else None
    write_json(folder / "config.json", whole.model_dump(mode="json", exclude=left_out))


def model_hash(folder: Path) -> str:
    """The SHA-256 that names a model, of its config and its weights: 64 hexadecimal digits.

    Raises:
        FileNotFoundError: when a file of the model is missing.
    """
    files = "".join(f"{name} {sha256_file(folder / name)}\n" for name in MODEL_FILES)
    return hashlib.sha256(files.encode()).hexdigest()


def read_config(folder: Path) -> ModelConfig:
    """A model folder's config.

    Raises:
        UserError: naming the file and the key that is wrong.
    """
    path = folder / "config.json"
    try:
        config = ModelConfig.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; run `dvc repro`") from error
    if config.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {config.format_version}, but this code reads {FORMAT_VERSION}; run `dvc repro`"
        )
    return config


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[UNet, ModelConfig]:
    """Load a model folder in fp32, in evaluation mode.

    Raises:
        UserError: when a file is missing or damaged, a tensor's name or shape is not what the config describes, or
            the weights are others than those that the config was saved with.
    """
    config = read_config(folder)
    path = folder / "model.safetensors"
    try:
        tensors, _ = read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); run `dvc checkout` or `dvc repro`") from error
    network = config.build()
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:  # in torch's words: which tensors, and their shapes
        raise UserError(f"{path} does not fit its config.json: {error}") from error
    if config.weights_sha256 not in (None, sha256_file(path)):  # names and shapes may fit by chance
        raise UserError(
            f"{path} holds other weights than its config.json was saved with: they were edited, or come from another "
            "training; run `dvc checkout` or `dvc repro`"
        )
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), config
