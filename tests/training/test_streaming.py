"""Where the data lie changes nothing that comes out: streamed from the disk and on the device, bit for bit."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from latentloom.diffusion.denoising_error import denoising_error
from latentloom.diffusion.text import Labels, Text, concatenate
from latentloom.encoding.dataset import Caches, load_caches
from latentloom.encoding.shard_files import DamagedShardError
from latentloom.training.batches import PREFETCH_THREAD, Batch, batches

ROWS, TRAINING = 40, 32
SETTINGS = {"seed": 3, "batch_size": 12, "block_rows": None, "distribution": "cosine", "label_dropout": 0.2}
PARTS = [slice(0, 5), slice(5, 12)]
STEPS = range(16)  # 12 of 32 rows each: six epochs


def both_ways(folders) -> tuple[Caches, Caches]:
    held, streamed = load_caches(*folders), load_caches(*folders, memory_share=0.0)
    assert (held.train.streamed, streamed.train.streamed) == (False, True)
    return held, streamed


def drawn(caches: Caches, steps=STEPS, parts=PARTS, **changes) -> list[Batch]:
    return [batch for step in batches(caches.train, steps=steps, parts=parts, **SETTINGS | changes) for batch in step]


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for name, *both in zip(Batch._fields, one, other, strict=True):
            for tensor, expected in zip(*map(tensors, both), strict=True):
                assert torch.equal(tensor, expected), name


def tensors(labels: Labels) -> list[torch.Tensor]:
    return [labels.pooled, labels.tokens, labels.mask] if isinstance(labels, Text) else [labels]


@pytest.mark.parametrize("block_rows", [None, 8])
@pytest.mark.parametrize("kind", [{}, {"flip": False}, {"std": False}, {"weighted": False}, {"tokens": True}])
def test_batches_of_several_epochs_are_the_same(write_caches, kind, block_rows, monkeypatch):
    held, streamed = both_ways(write_caches(ROWS, **kind))
    assert_equal(drawn(held, block_rows=block_rows), drawn(streamed, block_rows=block_rows))
    monkeypatch.setattr("latentloom.training.batches.WINDOW_BYTES", 1)  # a window a step
    assert_equal(drawn(held, range(5, 9), block_rows=block_rows), drawn(streamed, range(5, 9), block_rows=block_rows))


def test_latents_are_standardised_in_fp32_from_what_is_stored(write_caches):
    latents, text = write_caches(ROWS)
    index = pd.read_parquet(latents / "index.parquet").set_index("id")
    for caches in both_ways((latents, text)):
        for row, own in enumerate(caches.train.names()):
            raw = {
                name: tensor[index.loc[own, "row"]].astype(np.float32)
                for name, tensor in load_file(latents / index.loc[own, "shard"]).items()
            }
            center, scale = (
                np.array(caches.latent_statistics[name], np.float32)[:, None, None] for name in ("mean", "std")
            )
            mean, std = caches.train.latents_at(torch.tensor([row]))
            assert np.array_equal(mean[0], (raw["mean"] - center) / scale)
            assert np.array_equal(std[0], raw["std"] / scale)


@pytest.mark.parametrize("way", [0, 1])
def test_batches_from_a_later_step_on_are_the_rest(write_caches, way):
    caches = both_ways(write_caches(ROWS))[way]
    assert_equal(drawn(caches, range(7, 16)), drawn(caches)[2 * 7 :])


@pytest.mark.parametrize("tokens", [False, True])
def test_two_processes_see_the_halves_of_the_batches_of_one(write_caches, tokens):
    held, streamed = both_ways(write_caches(ROWS, tokens=tokens))
    halves = [drawn(caches, parts=[part]) for caches, part in ((held, slice(0, 6)), (streamed, slice(6, 12)))]
    together = [Batch(*map(concatenate, zip(*pair, strict=True))) for pair in zip(*halves, strict=True)]
    assert_equal(together, drawn(held, parts=[slice(0, 12)]))


def test_a_batch_has_the_token_states_of_its_captions_and_none_to_see_where_they_are_dropped(write_caches):
    caches = both_ways(write_caches(ROWS, tokens=True))[1]
    known = caches.train.embeddings_at(slice(0, 2 * ROWS))
    dropped = 0
    for batch in drawn(caches):
        for vector, states, mask in zip(batch.labels.pooled, batch.labels.tokens, batch.labels.mask, strict=True):
            if not vector.any():
                dropped += 1
                assert not mask.any()
                continue
            caption = int((known.pooled == vector).all(1).nonzero()[0])
            assert torch.equal(states[mask], known.tokens[caption][known.mask[caption]]) and mask.any()
    assert dropped


def test_a_latent_comes_with_one_of_its_own_captions(write_caches):
    caches = both_ways(write_caches(ROWS))[1]
    embeddings = caches.train.embeddings_at(slice(0, 2 * ROWS))
    met = set()
    for batch in drawn(caches, range(60)):
        for row, label in zip(batch.rows.tolist(), batch.labels, strict=True):
            if label.any():
                caption = int((embeddings == label).all(1).nonzero()[0])
                met.add((row, caption))
    assert met == set(zip(*(column.tolist() for column in caches.train.captions.flat()), strict=True))


@pytest.mark.parametrize("tokens", [False, True])
def test_the_validation_error_is_the_same(write_caches, tokens):
    held, streamed = both_ways(write_caches(ROWS, tokens=tokens))

    class Scales(nn.Module):
        def forward(self, x_t, noise_levels, labels):
            told = (labels.tokens * labels.mask.unsqueeze(2) if tokens else labels).mean()
            return x_t * noise_levels.view(-1, 1, 1, 1) + told

    for one, other in ((held.train, streamed.train), (held.validation, streamed.validation)):
        errors = [denoising_error(Scales(), data, schedule="vp", noise_levels="cosine") for data in (one, other)]
        assert errors[0] == errors[1]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_shard_deleted_or_replaced_while_training_is_named_and_never_read(write_caches, replaced):
    latents, text = write_caches(ROWS)
    _, streamed = both_ways((latents, text))
    path = latents / "00002.safetensors"
    content = path.read_bytes()
    path.unlink()
    if replaced:
        path.write_bytes(content[:-8] + bytes(8))
    with pytest.raises(DamagedShardError, match=r"00002\.safetensors was deleted or replaced"):
        drawn(streamed)


def test_only_streamed_data_are_prefetched_by_a_thread(write_caches):
    for caches in both_ways(write_caches(ROWS)):
        steps = batches(caches.train, steps=STEPS, parts=PARTS, **SETTINGS)
        next(steps)
        running = [thread for thread in threading.enumerate() if thread.name.startswith(PREFETCH_THREAD)]
        assert len(running) == caches.train.streamed
        steps.close()


def test_data_are_streamed_where_they_need_more_than_their_share_of_the_free_memory(write_caches, monkeypatch):
    folders = write_caches(ROWS)
    needed = ROWS * 4 * 4 * 8 * 8 * 2 + 2 * ROWS * 12 * 2  # mean and std, mirrored as well, and the embeddings
    monkeypatch.setattr("latentloom.encoding.dataset.free_memory", lambda device: 2 * needed)
    assert not load_caches(*folders, memory_share=0.5).train.streamed
    caches = load_caches(*folders, memory_share=0.499)
    assert caches.train.streamed
    assert caches.placement == (
        "0.1 MiB of latents and embeddings are streamed from the disk to cpu: 0.1 MiB allowed, "
        "0.499 of the 0.2 MiB free"
    )
