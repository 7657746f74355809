"""Many images as one."""

import numpy as np
import pytest

from latentloom.image_grid import image_grid


@pytest.mark.parametrize(
    ("count", "columns", "rows", "wide"), [(1, None, 1, 1), (5, None, 2, 3), (6, 2, 3, 2), (4, 4, 1, 4)]
)
def test_images_lie_row_by_row_and_places_left_over_are_white(count, columns, rows, wide):
    images = np.random.default_rng(0).integers(0, 255, (count, 4, 6, 3), dtype=np.uint8)
    grid = image_grid(images, columns)
    assert grid.shape == (rows * 4, wide * 6, 3) and grid.dtype == np.uint8
    for place in range(rows * wide):
        row, column = divmod(place, wide)
        shown = grid[row * 4 : row * 4 + 4, column * 6 : column * 6 + 6]
        expected = images[place] if place < count else np.full((4, 6, 3), 255)
        np.testing.assert_array_equal(shown, expected)
