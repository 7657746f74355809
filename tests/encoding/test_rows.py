"""Rows keyed by content: what is known is not computed, what changed is not served."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from latentloom.encoding import rows
from latentloom.encoding.rows import RowStore, load_rows, load_shard, row_key, write_shards


class Counting:
    """Computes a row from its key, and remembers for which keys it was asked."""

    def __init__(self, keys):
        self.keys, self.asked = keys, []

    def __call__(self, positions):
        self.asked += [self.keys[position] for position in positions]
        return {"value": torch.stack([expected(self.keys[position]) for position in positions])}


def expected(key: str) -> torch.Tensor:
    return torch.tensor(list(hashlib.sha256(key.encode()).digest()[:4]), dtype=torch.float16)


def run(folder: Path, state: Path, keys):
    compute = Counting(keys)
    shards = list(write_shards(folder, RowStore(state), keys, compute))
    return shards, compute.asked


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(rows, "SHARD_ROWS", 4)


def test_rows_come_out_in_the_order_of_their_keys(tmp_path):
    keys = [f"k{i}" for i in range(10)]
    shards, asked = run(tmp_path / "out", tmp_path / "state", keys)
    assert asked == keys
    assert [shard.path.name for shard in shards] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert torch.equal(
        torch.cat([shard.tensors["value"] for shard in shards]), torch.stack([expected(key) for key in keys])
    )


def test_a_second_run_computes_nothing_and_gives_the_same_bytes(tmp_path):
    keys = [f"k{i}" for i in range(10)]
    first, _ = run(tmp_path / "a", tmp_path / "state", keys)
    second, asked = run(tmp_path / "b", tmp_path / "state", keys)
    assert asked == []
    assert [shard.path.read_bytes() for shard in first] == [shard.path.read_bytes() for shard in second]


def test_only_new_rows_are_computed_wherever_they_stand(tmp_path):
    run(tmp_path / "a", tmp_path / "state", [f"k{i}" for i in range(10)])
    keys = ["new0", *(f"k{i}" for i in range(9, -1, -1)), "new1"]
    shards, asked = run(tmp_path / "b", tmp_path / "state", keys)
    assert asked == ["new0", "new1"]
    assert torch.equal(
        torch.cat([shard.tensors["value"] for shard in shards]), torch.stack([expected(key) for key in keys])
    )


def test_appending_leaves_earlier_shards_byte_identical(tmp_path):
    before, _ = run(tmp_path / "a", tmp_path / "state", [f"k{i}" for i in range(8)])
    after, asked = run(tmp_path / "a", tmp_path / "state", [f"k{i}" for i in range(9)])
    assert asked == ["k8"]
    assert [shard.path.read_bytes() for shard in after[:2]] == [shard.path.read_bytes() for shard in before]


def test_the_store_and_the_outs_are_one_file_on_disk(tmp_path):
    (shard,), _ = run(tmp_path / "out", tmp_path / "state", ["a", "b"])
    (stored,) = (tmp_path / "state").iterdir()
    assert shard.path.samefile(stored)


def test_a_run_from_a_partial_store_equals_one_from_nothing(tmp_path):
    keys = [f"k{i}" for i in range(11)]
    whole, _ = run(tmp_path / "whole", tmp_path / "fresh", keys)
    run(tmp_path / "part", tmp_path / "state", keys[3:7])
    mixed, _ = run(tmp_path / "mixed", tmp_path / "state", keys)
    assert [shard.path.read_bytes() for shard in mixed] == [shard.path.read_bytes() for shard in whole]


def test_a_damaged_stored_shard_is_left_aside_and_computed_again(tmp_path):
    keys = ["a", "b", "c"]
    (first,), _ = run(tmp_path / "a", tmp_path / "state", keys)
    good = first.path.read_bytes()
    (stored,) = (tmp_path / "state").iterdir()
    stored.unlink()
    stored.write_bytes(good[:20])
    with pytest.warns(UserWarning, match="damaged"):
        (again,), asked = run(tmp_path / "b", tmp_path / "state", keys)
    assert asked == keys
    assert again.path.read_bytes() == good


def test_work_done_before_a_crash_is_not_done_again(tmp_path):
    keys = [f"k{i}" for i in range(12)]
    compute = Counting(keys)

    def crashing(positions):
        if positions[0] >= 8:
            raise KeyboardInterrupt
        return compute(positions)

    with pytest.raises(KeyboardInterrupt):
        list(write_shards(tmp_path / "out", RowStore(tmp_path / "state"), keys, crashing))
    _, asked = run(tmp_path / "out", tmp_path / "state", keys)
    assert asked == keys[8:]


def test_keys_differ_with_every_part():
    parts = ["image", "weights", "preprocessing", "dtype"]
    keys = {row_key(*parts)} | {row_key(*[*parts[:i], "other", *parts[i + 1 :]]) for i in range(4)}
    assert len(keys) == 5


def test_rows_are_loaded_in_the_order_of_an_index(tmp_path):
    keys = [f"k{i}" for i in range(10)]
    run(tmp_path / "out", tmp_path / "state", keys)
    wanted = [9, 0, 5, 4]
    loaded = load_rows(
        tmp_path / "out", [f"{i // 4:05d}.safetensors" for i in wanted], np.array([i % 4 for i in wanted])
    )
    assert torch.equal(loaded["value"], torch.stack([expected(f"k{i}") for i in wanted]))


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"00007\.safetensors is missing or damaged"):
        load_shard(tmp_path / "00007.safetensors")
