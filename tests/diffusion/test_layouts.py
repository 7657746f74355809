"""Layouts: what comes in as an array or a tensor, channels first or last, goes out the same."""

import numpy as np
import pytest
import torch

from latentloom.diffusion import detect_layout, to_nchw, to_tensor


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(2, 4, 8, 6), (2, 8, 6, 4), (2, 4, 4, 4), (2, 4, 16, 4)])
def test_every_layout_kind_and_dtype_survives_the_round_trip(shape, kind, dtype):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    latents = array if kind == "numpy" else torch.from_numpy(array)
    inside, restore = to_nchw(latents, dtype=torch.float64)
    assert inside.shape[1] == 4 and inside.dtype == torch.float64
    outside = restore(inside)
    assert type(outside) is type(latents) and outside.dtype == latents.dtype
    np.testing.assert_array_equal(np.asarray(outside), array)


def test_the_channel_count_tells_the_layout_and_the_name_decides_a_tie():
    assert detect_layout((1, 4, 16, 16)) == "nchw"
    assert detect_layout((1, 16, 16, 4)) == "nhwc"
    assert detect_layout((1, 4, 4, 4)) == "nhwc"
    assert detect_layout((1, 4, 4, 4), layout="nchw") == "nchw"
    assert detect_layout((1, 8, 16, 16), latent_channels=8) == "nchw"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 3, 16, 16),), r"\(1, 3, 16, 16\) is no batch of latents of 4 channels as nhwc or nchw"),
        (((4, 16, 16),), r"\(4, 16, 16\) is no batch"),
        (((1, 16, 16, 4), 4, "nchw"), r"\(1, 16, 16, 4\) is no batch of latents of 4 channels as nchw"),
        (((1, 16, 16, 4), 4, "NHWC"), "as NHWC"),
    ],
)
def test_a_shape_that_fits_no_layout_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        detect_layout(*arguments)


def test_read_only_and_reversed_arrays_are_admitted_and_lists_are_not():
    frozen = np.arange(4.0)
    frozen.setflags(write=False)
    np.testing.assert_array_equal(to_tensor(frozen)[0].numpy(), frozen)
    np.testing.assert_array_equal(to_tensor(frozen[::-1])[0].numpy(), frozen[::-1])
    assert to_tensor(np.arange(3))[0].dtype == torch.float32
    with pytest.raises(TypeError, match="not list"):
        to_tensor([1.0])
