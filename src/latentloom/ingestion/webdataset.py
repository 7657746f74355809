"""The source ``webdataset``: tar files of ``KEY.jpg`` (or .png, .webp, ...) with ``KEY.txt``, ``KEY.json``, or both.

As WebDataset has it, a key is a member's path up to the first dot of its last part, and neighbours of equal key are
one sample. A text file holds one caption on each line; JSON, as img2dataset writes it, is an object with ``text``,
``caption`` or ``captions``. Captions of the text file come first. Members of other kinds are skipped.

Tars are read from front to back, one sample in memory at a time, and nothing is ever unpacked. A damaged tar costs what
lies behind the damage; the samples before it, and the other tars, are used.
"""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from latentloom.ingestion.captions import caption_lines, flat_captions
from latentloom.ingestion.images import EXTENSIONS, MAX_BYTES
from latentloom.ingestion.metadata import CAPTIONS
from latentloom.ingestion.rejects import Reason, RejectedSample, error_message, printable
from latentloom.ingestion.source_files import source_files
from latentloom.ingestion.sources import Sample, Source, rejected_sample

TARS = (".tar", ".tar.gz", ".tgz")
IMAGE, DOTTED, TXT, JSON = "image", "dotted", ".txt", ".json"  # kinds of members
UPWARDS_OR_ABSOLUTE = re.compile(r"(?:[A-Za-z]:)?[/\\]|(?:.*[/\\])?\.\.(?:[/\\]|$)", re.DOTALL)
CUT_OFF = "unexpected end of data"  # in tarfile's words


class WebDatasetSource(Source):
    """The samples of the tar files that ``path`` names, tar by tar in the order of their names.

    Raises:
        IngestError: when there is no tar file.
    """

    def __init__(self, path: Path | str) -> None:
        self._tars = source_files(path, TARS)

    def samples(self) -> Iterator[Sample]:
        for name, path in self._tars.items():
            yield from _samples(printable(name), path)


def _samples(tar: str, path: Path) -> Iterator[Sample]:
    stem, contents, stems = "", {}, set()
    try:
        for name, content in _members(path):
            if isinstance(content, RejectedSample):
                yield rejected_sample(f"{tar}/{name}", content.reason, content.detail)
                continue
            next_stem, extension = _split(name)
            if next_stem != stem:
                yield from _sample(f"{tar}/{stem}", contents, stem in stems)
                stems.add(stem)
                stem, contents = next_stem, {}
            kind = extension if extension in (TXT, JSON) else DOTTED if extension.count(".") > 1 else IMAGE
            if kind in contents and kind != DOTTED:
                detail = f"this key has its {kind} already, which is used"
                yield rejected_sample(f"{tar}/{name}", Reason.DUPLICATE_KEY, detail)
            else:
                contents[kind] = name if kind == DOTTED else content
    except RejectedSample as damage:
        if IMAGE in contents and len(contents) > 1:
            yield from _sample(f"{tar}/{stem}", contents, stem in stems)
        yield rejected_sample(tar, damage.reason, damage.detail)
    else:
        yield from _sample(f"{tar}/{stem}", contents, stem in stems)


def _sample(key: str, contents: dict[str, bytes | str], is_known: bool) -> Iterator[Sample]:
    """The one sample of a key's members, by kind; none where there are none of interest."""
    if not contents:
        return
    if is_known:
        detail = "its key came before in this tar, with others in between"
        yield rejected_sample(key, Reason.DUPLICATE_KEY, detail)
    elif IMAGE in contents:
        yield Sample(key, partial(bytes, contents[IMAGE]), partial(_captions, contents.get(TXT), contents.get(JSON)))
    elif DOTTED in contents:
        detail = f"{contents[DOTTED]}: all that follows its first dot is taken for its extension; rename it"
        yield rejected_sample(key, Reason.MISSING_FILE, detail)
    else:
        yield rejected_sample(key, Reason.MISSING_FILE, f"{' and '.join(contents)} without an image")


def _captions(text: bytes | None, record: bytes | None) -> list[object]:
    captions: list[object] = [] if text is None else caption_lines(text)
    if record is not None:
        try:
            fields = json.loads(record.decode("utf-8-sig", errors="surrogateescape"))
        except (ValueError, RecursionError):
            raise RejectedSample(Reason.BAD_ROW, "its .json is not valid JSON; fix it, or leave it out") from None
        if not isinstance(fields, dict):
            raise RejectedSample(Reason.BAD_ROW, "its .json is not a JSON object; fix it, or leave it out")
        captions += flat_captions(fields.get(name) for name in CAPTIONS)
    return captions


def _members(path: Path) -> Iterator[tuple[str, bytes | RejectedSample]]:
    """Names and contents of the images, texts and JSON of a tar, and for a member that is rejected, why.

    Raises:
        RejectedSample: where the tar is damaged; all before the damage has been given then.
    """
    last = None
    try:
        if not path.stat().st_size:
            raise RejectedSample(Reason.EMPTY_FILE, "the file holds no bytes")
        with tarfile.open(path) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # which would list all members in the end
                last = printable(member.name)
                if member.size < 0:
                    raise tarfile.ReadError("negative size")
                if problem := _problem(member):
                    yield last, problem
                elif member.isfile() and _is_wanted(last):
                    yield last, tar.extractfile(member).read()
            _require_end(tar)
    except (RejectedSample, MemoryError):
        raise
    except Exception as error:  # tarfile meets damaged bytes with nearly any exception: each costs this tar alone
        if last is None:
            detail = f"no tar file, or damaged at its beginning ({error_message(error)})"
            raise RejectedSample(Reason.UNREADABLE, detail) from error
        is_cut = isinstance(error, EOFError) or CUT_OFF in str(error)
        what = "cut off" if is_cut else f"damaged ({error_message(error)})"
        detail = f"{what} in or after the member {last}; what follows is lost"
        raise RejectedSample(Reason.TRUNCATED if is_cut else Reason.UNREADABLE, detail) from error


def _require_end(tar: tarfile.TarFile) -> None:
    """Zeros end an archive; tarfile stops, without a word, at a damaged header and at the file's end as well."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(CUT_OFF)
    if any(block):
        raise tarfile.ReadError("no valid header")


def _problem(member: tarfile.TarInfo) -> RejectedSample | None:
    if not member.isdir() and UPWARDS_OR_ABSOLUTE.match(member.name):
        return RejectedSample(Reason.UNSAFE_PATH, "its path is absolute or leads upwards; pack it under a relative one")
    if member.issym() or member.islnk() or member.isdev():
        return RejectedSample(
            Reason.UNSAFE_PATH, "a link or a device, not a file; pack the file itself (tar --dereference)"
        )
    if member.size > MAX_BYTES:
        return RejectedSample(Reason.TOO_MANY_BYTES, f"{member.size:,} bytes; at most {MAX_BYTES:,}")
    return None


def _split(name: str) -> tuple[str, str]:
    """``./a/b.seg.PNG`` -> ``a/b`` and ``.seg.png``."""
    folder, base = posixpath.split(posixpath.normpath(name))
    stem, dot, extension = base.partition(".")
    return posixpath.join(folder, stem), dot + extension.lower()


def _is_wanted(name: str) -> bool:
    """Images, texts and JSON, but no hidden files; an image's extension may have more dots."""
    base = posixpath.basename(name)
    is_text, is_image = _split(base)[1] in (TXT, JSON), posixpath.splitext(base)[1].lower() in EXTENSIONS
    return (is_text or is_image) and not base.startswith(".")
