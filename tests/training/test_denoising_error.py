"""The validation error: fixed noise, comparable over time, by bins of noise level."""

import math

import numpy as np
import pytest
import torch
from latent_data import TensorDataset
from torch import nn

from latentloom.training.denoising_error import denoising_error


class Zero(nn.Module):
    def forward(self, x_t, noise_levels, labels):
        return torch.zeros_like(x_t)


class Returns(nn.Module):
    """Gives its input back: the error is then that of the noise itself."""

    def forward(self, x_t, noise_levels, labels):
        return x_t


class Reads(nn.Module):
    """Answers with a number that the label gives."""

    def forward(self, x_t, noise_levels, labels):
        return labels.sum(1).view(-1, 1, 1, 1).expand_as(x_t)


SETTINGS = {"schedule": "vp", "noise_levels": "cosine"}


def test_a_network_that_answers_zero_errs_by_the_mean_absolute_latent(make_data):
    data = make_data(10)
    error = denoising_error(Zero(), data, **SETTINGS)
    assert error["mae"] == pytest.approx(float(data.mean.abs().mean()), rel=1e-5)


def test_the_error_grows_with_the_noise_level(make_data):
    error = denoising_error(Returns(), make_data(50), **SETTINGS)
    bins = [error[f"mae_noise_{low:.2f}-{low + 0.25:.2f}"] for low in (0.0, 0.25, 0.5, 0.75)]
    assert bins == sorted(bins)


def test_the_error_is_what_the_formula_says(make_data):
    data = make_data(400)
    levels = [math.sin(math.pi / 2 * (k + 0.5) / 8) for k in range(8)]
    # z - (gamma z + alpha e) is normal with variance (1 - gamma)^2 + alpha^2; E|N(0, s)| = s sqrt(2 / pi).
    spread = [math.hypot(1 - math.sqrt(1 - level**2), level) for level in levels]
    expected = np.mean(spread) * math.sqrt(2 / math.pi)
    assert denoising_error(Returns(), data, **SETTINGS)["mae"] == pytest.approx(expected, rel=0.02)


def test_it_is_the_same_at_every_call_and_for_every_batch_size(make_data):
    data = make_data(10)
    torch.manual_seed(1)
    first = denoising_error(Returns(), data, **SETTINGS)
    torch.manual_seed(2)
    assert denoising_error(Returns(), data, **SETTINGS) == first
    assert denoising_error(Returns(), data, **SETTINGS, batch_size=3) == pytest.approx(first)


def test_each_row_is_denoised_with_its_primary_caption_for_every_batch_size(make_data):
    data = make_data(10)
    predicted = data.embeddings[:10].sum(1).view(-1, 1, 1, 1)
    expected = float((predicted - data.mean).abs().mean())
    for batch_size in (3, 256):
        assert denoising_error(Reads(), data, **SETTINGS, batch_size=batch_size)["mae"] == pytest.approx(expected)


def test_a_rows_noise_does_not_depend_on_the_other_rows(make_data):
    data = make_data(10)
    alone = [denoising_error(Returns(), data.take(count), **SETTINGS)["mae"] * count for count in (3, 4)]
    fourth = TensorDataset.from_tensors(
        ids=data.ids[3:4],
        mean=data.mean[3:4],
        std=None,
        embeddings=data.embeddings,
        texts=data.texts,
        captions=data.captions[3:4],
        caption_counts=data.caption_counts[3:4],
    )
    assert denoising_error(Returns(), fourth, **SETTINGS)["mae"] == pytest.approx(alone[1] - alone[0], rel=1e-4)


def test_without_validation_rows_there_is_no_error(make_data):
    assert denoising_error(Zero(), make_data(3).take(0), **SETTINGS) == {}
