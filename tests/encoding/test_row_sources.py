"""Rows on the device and rows streamed from the disk: the same bytes, and what is said of a shard that is wrong."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file

from latentloom.encoding.row_sources import StreamedRows
from latentloom.encoding.shard_files import DamagedShardError

CPU = torch.device("cpu")
SHARDS = 5
OPEN_FILES = Path("/proc/self/fd")


def streamed_rows(folders: list[Path], index: pd.DataFrame) -> StreamedRows:
    shards, names = pd.factorize(index["shard"])
    return StreamedRows(folders, names, shards, index["row"].to_numpy(), CPU)


def write_shards(folder: Path, seed: int) -> Path:
    """Five shards of three rows each, written by safetensors itself."""
    random, shape = np.random.default_rng(seed), (3, 4, 2, 2)
    folder.mkdir()
    for number in range(SHARDS):
        rows = {name: random.standard_normal(shape, np.float32).astype(np.float16) for name in ("mean", "std")}
        save_file(rows, folder / f"{number}.safetensors")
    return folder


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return [write_shards(tmp_path / "first", 0), write_shards(tmp_path / "second", 1)]


@pytest.fixture
def index() -> pd.DataFrame:
    """All 15 rows of a folder, in a random order."""
    rows = [(f"{number}.safetensors", row) for number in range(SHARDS) for row in range(3)]
    return pd.DataFrame(rows, columns=["shard", "row"]).sample(frac=1, random_state=1, ignore_index=True)


@pytest.fixture
def stream(folders, index):
    """Rows of both folders, opened; the 15 of the second are numbers 15 to 29."""
    return lambda: streamed_rows(folders, index)


@pytest.fixture(params=["streamed", "loaded"])
def source(stream, request):
    return stream if request.param == "streamed" else lambda: stream().load()


@pytest.fixture
def read(folders, index):
    """``read(name, rows)``: the rows as safetensors reads them."""

    def read(name: str, rows) -> np.ndarray:
        places = [(folders[row // 15] / index["shard"][row % 15], index["row"][row % 15]) for row in rows]
        return np.stack([load_file(path)[name][place] for path, place in places])

    return read


@pytest.mark.parametrize("rows", [[4], [3, 17, 3, 29, 0], slice(2, 19), slice(0, 30), []])
def test_rows_come_as_they_are_stored_in_the_order_asked_for(source, read, rows):
    given = source().gather(rows if isinstance(rows, slice) else torch.tensor(rows, dtype=torch.long))
    numbers = range(30)[rows] if isinstance(rows, slice) else rows
    assert given.keys() == {"mean", "std"}
    for name, tensor in given.items():
        assert tensor.shape == (len(numbers), 4, 2, 2) and tensor.dtype == torch.float16
        if numbers:
            assert np.array_equal(tensor, read(name, numbers))


@pytest.mark.parametrize("load", [False, True])
def test_selected_rows_are_those_of_each_folder_one_folder_after_the_other(stream, read, load):
    selected = stream().select(slice(4, 7))
    given = (selected.load() if load else selected).gather(slice(0, 6))
    assert np.array_equal(given["std"], read("std", [4, 5, 6, 19, 20, 21]))


def test_the_bytes_needed_are_those_of_all_rows(stream):
    assert stream().nbytes == sum(tensor.nbytes for tensor in stream().gather(slice(0, 30)).values())


@pytest.fixture
def captions(tmp_path) -> tuple[StreamedRows, list[np.ndarray]]:
    """Seven rows of one to five items (3,) in three shards, in another order; and what each of them is."""
    random, items, places = np.random.default_rng(0), [], []
    for number, lengths in enumerate([(2, 5, 1), (3,), (1, 4, 2)]):
        own = [random.standard_normal((length, 3), np.float32).astype(np.float16) for length in lengths]
        tensors = {"tokens": np.concatenate(own), "tokens_ends": np.cumsum(lengths)}
        vectors = random.standard_normal((len(own), 2), np.float32).astype(np.float16)
        save_file({"embedding": vectors} | tensors, tmp_path / f"{number}.safetensors")
        items += own
        places += [(f"{number}.safetensors", row) for row in range(len(own))]
    order = random.permutation(7)
    index = pd.DataFrame(places, columns=["shard", "row"]).iloc[order]
    return streamed_rows([tmp_path], index), [items[place] for place in order]


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("rows", [[4], [3, 6, 3, 0], slice(1, 6), slice(0, 7), []])
def test_rows_of_different_lengths_are_padded_with_zeros_and_masked(captions, rows, load):
    source, items = captions
    given = (source.load() if load else source).gather(rows if isinstance(rows, slice) else torch.tensor(rows).long())
    chosen = items[rows] if isinstance(rows, slice) else [items[row] for row in rows]
    assert given.keys() == {"embedding", "tokens", "tokens_mask"}
    assert given["tokens"].shape == (len(chosen), 5, 3) and given["tokens_mask"].dtype == torch.bool
    for own, mask, expected in zip(given["tokens"].numpy(), given["tokens_mask"].numpy(), chosen, strict=True):
        assert np.array_equal(own[: len(expected)], expected) and not own[len(expected) :].any()
        assert mask.tolist() == [step < len(expected) for step in range(5)]


def test_rows_of_different_lengths_take_the_bytes_of_their_items(captions):
    source, items = captions
    assert source.nbytes == 7 * 2 * 2 + sum(own.nbytes for own in items)
    assert source.shapes == source.load().shapes == {"embedding": (2,), "tokens": (5, 3)}


def test_of_selected_rows_the_longest_decides_the_padding(captions):
    source, items = captions
    rows = next(slice(row, row + 2) for row in range(6) if max(map(len, items[row : row + 2])) < 5)
    longest = max(map(len, items[rows]))
    for selected in (source.select(rows), source.select(rows).load()):
        given = selected.gather(slice(0, 2))
        assert given["tokens"].shape == (2, longest, 3)
        assert np.array_equal(given["tokens"][given["tokens_mask"]], np.concatenate(items[rows]))


def test_streamed_rows_are_read_when_they_are_asked_for_and_no_sooner(stream, folders):
    streamed, loaded = stream(), stream().load()
    before = loaded.gather(slice(0, 30))
    for path in (path for folder in folders for path in folder.iterdir()):  # in place, and as if nothing was
        status = path.stat()
        with open(path, "r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.seek(header)
            file.write(bytes(path.stat().st_size - header))
        os.utime(path, ns=(0, status.st_mtime_ns))
    for name, rows in streamed.gather(slice(0, 30)).items():
        assert not rows.any()
        assert torch.equal(loaded.gather(slice(0, 30))[name], before[name])


def test_a_shard_deleted_later_is_not_missed_by_rows_in_memory(stream, read, folders):
    expected, rows = read("mean", range(30)), stream().load()
    for path in (path for folder in folders for path in folder.iterdir()):
        path.unlink()
    assert np.array_equal(rows.gather(slice(0, 30))["mean"], expected)


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="counts open files as Linux lists them")
def test_streaming_holds_no_file_open(stream):
    before = len(list(OPEN_FILES.iterdir()))
    rows = stream()
    rows.gather(slice(0, 30))
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


@pytest.mark.parametrize("damage", [missing, cut_off, too_few_rows, another_shape, another_name])
def test_a_shard_that_is_wrong_is_named_before_training_starts(stream, folders, damage):
    path = folders[1] / "3.safetensors"
    damage(path)
    with pytest.raises(DamagedShardError, match=rf"{path} is .*run `dvc repro`"):
        stream()
