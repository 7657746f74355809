"""The VAE between images and latents: pixels (B, 3, 8h, 8w) in [-1, 1] <-> latents (B, C, h, w).

A public VAE that is never trained here: the small one that the package carries (`bundled`), or any `AutoencoderKL` or
`AutoencoderTiny` in diffusers' format. Latents are the VAE's raw output; scaling belongs to whoever trains on them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from latentloom.devices import autocast
from latentloom.encoding import pretrained

BUNDLED = Path(__file__).parent / "bundled_vae"
CLASSES = ("AutoencoderKL", "AutoencoderTiny")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Vae:
    """A loaded VAE, frozen, in evaluation mode; it encodes in ``precision`` (fp32, bf16 or fp16, by autocast)."""

    module: torch.nn.Module
    reference: str
    class_name: str
    fingerprint: str
    precision: str = "fp32"

    @property
    def distribution(self) -> str:
        """``moments`` where encoding gives a mean and a standard deviation, ``mean`` where it is deterministic."""
        return "moments" if self.class_name == "AutoencoderKL" else "mean"

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        """Encode uint8 images (B, H, W, 3): raw ``mean`` and, for moments, ``std``, each (B, C, H/8, W/8) in fp32."""
        device = next(self.module.parameters()).device
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with autocast(PRECISIONS[self.precision], device):
            encoded = self.module.encode(pixels)
        if self.distribution == "mean":
            return {"mean": encoded.latents.float().cpu()}
        posterior = encoded.latent_dist
        return {"mean": posterior.mean.float().cpu(), "std": posterior.std.float().cpu()}

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, *, batch_size: int = 32) -> np.ndarray:
        """Decode raw latents (B, C, h, w) into uint8 images (B, 8h, 8w, 3)."""
        parameter = next(self.module.parameters())
        images = []
        for batch in latents.to(parameter.device, parameter.dtype).split(batch_size):
            pixels = self.module.decode(batch.contiguous(memory_format=torch.channels_last)).sample
            images.append(
                pixels.float()
                .add(1.0)
                .mul(127.5)
                .round()
                .clamp(0, 255)
                .to(torch.uint8)
                .permute(0, 2, 3, 1)
                .cpu()
                .numpy()
            )
        return np.concatenate(images)


def vae_folder(reference: str) -> Path:
    """The folder of the VAE that ``encode_images.vae`` names; see `pretrained.resolve_folder`."""
    return pretrained.resolve_folder(reference, bundled=BUNDLED, what="encode_images.vae")


def vae_fingerprint(reference: str) -> str:
    """The fingerprint of the VAE that ``reference`` names, without loading it."""
    return pretrained.fingerprint(vae_folder(reference))


def load_vae(reference: str, device: torch.device | str = "cpu", precision: str = "fp32") -> Vae:
    """Load a VAE; its weights are held in fp32, whatever the precision that it computes in.

    Raises:
        ValueError: when the reference cannot be resolved, or names another class than the two that are supported.
    """
    import diffusers

    diffusers.logging.set_verbosity_error()  # it warns of a config key that its own AutoencoderTiny wrote
    folder = vae_folder(reference)
    class_name = pretrained.read_config(folder).get("_class_name")
    if class_name not in CLASSES:
        raise ValueError(f"encode_images.vae: {reference} is a {class_name}; supported: {', '.join(CLASSES)}")
    module = getattr(diffusers, class_name).from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    module = module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Vae(module, reference, class_name, pretrained.fingerprint(folder), precision)
