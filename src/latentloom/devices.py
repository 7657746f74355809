"""Which device computes, and in which precision.

The device comes from the machine (or ``LATENTLOOM_DEVICE``), never from ``params.yaml``: the same project must not
count as changed because it moved to another machine.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F

from latentloom.errors import UserError

# Of a feature map (B, 16, 8, 8): each kind of convolution that the network and the VAE have, with fixed weights.
CONVOLUTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "3x3": lambda x, weight: F.conv2d(x, weight[:, :, :3, :3], padding=1),
    "1x1": lambda x, weight: F.conv2d(x, weight[:, :, :1, :1]),
    "strided": lambda x, weight: F.conv2d(x, weight[:, :, :3, :3], stride=2, padding=1),
    "transposed": lambda x, weight: F.conv_transpose2d(x, weight, stride=2, padding=1),
}
CONVOLUTIONS_AGREE = 1e-3  # relative to the largest value


def choose_device() -> torch.device:
    """``LATENTLOOM_DEVICE`` where it is set, else CUDA, else Apple's MPS, else the CPU; set up to compute as asked.

    On CUDA, fp32 is fp32: without this, torch computes its convolutions in TF32, with 10 bits of mantissa, but not its
    matrix products. What may be less exact is asked for as bf16.

    Raises:
        UserError: when ``LATENTLOOM_DEVICE`` names a device that torch does not know or this machine does not have, or
            the convolutions of MPS are wrong.
    """
    device = _wanted_device()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False  # the algorithm, and so the bytes, would depend on what it timed
    if device.type == "mps":
        check_convolutions(device)
    return device


def _wanted_device() -> torch.device:
    name = os.environ.get("LATENTLOOM_DEVICE")
    if name:
        try:
            device = torch.device(name)
            torch.empty(1, device=device).tolist()  # which the device `meta` cannot
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


@cache
def check_convolutions(device: torch.device) -> None:
    """Compare one convolution of each kind on ``device`` with the CPU, on a slice of the channels of channels-last
    memory, which some versions of torch get wrong on MPS (https://github.com/pytorch/pytorch/issues/180984).

    Raises:
        UserError: naming the kinds that differ.
    """
    draws = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 32, 8, 8, generator=draws).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 4, 4, generator=draws)
    wrong = []
    for kind, convolution in CONVOLUTIONS.items():
        expected = convolution(whole[:, 16:], weight)
        found = convolution(whole.to(device)[:, 16:], weight.to(device)).cpu()
        if not (found - expected).abs().max() <= CONVOLUTIONS_AGREE * expected.abs().max():
            wrong.append(kind)
    if wrong:
        raise UserError(
            f"{device} computes wrong convolutions ({', '.join(wrong)}) with torch {torch.__version__}: use another "
            "version of torch, or LATENTLOOM_DEVICE=cpu"
        )


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
