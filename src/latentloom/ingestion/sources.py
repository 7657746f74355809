"""What every source of captioned images is: a name, a length, and samples that come one at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from latentloom.ingestion.rejects import Reject


class IngestError(ValueError):
    """The source as a whole cannot be used; the message names the file or column, and what to do."""


@dataclass(frozen=True)
class Sample:
    """One captioned image, not read yet.

    ``captions`` is as the source has it: a null is left out by the source, other things than text are for
    ``captions.clean_captions`` to judge. ``read`` gives the image file's bytes.
    """

    key: str
    captions: Sequence[object]
    read: Callable[[], bytes]


class Source(Protocol):
    """A source of captioned images; its samples come in an order that depends on nothing but its content."""

    name: str
    attribution: str | None
    licence: str | None

    def __len__(self) -> int:
        """How many samples and rejects there are to come."""
        ...

    def samples(self) -> Iterator[Sample | Reject]:
        """Every sample, lazily; what the source itself cannot use comes as a reject in its place."""
        ...
