"""Tensors on disk, as safetensors: written atomically, and mapped into memory where the disk lets one."""

import errno
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from latentloom.files import atomic_path, refuses_maps

DTYPES = {  # of what the package stores
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENODEV)  # what a disk says to the library's fast way of writing


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically, from any device; the same tensors give the same bytes.

    Raises:
        WriteError: when it cannot be written, naming it and the room it needs.
    """
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path, room=sum(tensor.nbytes for tensor in on_host.values())) as temporary:
        try:
            save_file(on_host, temporary)
        except SafetensorError as error:  # the library's own form of an OSError
            found = re.search(r"(?:os error|code:) (\d+)", str(error))
            code = int(found[1]) if found else errno.EIO
            if code not in UNSUPPORTED:
                raise OSError(code, os.strerror(code)) from error
            temporary.write_bytes(save(on_host))
        temporary.chmod(0o644)  # the library leaves it readable to its owner alone


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, mapped into memory, and the metadata of its header.

    From a disk that refuses memory maps they are read whole.

    Raises:
        SafetensorError: when the file is damaged.
        OSError: when it is missing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError):
        if not path.is_file() or not refuses_maps(path):
            raise
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return load(content), json.loads(content[8 : 8 + length]).get("__metadata__", {})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what it is, and where its bytes begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def read_layout(file: BinaryIO) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file are: https://github.com/huggingface/safetensors#format.

    Raises:
        SafetensorError: when it is not such a file, or is cut off.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError("the header is cut off")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        layout = {
            name: StoredTensor(DTYPES[own["dtype"]], tuple(own["shape"]), 8 + length + own["data_offsets"][0])
            for name, own in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorError(f"its header cannot be read: {error}") from error
    for name, own in layout.items():
        if own.offset + math.prod(own.shape) * own.dtype.itemsize > size:
            raise SafetensorError(f"it is cut off within {name}")
    return layout
