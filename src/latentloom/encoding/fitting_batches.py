"""Batches that fit into memory: what an encoder does where one did not, instead of ending the run."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from latentloom.errors import lacks_memory

Computed = TypeVar("Computed")


class FittingBatches:
    """Rows computed in batches that fit into the device's memory: where one did not, all later ones are half of it.

    Args:
        fewest: rows of a batch.
    """

    def __init__(self, fewest: int = 1) -> None:
        self._fits, self._fewest, self._halvings = sys.maxsize, fewest, 0

    def halve(self, times: int) -> None:
        """Compute all later batches so many times halved, if they are not already."""
        self._halvings = max(self._halvings, times)

    def __call__(self, compute: Callable[[slice], Computed], rows: int, size: int) -> list[Computed]:
        """What ``compute`` gives for all rows, at most ``size`` at a time.

        Raises:
            torch.OutOfMemoryError, MemoryError, RuntimeError: when the fewest rows are too much; torch has no error of
                its own for the memory of a CPU.
        """
        results, start = [], 0
        size = max(size >> self._halvings, min(size, self._fewest))
        while start < rows or not results:
            size = min(size, self._fits)
            try:
                results.append(compute(slice(start, min(start + size, rows))))
            except Exception as error:
                if size <= self._fewest or not lacks_memory(error):
                    raise
                self._fits = max(size // 2, self._fewest)
            else:
                start += size
                continue
            torch.cuda.empty_cache()  # here the error holds no tensors any more
        return results
