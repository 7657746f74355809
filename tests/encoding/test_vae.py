"""Where a device's memory is too small for a batch, the VAE takes smaller ones, and gives the same bytes."""

import numpy as np
import pytest
import tiny_models
import torch

from latentloom.encoding.vae import FittingBatches, load_vae


@pytest.fixture(params=["tiny", "kl"])
def vae(request, tmp_path_factory):
    save = tiny_models.save_tiny_vae if request.param == "tiny" else tiny_models.save_kl_vae
    return load_vae(str(save(tmp_path_factory.mktemp("vae") / "vae")))


@pytest.fixture
def small_memory(vae, monkeypatch) -> list[int]:
    """From here on there is room for three rows; gives how many were asked for at each call."""
    asked = []

    def limited(compute):
        def call(rows):
            asked.append(len(rows))
            if len(rows) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(rows)

        return call

    for name in ("encode", "decode"):
        monkeypatch.setattr(vae.module, name, limited(getattr(vae.module, name)))
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


def test_a_row_for_which_there_is_no_memory_stops_with_torchs_own_error(vae, monkeypatch):
    def never(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vae.module, "decode", never)
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(torch.zeros(4, 4, 4, 4))


def test_no_rows_are_one_empty_batch():
    assert FittingBatches()(lambda part: list(range(0)[part]), 0, 8) == [[]]
