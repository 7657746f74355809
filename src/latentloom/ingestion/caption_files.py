"""Caption files: which image each of them belongs to, what they hold, and captions in the names of the images.

A caption file is called as its image is, with a suffix of ``CAPTION_SUFFIXES`` in place of the image's own or behind
it: ``cat.txt`` or ``cat.jpg.txt`` for ``cat.jpg``. Where an image has several, the captions of all are taken.
"""

import json
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from latentloom.ingestion.captions import (
    CAPTION_COLUMNS,
    HOW_TO_NAME_COLUMN,
    caption_lines,
    columns_of_captions,
    flat_captions,
)
from latentloom.ingestion.rejects import Reason, RejectedSample

TEXT_SUFFIXES = (".txt", ".caption", ".captions", ".cap", ".text", ".prompt")
JSON_SUFFIX = ".json"
CAPTION_SUFFIXES = (*TEXT_SUFFIXES, JSON_SUFFIX)  # in the order in which the files of an image are read
TABLES = (".csv", ".tsv", ".jsonl", ".xlsx")  # which may hold captions
WORD = re.compile(r"[\u4e00-\u9fff]|\w{3,}")  # which captions of one picture have in common: or a Chinese character
FREQUENT = frozenset(("the", "and", "are", "for", "has", "her", "his", "its", "that", "this", "with"))
COUNTER = re.compile(r"\s*\(\d+\)$|[_-]\d+$")  # of a file's name: "cat (2)", "cat_002"
REPEATS = re.compile(r"^\d+_")  # of a folder's name: "10_cat", as trainers of small models have it


def as_seen(name: str) -> str:
    """A name as people see it: accents composed or not, and either case, look the same."""
    return unicodedata.normalize("NFC", name).casefold()


def caption_suffix(name: str) -> str | None:
    """The suffix of a caption file, in lower case; None of any other file."""
    suffix = posixpath.splitext(name)[1].lower()
    return suffix if suffix in CAPTION_SUFFIXES else None


def is_text_file(name: str) -> bool:
    return caption_suffix(name) in TEXT_SUFFIXES


class ImageNames:
    """Finds images by what other files call them: with their suffix or without, and as people see names."""

    def __init__(self, images: Sequence[str]) -> None:
        self._images = images
        hashes = np.fromiter((hash(as_seen(name)) for image in images for name in _names(image)), np.int64)
        order = hashes.argsort(kind="stable")
        self._hashes, self._places = hashes[order], order // 2  # of two names each

    def called(self, name: str) -> dict[str, str]:
        """The images called exactly so, or where none is, as people see names; each with what it is called."""
        seen = as_seen(name)
        first, end = (self._hashes.searchsorted(np.int64(hash(seen)), side) for side in ("left", "right"))
        images = [self._images[place] for place in self._places[first:end]]
        alike = {image: own for image in images for own in _names(image) if as_seen(own) == seen}
        return {image: own for image, own in alike.items() if own == name} or alike


def pair(names: ImageNames, caption_files: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The caption files of each image that has some; and those of no image, or of several names, and why."""
    of_image, alone = defaultdict(list), {}
    for file in sorted(caption_files, key=lambda file: file.count(".")):  # first those without the image's suffix
        called = names.called(posixpath.splitext(file)[0])
        if len(set(called.values())) == 1:
            for image in called:
                of_image[image].append(file)
        else:
            several = f"these differ from its name in upper and lower case alone: {', '.join(called)}"
            why = several if called else "no image beside it has its name"
            alone[file] = f"{why}; name it as its image, or remove it"
    return of_image, alone


class LineCounts(NamedTuple):
    """Of text files: the lines after the first of each, and those of them that have no word in common with it."""

    further: int = 0
    unlike: int = 0

    def plus(self, other: "LineCounts") -> "LineCounts":
        return LineCounts(self.further + other.further, self.unlike + other.unlike)

    def notices(self) -> list[str]:
        """That most lines do not look like captions of one picture, where they do not."""
        if 2 * self.unlike <= self.further:
            return []
        return [
            f"{self.unlike} of {self.further} lines have no word in common with the first line of their text file. "
            "Each line is learnt as a whole caption; if a whole file is one, add `captions: file` to the source's "
            "entry under ingest.source"
        ]


class RawCaptions(list[object]):
    """What `CaptionFiles.read` gives: captions, and the ``lines`` of the text files they are of."""

    lines = LineCounts()


@dataclass(frozen=True)
class CaptionFiles:
    """Reads the captions of one image after another, in any process.

    Args:
        captions: what is a caption: each of the ``lines`` of a text file, the whole ``file``, the image's
            ``file_name``, or its ``folder_name``; with these two, no file is read.
        columns: the keys of JSON objects that hold captions, and how often a caption of each counts; None for those of
            ``CAPTION_COLUMNS``.
    """

    captions: str = "lines"
    columns: Mapping[str, int] | None = None

    @property
    def from_names(self) -> bool:
        return self.captions in ("file_name", "folder_name")

    def read(self, name: str, files: Iterable[tuple[str, bytes]]) -> RawCaptions:
        """The raw captions of an image.

        Args:
            name: the image's path without its suffix.
            files: its caption files as suffix, in lower case, and content.

        Raises:
            RejectedSample: ``bad_row`` where JSON is not valid; where it is all there is, also if it is no object, and
                ``no_caption`` if that has none, or there is no folder whose name to take.
        """
        if self.from_names:
            return RawCaptions(caption_in_name(name, self.captions == "folder_name"))
        captions, problem = RawCaptions(), None
        for suffix, content in sorted(files, key=lambda file: CAPTION_SUFFIXES.index(file[0])):
            if suffix == JSON_SUFFIX:
                fields = _json(content)
                columns = columns_of_captions(fields, self.columns) if isinstance(fields, dict) else {}
                captions += flat_captions(fields, columns)
                problem = problem if columns else self._without_captions(fields)
            else:
                lines = caption_lines(content)
                if self.captions == "file":
                    captions.append("\n".join(lines))
                else:
                    captions += lines
                    captions.lines = captions.lines.plus(_counts(lines))
        if problem and not captions:
            raise problem
        return captions

    def _without_captions(self, fields: object) -> RejectedSample:
        if not isinstance(fields, dict):
            return RejectedSample(Reason.BAD_ROW, "its .json does not hold a JSON object; fix it, or leave it out")
        wanted, there = ", ".join(self.columns or CAPTION_COLUMNS), ", ".join(map(repr, fields))[:200] or "nothing"
        detail = f"its .json has none of {wanted}, but {there}; name the right one: {HOW_TO_NAME_COLUMN}"
        return RejectedSample(Reason.NO_CAPTION, detail)


def caption_in_name(name: str, of_folder: bool) -> list[str]:
    """The caption in an image's name without its suffix, ``cats/red_cat (2)``: "red cat", or "cats", of its folder.

    Underscores are spaces; a file's counter and a folder's number of repeats, ``10_cats``, are left out.

    Raises:
        RejectedSample: ``no_caption`` where the image lies in no folder.
    """
    folder, base = posixpath.split(name)
    text, needless = (posixpath.basename(folder), REPEATS) if of_folder else (base, COUNTER)
    if not text:
        raise RejectedSample(Reason.NO_CAPTION, "it lies in no sub-folder whose name could be its caption")
    return [(needless.sub("", text) or text).replace("_", " ")]


def _names(image: str) -> tuple[str, str]:
    return image, posixpath.splitext(image)[0]


def _json(content: bytes) -> object:
    try:
        return json.loads(content.decode("utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError):
        raise RejectedSample(Reason.BAD_ROW, "its .json is not valid JSON; fix it, or leave it out") from None


def _counts(lines: Sequence[str]) -> LineCounts:
    first, *further = list(filter(None, map(_words, lines))) or [set()]
    return LineCounts(len(further), sum(map(first.isdisjoint, further)))


def _words(line: str) -> set[str]:
    return set(WORD.findall(line.casefold())) - FREQUENT
