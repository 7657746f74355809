"""Muon for the convolution kernels, AdamW for all else."""

import torch

from latentloom.training.optimizers import Muon


class SpectralMuon(Muon):
    """Muon whose learning rate is a step's spectral norm, about."""

    def scale(self, rows: int, columns: int) -> float:
        """Larger for tall matrices."""
        return max(1, rows / columns) ** 0.5


def build_optimizers(
    network: torch.nn.Module, muon_rate: float, adam_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for kernels inside the network, AdamW for biases and for the kernels at pixels and latents."""
    inner, outer = [], []
    for parameter in network.parameters():
        narrow = parameter.ndim < 4 or min(parameter.shape[:2]) <= 4
        (outer if narrow else inner).append(parameter)
    return [
        SpectralMuon(inner, lr=muon_rate, weight_decay=weight_decay, dtype=torch.bfloat16),
        torch.optim.AdamW(outer, lr=adam_rate, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=True),
    ]
