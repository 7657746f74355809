"""The bound of dynamic thresholding, against NumPy's quantiles."""

import numpy as np
import pytest
import torch

from latentloom.training import latent_bound as module
from latentloom.training.latent_bound import latent_bound, quantile


@pytest.mark.parametrize("numbers", [1, 2, 64, 256, 1000])
@pytest.mark.parametrize("share", [0.5, 0.995, 1.0])
def test_quantiles_of_rows_are_numpys(numbers, share):
    values = torch.randn(7, numbers, generator=torch.Generator().manual_seed(0))
    expected = np.quantile(values.double().numpy(), share, axis=1)
    np.testing.assert_allclose(quantile(values, share), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 256 * 9, 2**22])
def test_99_of_100_latents_have_their_percentile_below_the_bound(make_data, monkeypatch, at_once):
    data = make_data(50)
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", at_once)
    percentiles = np.quantile(np.abs(data.mean.double().numpy()).reshape(50, -1), 0.995, axis=1)
    assert latent_bound(data) == pytest.approx(np.quantile(percentiles, 0.99), abs=1e-4)
