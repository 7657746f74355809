"""Both forms of the nearest semi-orthogonal matrix come near the one that a singular value decomposition gives."""

import pytest
import torch

from latentloom.training.orthogonal import inverses, newton_schulz, orthogonalised

# Form, dtype, the range of the singular values that come out, and how much their vectors may turn.
FORMS = {
    "inverses": (inverses, torch.float32, 0.825, 1.175, 0.01),
    "inverses in fp64": (inverses, torch.float64, 0.825, 1.175, 1e-9),
    "newton_schulz": (newton_schulz, torch.float32, 0.67, 1.21, 0.01),
    "newton_schulz in bf16": (newton_schulz, torch.bfloat16, 0.6, 1.3, 0.15),
}


def matrix_and_nearest(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As a momentum: one direction prevails, the weakest are at 0.002 of the norm. float64; the second by an SVD."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    values = torch.cat([torch.ones(1), torch.logspace(-1.5, -2.65, len(left) - 1)]).double()
    return left * values @ right, left @ right


@pytest.mark.parametrize("columns", [64, 200])
@pytest.mark.parametrize("form", FORMS)
def test_singular_values_become_about_one_and_their_vectors_stay(form, columns):
    compute, dtype, low, high, turned = FORMS[form]
    matrix, nearest = matrix_and_nearest(64, columns)
    result = compute(7 * matrix[None].to(dtype))[0].double()
    common = nearest @ result.T  # symmetric with the result's singular values, if their vectors stayed
    values = torch.linalg.svdvals(common)
    assert low < values.min() <= values.max() < high
    assert (common - common.T).norm() < turned * common.norm()


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_tall_and_wide_matrices_are_orthogonal_along_their_shorter_side(shape):
    torch.manual_seed(0)
    result = orthogonalised(torch.randn(2, *shape))
    for matrix in result:
        assert 0.8 < torch.linalg.svdvals(matrix).min() <= torch.linalg.svdvals(matrix).max() < 1.2
    assert result.shape == (2, *shape)


@pytest.mark.parametrize("compute", [inverses, newton_schulz])
def test_a_matrix_of_zeros_stays(compute):
    assert not compute(torch.zeros(2, 3, 5)).any()
