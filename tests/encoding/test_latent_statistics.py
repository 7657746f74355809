"""Figures of the training latents, against NumPy's."""

import numpy as np
import pytest
import torch

from latentloom.encoding import latent_statistics
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.latent_statistics import ChannelStatistics, latent_bound
from latentloom.errors import UserError


def test_one_pass_statistics_do_not_lose_digits_far_from_zero():
    values = torch.randn(300, 2, 3, 3, dtype=torch.float64) + 1e6
    statistics = ChannelStatistics()
    for part in values.split(7):
        statistics.add({"mean": part})
    mean, std = statistics.result()
    np.testing.assert_allclose(mean, values.numpy().mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.numpy().std((0, 2, 3)), rtol=1e-6)


def test_statistics_of_moments_are_those_of_samples():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2000, 1, 2, 2, generator=generator)
    std = torch.rand(2000, 1, 2, 2, generator=generator)
    statistics = ChannelStatistics()
    statistics.add({"mean": mean, "std": std})
    samples = mean + std * torch.randn(50, *mean.shape, generator=generator)
    assert statistics.result()[1][0] == pytest.approx(float(samples.std()), rel=0.01)


def test_an_empty_training_split_is_said():
    statistics = ChannelStatistics()
    statistics.add({"mean": torch.empty(0, 4, 2, 2)})
    with pytest.raises(UserError, match="the training split is empty"):
        statistics.result()


@pytest.mark.parametrize("at_once", [1, 256 * 9, 2**22])
def test_99_of_100_standardised_latents_have_their_percentile_below_the_bound(monkeypatch, at_once):
    monkeypatch.setattr(latent_statistics, "VALUES_AT_ONCE", at_once)
    raw = torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    center, scale = [1.0, 0.5, 2.0, 1.5], [3.0, 2.0, 4.0, 2.5]
    standardised = (raw.double().numpy() - np.reshape(center, (4, 1, 1))) / np.reshape(scale, (4, 1, 1))
    percentiles = np.quantile(np.abs(standardised).reshape(50, -1), 0.995, axis=1)
    bound = latent_bound(LatentCodec(center, scale), raw.split(20))
    assert bound == pytest.approx(np.quantile(percentiles, 0.99), abs=1e-4)
