"""Images shown in a notebook."""

import matplotlib as mpl
import numpy as np
import pytest
import torch

from latentloom.diffusion import imshow, plot_images

mpl.use("Agg")
import matplotlib.pyplot as plt


@pytest.mark.parametrize("kind", ["uint8", "float", "torch", "list"])
def test_images_are_laid_out_in_a_grid_with_their_labels(kind):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    given = {
        "uint8": images,
        "float": images / 255,
        "torch": torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        "list": list(images),
    }[kind]
    figure = plot_images(given, list("abcde"), columns=3, title="five")
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(figure.axes) == 6 and [ax.get_title() for ax in drawn] == list("abcde")
    shown = np.asarray(drawn[4].images[0].get_array(), dtype=float)
    np.testing.assert_allclose(shown if kind in ("uint8", "list") else shown * 255, images[4], atol=1e-3)
    plt.close(figure)


def test_one_image_is_shown_on_axes_of_its_own_or_given_ones():
    figure, ax = plt.subplots()
    assert imshow(np.zeros((4, 4)), "grey", ax=ax) is ax
    assert imshow(np.zeros((4, 4, 3), np.uint8)).figure is not figure
    plt.close("all")


def test_what_is_no_image_is_rejected():
    with pytest.raises(ValueError, match=r"\(7, 5, 9\)"):
        imshow(np.zeros((7, 5, 9)))
    with pytest.raises(ValueError, match="shorter"):
        plot_images(np.zeros((2, 4, 4, 3)), ["a"])
    plt.close("all")
