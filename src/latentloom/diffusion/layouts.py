"""One door between the outside's arrays and the inside's tensors.

Inside the package latents are float tensors `(B, C, H, W)`. Outside they may be NumPy arrays or tensors,
channels-first `(B, C, H, W)` or channels-last `(B, H, W, C)`. `to_nchw` lets one in and returns, with the
tensor, the way back: a function that gives any such tensor the layout, kind, dtype and device that came in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

Array: TypeAlias = torch.Tensor | np.ndarray
Layout: TypeAlias = Literal["nchw", "nhwc"]

CHANNEL_AXIS: dict[Layout, int] = {"nhwc": 3, "nchw": 1}


def detect_layout(shape: tuple[int, ...], latent_channels: int = 4, layout: Layout | None = None) -> Layout:
    """Tell the layout of a batch of latents from where its channel count sits.

    Where both ends fit (such as `(B, 4, 4, 4)`), `"nhwc"` wins: it is what the arguments are named after.
    Pass `layout` to say otherwise. Raises `ValueError` if the shape is not that of a batch of latents.
    """
    for candidate, axis in CHANNEL_AXIS.items():
        if len(shape) == 4 and shape[axis] == latent_channels and layout in (None, candidate):
            return candidate
    raise ValueError(
        f"{tuple(shape)} is no batch of latents of {latent_channels} channels as {layout or 'nhwc or nchw'}; pass "
        "latent_channels= if the latents have another number"
    )


def home_of(module: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of a module's weights; None, None for a function, or a module without any."""
    parameters = getattr(module, "parameters", lambda: iter(()))()
    parameter = next((p for p in parameters if p.is_floating_point()), None)
    return (None, None) if parameter is None else (parameter.device, parameter.dtype)


def to_tensor(
    array: Array, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Array]]:
    """Return `(tensor, restore)`: `array` as a floating tensor, and the way back to its kind, dtype and device.

    Arrays and tensors of integers become float32, going in and coming back.
    """
    is_numpy = isinstance(array, np.ndarray)
    if not is_numpy and not isinstance(array, torch.Tensor):
        raise TypeError(f"expected a NumPy array or a torch tensor, not {type(array).__name__}")
    # A copy, as torch has no negative strides and warns about read-only memory.
    original = torch.from_numpy(np.array(array, order="C")) if is_numpy else array
    home_dtype = original.dtype if original.is_floating_point() else torch.float32
    tensor = original.to(device=device, dtype=dtype or home_dtype)

    def restore(result: torch.Tensor) -> Array:
        result = result.to(device=original.device, dtype=home_dtype)
        return result.detach().contiguous().numpy() if is_numpy else result

    return tensor, restore


def to_nchw(
    latents: Array,
    *,
    latent_channels: int = 4,
    layout: Layout | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Array]]:
    """Return `(tensor, restore)`: a batch of latents as `(B, C, H, W)`, and the way back for results like it.

    `latents` is `(B, H, W, C)` or `(B, C, H, W)`, an array or a tensor; see `detect_layout` for the rule.
    """
    tensor, restore_kind = to_tensor(latents, device=device, dtype=dtype)
    if detect_layout(tuple(tensor.shape), latent_channels, layout) == "nchw":
        return tensor, restore_kind
    return tensor.permute(0, 3, 1, 2), lambda result: restore_kind(result.permute(0, 2, 3, 1))
