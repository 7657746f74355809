"""Raw captions -> clean ones: one line of valid Unicode each, none twice, order kept; and where tables hold them.

Encodings are never guessed: a caption that is not UTF-8 rejects its sample, since a wrong one would be learnt as truth.
Readers of files decode with ``errors="surrogateescape"``, so that broken bytes arrive here to be found.
"""

import ast
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from latentloom.ingestion.rejects import Reason, RejectedSample, printable

CAPTION_COLUMNS = ("text", "caption", "captions", "texts", "txt", "prompt", "description")
HOW_TO_NAME_COLUMN = "ingest.source: [{source: ..., path: ..., caption_column: ...}]"
LISTED = re.compile(r"""\s*\[\s*['"].*['"]\s*\]\s*""", re.DOTALL)  # a list of texts, written as one text


def clean_caption(text: str) -> str:
    """One caption in Unicode's composed form (NFC), control characters and runs of white space as one space.

    Raises:
        RejectedSample: ``caption_not_utf8``, where the text holds bytes that could not be decoded.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        detail = f"not UTF-8: {printable(text)[:80]!r}; save the captions as UTF-8"
        raise RejectedSample(Reason.CAPTION_NOT_UTF8, detail) from None
    text = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
    return " ".join("".join(" " if unicodedata.category(char) == "Cc" else char for char in text).split())


class Repeated(NamedTuple):
    """A raw caption that is to be learnt so many times as often as a plain one."""

    caption: object
    times: int


def clean_captions(raw: Iterable[object]) -> list[str]:
    """The clean, distinct captions of one image, at least one; numbers become text, and so do bytes.

    A `Repeated` one stands there so many times: whoever takes any of the list takes it as often as was asked.

    Raises:
        RejectedSample: ``no_caption`` where nothing was given, ``empty_caption`` where only white space was,
            ``caption_not_text`` where something is neither text nor a number, ``caption_not_utf8``.
    """
    times: dict[str, int] = {}
    for caption in raw:
        text, count = caption if isinstance(caption, Repeated) else (caption, 1)
        text = clean_caption(_text(text))
        times[text] = max(count, times.get(text, 0))
    if not times:
        raise RejectedSample(
            Reason.NO_CAPTION, "nothing gives it a caption: no metadata, no column, no file of its name"
        )
    captions = [text for text, count in times.items() if text for _ in range(count)]
    if not captions:
        raise RejectedSample(Reason.EMPTY_CAPTION, "its caption holds nothing but white space")
    return captions


def caption_lines(data: bytes) -> list[str]:
    """The lines of a text file, which end at newlines alone: Unicode's other line ends are white space in a caption."""
    return data.decode("utf-8-sig", errors="surrogateescape").split("\n")


def columns_of_captions(there: Iterable[str], wanted: Mapping[str, int] | None) -> dict[str, int]:
    """Of the columns ``there``, those with captions, and how often a caption of each counts.

    They are the ``wanted`` ones, or all of the usual names, in any case.
    """
    if wanted is not None:
        return {name: times for name, times in wanted.items() if name in there}
    usual = [name for name in there if name.lower() in CAPTION_COLUMNS]
    return dict.fromkeys(sorted(usual, key=lambda name: CAPTION_COLUMNS.index(name.lower())), 1)


def notice_of_several(name: str, columns: Iterable[str]) -> str:
    """What a person should know of a table that has several columns of usual names."""
    return f"the captions of {name} are those of all of its columns {', '.join(columns)}; caption_column chooses"


def flat_captions(row: Mapping[str, object], columns: Mapping[str, int]) -> list[object]:
    """The raw captions in ``columns`` of a row, each of which counts so often; nulls, NaN too, are left out.

    A value is a caption or a list of captions, also one written as text, ``["one", "two"]``, as tables without lists
    have it.
    """
    return [
        Repeated(caption, count) if count > 1 else caption
        for column, count in columns.items()
        for caption in _listed(row[column])
        if caption is not None and not (isinstance(caption, float) and not math.isfinite(caption))
    ]


def _listed(value: object) -> list[object]:
    """The captions of a list, or of a text that is one in JSON's or Python's form; of anything else, itself."""
    if isinstance(value, str) and LISTED.fullmatch(value):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError):
                listed = parse(value.strip())
                # NumPy's form has no commas, so Python would join its texts.
                if parse is json.loads or repr(listed) == value.strip():
                    return listed
    return value if isinstance(value, list) else [value]


def _text(caption: object) -> str:
    if isinstance(caption, bytes):
        return caption.decode("utf-8", errors="surrogateescape")
    if isinstance(caption, str) and LISTED.fullmatch(caption):
        detail = f"a list that cannot be read: {caption[:80]!r}; write it as JSON has it, or in metadata.jsonl"
        raise RejectedSample(Reason.CAPTION_NOT_TEXT, detail)
    if isinstance(caption, str | int | float) and not isinstance(caption, bool):
        return str(caption)
    raise RejectedSample(Reason.CAPTION_NOT_TEXT, f"a caption must be text, not {str(caption)[:80]!r}")
