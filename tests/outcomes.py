"""What becomes of the samples of a source when they are read, one at a time, and their captions cleaned.

Each is read from its pickle, since a worker on another machine gets no other.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass

from latentloom.ingestion.captions import clean_captions
from latentloom.ingestion.rejects import Reason, RejectedSample
from latentloom.ingestion.sources import Source


@dataclass(frozen=True)
class Outcome:
    """A sample with its content, or with the reason why it has none."""

    key: str
    data: bytes | None = None
    captions: list[str] | None = None  # none at all is for `preprocess` to reject
    reason: Reason | None = None
    detail: str = ""


def outcomes(source: Source) -> Iterator[Outcome]:
    for sample in source.samples():
        sample = pickle.loads(pickle.dumps(sample))
        try:
            captions = list(sample.captions())
            yield Outcome(sample.key, sample.read(), clean_captions(captions) if captions else [])
        except RejectedSample as rejected:
            yield Outcome(sample.key, reason=rejected.reason, detail=rejected.detail)
