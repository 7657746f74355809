"""What every source of captioned images offers: its samples, one at a time, and who made them under which license."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from latentloom.errors import UserError
from latentloom.ingestion.caption_files import LineCounts
from latentloom.ingestion.rejects import Reason, RejectedSample


class IngestError(UserError):
    """The source as a whole cannot be used; the message names the file or column, and what to do."""


@dataclass(frozen=True)
class Origin:
    """Where an image's bytes are from: the ``part`` of a ``file`` that says all, or of what needs no file."""

    file: str | None
    part: str = ""


@dataclass(frozen=True)
class Sample:
    """One captioned image, not read yet: both functions run in a worker, and raise ``RejectedSample`` where they fail.

    ``read`` gives the image file's bytes, ``captions`` the captions as the source has them: a null is left out by the
    source, other things than text are for ``captions.clean_captions`` to judge. Both are picklable, and know nothing of
    the source's other samples, since a worker may be a process on another machine. Of one origin, ``read`` gives the
    same bytes as long as the file's are the same; None where that cannot be said.
    """

    key: str
    read: Callable[[], bytes]
    captions: Callable[[], Iterable[object]]
    origin: Origin | None = None


def rejected_sample(key: str, reason: Reason, detail: str) -> Sample:
    """What a source gives in place of a sample that it cannot use: reading it tells why."""
    read = partial(reject, reason, detail)
    return Sample(key, read, read)


def reject(reason: Reason, detail: str) -> NoReturn:
    raise RejectedSample(reason, detail)


class Source(ABC):
    """A source of captioned images; its samples come in an order that depends on nothing but its content.

    ``total`` is how many samples are to come, None where only reading tells. A source that turns out to be damaged
    half-way may give fewer. ``joins_captions`` says whether a sample may be a picture with one of its captions, as a
    row of a table is, so that samples with equal files are one image.
    """

    attribution: str | None = None
    licence: str | None = None
    total: int | None = None
    joins_captions: bool = False
    lines = LineCounts()  # of the text files that workers have read

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Every sample, lazily; what the source cannot use is a ``rejected_sample`` in its place."""

    def notices(self) -> list[str]:
        """What a person should know of the samples once they have been read, though none is wrong."""
        return self.lines.notices()
