"""What becomes of the samples of a source when they are read, one at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from latentloom.ingestion.rejects import Reason, RejectedSample
from latentloom.ingestion.sources import Source


@dataclass(frozen=True)
class Outcome:
    """A sample with its content, or with the reason why it has none."""

    key: str
    data: bytes | None = None
    captions: list[object] | None = None
    reason: Reason | None = None
    detail: str = ""


def outcomes(source: Source) -> Iterator[Outcome]:
    for sample in source.samples():
        try:
            yield Outcome(sample.key, sample.read(), list(sample.captions()))
        except RejectedSample as rejected:
            yield Outcome(sample.key, reason=rejected.reason, detail=rejected.detail)
