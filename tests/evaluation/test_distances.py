"""FID, KID and CMMD are what their papers' formulas give, computed in another way."""

from itertools import product

import numpy as np
import pytest
from scipy.linalg import sqrtm

from latentloom.evaluation import distances
from latentloom.evaluation.distances import cmmd, cosines, frechet_distance, kernel_distance

RANDOM = np.random.default_rng(0)
REAL, SAMPLES = RANDOM.normal(size=(12, 5)), RANDOM.normal(0.4, 1.3, size=(9, 5))


def with_moments(count: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Rows of exactly this mean and covariance."""
    rows = np.random.default_rng(count).normal(size=(count, len(mean)))
    rows -= rows.mean(0)
    whitened = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    mean, other_mean = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    covariance = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 0.5]])
    other = np.array([[1.0, -0.4, 0.0], [-0.4, 3.0, 0.6], [0.0, 0.6, 1.5]])
    rows, other_rows = with_moments(20, mean, covariance), with_moments(31, other_mean, other)
    expected = 10.0 + np.trace(covariance + other - 2 * sqrtm(covariance @ other).real)
    assert frechet_distance(rows, other_rows) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_gaussians_without_correlation_is_that_of_their_deviations():
    rows = with_moments(20, np.zeros(2), np.diag([4.0, 9.0]))
    other_rows = with_moments(25, np.array([3.0, 0.0]), np.diag([1.0, 16.0]))
    assert frechet_distance(rows, other_rows) == pytest.approx(3**2 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-9)


def test_fewer_pictures_than_dimensions_have_a_frechet_distance_too():
    few, others = RANDOM.normal(size=(4, 30)), RANDOM.normal(size=(5, 30))
    covariances = [np.cov(rows, rowvar=False) for rows in (few, others)]
    apart = np.square(few.mean(0) - others.mean(0)).sum()
    expected = apart + sum(map(np.trace, covariances)) - 2 * np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(few, others) == pytest.approx(expected, rel=1e-4)


def direct_kid(real: np.ndarray, samples: np.ndarray) -> float:
    """The unbiased sum over pairs, one by one."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1.0) ** 3

    def within(rows: np.ndarray) -> float:
        pairs = [(i, j) for i, j in product(range(len(rows)), repeat=2) if i != j]
        return sum(kernel(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    between = sum(kernel(x, y) for x, y in product(real, samples)) / (len(real) * len(samples))
    return within(real) + within(samples) - 2 * between


@pytest.mark.parametrize("rows", [4, 2048])
def test_kid_is_the_direct_double_sum_and_its_error_the_jackknifes(monkeypatch, rows):
    monkeypatch.setattr(distances, "ROWS", rows)
    value, error = kernel_distance(REAL, SAMPLES)
    assert value == pytest.approx(direct_kid(REAL, SAMPLES), rel=1e-12)
    without = [direct_kid(np.delete(REAL, row, 0), SAMPLES) for row in range(len(REAL))]
    without_other = [direct_kid(REAL, np.delete(SAMPLES, row, 0)) for row in range(len(SAMPLES))]
    variance = sum((len(left_out) - 1) * np.var(left_out) for left_out in (without, without_other))
    assert error == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_kid_of_one_distribution_is_0_within_its_errors_and_its_spread_is_what_the_error_says():
    random = np.random.default_rng(1)
    many = [kernel_distance(random.normal(size=(40, 4)), random.normal(0.3, 1, size=(40, 4))) for _ in range(200)]
    values, errors = np.array(many).T
    assert np.median(errors) == pytest.approx(values.std(), rel=0.25)
    same = [kernel_distance(random.normal(size=(40, 4)), random.normal(size=(40, 4)))[0] for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)
    assert min(same) < 0 < max(same)


@pytest.mark.parametrize("rows", [4, 2048])
def test_cmmd_is_the_direct_double_sum(monkeypatch, rows):
    monkeypatch.setattr(distances, "ROWS", rows)

    def mean(left: np.ndarray, right: np.ndarray) -> float:
        units = [[row / np.sqrt((row**2).sum()) for row in side] for side in (left, right)]
        return float(np.mean([np.exp(-((x - y) ** 2).sum() / (2 * 10.0**2)) for x, y in product(*units)]))

    expected = 1000 * (mean(REAL, REAL) + mean(SAMPLES, SAMPLES) - 2 * mean(REAL, SAMPLES))
    assert cmmd(REAL, SAMPLES) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_are_no_distance_apart():
    assert frechet_distance(REAL, REAL[::-1]) == pytest.approx(0, abs=1e-6)
    assert cmmd(REAL, REAL[::-1]) == pytest.approx(0, abs=1e-9)
    value, error = kernel_distance(REAL, REAL[::-1])
    assert value <= 0 < error  # unbiased, it takes off what a picture has in common with itself


def test_features_in_single_precision_are_computed_in_double():
    shifted, other = (REAL + 1000).astype(np.float32), (SAMPLES + 1000).astype(np.float32)
    wide = shifted.astype(np.float64), other.astype(np.float64)
    assert frechet_distance(shifted, other) == frechet_distance(*wide)
    assert kernel_distance(shifted, other) == kernel_distance(*wide)


def test_the_cosine_is_of_each_row_with_its_own():
    left, right = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[6.0, 8.0], [0.0, 2.0]])
    np.testing.assert_allclose(cosines(left, right), [1.0, 0.0], atol=1e-12)
