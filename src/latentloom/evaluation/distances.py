"""Distances between two sets of pictures, given by the features of a vision encoder: real (N, dim), samples (M, dim).

All is computed in float64. They are few lines each and written here, since a library for them reads pictures in its
own way, gives KID without a standard error, and has no CMMD.
"""

from collections.abc import Callable

import numpy as np

ROWS = 2048  # rows of a kernel's matrix in memory at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
FEWEST = 3  # rows in each set: KID's standard error leaves one out, and its mean is over pairs

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (N, dim), (M, dim) -> (N, M)


def frechet_distance(real: np.ndarray, samples: np.ndarray) -> float:
    """The Fréchet distance between the two Gaussians with the sets' means and covariances (Heusel et al. 2017):

        |m1 - m2|² + Tr(C1 + C2 - 2 (C1 C2)^½)

    It is biased: of few pictures it is too large, the more so the more dimensions the features have.
    """
    real, samples = real.astype(np.float64), samples.astype(np.float64)
    of_real, of_samples = np.cov(real, rowvar=False), np.cov(samples, rowvar=False)
    levels, axes = np.linalg.eigh(of_real)
    root = (axes * np.sqrt(levels.clip(min=0.0))) @ axes.T
    # C1 C2 has the eigenvalues of the symmetric C1^½ C2 C1^½, which are computed without complex numbers.
    shared = np.sqrt(np.linalg.eigvalsh(root @ of_samples @ root).clip(min=0.0)).sum()
    apart = np.square(real.mean(0) - samples.mean(0)).sum()
    return float(apart + np.trace(of_real) + np.trace(of_samples) - 2 * shared)


def kernel_distance(real: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018) over whole sets, and its standard error.

    The squared maximum mean discrepancy with the kernel (x·y / dim + 1)³, unbiased, so of equal distributions it is 0
    on average and may be below. The standard error is the jackknife's for two samples (Arvesen 1969): each picture in
    turn is left out.

    Raises:
        ValueError: when a set has fewer than `FEWEST` rows.
    """
    count, other_count = len(real), len(samples)
    if min(count, other_count) < FEWEST:
        raise ValueError(f"sets of {count} and {other_count} rows; each needs {FEWEST}")

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left @ right.T / left.shape[1] + 1.0) ** 3

    def diagonal(rows: np.ndarray) -> np.ndarray:
        return (np.square(rows).sum(1) / rows.shape[1] + 1.0) ** 3

    real, samples = real.astype(np.float64), samples.astype(np.float64)
    # For each row the sum of the kernel over all other rows of its own set, and over those of the other set.
    own, other_own = (_sums(kernel, rows, rows)[0] - diagonal(rows) for rows in (real, samples))
    across, other_across = _sums(kernel, real, samples)

    def discrepancy(within: np.ndarray, other_within: np.ndarray, between: np.ndarray, n: int, m: int) -> np.ndarray:
        return within / (n * (n - 1)) + other_within / (m * (m - 1)) - 2 * between / (n * m)

    within, other_within, between = own.sum(), other_own.sum(), across.sum()
    value = discrepancy(within, other_within, between, count, other_count)
    without = discrepancy(within - 2 * own, other_within, between - across, count - 1, other_count)
    without_other = discrepancy(within, other_within - 2 * other_own, between - other_across, count, other_count - 1)
    variance = sum((len(each) - 1) * each.var() for each in (without, without_other))
    return float(value), float(np.sqrt(variance))


def cmmd(real: np.ndarray, samples: np.ndarray) -> float:
    """CMMD (Jayasumana et al. 2024): 1000 times the squared maximum mean discrepancy of features of unit length.

    With the kernel exp(-|x - y|² / (2 · 10²)), as its authors compute it: each picture counts as a pair with itself,
    which makes it a little larger than 0 for equal distributions.
    """

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.exp((left @ right.T - 1.0) / CMMD_SIGMA**2)  # of unit vectors, |x - y|² = 2 - 2 x·y

    real, samples = (_unit(rows.astype(np.float64)) for rows in (real, samples))
    within, other_within, between = (
        _sums(kernel, left, right)[0].mean() / len(right)
        for left, right in ((real, real), (samples, samples), (real, samples))
    )
    return float(CMMD_SCALE * (within + other_within - 2 * between))


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The cosine (N) between the two features (N, dim) of each row, float64."""
    return (_unit(left.astype(np.float64)) * _unit(right.astype(np.float64))).sum(1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _sums(kernel: Kernel, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the kernel's matrix over its rows (N) and over its columns (M), some rows in memory at a time."""
    of_rows, of_columns = np.empty(len(left)), np.zeros(len(right))
    for start in range(0, len(left), ROWS):
        part = kernel(left[start : start + ROWS], right)
        of_rows[start : start + ROWS] = part.sum(1)
        of_columns += part.sum(0)
    return of_rows, of_columns
