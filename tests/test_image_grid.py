"""Many images as one."""

import numpy as np
import pytest

from latentloom.image_grid import captioned_grid, image_grid


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


def test_images_of_several_sizes_lie_whole_in_the_middle_of_equal_places():
    images = [np.full((height, width, 3), 10 * width, dtype=np.uint8) for height, width in ((4, 6), (2, 6), (4, 2))]
    grid = image_grid(images, columns=2)
    captioned = captioned_grid(images, ["", "", ""])
    assert grid.shape == (8, 12, 3)
    for place, (top, left) in enumerate([(0, 0), (1, 6), (4, 2)]):
        height, width = images[place].shape[:2]
        row, column = divmod(place, 2)
        y, x = row * (4 + 56) + top - 4 * row, column * 128 + 61 + left - 6 * column
        np.testing.assert_array_equal(grid[top : top + height, left : left + width], images[place])
        np.testing.assert_array_equal(captioned[y : y + height, x : x + width], images[place])
    for shown in (grid, captioned):
        assert (shown < 255).all(-1).sum() == sum(image.shape[0] * image.shape[1] for image in images)


def test_each_image_has_its_own_caption_below_it():
    images = np.full((3, 4, 6, 3), 200, dtype=np.uint8)
    grid = captioned_grid(images, ["lion", "a very long caption " * 20, "lion"])
    height, width = 4 + 56, 128
    cells = [grid[y : y + height, x : x + width] for y, x in ((0, 0), (0, width), (height, 0))]
    assert grid.shape == (2 * height, 2 * width, 3)
    for cell in cells:
        np.testing.assert_array_equal(cell[:4, 61:67], images[0])  # centred
        assert cell[:4].min() == 200
    written = [int((cell[4:] < 128).any(-1).sum()) for cell in cells]
    assert 0 < written[0] < written[1]
    assert (cells[0] == cells[2]).all()


def test_a_long_word_keeps_out_of_its_neighbours_place():
    images = np.full((2, 4, 6, 3), 255, dtype=np.uint8)
    grid = captioned_grid(images, ["Donaudampfschifffahrtsgesellschaftskapit\u00e4n" * 2, ""])
    columns = np.flatnonzero((grid < 128).any((0, 2)))
    assert columns.size > 64 and columns.min() >= 2 and columns.max() < 126
