"""Texts -> embeddings, with a tokenizer and a model that are loaded; `text_encoder` says which models there are.

An exported model carries this module (see `latentloom.export`), so it knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latentloom.diffusion.text import Labels, Text
from latentloom.encoding.fitting_batches import FittingBatches

if TYPE_CHECKING:
    from latentloom.encoding.text_encoder import TextEncoder

PROJECTION = "projection"  # the pooling of CLIP: the model gives the vector itself
CPU_BATCH, ACCELERATOR_BATCH = 8, 128
PADDING_STEP = 8


@dataclass(frozen=True)
class EncodedText:
    """What an encoder makes of N captions."""

    pooled: np.ndarray  # (N, dim), fp32
    states: list[np.ndarray]  # (T, token_dim) of each caption, fp32, without padding; empty where not asked for


@dataclass(frozen=True)
class TextEmbedder:
    """A tokenizer and a model of transformers, in evaluation mode, and how captions go through them."""

    tokenizer: Any
    model: torch.nn.Module
    pooling: str  # `PROJECTION`, or how token states become one vector of unit length: mean, cls
    max_tokens: int  # that are read of a caption, with those that mark its start and end
    dim: int  # of a pooled embedding
    fitting: FittingBatches = field(default_factory=FittingBatches, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def count_tokens(self, captions: Sequence[str]) -> np.ndarray:
        """How many tokens (N,) each caption has in full; of those with more than ``max_tokens`` the rest is cut."""
        return count_tokens(self.tokenizer, captions)

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """The pooled embeddings (N, dim), fp32, of ``captions``, as `encode_tokens` computes them."""
        return self.encode_tokens(captions, states=False).pooled

    @torch.inference_mode()
    def encode_tokens(self, captions: Sequence[str], *, states: bool = True) -> EncodedText:
        """Embed ``captions``; longer ones than ``max_tokens`` are cut.

        What becomes of a caption depends on that caption alone: each is padded to a length that its own tokens decide,
        and batches always have the same size, so neighbours change neither shapes nor the order of sums.
        """
        tokens = self.tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        padded = [min(math.ceil(len(own) / PADDING_STEP) * PADDING_STEP, self.max_tokens) for own in tokens]
        # Small on the CPU, which is as fast with it: a batch filled up for a few new captions costs little.
        batch_size = CPU_BATCH if self.device.type == "cpu" else ACCELERATOR_BATCH
        pooled = np.empty((len(captions), self.dim), dtype=np.float32)
        by_caption: dict[int, np.ndarray] = {}
        for length in sorted(set(padded)):
            members = [index for index, own in enumerate(padded) if own == length]
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                filled = batch + [batch[-1]] * (batch_size - len(batch))
                vectors, hidden = self._embed([tokens[index] for index in filled], length)
                pooled[batch] = vectors[: len(batch)].cpu()
                if states:
                    on_host = hidden[: len(batch)].cpu().numpy()
                    by_caption |= {
                        index: own[: len(tokens[index])].copy() for index, own in zip(batch, on_host, strict=True)
                    }
        return EncodedText(pooled, [by_caption[index] for index in range(len(by_caption))])

    def _embed(self, tokens: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (N, dim) and states (N, T, token_dim) of captions given by their tokens, padded to ``length``."""
        inputs = self.tokenizer.pad(
            {"input_ids": tokens}, "max_length", length, padding_side="right", return_tensors="pt"
        ).to(self.device)

        def embed(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            own = {name: tensor[part] for name, tensor in inputs.items()}
            return self.read(self.model(**own), own["attention_mask"])

        vectors, states = zip(*self.fitting(embed, len(tokens), len(tokens)), strict=True)
        return torch.cat(vectors), torch.cat(states)

    def read(self, output: Any, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (N, dim) and states (N, T, token_dim) in what the model gave for tokens with that mask (N, T)."""
        states = output.last_hidden_state.float()
        if self.pooling == PROJECTION:
            return output.text_embeds.float(), states
        if self.pooling == "cls":
            return torch.nn.functional.normalize(states[:, 0], dim=-1), states
        mask = attention_mask.unsqueeze(-1).float()
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1), states


def count_tokens(tokenizer: Any, captions: Sequence[str]) -> np.ndarray:
    """How many tokens (N,) a tokenizer of transformers makes of each caption."""
    return np.array([len(own) for own in tokenizer(list(captions), verbose=False)["input_ids"]], np.int32)


def embed(encoder: TextEncoder | TextEmbedder, captions: Sequence[str], *, tokens: bool) -> Labels:
    """What a network reads of captions, on the CPU: embeddings (N, dim), or a `Text` of these and token states."""
    if not tokens:
        return torch.from_numpy(encoder.encode(captions))
    encoded = encoder.encode_tokens(captions)
    states = [torch.from_numpy(own) for own in encoded.states]
    lengths = torch.tensor([len(own) for own in states])
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    return Text(torch.from_numpy(encoded.pooled), padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1))
