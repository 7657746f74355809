"""The source ``webdataset``: tar files of ``KEY.jpg`` (or .png, .webp, ...) with ``KEY.txt``, ``KEY.json``, or both.

As WebDataset has it, a key is a member's path up to the first dot of its last part, and neighbours of equal key are
one sample. A text file holds one caption on each line; JSON, as img2dataset writes it, is an object with ``text``,
``caption`` or ``captions``. Captions of the text file come first. Members of other kinds are skipped.

Tars are read from front to back, one sample in memory at a time, and nothing is ever unpacked. A damaged tar costs what
lies behind the damage; the samples before it, and the other tars, are used.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path, PureWindowsPath

from latentloom.ingestion.captions import caption_lines, flat_captions
from latentloom.ingestion.image_formats import looks_like_image
from latentloom.ingestion.images import MAX_BYTES
from latentloom.ingestion.metadata import CAPTIONS
from latentloom.ingestion.rejects import Reason, RejectedSample, error_message
from latentloom.ingestion.source_files import is_hidden, source_files
from latentloom.ingestion.sources import Sample, Source, rejected_sample

TARS = (".tar", ".tar.gz", ".tgz")
IMAGE, TXT, JSON = "image", ".txt", ".json"  # kinds of members
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
            yield from _samples(name, path)


def _samples(tar: str, path: Path) -> Iterator[Sample]:
    known: set[str] = set()
    for stem, members in groupby(_members(path), key=lambda member: _split(member[0])[0]):
        contents: dict[str, bytes] = {}
        dotted: list[str] = []
        for name, content in members:
            extension = _split(name)[1]
            kind = extension if extension in (TXT, JSON) else IMAGE
            if isinstance(content, RejectedSample):
                yield rejected_sample(f"{tar}/{name}" if name else tar, content.reason, content.detail)
            elif extension.count(".") > 1:
                dotted.append(name)
            elif kind in contents:
                detail = f"this key has its {kind} already, which is used"
                yield rejected_sample(f"{tar}/{name}", Reason.DUPLICATE_KEY, detail)
            else:
                contents[kind] = content
        key = f"{tar}/{stem}"
        if contents and stem in known:
            detail = "its key came before in this tar, with others in between"
            yield rejected_sample(key, Reason.DUPLICATE_KEY, detail)
        elif IMAGE in contents:
            captions = partial(_captions, contents.get(TXT), contents.get(JSON))
            yield Sample(key, partial(bytes, contents[IMAGE]), captions)
        elif dotted:
            detail = "all that follows the first dot of its name is taken for its extension; rename it"
            for name in dotted:
                yield rejected_sample(f"{tar}/{name}", Reason.MISSING_FILE, detail)
        elif contents:
            yield rejected_sample(key, Reason.MISSING_FILE, f"{' and '.join(contents)} without an image")
        known.add(stem)


def _captions(text: bytes | None, record: bytes | None) -> list[object]:
    captions: list[object] = [] if text is None else caption_lines(text)
    if record is not None:
        try:
            fields = json.loads(record.decode("utf-8-sig", errors="surrogateescape"))
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise RejectedSample(Reason.BAD_ROW, "its .json does not hold a JSON object; fix it, or leave it out")
        captions += flat_captions(map(fields.get, CAPTIONS))
    return captions


def _members(path: Path) -> Iterator[tuple[str, bytes | RejectedSample]]:
    """Names and contents of the images, texts and JSON of a tar; of a member that is rejected, why.

    Where the tar is damaged, the reason comes as the content of a last member without a name.
    """
    last = ""
    try:
        if not path.stat().st_size:
            yield "", RejectedSample(Reason.EMPTY_FILE, "the file holds no bytes")
            return
        with tarfile.open(path) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # which would list all members in the end
                last = member.name
                if member.size < 0:
                    raise tarfile.ReadError("negative size")
                if problem := _problem(member):
                    yield last, problem
                elif member.isfile() and _is_wanted(last):
                    yield last, tar.extractfile(member).read()
            _require_end(tar)
    except MemoryError:
        raise
    except Exception as error:  # tarfile meets damaged bytes with nearly any exception: each costs this tar alone
        message = error_message(error)
        is_cut = isinstance(error, EOFError) or CUT_OFF in message
        detail = f"cut off or damaged in or after the member {last} ({message}); what follows is lost"
        if not last:
            detail = f"no tar file, or damaged at its beginning ({message})"
        yield "", RejectedSample(Reason.TRUNCATED if is_cut and last else Reason.UNREADABLE, detail)


def _require_end(tar: tarfile.TarFile) -> None:
    """Zeros end an archive; tarfile stops, without a word, at a damaged header and at the file's end as well."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(CUT_OFF)
    if any(block):
        raise tarfile.ReadError("no valid header")


def _problem(member: tarfile.TarInfo) -> RejectedSample | None:
    path = PureWindowsPath(member.name)  # to which both slashes are folder marks
    if not member.isdir() and (path.root or ".." in path.parts):
        return RejectedSample(Reason.UNSAFE_PATH, "its path is absolute or leads upwards; pack it under a relative one")
    if member.issym() or member.islnk() or member.isdev():
        detail = "a link or a device, not a file; pack the file itself (tar --dereference)"
        return RejectedSample(Reason.UNSAFE_PATH, detail)
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
    return (_split(name)[1] in (TXT, JSON) or looks_like_image(name)) and not is_hidden(name)
