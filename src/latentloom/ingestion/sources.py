"""What every source of captioned images offers: its samples, one at a time, and who made them under which license."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from latentloom.errors import UserError
from latentloom.ingestion.rejects import Reject


class IngestError(UserError):
    """The source as a whole cannot be used; the message names the file or column, and what to do."""


@dataclass(frozen=True)
class Sample:
    """One captioned image, not read yet.

    ``captions`` is as the source has it: a null is left out by the source, other things than text are for
    ``captions.clean_captions`` to judge. ``read`` gives the image file's bytes; it can be pickled.
    """

    key: str
    captions: Sequence[object]
    read: Callable[[], bytes]


class Source(Protocol):
    """A source of captioned images; its samples come in an order that depends on nothing but its content.

    ``total`` is how many samples and rejects are to come, None where only reading tells. A source that turns out to be
    damaged half-way may give fewer.
    """

    attribution: str | None
    licence: str | None
    total: int | None

    def samples(self) -> Iterator[Sample | Reject]:
        """Every sample, lazily; what the source itself cannot use comes as a reject in its place."""
        ...
