"""Caption files: which image each of them belongs to, what they hold, and captions in the names of the images.

A caption file is called as its image is, with a suffix of ``CAPTION_SUFFIXES`` in place of the image's own or behind
it: ``cat.txt`` or ``cat.jpg.txt`` for ``cat.jpg``. Where an image has several, the captions of all are taken.
"""

import json
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock

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


def names_of(images: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each image with the names by which others may call it: without its suffix, and with it."""
    for image in images:
        yield image, posixpath.splitext(image)[0]
        yield image, image


def is_text_file(name: str) -> bool:
    return caption_suffix(name) in TEXT_SUFFIXES


@dataclass(frozen=True)
class Pairing:
    """``of_image``: the caption files of each image that has some; ``alone``: those of no image, and why."""

    of_image: dict[str, list[str]]
    alone: dict[str, str]


def pair(images: Collection[str], caption_files: Iterable[str]) -> Pairing:
    """Find the images that caption files belong to, by names relative to one folder.

    A file belongs to the images that are called exactly as it is; where none is, to those that are called so as people
    see names, unless these are several names.
    """
    pairing, by_stem = Pairing(defaultdict(list), {}), defaultdict(list)
    for file in caption_files:
        by_stem[posixpath.splitext(file)[0]].append(file)
    left = dict(by_stem)
    for image, name in names_of(images):
        if name in by_stem:
            pairing.of_image[image] += by_stem[name]
            left.pop(name, None)
    alike = {as_seen(stem): defaultdict(list) for stem in left}
    for image, name in names_of(images) if alike else ():
        if (seen := as_seen(name)) in alike:
            alike[seen][name].append(image)
    for stem, files in left.items():
        named = alike[as_seen(stem)]
        if len(named) == 1:
            for image in next(iter(named.values())):
                pairing.of_image[image] += files
        else:
            several = f"these differ from its name in upper and lower case alone: {', '.join(named)}"
            why = several if named else "no image beside it has its name"
            pairing.alone.update(dict.fromkeys(files, f"{why}; name it as its image, or remove it"))
    return pairing


class CaptionFiles:
    """Reads the caption files of one image after another.

    Args:
        lines: whether each line of a text file is a caption of its own; else the whole text is one.
        columns: the keys of JSON objects that hold captions; None for those of ``CAPTION_COLUMNS``.
    """

    def __init__(self, lines: bool = True, columns: Mapping[str, int] | None = None) -> None:
        self._lines, self._columns = lines, columns
        self._lock = Lock()  # images are read in several threads
        self._further = self._unlike = 0  # lines after a text's first; those that have no word of it

    def read(self, files: Iterable[tuple[str, bytes]]) -> list[object]:
        """The raw captions of an image's files, which are given as suffix, in lower case, and content.

        Raises:
            RejectedSample: ``bad_row`` where JSON is not valid; where it is all there is, also if it is no object, and
                ``no_caption`` if that has none.
        """
        captions, problem = [], None
        for suffix, content in sorted(files, key=lambda file: CAPTION_SUFFIXES.index(file[0])):
            if suffix == JSON_SUFFIX:
                fields = _json(content)
                columns = columns_of_captions(fields, self._columns) if isinstance(fields, dict) else {}
                captions += flat_captions([fields[column] for column in columns], columns.values())
                problem = problem if columns else self._without_captions(fields)
            else:
                captions += self._text_captions(content)
        if problem and not captions:
            raise problem
        return captions

    def notices(self) -> list[str]:
        """What a person should know where most lines do not look like captions of one picture."""
        if 2 * self._unlike <= self._further:
            return []
        return [
            f"{self._unlike} of {self._further} lines have no word in common with the first line of their text file. "
            "Each line is learnt as a whole caption; if a whole file is one, add `captions: file` to the source's "
            "entry under ingest.source"
        ]

    def _without_captions(self, fields: object) -> RejectedSample:
        if not isinstance(fields, dict):
            return RejectedSample(Reason.BAD_ROW, "its .json does not hold a JSON object; fix it, or leave it out")
        wanted, there = ", ".join(self._columns or CAPTION_COLUMNS), ", ".join(map(repr, fields))[:200] or "nothing"
        detail = f"its .json has none of {wanted}, but {there}; name the right one: {HOW_TO_NAME_COLUMN}"
        return RejectedSample(Reason.NO_CAPTION, detail)

    def _text_captions(self, content: bytes) -> list[str]:
        lines = caption_lines(content)
        if not self._lines:
            return ["\n".join(lines)]
        first, *further = list(filter(None, map(_words, lines))) or [set()]
        with self._lock:
            self._further += len(further)
            self._unlike += sum(map(first.isdisjoint, further))
        return lines


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


def _json(content: bytes) -> object:
    try:
        return json.loads(content.decode("utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError):
        raise RejectedSample(Reason.BAD_ROW, "its .json is not valid JSON; fix it, or leave it out") from None


def _words(line: str) -> set[str]:
    return set(WORD.findall(line.casefold())) - FREQUENT
