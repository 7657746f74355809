"""Raw captions -> clean ones: one line of valid Unicode each, none twice, order kept.

Encodings are never guessed: a caption that is not UTF-8 rejects its sample, since a wrong one would be learnt as truth.
Readers of files decode with ``errors="surrogateescape"``, so that broken bytes arrive here to be found.
"""

import unicodedata
from collections.abc import Iterable

from latentloom.ingestion.rejects import Reason, RejectedSample, printable


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


def clean_captions(raw: Iterable[object]) -> list[str]:
    """The clean, distinct captions of one image, at least one; numbers become text, and so do bytes.

    Raises:
        RejectedSample: ``no_caption`` where nothing was given, ``empty_caption`` where only white space was,
            ``caption_not_text`` where something is neither text nor a number, ``caption_not_utf8``.
    """
    cleaned = [clean_caption(_text(caption)) for caption in raw]
    if not cleaned:
        raise RejectedSample(
            Reason.NO_CAPTION, "nothing gives it a caption: no metadata row or column, no text or JSON file of its name"
        )
    captions = list(dict.fromkeys(filter(None, cleaned)))
    if not captions:
        raise RejectedSample(Reason.EMPTY_CAPTION, "its caption holds nothing but white space")
    return captions


def caption_lines(data: bytes) -> list[str]:
    """The captions of a text file, one on each line; an empty file holds one empty caption."""
    return data.decode("utf-8-sig", errors="surrogateescape").split("\n")


def flat_captions(values: Iterable[object]) -> list[object]:
    """Raw captions of values that are a caption, a list of captions, or null each; nulls, NaN too, are left out."""
    flat = [caption for value in values for caption in (value if isinstance(value, list) else [value])]
    return [caption for caption in flat if caption is not None and caption == caption]


def _text(caption: object) -> str:
    if isinstance(caption, bytes):
        return caption.decode("utf-8", errors="surrogateescape")
    if isinstance(caption, str | int | float) and not isinstance(caption, bool):
        return str(caption)
    raise RejectedSample(Reason.CAPTION_NOT_TEXT, f"a caption must be text, not {str(caption)[:80]!r}")
