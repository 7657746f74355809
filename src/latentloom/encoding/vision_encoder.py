"""The vision encoder: pixels -> a feature vector (dim,) each, by which sets of pictures are compared.

Two families, told apart by the ``model_type`` of the model's ``config.json``:

- CLIP's vision towers: the projected embedding (Radford et al. 2021), which compares with embeddings of text, too;
- DINOv2: the class token after the last norm (Oquab et al. 2023), which was learnt from pictures alone.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from latentloom.encoding import pretrained
from latentloom.encoding.references import vision_folder
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.errors import UserError

CLIP_CLASS = "CLIPVisionModelWithProjection"
CLASSES = {
    "clip": CLIP_CLASS,
    "clip_vision_model": CLIP_CLASS,
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
CPU_BATCH, ACCELERATOR_BATCH = 8, 64


class VisionEncoder:
    """A vision encoder, frozen, in evaluation mode, in fp32. Its weights are loaded when they are first needed.

    Args:
        reference: a folder, or a hub id.
        key: of the params, which named the reference.
        device: where it computes.

    Attributes:
        fingerprint: a hash of config and weights.

    Raises:
        UserError: when the reference cannot be resolved, or its files are no model of the two families.
    """

    def __init__(self, reference: str, key: str, device: torch.device | str = "cpu") -> None:
        self.reference, self.device, self._name = reference, torch.device(device), f"{key}: {reference}"
        self._folder = vision_folder(reference, key)
        self._type = pretrained.read_config(self._folder).get("model_type")
        if self._type not in CLASSES:
            raise UserError(
                f"{self._name} is of the type {self._type!r}, which is no vision encoder known here; allowed are "
                f"{', '.join(CLASSES)}"
            )
        self.fingerprint = pretrained.fingerprint(self._folder)

    @property
    def reads_text(self) -> bool:
        """Whether the folder holds CLIP's text tower, too."""
        return self._type == "clip"

    @cached_property
    def processor(self) -> Any:
        """What makes of a picture the model's input: by Pillow, whatever else is installed, so that the same is read
        everywhere."""
        loader = pretrained.library("transformers").AutoImageProcessor
        return pretrained.load_part(loader, self._folder, self._name, backend="pil")

    @cached_property
    def preprocessing(self) -> str:
        """A hash of how pictures are resized, cropped and scaled: 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.processor.to_dict(), sort_keys=True, default=str).encode()).hexdigest()

    @property
    def name(self) -> str:
        """What decides the features of a picture."""
        return f"{self.fingerprint}|{self.preprocessing}"

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model itself.

        Raises:
            UserError: when it cannot be loaded, or weights are missing, naming the first.
        """
        loader = getattr(pretrained.library("transformers"), CLASSES[self._type])
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        model = pretrained.load_model(loader, self._folder, self._name, **options)
        return model.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def encode(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """The features (B, dim), fp32, of pictures, each uint8 (H, W, 3).

        Batches always have the same size, so that a picture's features do not depend on how many others there are.
        """
        size = CPU_BATCH if self.device.type == "cpu" else ACCELERATOR_BATCH
        features = []
        for start in range(0, len(pixels), size):
            batch = pixels[start : start + size]
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            read = self.processor(images=filled, return_tensors="pt", input_data_format="channels_last")
            output = self.model(pixel_values=read["pixel_values"].to(self.device))
            vectors = output.image_embeds if CLASSES[self._type] == CLIP_CLASS else output.pooler_output
            features.append(vectors[: len(batch)].float().cpu().numpy())
        return np.concatenate(features)


@dataclass(frozen=True)
class Clip:
    """Both towers of a CLIP model: features of pictures and of captions in one space."""

    vision: VisionEncoder
    text: TextEncoder


def load_clip(reference: str, key: str, device: torch.device | str = "cpu") -> Clip:
    """The CLIP model that the params' ``key`` names.

    Raises:
        UserError: when the reference cannot be resolved, or is no whole CLIP model.
    """
    vision = VisionEncoder(reference, key, device)
    if not vision.reads_text:
        raise UserError(f"{key}: {reference} has no text tower; give a whole CLIP model")
    return Clip(vision, TextEncoder(reference, device, key=key))
