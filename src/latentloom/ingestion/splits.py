"""Which split an image is in: its id decides, and then its near duplicates.

An id is a hash of the pixels, so the split is as good as random, and new data never moves old data. But an image that
looks like one of the training split would flatter the model if it were held out, so it follows that one.
"""

import numpy as np

from latentloom.ingestion.near_duplicates import Pairs


def split_of(image_id: str, val_fraction: float) -> str:
    """``train`` or ``validation``, by the id alone: its first 64 bits are below ``val_fraction`` of their range."""
    return "validation" if int(image_id[:16], 16) / 2**64 < val_fraction else "train"


def linked_to_train(pairs: Pairs, is_train: np.ndarray) -> np.ndarray:
    """Positions of the images outside the training split that a chain of near duplicates links to one in it.

    Args:
        pairs: the near duplicates among N images.
        is_train: (N,) bool.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(is_train)
    links = coo_array((np.ones(len(pairs), np.int8), (pairs.first, pairs.second)), shape=(count, count))
    components, component = connected_components(links, directed=False)
    holds_train = np.zeros(components, bool)
    holds_train[component[is_train]] = True
    return np.flatnonzero(holds_train[component] & ~is_train)
