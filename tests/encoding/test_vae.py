"""Where memory is too small for a batch, the VAE takes smaller ones, and gives the same bytes."""

import numpy as np
import pytest
import tiny_models
import torch

from latentloom.encoding.fitting_batches import FittingBatches
from latentloom.encoding.vae import load_vae


@pytest.fixture(params=["tiny", "kl"])
def vae(request, tmp_path_factory):
    save = tiny_models.save_tiny_vae if request.param == "tiny" else tiny_models.save_kl_vae
    return load_vae(str(save(tmp_path_factory.mktemp("vae") / "vae")))


def cpu_error() -> RuntimeError:
    """What torch raises when a CPU's memory does not suffice."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    return caught.value


@pytest.fixture
def small_memory(vae, monkeypatch) -> list[int]:
    """From here on there is room for three rows; gives how many were asked for at each call."""
    asked = []

    def limited(compute, error):
        def call(rows):
            asked.append(len(rows))
            if len(rows) > 3:
                raise error
            return compute(rows)

        return call

    for name, error in (("encode", cpu_error()), ("decode", torch.OutOfMemoryError("CUDA out of memory"))):
        monkeypatch.setattr(vae.module, name, limited(getattr(vae.module, name), error))
    return asked


def test_encoding_in_halves_gives_the_bytes_of_encoding_at_once(vae, request):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    whole = vae.encode(pixels)
    asked = request.getfixturevalue("small_memory")
    halves = vae.encode(pixels)
    assert asked == [9, 4, 2, 2, 2, 2, 1]
    asked.clear()
    vae.encode(pixels)
    assert asked == [2, 2, 2, 2, 1]  # what did not fit is not tried again
    assert halves.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(halves[name].half(), tensor.half()), name  # as the cache stores them


def test_decoding_in_halves_gives_the_bytes_of_decoding_at_once(vae, request):
    raw = torch.randn(9, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(raw, batch_size=6)
    asked = request.getfixturevalue("small_memory")
    assert np.array_equal(vae.decode(raw, batch_size=6), whole)
    assert asked == [6, 3, 3, 3]


@pytest.mark.parametrize(
    ("error", "tried"),
    [(torch.OutOfMemoryError("CUDA out of memory"), [7, 3, 2]), (MemoryError(), [7, 3, 2]), (RuntimeError("bug"), [7])],
)
def test_rows_for_which_there_is_no_memory_stop_with_their_own_error_and_others_at_once(error, tried):
    """Never one row alone on a CPU: it would have other last bits."""
    asked = []

    def never(part: slice):
        asked.append(len(range(7)[part]))
        raise error

    with pytest.raises(type(error)) as caught:
        FittingBatches(fewest=2)(never, 7, 7)
    assert caught.value is error
    assert asked == tried


def test_batches_are_halved_before_they_are_tried_where_that_is_asked_for():
    asked, fitting = [], FittingBatches(fewest=2)
    for times in (1, 0, 3):
        fitting.halve(times)
        fitting(lambda part: asked.append(len(range(8)[part])), 8, 8)
    assert asked == [4, 4, 4, 4, 2, 2, 2, 2]


def test_no_rows_are_one_empty_batch():
    assert FittingBatches()(lambda part: list(range(0)[part]), 0, 8) == [[]]
