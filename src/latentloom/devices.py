"""Which device computes, and in which precision.

The device comes from the machine (or ``LATENTLOOM_DEVICE``), never from ``params.yaml``: the same project must not
count as changed because it moved to another machine.
"""

import os

import torch

from latentloom.errors import UserError


def choose_device() -> torch.device:
    """``LATENTLOOM_DEVICE`` where it is set, else CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: when ``LATENTLOOM_DEVICE`` names a device that torch does not know or this machine does not have.
    """
    name = os.environ.get("LATENTLOOM_DEVICE")
    if name:
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            first_line = str(error).splitlines()[0]
            raise UserError(
                f"LATENTLOOM_DEVICE={name} cannot be used here ({first_line}); try cuda, mps or cpu"
            ) from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype for ``torch.autocast``, or None for plain fp32.

    ``auto`` takes bf16 where the device multiplies it faster than fp32: CUDA from Ampere on, and CPUs with AVX512-BF16
    or AMX.
    """
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else None
    return None


def autocast(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """An autocast context for ``dtype``; one that changes nothing for None."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
