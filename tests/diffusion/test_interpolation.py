"""Between two samples: noise keeps its norm and turns evenly, texts move in a straight line, ends are exact."""

import numpy as np
import pytest
import torch

from latentloom.diffusion import Text, between_noise, between_texts


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_noise_turns_at_an_even_rate_and_its_norm_moves_in_a_straight_line(share):
    a, b = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.3]).view(
        2, 1, 1, 1
    )
    mixed = between_noise(a, b, share)
    x, y, z = (each.double().numpy().ravel() for each in (a, b, mixed))
    norms = [np.linalg.norm(each) for each in (x, y, z)]
    assert norms[2] == pytest.approx((1 - share) * norms[0] + share * norms[1], rel=1e-6)

    def angle(p, q):
        return np.arccos(p @ q / np.linalg.norm(p) / np.linalg.norm(q))

    assert angle(x, z) == pytest.approx(share * angle(x, y), rel=1e-5)
    assert angle(z, y) == pytest.approx((1 - share) * angle(x, y), rel=1e-5)
    assert mixed.dtype == a.dtype
    torch.testing.assert_close(between_noise(a, a, share), a)


def test_the_ends_are_the_very_tensors():
    a, b = torch.randn(2, 4, 8, 8)
    assert between_noise(a, b, 0.0) is a and between_noise(a, b, 1.0) is b
    assert between_texts(a, b, 0.0) is a and between_texts(a, b, 1.0) is b


def test_texts_move_in_a_straight_line_and_the_shorter_one_repeats_its_end():
    rng = np.random.default_rng(0)
    pooled, short, long = rng.normal(size=(2, 1, 6)), rng.normal(size=(1, 2, 5)), rng.normal(size=(1, 4, 5))
    a, b = (torch.from_numpy(each) for each in pooled)
    np.testing.assert_allclose(between_texts(a, b, 0.25), 0.75 * pooled[0] + 0.25 * pooled[1])
    # Of the three places of `a` two are seen; what lies in the third is padding.
    padded = torch.cat([torch.from_numpy(short), torch.full((1, 1, 5), 99.0, dtype=torch.float64)], 1)
    first = Text(a, padded, torch.tensor([[True, True, False]]))
    second = Text(b, torch.from_numpy(long), torch.ones(1, 4, dtype=torch.bool))
    expected = 0.75 * short[:, [0, 1, 1, 1]] + 0.25 * long
    for mixed in (between_texts(first, second, 0.25), between_texts(second, first, 0.75)):
        np.testing.assert_allclose(mixed.tokens, expected)
        assert mixed.mask.all() and mixed.mask.shape == (1, 4)
