"""Rows keyed by content: what is known is not computed, what changed is not served."""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentloom import sharding
from latentloom.encoding import cache, row_store
from latentloom.encoding.cache import Done, Plan, row_keys
from latentloom.encoding.row_store import KEYS, RowStore, shard_name
from latentloom.encoding.shard_files import DamagedShardError, load_shard, read_shard
from latentloom.ids import from_hex

ENOUGH = 2**30


class Counting:
    """Computes a row from its key, in batches of 3, and remembers for which keys it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, keys, crash_after=math.inf):
        for start in range(0, len(keys), 3):
            batch = keys[start : start + 3]
            self.asked += batch
            if len(self.asked) > crash_after:
                raise KeyboardInterrupt
            yield {"value": torch.stack([expected(key) for key in batch])}


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def expected(key: str) -> torch.Tensor:
    return torch.tensor(list(digest(key)[:4]), dtype=torch.float16)


def hashes(texts) -> np.ndarray:
    return from_hex([digest(text).hex() for text in texts])


def plan_for(folder: Path, store: RowStore, keys) -> Plan:
    return Plan(store, folder, hashes(f"id of {key}" for key in keys), hashes(keys), 1, np.array(keys))


def stored(state: Path) -> list[Path]:
    return [path for path in state.iterdir() if path.name != KEYS]


def run(folder: Path, state: Path, keys, limit=ENOUGH, crash_after=math.inf):
    """The shards, and the keys whose rows were computed."""
    compute, store = Counting(), RowStore(state, limit)
    shards = written(plan_for(folder, store, keys), compute, crash_after)
    store.trim()
    return shards, compute.asked


def written(plan: Plan, compute: Counting, crash_after=math.inf) -> list:
    def function(task) -> Done:
        batches = compute(task.made_of[task.link()].tolist(), crash_after)
        return Done(task.computed, list(task.write(batches)))

    return [shard for part in plan.run(function) for shard in part]


def values(shards) -> torch.Tensor:
    return torch.cat([shard.tensors["value"] for shard in shards])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of exactly 4 rows, and several tasks."""
    monkeypatch.setattr(cache, "TASK_MISSING", 5)
    monkeypatch.setattr(sharding, "TENSORS", sharding.ShardBytes(4, 4, 4))


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
    (own,) = stored(tmp_path / "state")
    assert shard.path.samefile(own)


def test_a_run_from_a_partial_store_equals_one_from_nothing(tmp_path):
    keys = [f"k{i}" for i in range(11)]
    whole, _ = run(tmp_path / "whole", tmp_path / "fresh", keys)
    run(tmp_path / "part", tmp_path / "state", keys[3:7])
    mixed, _ = run(tmp_path / "mixed", tmp_path / "state", keys)
    assert [shard.path.read_bytes() for shard in mixed] == [shard.path.read_bytes() for shard in whole]


def test_a_damaged_stored_shard_is_skipped_and_computed_again(tmp_path):
    keys = ["a", "b", "c"]
    (first,), _ = run(tmp_path / "a", tmp_path / "state", keys)
    good = first.path.read_bytes()
    (own,) = stored(tmp_path / "state")
    own.unlink()
    own.write_bytes(good[:20])
    with pytest.warns(UserWarning, match="computed again"):
        (again,), asked = run(tmp_path / "b", tmp_path / "state", keys)
    assert asked == keys
    assert again.path.read_bytes() == good


def test_a_stored_shard_with_one_changed_bit_is_noticed(tmp_path):
    keys = ["a", "b", "c"]
    (first,), _ = run(tmp_path / "a", tmp_path / "state", keys)
    good = first.path.read_bytes()
    (own,) = stored(tmp_path / "state")
    own.unlink()
    own.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.warns(UserWarning, match="checksum"):
        (again,), asked = run(tmp_path / "b", tmp_path / "state", [*keys, "d"])
    assert sorted(asked) == [*keys, "d"]
    assert torch.equal(again.tensors["value"], torch.stack([expected(key) for key in [*keys, "d"]]))


def test_work_done_before_a_crash_is_not_done_again(tmp_path):
    keys = [f"k{i}" for i in range(12)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", tmp_path / "state", keys, crash_after=9)
    _, asked = run(tmp_path / "out", tmp_path / "state", keys)
    assert asked == keys[8:]


def test_the_missing_rows_of_all_shards_are_known_before_any_is_computed(tmp_path):
    run(tmp_path / "a", tmp_path / "state", [f"k{i}" for i in range(40)])
    keys = [f"k{i}" if i % 7 else f"new{i}" for i in range(40)]
    plan = plan_for(tmp_path / "b", RowStore(tmp_path / "state", ENOUGH), keys)
    assert np.flatnonzero(plan.missing).tolist() == list(range(0, 40, 7))
    assert torch.equal(values(written(plan, Counting())), torch.stack([expected(key) for key in keys]))


def test_the_store_may_be_deleted_while_a_stage_runs(tmp_path):
    before = [f"k{i}" for i in range(20)]
    run(tmp_path / "before", tmp_path / "state", before)
    keys = ["new", *before]  # no shard is the same, so that all rows come from parts of shards
    whole, _ = run(tmp_path / "whole", tmp_path / "fresh", keys)
    plan = plan_for(tmp_path / "out", RowStore(tmp_path / "state", ENOUGH), keys)
    shutil.rmtree(tmp_path / "state")
    shards = written(plan, Counting())
    assert [shard.path.read_bytes() for shard in shards] == [shard.path.read_bytes() for shard in whole]


def test_the_rows_of_a_shard_that_the_store_lost_are_found_in_others_or_computed(tmp_path):
    run(tmp_path / "a", tmp_path / "state", ["k2", "k3", "x", "y"])
    keys = [f"k{i}" for i in range(4)]
    run(tmp_path / "b", tmp_path / "state", keys)
    RowStore(tmp_path / "state", ENOUGH).path(shard_name(hashes(keys))).unlink()
    (shard,), asked = run(tmp_path / "c", tmp_path / "state", keys)
    assert asked == ["k0", "k1"]
    assert torch.equal(shard.tensors["value"], torch.stack([expected(key) for key in keys]))


def test_shards_of_another_machine_are_adopted_and_other_files_are_skipped(tmp_path):
    keys = [f"k{i}" for i in range(9)]
    shards, _ = run(tmp_path / "theirs", tmp_path / "their state", keys)
    stray = tmp_path / "stray.safetensors"
    safetensors.torch.save_file({"value": torch.zeros(3)}, stray)
    store = RowStore(tmp_path / "state", ENOUGH)
    store.adopt([*(shard.path for shard in shards), stray, tmp_path / "missing.safetensors"])
    assert not plan_for(tmp_path / "out", store, keys).missing.any()
    assert run(tmp_path / "out", tmp_path / "state", [*keys, "new"])[1] == ["new"]


def test_the_store_keeps_the_last_used_within_its_limit(tmp_path):
    size = run(tmp_path / "0", tmp_path / "state", ["a0", "a1"])[0][0].path.stat().st_size
    for name in ("b", "c", "d"):
        run(tmp_path / name, tmp_path / "state", [f"{name}0", f"{name}1"])
    run(tmp_path / "again", tmp_path / "state", ["a0", "a1"])  # the oldest is used once more
    _, asked = run(tmp_path / "e", tmp_path / "state", ["e0", "e1"], limit=2 * size)
    assert asked == ["e0", "e1"]
    _, shard, _ = RowStore(tmp_path / "state", ENOUGH).find(hashes(f"{name}0" for name in "abcde"))
    assert (shard >= 0).tolist() == [True, False, False, True, True]


def test_what_a_run_used_is_not_trimmed_by_it(tmp_path):
    keys = [f"k{i}" for i in range(12)]
    run(tmp_path / "a", tmp_path / "state", keys, limit=0)
    assert run(tmp_path / "b", tmp_path / "state", keys, limit=0)[1] == []
    run(tmp_path / "c", tmp_path / "state", ["other"], limit=0)
    assert len(stored(tmp_path / "state")) == 1


def test_use_is_marked_without_a_new_modification_time(tmp_path):
    (shard,), _ = run(tmp_path / "a", tmp_path / "state", ["a"])
    os.utime(shard.path, ns=(0, 0))
    (again,), _ = run(tmp_path / "b", tmp_path / "state", ["a"])
    assert again.path.stat().st_mtime_ns == 0
    assert again.path.stat().st_atime_ns > 0


def test_where_links_are_not_possible_the_store_holds_a_copy(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    keys = [f"k{i}" for i in range(6)]
    first, _ = run(tmp_path / "a", tmp_path / "state", keys)
    second, asked = run(tmp_path / "b", tmp_path / "state", keys)
    assert asked == []
    assert [shard.path.read_bytes() for shard in first] == [shard.path.read_bytes() for shard in second]


def test_a_store_that_cannot_be_written_costs_a_warning_not_the_shards(tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")
    keys = [f"k{i}" for i in range(3)]
    with pytest.warns(UserWarning, match="could not be kept"):
        shards, asked = run(tmp_path / "a", tmp_path / "state", keys)
    assert asked == keys
    assert torch.equal(values(shards), torch.stack([expected(key) for key in keys]))


def test_shards_of_an_earlier_run_and_temporary_files_go(tmp_path):
    run(tmp_path / "out", tmp_path / "state", [f"k{i}" for i in range(9)])
    (tmp_path / "out" / ".00000.safetensors.77.tmp").write_text("half")
    run(tmp_path / "out", tmp_path / "state", ["k0"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.safetensors"]


def test_safetensors_own_tools_open_a_shard(tmp_path):
    (shard,), _ = run(tmp_path / "out", tmp_path / "state", ["a", "b"])
    assert torch.equal(safetensors.torch.load_file(shard.path)["value"], shard.tensors["value"])
    assert np.array_equal(safetensors.numpy.load_file(shard.path)["value"], shard.tensors["value"].numpy())


LOSSES = [slice(0), slice(1), slice(0, None, 2), slice(-1, None), slice(None)]  # the last file is the index
ROWS = st.lists(st.integers(0, 40), unique=True, max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ROWS, st.integers(0, 40), st.sampled_from(LOSSES)), min_size=1, max_size=6))
def test_after_any_history_of_changes_and_crashes_the_outs_equal_a_rebuild(history):
    """Each run of a history has its own list of rows, may crash after some computed rows, and may lose of the store
    what lies at some places, or all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for chosen, computed_before_crash, lost in history:
            keys = [f"k{number}" for number in chosen]
            with contextlib.suppress(KeyboardInterrupt):
                run(folder / "out", folder / "state", keys, crash_after=computed_before_crash)
            for path in sorted((folder / "state").glob("*"))[lost]:
                path.unlink()
        run(folder / "out", folder / "state", keys)
        run(folder / "rebuilt", folder / "fresh", keys)
        assert contents(folder / "out") == contents(folder / "rebuilt")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_found_by_an_index_that_is_made_anew_where_it_is_missing_or_wrong(tmp_path, monkeypatch):
    run(tmp_path / "a", tmp_path / "state", [f"k{i}" for i in range(12)])
    store, index = RowStore(tmp_path / "state", ENOUGH), tmp_path / "state" / KEYS
    shards, shard, row = store.find(hashes(["k7", "new"]))
    assert (shards[shard[0]], shard[1]) == (store.path(shard_name(hashes(f"k{i}" for i in range(4, 8)))), -1)
    assert row.tolist() == [3, -1]
    opened = []
    monkeypatch.setattr(row_store, "read_shard", lambda path: opened.append(path) or read_shard(path))
    for damage, cost in [(lambda: None, 0), (index.unlink, 3), (lambda: index.write_bytes(b"no index"), 3)]:
        damage()
        assert store.find(hashes(["k7"]))[2] == [3]
        assert len(opened) == cost
        opened.clear()
    tensors = safetensors.torch.load_file(index)
    safetensors.torch.save_file(tensors | {"rows": tensors["rows"].flip(0) + torch.tensor([1, 0, -1])}, index)
    shards, asked = run(tmp_path / "b", tmp_path / "state", ["new", *(f"k{i}" for i in range(12))])
    assert len(asked) > 1  # rows of a wrong place are computed, not used
    assert torch.equal(values(shards)[1:], torch.stack([expected(f"k{i}") for i in range(12)]))


def test_keys_differ_with_every_part_and_are_those_of_earlier_versions():
    """Else no row that people have would be found again."""
    parts, ids = ["weights", "preprocessing", "dtype"], hashes(["one", "other"])
    changed = [row_keys(ids, *parts[:number], "other", *parts[number + 1 :]) for number in range(3)]
    keys = row_keys(ids, *parts)
    assert len(np.unique(np.concatenate([keys, *changed]), axis=0)) == 8
    text = f"{digest('other').hex()}|weights|preprocessing|dtype|v2"
    assert keys[1].tobytes() == digest(text)
    assert keys[0].tobytes().hex() == "66fbbcae62171ad9be58d12cdba866226eb088e7c7e887bd611362f349fb9636"


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(DamagedShardError, match=r"00007\.safetensors is missing or damaged"):
        load_shard(tmp_path / "00007.safetensors")
