"""One door between the outside's arrays and the inside's tensors.

Inside the package latents are float tensors `(B, C, H, W)`. Outside they may be NumPy arrays or tensors,
channels-first `(B, C, H, W)` or channels-last `(B, H, W, C)`. `to_nchw` lets one in and returns, with the
tensor, the way back: a function that gives any such tensor the layout, kind, dtype and device that came in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import torch

Array: TypeAlias = torch.Tensor | np.ndarray
Layout: TypeAlias = Literal["nchw", "nhwc"]

LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")


def detect_layout(shape: tuple[int, ...], latent_channels: int = 4, layout: Layout | None = None) -> Layout:
    """Tell the layout of a batch of latents from where its channel count sits.

    Where both ends fit (such as `(B, 4, 4, 4)`), `"nhwc"` wins: it is what the arguments are named after.
    Pass `layout` to say otherwise. Raises `ValueError` if the shape is not that of a batch of latents.
    """
    shape = tuple(shape)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: allowed are {', '.join(LAYOUTS)}, or None to detect it")
    if len(shape) != 4:
        raise ValueError(f"latents need 4 axes, (B, H, W, C) or (B, C, H, W), but the shape is {shape}")
    fits = {"nhwc": shape[3] == latent_channels, "nchw": shape[1] == latent_channels}
    for candidate in (layout,) if layout else ("nhwc", "nchw"):
        if fits[candidate]:
            return candidate
    where = {"nhwc": "the last axis", "nchw": "axis 1", None: "neither axis 1 nor the last axis"}[layout]
    verb = "has" if layout is None else "does not have"
    raise ValueError(
        f"{where} of shape {shape} {verb} the {latent_channels} latent channels; "
        f"pass latent_channels= if the latents have another number"
    )


def to_tensor(
    array: Array, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Array]]:
    """Return `(tensor, restore)`: `array` as a floating tensor, and the way back.

    What comes back has the kind, dtype and device of `array`.

    Arrays and tensors of integers become float32, going in and coming back.
    """
    is_numpy = isinstance(array, np.ndarray)
    if not is_numpy and not isinstance(array, torch.Tensor):
        raise TypeError(f"expected a NumPy array or a torch tensor, not {type(array).__name__}")
    # Torch refuses negative strides and warns about read-only memory: copy just those.
    needs_copy = is_numpy and (not array.flags.writeable or any(stride < 0 for stride in array.strides))
    original = torch.from_numpy(array.copy() if needs_copy else array) if is_numpy else array
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
