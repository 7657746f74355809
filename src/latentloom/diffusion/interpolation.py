"""On the way from one sample to another: what lies between two texts, and between two draws of noise."""

from __future__ import annotations

import torch

from latentloom.diffusion.text import Labels, Text


def between_texts(a: Labels, b: Labels, share: float) -> Labels:
    """Labels `share`, from 0 to 1, of the way from `a` to `b` in a straight line; 0 and 1 are `a` and `b` themselves.

    Of token states, the nth of one caption moves to the nth of the other. The shorter caption repeats its last state,
    which marks its end.
    """
    if share in (0, 1):
        return b if share else a
    if not isinstance(a, Text):
        return torch.lerp(a, b, share)
    length = max(a.mask.shape[1], b.mask.shape[1])
    a, b = _lengthened(a, length), _lengthened(b, length)
    return Text(torch.lerp(a.pooled, b.pooled, share), torch.lerp(a.tokens, b.tokens, share), a.mask & b.mask)


def between_noise(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """Noise `share`, from 0 to 1, of the way from `a` to `b`, of one shape, along the arc between their directions.

    A straight line would pass through noise of too small a norm, which no training has met (Shoemake 1985). The norm
    moves in a straight line. 0 and 1 are `a` and `b` themselves.
    """
    if share in (0, 1):
        return b if share else a
    ends = torch.stack([a, b]).double()
    norms = ends.flatten(1).norm(dim=1)
    directions = ends / norms.reshape(-1, *[1] * a.ndim)
    angle = (directions[0] * directions[1]).sum().clamp(-1, 1).acos()
    if angle == 0:
        direction = directions[0]
    else:
        direction = ((1 - share) * angle).sin() * directions[0] + (share * angle).sin() * directions[1]
        direction = direction / angle.sin()
    return (torch.lerp(norms[0], norms[1], share) * direction).to(a.dtype)


def _lengthened(text: Text, length: int) -> Text:
    """`text` with `length` token states, each row's last seen one repeated; of a row without any none is seen."""
    seen = text.mask.sum(1, keepdim=True)
    places = torch.arange(length, device=seen.device).minimum(seen - 1).clamp(min=0)
    tokens = text.tokens.gather(1, places[..., None].expand(-1, -1, text.tokens.shape[2]))
    return Text(text.pooled, tokens, (seen > 0).expand(-1, length))
