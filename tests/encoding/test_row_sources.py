"""Rows on the device and rows streamed from the disk: the same bytes, and what is said of a shard that is wrong."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file

from latentloom.encoding.row_sources import MemmapRows, RowIndex
from latentloom.encoding.shard_files import DamagedShardError

CPU = torch.device("cpu")
SHARDS = 5
OPEN_FILES = Path("/proc/self/fd")


@pytest.fixture
def folder(tmp_path):
    """Five shards of three rows each, written by safetensors itself."""
    random = np.random.default_rng(0)
    for number in range(SHARDS):
        rows = {"mean": (3, 4, 2, 2), "std": (3, 4, 2, 2)}
        save_file(
            {name: random.standard_normal(shape, np.float32).astype(np.float16) for name, shape in rows.items()},
            tmp_path / f"{number}.safetensors",
        )
    return tmp_path


@pytest.fixture
def index(folder) -> RowIndex:
    """All rows, in a random order."""
    rows = [(f"{number}.safetensors", row) for number in range(SHARDS) for row in range(3)]
    table = pd.DataFrame(rows, columns=["shard", "row"]).sample(frac=1, random_state=1)
    return RowIndex.of(folder, table["shard"], table["row"])


def load(index: RowIndex):
    return index.load(CPU)


def stream(index: RowIndex):
    return MemmapRows(index, CPU)


BOTH = pytest.mark.parametrize("source", [load, stream])


def read(index: RowIndex, name: str, rows) -> np.ndarray:
    return np.stack([load_file(index.paths[index.shards[row]])[name][index.rows[row]] for row in rows])


@BOTH
@pytest.mark.parametrize("rows", [[4], [3, 3, 14, 0], slice(2, 9), slice(0, 15), []])
def test_rows_come_as_they_are_stored_in_the_order_asked_for(index, source, rows):
    asked = rows if isinstance(rows, slice) else torch.tensor(rows, dtype=torch.long)
    given = source(index).gather(asked)
    numbers = range(15)[rows] if isinstance(rows, slice) else rows
    assert given.keys() == {"mean", "std"}
    for name, tensor in given.items():
        assert tensor.shape == (len(numbers), 4, 2, 2) and tensor.dtype == torch.float16
        if numbers:
            assert np.array_equal(tensor, read(index, name, numbers))


@BOTH
def test_a_joined_index_gives_the_rows_of_the_first_then_those_of_the_second(index, source):
    joined = index[np.array([5, 1])] + index[8:10]
    assert np.array_equal(source(joined).gather(slice(0, 4))["std"], read(index, "std", [5, 1, 8, 9]))


def test_the_bytes_needed_are_those_of_all_rows(index):
    assert index.nbytes() == sum(tensor.nbytes for tensor in index.load(CPU).gather(slice(0, 15)).values())


def test_streamed_rows_are_read_when_they_are_asked_for_and_no_sooner(index):
    streamed, loaded = stream(index), load(index)
    before = loaded.gather(slice(0, 15))
    for path in index.paths:  # in place, so that a map of the file shows it
        with open(path, "r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.seek(header)
            file.write(bytes(path.stat().st_size - header))
    for name, rows in streamed.gather(slice(0, 15)).items():
        assert not rows.any()
        assert torch.equal(loaded.gather(slice(0, 15))[name], before[name])


@BOTH
def test_a_shard_deleted_later_can_still_be_read(index, source):
    expected, rows = read(index, "mean", range(15)), source(index)
    for path in index.paths:
        path.unlink()
    assert np.array_equal(rows.gather(slice(0, 15))["mean"], expected)


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="counts open files as Linux lists them")
def test_streaming_holds_no_file_open(index):
    before = len(list(OPEN_FILES.iterdir()))
    rows = stream(index)
    rows.gather(slice(0, 15))
    assert len(list(OPEN_FILES.iterdir())) == before


def missing(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def too_few_rows(path: Path) -> None:
    save_file({name: rows[:2] for name, rows in load_file(path).items()}, path)


def another_shape(path: Path) -> None:
    save_file({name: rows.reshape(3, 4, 4, 1) for name, rows in load_file(path).items()}, path)


def another_name(path: Path) -> None:
    save_file({"mean": load_file(path)["mean"]}, path)


@BOTH
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing, "missing or damaged"),
        (cut_off, "missing or damaged"),
        (too_few_rows, "has 2 rows, but its index names row 2"),
        (another_shape, "holds other tensors than"),
        (another_name, "holds other tensors than"),
    ],
)
def test_a_shard_that_is_wrong_is_named_before_training_starts(index, source, damage, says):
    damage(index.paths[3])
    with pytest.raises(DamagedShardError, match=rf"{index.paths[3].name} .*{says}.*run `dvc repro`"):
        source(index)
