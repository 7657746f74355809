"""Tensors on disk, as safetensors: written atomically, and mapped into memory where the disk lets one."""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from latentloom.files import atomic_path, refuses_maps

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
