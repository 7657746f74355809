"""Seeded random generators: every random number of a run is a function of the seed and of what it is for."""

import hashlib

import torch


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator seeded by ``parts``: the seed, what the numbers are for, the step."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
