"""Params to train on small data sets in seconds."""

import pytest
from latent_data import make_data, write_caches  # noqa: F401 (fixtures)

from latentloom.params import DiffusionParams, TrainParams


@pytest.fixture
def train_params() -> TrainParams:
    return TrainParams(
        init=None,
        init_strict=False,
        steps=40,
        batch_size=8,
        gradient_accumulation=1,
        block_rows=None,
        optimizer="adamw",
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
        reduce_precision="fp32",
    )


@pytest.fixture
def diffusion_params() -> DiffusionParams:
    return DiffusionParams(schedule="vp", noise_levels="cosine", label_dropout=0.15)
