"""The format of one shard of tensor rows: a safetensors file whose header tells the rows' keys and a checksum.

    tensors {name: (rows, ...)}, keys (rows)  <->  NNNNN.safetensors

The same rows give the same bytes. Readers of safetensors that know nothing of us read the tensors as they are.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from latentloom.files import atomic_path

Tensors = dict[str, torch.Tensor]
HEADER = "latentloom"  # one entry, since safetensors writes several in an order that changes from run to run


class DamagedShardError(ValueError):
    """A shard is missing, cut off, or holds other bytes than were written; the message names it."""


def save_shard(path: Path, tensors: Tensors, keys: Sequence[str]) -> None:
    """Write one shard atomically.

    Raises:
        OSError: naming the file and the room it needs, when the disk is full.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(tensors, {HEADER: json.dumps({"checksum": checksum(tensors), "keys": list(keys)})})
    with atomic_path(path, room=len(content)) as temporary:
        temporary.write_bytes(content)


def load_shard(path: Path) -> Tensors:
    """A shard's tensors, by memory map.

    Raises:
        DamagedShardError: when the file is missing or damaged.
    """
    with _open(path) as file:
        return _tensors(file)


def load_checked(path: Path) -> Tensors:
    """A shard's tensors, every byte held against the checksum.

    Raises:
        DamagedShardError: when the file is missing or damaged.
    """
    with _open(path) as file:
        tensors, expected = _tensors(file), _header(file)["checksum"]
    if expected != checksum(tensors):
        raise DamagedShardError(f"{path} is damaged (its checksum is another); delete it and run `dvc repro`")
    return tensors


def read_keys(path: Path) -> list[str]:
    """The keys of a shard's rows; the tensors are not read.

    Raises:
        DamagedShardError: when the file is missing, damaged, or no shard of ours.
    """
    with _open(path) as file:
        return _header(file)["keys"]


def checksum(tensors: Tensors) -> str:
    """The SHA-256 of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{list(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedShardError(f"{path} is missing or damaged ({error}); delete it and run `dvc repro`") from error


def _tensors(file: safe_open) -> Tensors:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)


def _header(file: safe_open) -> dict[str, Any]:
    return json.loads((file.metadata() or {})[HEADER])
