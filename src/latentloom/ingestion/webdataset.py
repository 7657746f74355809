"""The source ``webdataset``: tar files of ``KEY.jpg`` (or .png, .webp, ...) with caption files of the same key.

As WebDataset has it, a key is a member's path up to the first dot of its last part, and neighbours of equal key are
one sample; params may have it end at the last dot instead. Caption files, their suffixes, and what they hold are those
of ``caption_files``; JSON is an object, as img2dataset writes it. Members of other kinds are skipped.

Tars are read from front to back, one sample in memory at a time, and nothing is ever unpacked. Of a plain tar on a disk
workers read the images, where they have to be read at all. A tar may follow another in one file. A damaged tar costs
what lies behind the damage; the samples before it, and the other tars, are used.
"""

import io
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path, PureWindowsPath
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from latentloom.ingestion.caption_files import TABLES, CaptionFiles, caption_suffix
from latentloom.ingestion.image_formats import HEAD, format_of, looks_like_image
from latentloom.ingestion.images import MAX_BYTES
from latentloom.ingestion.rejects import Reason, RejectedSample, error_message
from latentloom.ingestion.remote import is_remote, open_file, size_of
from latentloom.ingestion.source_files import is_hidden, loose_samples, origin_of, source_files
from latentloom.ingestion.sources import Sample, Source, rejected_sample

ZSTD = (".zst", ".tzst")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst")
OTHER_ARCHIVES = (".zip", ".rar", ".7z", ".tar.lz4", ".tar.z")  # each of which is a reject
CUT_OFF = "unexpected end of data"  # in tarfile's words


class WebDatasetSource(Source):
    """The samples of the tar files that ``path`` names, tar by tar in the order of their names.

    Args:
        path: a tar, a folder of them, or a pattern.
        captions, caption_columns: as `CaptionFiles` has them.
        key: where in a name the key ends: at the ``first_dot`` or at the ``last_dot``.

    Raises:
        IngestError: when there is no tar file.
    """

    joins_captions = True

    def __init__(
        self,
        path: Path | str,
        captions: str = "lines",
        caption_columns: Mapping[str, int] | None = None,
        key: str = "first_dot",
    ) -> None:
        self._tars, others = source_files(path, TARS + OTHER_ARCHIVES)
        self._loose = loose_samples(others, "the tars")
        self._reader = CaptionFiles(captions, caption_columns)
        self._unread = 0
        self._split = partial(_split, at_last_dot=key == "last_dot")

    def samples(self) -> Iterator[Sample]:
        yield from self._loose
        for name, path in self._tars.items():
            yield from self._samples(name, path)

    def notices(self) -> list[str]:
        if self._unread:
            return [f"{self._unread} caption files are not read, since captions are the names of images or folders"]
        return super().notices()

    def _samples(self, tar: str, path: Path | str) -> Iterator[Sample]:
        known: set[str] = set()
        for stem, members in groupby(_members(path), key=lambda member: self._split(member[0])[0]):
            image: _Image | None = None
            captions: dict[str, bytes] = {}
            others: list[str] = []
            for name, content in members:
                extension = self._split(name)[1]
                is_caption = caption_suffix(name) is not None
                if isinstance(content, RejectedSample):
                    yield rejected_sample(f"{tar}/{name}" if name else tar, content.reason, content.detail)
                elif extension.count(".") > 1:
                    others.append(name)
                elif extension in captions or (image is not None and not is_caption):
                    detail = f"this key has its {extension if is_caption else 'image'} already, which is used"
                    yield rejected_sample(f"{tar}/{name}", Reason.DUPLICATE_KEY, detail)
                elif is_caption:
                    captions[extension] = content
                else:
                    image = content
            key = f"{tar}/{stem}"
            if stem in known and (captions or image is not None):
                detail = "its key came before in this tar, with others in between; pack by name (tar --sort=name)"
                yield rejected_sample(key, Reason.DUPLICATE_KEY, detail)
            elif image is not None:
                self._unread += len(captions) if self._reader.from_names else 0
                read = partial(self._reader.read, stem, tuple(captions.items()))
                yield Sample(key, image.read, read, origin_of(path, str(image.offset)))
            elif captions:
                yield rejected_sample(key, Reason.MISSING_FILE, f"{' and '.join(captions)} without an image")
            yield from _of_longer_extension(tar, stem, others)
            known.add(stem)


def _of_longer_extension(tar: str, stem: str, names: list[str]) -> Iterator[Sample]:
    """A reject for each image of ``names``, which its captions among them share, and for captions without one."""
    images = {_split(name)[0] for name in names if not caption_suffix(name)}
    for name in names:
        own, _ = _split(name)
        if not caption_suffix(name) or own not in images:
            detail = (
                f"a key ends at the first dot, so its key is {stem}, and all that follows is its extension, none of an "
                f"image. If {own} is its name, add `key: last_dot` to the source's entry under ingest.source"
            )
            yield rejected_sample(f"{tar}/{name}", Reason.MISSING_FILE, detail)


class _Image(NamedTuple):
    """An image of a tar, which may not be read yet, and where in the unpacked tar it begins."""

    read: Callable[[], bytes]
    offset: int


def _members(path: Path | str) -> Iterator[tuple[str, _Image | bytes | RejectedSample]]:
    """Names and contents of the images, texts and JSON of a tar; of a member that is rejected, why.

    Where the tar is damaged, the reason comes as the content of a last member without a name.
    """
    last = ""
    try:
        size = size_of(path)
        if not size:
            yield "", RejectedSample(Reason.EMPTY_FILE, "the file holds no bytes")
            return
        with _opened(path) as tar:
            for member in _headers(tar):
                last = member.name
                if member.size < 0:
                    raise tarfile.ReadError("negative size")
                if problem := _problem(member):
                    yield last, problem
                elif member.isfile() and not is_hidden(last):
                    file = tar.extractfile(member)
                    if caption_suffix(last):
                        yield last, file.read()
                    elif looks_like_image(last):
                        yield last, _image(path, size, tar, member, file)
                    elif name := format_of(file.read(HEAD)):
                        detail = f"begins as {name}, but is not called as an image; call it KEY.jpg or the like"
                        yield last, RejectedSample(Reason.UNSUPPORTED_FORMAT, detail)
    except MemoryError:
        raise
    except Exception as error:  # tarfile meets damaged bytes with nearly any exception: each costs this tar alone
        message = error_message(error)
        is_cut = isinstance(error, EOFError) or CUT_OFF in message or "Truncated" in message
        detail = f"cut off or damaged in or after the member {last} ({message}); what follows is lost"
        if not last:
            detail = f"no tar file, or damaged at its beginning ({message})"
        yield "", RejectedSample(Reason.TRUNCATED if is_cut and last else Reason.UNREADABLE, detail)


def _image(path: Path | str, size: int, tar: tarfile.TarFile, member: tarfile.TarInfo, file: BinaryIO) -> _Image:
    is_plain = isinstance(tar.fileobj, io.BufferedReader)
    if not is_plain or member.issparse() or is_remote(path):
        return _Image(partial(bytes, file.read()), member.offset_data)
    if member.offset_data + member.size > size:
        raise tarfile.ReadError(CUT_OFF)
    return _Image(partial(_part, str(path), member.offset_data, member.size), member.offset_data)


def _part(path: str, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        detail = f"{posixpath.basename(path)}: {error.strerror or error}"
        raise RejectedSample(Reason.UNREADABLE, detail) from error


@contextmanager
def _opened(path: Path | str) -> Iterator[tarfile.TarFile]:
    with open_file(path) as file:
        if str(path).lower().endswith(ZSTD):
            unpacked = pa.input_stream(file, compression="zstd")
            with unpacked, tarfile.open(fileobj=unpacked, mode="r|", tarinfo=_Header) as tar:
                yield tar
        else:
            with tarfile.open(fileobj=file, tarinfo=_Header) as tar:
                yield tar


class _Header(tarfile.TarInfo):
    """Says so where bytes are no header; tarfile takes them for the end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:
            raise tarfile.ReadError("no valid header") from error


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, and of those that follow it in the same file.

    Raises:
        ReadError: where the file ends without the zeros that end a tar, which tarfile does not ask for.
    """
    ended = False
    while True:
        if (header := tar.next()) is not None:
            ended = False
            tar.members.clear()  # which would list all members in the end
            yield header
        elif tar.fileobj.tell() == tar.offset + tarfile.BLOCKSIZE:  # a whole block, of zeros
            ended = True
            tar.offset += tarfile.BLOCKSIZE
        elif ended:
            return
        else:
            raise tarfile.ReadError(CUT_OFF)


def _problem(member: tarfile.TarInfo) -> RejectedSample | None:
    path = PureWindowsPath(member.name)  # to which both slashes are folder marks
    if not member.isdir() and (path.root or ".." in path.parts):
        return RejectedSample(Reason.UNSAFE_PATH, "its path is absolute or leads upwards; pack it under a relative one")
    if member.issym() or member.islnk() or member.isdev():
        detail = "a link or a device, not a file; pack the file itself (tar --dereference)"
        return RejectedSample(Reason.UNSAFE_PATH, detail)
    if member.name.lower().endswith(TABLES) and not is_hidden(member.name):
        detail = "may hold captions, but of a tar only caption files are read; put them into one for each image"
        return RejectedSample(Reason.BAD_ROW, detail)
    if member.size > MAX_BYTES:
        return RejectedSample(Reason.TOO_MANY_BYTES, f"{member.size:,} bytes; at most {MAX_BYTES:,}")
    return None


def _split(name: str, at_last_dot: bool = True) -> tuple[str, str]:
    """``./a/b.seg.PNG`` -> ``a/b.seg`` and ``.png``; at the first dot ``a/b`` and ``.seg.png``."""
    folder, base = posixpath.split(posixpath.normpath(name))
    base = _without_image_suffix(base)
    stem = posixpath.splitext(base)[0] if at_last_dot else base.partition(".")[0]
    return posixpath.join(folder, stem), base[len(stem) :].lower()


def _without_image_suffix(base: str) -> str:
    """``b.jpg.txt``, a caption file that is called after its whole image, -> ``b.txt``."""
    stem, suffix = posixpath.splitext(base)
    bare, inner = posixpath.splitext(stem)
    return bare + suffix if caption_suffix(base) and looks_like_image(inner) else base
