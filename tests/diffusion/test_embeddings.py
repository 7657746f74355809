"""Whitened text: what captions share is gone, what tells them apart is as large as anything."""

import numpy as np
import pytest
import torch

from latentloom.diffusion.embeddings import VARIANCE_FLOOR, TextWhitening


def fitted(embeddings: torch.Tensor) -> TextWhitening:
    whitening = TextWhitening(embeddings.shape[1])
    whitening.fit(embeddings)
    return whitening


def captions(count: int = 400, dim: int = 12) -> torch.Tensor:
    """Embeddings that share most of their direction, and vary much more along some axes than along others."""
    torch.manual_seed(0)
    return 5 + torch.randn(count, dim) * torch.logspace(0, -2, dim)


def test_features_are_those_of_zca_in_float64():
    embeddings = captions()
    rows = embeddings.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centred = rows - rows.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(rows))
    expected = centred @ axes / np.sqrt(variances + VARIANCE_FLOOR * variances.mean()) @ axes.T
    expected *= np.sqrt(rows.shape[1]) / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(fitted(embeddings)(embeddings).numpy(), expected, atol=2e-3)


def test_captions_of_near_embeddings_get_features_far_apart():
    embeddings = captions()
    features = fitted(embeddings)(embeddings)
    near = torch.nn.functional.cosine_similarity(embeddings[:1], embeddings[1:]).mean()
    far = torch.nn.functional.cosine_similarity(features[:1], features[1:]).mean()
    assert near > 0.95
    assert abs(far) < 0.1


def test_no_text_stays_zero_and_an_embeddings_norm_does_not_matter():
    embeddings = captions()
    whitening = fitted(embeddings)
    assert not whitening(torch.zeros(2, 12)).any()
    torch.testing.assert_close(whitening(7 * embeddings), whitening(embeddings), rtol=1e-3, atol=1e-3)
    norms = whitening(embeddings).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 12**0.5))


def test_before_it_is_fitted_and_with_one_caption_alone_only_the_norm_changes():
    text = captions(3)
    expected = torch.nn.functional.normalize(text, dim=1) * 12**0.5
    for whitening in (TextWhitening(12), fitted(text[:1].expand(5, -1))):
        torch.testing.assert_close(whitening(text), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_rounds_nothing(dtype):
    embeddings = captions()
    whitening = fitted(embeddings).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        under = whitening(embeddings)
    assert under.dtype == dtype
    assert torch.equal(under, whitening(embeddings))
