"""Tensors are read alike from a disk that maps files into memory and from one that refuses."""

import errno
import mmap

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from latentloom import tensor_files
from latentloom.tensor_files import read_tensors, save_tensors


@pytest.fixture
def no_maps(monkeypatch):
    """From here on, files lie on a disk that refuses memory maps."""

    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(tensor_files, "safe_open", refuse)


def test_a_disk_that_refuses_memory_maps_is_read_without_and_the_user_is_told(tmp_path, request):
    tensors = {"a": torch.arange(6).view(2, 3).half(), "b": torch.tensor([1.5])}
    save_file(tensors, tmp_path / "x.safetensors", {"own": "said"})
    save_tensors(tmp_path / "y.safetensors", tensors)
    request.getfixturevalue("no_maps")
    with pytest.warns(UserWarning, match="on a disk that refuses memory maps: its files are read whole"):
        found, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"own": "said"}
    with pytest.warns(UserWarning, match="memory maps"):
        other, metadata = read_tensors(tmp_path / "y.safetensors")
    assert metadata == {}
    assert all(torch.equal(own[name], tensor) for own in (found, other) for name, tensor in tensors.items())


def test_a_disk_that_takes_only_plain_writes_gets_them(tmp_path, monkeypatch):
    def refuse(*_):
        raise SafetensorError("Error while serializing: I/O error: Operation not supported (os error 95)")

    save_tensors(tmp_path / "a.safetensors", {"a": torch.arange(5.0)})
    monkeypatch.setattr(tensor_files, "save_file", refuse)
    save_tensors(tmp_path / "b.safetensors", {"a": torch.arange(5.0)})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_damaged_file_is_damaged_on_any_disk(tmp_path, request):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(8)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        read_tensors(path)
    request.getfixturevalue("no_maps")
    with pytest.warns(UserWarning, match="memory maps"), pytest.raises(SafetensorError):
        read_tensors(path)
    with pytest.raises(OSError, match="No such device"):
        read_tensors(tmp_path / "missing.safetensors")
