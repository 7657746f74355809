"""A small data set in memory, and params to train on it in seconds."""

from collections.abc import Callable

import pytest
import torch

from latentloom.params import DiffusionParams, TrainParams
from latentloom.training.dataset import LatentDataset


@pytest.fixture
def make_data() -> Callable[..., LatentDataset]:
    """``make_data(rows)``: latents (rows, 4, 8, 8) with two captions each, the second shared by all."""

    def make(rows: int, *, std: bool = False, prefix: str = "image") -> LatentDataset:
        generator = torch.Generator().manual_seed(rows)
        return LatentDataset(
            ids=[f"{prefix}{row}" for row in range(rows)],
            mean=torch.randn(rows, 4, 8, 8, generator=generator),
            std=torch.full((rows, 4, 8, 8), 0.1) if std else None,
            embeddings=torch.randn(rows + 1, 12, generator=generator),
            texts=[*(f"caption {row}" for row in range(rows)), "shared"],
            captions=torch.tensor([[row, rows] for row in range(rows)]),
            caption_counts=torch.full((rows,), 2),
        )

    return make


@pytest.fixture
def train_params() -> TrainParams:
    return TrainParams(
        steps=40,
        batch_size=8,
        gradient_accumulation=1,
        learning_rate=3e-3,
        lr_schedule="cosine",
        warmup_steps=5,
        decay_steps=10,
        weight_decay=0.01,
        gradient_clip=1.0,
        loss="mae",
        huber_delta=0.1,
        ema_images=80.0,
        keep="last",
        precision="fp32",
        gradient_checkpointing=False,
        compile=False,
        log_every=5,
        validate_every=20,
        sample_every=20,
        sample_count=4,
        sample_guidance=2.0,
    )


@pytest.fixture
def diffusion_params() -> DiffusionParams:
    return DiffusionParams(schedule="vp", noise_levels="cosine", label_dropout=0.15)
