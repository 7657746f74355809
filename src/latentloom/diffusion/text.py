"""What a denoiser is told of a batch of captions: one vector each, `(B, dim)`, or that and the states of its tokens.

The plain vectors are a tensor; with token states they are a `Text`, which can do what is done to that tensor. So what
hands labels on, such as a sampler, need not know which of the two they are. "No text" is a vector of zeros, and no
token to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Text:
    """A batch of captions as vectors and token states."""

    pooled: torch.Tensor  # `(B, dim)`
    tokens: torch.Tensor  # `(B, T, token_dim)`; those of a shorter caption are followed by padding
    mask: torch.Tensor  # `(B, T)`, bool: whether there is a token

    def __post_init__(self) -> None:
        if (
            self.pooled.ndim != 2
            or self.tokens.ndim != 3
            or self.mask.shape != self.tokens.shape[:2]
            or self.tokens.shape[:1] != self.pooled.shape[:1]  # not `len`: it would be fixed in an exported graph
        ):
            raise ValueError(
                "a Text has vectors (B, dim), token states (B, T, token_dim) and a mask (B, T), not "
                f"{tuple(self.pooled.shape)}, {tuple(self.tokens.shape)} and {tuple(self.mask.shape)}"
            )

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: slice | torch.Tensor) -> Text:
        """Some of the captions."""
        return Text(self.pooled[rows], self.tokens[rows], self.mask[rows])

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Text:
        """The same on a device; `dtype` is that of the vectors and states."""
        return Text(
            self.pooled.to(device=device, dtype=dtype),
            self.tokens.to(device=device, dtype=dtype),
            self.mask.to(device=device),
        )

    def record_stream(self, stream: Any) -> None:
        """As `torch.Tensor.record_stream`."""
        for tensor in (self.pooled, self.tokens, self.mask):
            tensor.record_stream(stream)


Labels: TypeAlias = torch.Tensor | Text


def pooled(labels: Labels) -> torch.Tensor:
    """The vectors alone, `(B, dim)`."""
    return labels.pooled if isinstance(labels, Text) else labels


def drop(labels: Labels, kept: torch.Tensor) -> Labels:
    """`labels` with "no text" where `kept` `(B,)`, bool, is false."""
    if isinstance(labels, Text):
        return Text(labels.pooled * kept[:, None], labels.tokens, labels.mask & kept[:, None])
    return labels * kept[:, None]


def no_text(labels: Labels) -> Labels:
    """As many labels that say nothing."""
    if isinstance(labels, Text):
        return Text(torch.zeros_like(labels.pooled), labels.tokens, torch.zeros_like(labels.mask))
    return torch.zeros_like(labels)


def concatenate(parts: Sequence[Labels]) -> Labels:
    """Batches one after the other, all of one kind."""
    if not any(isinstance(part, Text) for part in parts):
        return torch.cat(list(parts))
    longest = max(part.mask.shape[1] for part in parts)
    padded = [(part, longest - part.mask.shape[1]) for part in parts]
    return Text(
        torch.cat([part.pooled for part in parts]),
        torch.cat([F.pad(part.tokens, (0, 0, 0, missing)) for part, missing in padded]),
        torch.cat([F.pad(part.mask, (0, missing)) for part, missing in padded]),
    )


def trimmed(labels: Labels) -> Labels:
    """`labels` without the padding that all of them have, so that what is computed of one depends on no other's."""
    if not isinstance(labels, Text):
        return labels
    longest = int(labels.mask.sum(1).max()) if labels.mask.numel() else 0
    return Text(labels.pooled, labels.tokens[:, :longest], labels.mask[:, :longest])
