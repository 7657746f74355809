"""The VAE between pixels and raw latents: uint8 (B, 8h, 8w, 3) <-> (B, C, h, w).

A public VAE that is never trained here: the small one that the package carries (`bundled`), or any `AutoencoderKL` or
`AutoencoderTiny` in diffusers' format. Latents are the VAE's raw output; `latentloom.encoding.codec` scales them.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch

from latentloom.devices import autocast, choose_device
from latentloom.diffusion.decoding import decode_latents, encode_pixels
from latentloom.encoding import pretrained
from latentloom.encoding.fitting_batches import FittingBatches
from latentloom.encoding.references import vae_folder
from latentloom.errors import UserError

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Vae:
    """A VAE, frozen, in evaluation mode. Its weights are loaded when they are first needed, and held in fp32.

    Args:
        reference: ``bundled``, a folder, or a hub id.
        device: where it computes.
        precision: what it encodes in, by autocast: fp32, bf16 or fp16.

    Attributes:
        class_name: the class of diffusers.
        factor: how many pixels one row or column of a latent stands for.
        fingerprint: a hash of config and weights.

    Raises:
        UserError: when the reference cannot be resolved, or names another class than the two that are supported.
    """

    def __init__(self, reference: str, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        self.reference, self.device, self.precision = reference, torch.device(device), precision
        self.folder = vae_folder(reference)
        config = pretrained.read_config(self.folder)
        self.class_name = config.get("_class_name")
        if self.class_name not in CLASSES:
            raise UserError(f"encode_images.vae: {reference} is a {self.class_name}; supported: {', '.join(CLASSES)}")
        # The first block of both classes keeps the size, and each further one halves it.
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or ()
        self.factor = 2 ** max(len(blocks) - 1, 0)
        self._channels: int = config.get("latent_channels", 4)  # the default of both classes
        self.fingerprint = pretrained.fingerprint(self.folder)
        # For a single row, a CPU's convolutions take another way, and its last bits are others.
        fewest = 2 if self.device.type == "cpu" else 1
        self._encoding, self._decoding = FittingBatches(fewest), FittingBatches(fewest)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is its reference: the worker that gets it loads it, onto the device that it has."""
        return _arrived, (self.reference, self.precision, self.fingerprint)

    def halve_batches(self, times: int) -> None:
        """Encode in batches that many times halved: memory has not sufficed (`latentloom.engine`)."""
        self._encoding.halve(times)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The model itself.

        Raises:
            UserError: when diffusers cannot load it, or weights are missing, naming the first.
        """
        diffusers = pretrained.library("diffusers")  # 3 to 5 s, for its loaders of all kinds of models
        name, loader = f"encode_images.vae: {self.reference}", getattr(diffusers, self.class_name)
        module = pretrained.load_model(loader, self.folder, name, torch_dtype=torch.float32)
        return module.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    @property
    def distribution(self) -> str:
        """``moments`` where encoding gives a mean and a standard deviation, ``mean`` where it is deterministic."""
        return "moments" if self.class_name == "AutoencoderKL" else "mean"

    def latent_bytes(self, pixels: np.ndarray) -> np.ndarray:
        """The bytes that fp16 latents of images of so many pixels have (N,)."""
        numbers = pixels // self.factor**2 * self._channels
        return numbers * (4 if self.distribution == "moments" else 2)

    def encode(self, pixels: np.ndarray, *, precision: str | None = None) -> dict[str, torch.Tensor]:
        """Encode pixels, uint8 (B, H, W, 3): raw ``mean`` and, for moments, ``std``, each (B, C, H/8, W/8) in fp32.

        All at once, or in parts where memory is too small for that.

        ``precision``: another one than the VAE's own.
        """
        parts = self._encoding(lambda part: self._encode(pixels[part], precision), len(pixels), len(pixels))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.inference_mode()
    def _encode(self, pixels: np.ndarray, precision: str | None) -> dict[str, torch.Tensor]:
        with autocast(PRECISIONS[precision or self.precision], self.device):
            return encode_pixels(pixels, vae=self.module)

    def decode(self, raw: torch.Tensor, *, batch_size: int = 32) -> np.ndarray:
        """Decode raw latents (B, C, h, w) into pixels, uint8 (B, 8h, 8w, 3); at most ``batch_size`` of them at a time,
        and fewer where the device's memory is too small for that."""

        def decode(part: slice) -> np.ndarray:
            return decode_latents(
                raw[part], 1.0, vae=self.module, latent_channels=raw.shape[1], layout="nchw", batch_size=batch_size
            )

        return np.concatenate(self._decoding(decode, len(raw), batch_size))


def _arrived(reference: str, precision: str, fingerprint: str) -> Vae:
    vae = Vae(reference, choose_device(), precision)
    pretrained.check_same(vae.folder, vae.fingerprint, fingerprint)
    return vae


def load_vae(reference: str, device: torch.device | str = "cpu", precision: str = "fp32") -> Vae:
    """A `Vae` whose weights are loaded at once, so that what is wrong with them is said now."""
    vae = Vae(reference, device, precision)
    _ = vae.module
    return vae
