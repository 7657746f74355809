"""Figures of the training latents, against NumPy's."""

import numpy as np
import pytest
import torch

from latentloom.encoding import latent_statistics
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.latent_statistics import channel_statistics, channel_sums, latent_bound, percentiles


def test_statistics_do_not_lose_digits_far_from_zero():
    """Close to the largest number of fp16, where its neighbours lie 32 apart."""
    values = (torch.randn(300, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 32 + 6e4).half()
    mean, std = channel_statistics(channel_sums({"mean": part}) for part in values.split(7))
    exact = values.numpy().astype(np.longdouble)
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, exact.std((0, 2, 3)), rtol=1e-8)


def test_a_channel_that_never_varies_has_no_deviation():
    values = torch.full((5000, 2, 16, 16), 0.1).half()
    assert channel_statistics(channel_sums({"mean": part}) for part in values.split(700))[1] == [0.0, 0.0]


def test_statistics_of_moments_are_those_of_samples():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2000, 1, 2, 2, generator=generator)
    std = torch.rand(2000, 1, 2, 2, generator=generator)
    samples = mean + std * torch.randn(50, *mean.shape, generator=generator)
    _, (own,) = channel_statistics([channel_sums({"mean": mean, "std": std})])
    assert own == pytest.approx(float(samples.std()), rel=0.01)


@pytest.mark.parametrize("at_once", [1, 9, 256])
def test_99_of_100_standardised_latents_have_their_percentile_below_the_bound(monkeypatch, at_once):
    monkeypatch.setattr(latent_statistics, "ROWS_AT_ONCE", at_once)
    raw = torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    center, scale = [1.0, 0.5, 2.0, 1.5], [3.0, 2.0, 4.0, 2.5]
    standardised = (raw.double().numpy() - np.reshape(center, (4, 1, 1))) / np.reshape(scale, (4, 1, 1))
    expected = np.quantile(np.abs(standardised).reshape(50, -1), 0.995, axis=1)
    bound = latent_bound(percentiles(LatentCodec(center, scale), part) for part in raw.split(20))
    assert bound == pytest.approx(np.quantile(expected, 0.99), abs=1e-4)
