"""The bytes of any image file -> prepared pixels: uint8 sRGB ``(H, W, 3)``, upright, on white, its centre.

File -> first frame -> upright (EXIF) -> the centre in the ratio of its bucket -> 8 bits, over white -> Lanczos to the
bucket's size -> sRGB. Without buckets the one size is a square. Cropping comes before converting, so that of a wide
picture only its square is converted; with buckets it is converted whole, too, to be compared with others.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from latentloom.ingestion.colours import Profile, conversion_of, on_white
from latentloom.ingestion.image_formats import FORMATS, PLUGINS, format_of, formats, installed_plugins, jpeg_xl_size
from latentloom.ingestion.png_chunks import readable_png
from latentloom.ingestion.rejects import Reason, RejectedSample
from latentloom.sizes import Size, best_bucket, enlargement, prepared_size

MAX_BYTES = 2**30
MAX_PNG_CHUNK = 2**22  # of text or a colour profile, inflated; profiles with tables have 3 MiB
LARGEST_ENLARGEMENT = 4
PREVIEW_SIZE = 64
WHOLE, REDUCING_GAP = (64, 64), 3.0  # of what near duplicates are found by; the latter makes it several times as fast
# Tags of TIFF. Bit 0 of the first: a smaller version of another image; 6 of the second: YCbCr.
NEW_SUBFILE_TYPE, PHOTOMETRIC, DNG_VERSION = 254, 262, 50706


@dataclass(frozen=True)
class PreparedImage:
    """Prepared ``pixels``, uint8 ``(H, W, 3)``, and of the original the upright ``width`` and ``height``, and what
    became of its colour ``profile``.

    ``compared`` is what near duplicates are found by, which must not depend on the bucket: the pixels themselves where
    all buckets are squares, else the whole picture, ``(64, 64, 3)``.
    """

    pixels: np.ndarray
    compared: np.ndarray
    width: int
    height: int
    profile: Profile


def prepare_image(
    data: bytes, tables: Sequence[Sequence[Size]], *, max_pixels: int, max_aspect_ratio: float
) -> PreparedImage:
    """Decode an image file and prepare its pixels at one of the sizes of ``tables``, see `prepared_size`.

    Args:
        max_pixels: the most that the image may have.
        max_aspect_ratio: the most that its longer side may be of its shorter one.

    Raises:
        RejectedSample: with the reason, where the bytes are no image that can be used.
    """
    image = _decode(data, tables[0], max_pixels, max_aspect_ratio)
    width, height = image.size
    size = prepared_size(width, height, tables)
    centre = _centre(image, size)
    to_srgb = conversion_of(centre)

    def scaled(part: Image.Image, to: tuple[int, int], **options: float) -> np.ndarray:
        return np.asarray(to_srgb(on_white(part, to_srgb.mode).resize(to, Image.Resampling.LANCZOS, **options)))

    pixels = scaled(centre, size)
    squares = all(len(table) == 1 for table in tables)
    compared = pixels if squares else scaled(image, WHOLE, reducing_gap=REDUCING_GAP)
    return PreparedImage(pixels, compared, width, height, to_srgb.profile)


def _centre(image: Image.Image, size: Size) -> Image.Image:
    """The centre in the ratio of ``size``, as much of it as there is."""
    width, height = image.size
    own_width = min(width, round(height * size.width / size.height))
    own_height = min(height, round(width * size.height / size.width))
    left, top = (width - own_width) // 2, (height - own_height) // 2
    return image.crop((left, top, left + own_width, top + own_height))


def image_id(pixels: np.ndarray) -> str:
    """The id of prepared pixels: the SHA-256 of their shape, as ``HxWx3:``, and their bytes."""
    shape = "x".join(map(str, pixels.shape))
    return hashlib.sha256(f"{shape}:".encode() + np.ascontiguousarray(pixels, np.uint8).tobytes()).hexdigest()


def preview(data: bytes, max_pixels: float = math.inf) -> bytes | None:
    """A PNG, at most 64 pixels per side, of an image file's first frame; None where it cannot be decoded."""
    try:
        image = _open(data, lambda width, height: _check_pixels(width, height, max_pixels))
        image.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
        buffer = io.BytesIO()
        to_srgb = conversion_of(image)
        to_srgb(on_white(_upright(image), to_srgb.mode)).save(buffer, "PNG")
        return buffer.getvalue()
    except Exception:  # damaged bytes raise nearly anything, and the file is rejected already
        return None


@contextmanager
def pillow_settings(max_pixels: int) -> Iterator[None]:
    """Pillow as an ingestion needs it: images of ``max_pixels`` allowed, no warnings of odd but readable files.

    All are settings of the process, so they are made around all workers, and restored at the end.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels  # beyond twice as many, Pillow stops
    chunk, PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_CHUNK, MAX_PNG_CHUNK
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
        PngImagePlugin.MAX_TEXT_CHUNK = chunk


def _decode(data: bytes, smallest: Sequence[Size], max_pixels: int, max_aspect_ratio: float) -> Image.Image:
    """The first frame, upright, in whatever mode the file has; ``smallest`` is the table of the smallest base size."""
    if not data:
        raise RejectedSample(Reason.EMPTY_FILE, "the file holds no bytes")
    if len(data) > MAX_BYTES:
        raise RejectedSample(Reason.TOO_MANY_BYTES, f"{len(data):,} bytes; at most {MAX_BYTES:,}")
    try:
        image = _open(data, lambda width, height: _check_bounds(width, height, smallest, max_pixels, max_aspect_ratio))
        image.load()
    except (RejectedSample, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise RejectedSample(Reason.TOO_MANY_PIXELS, f"more than {max_pixels:,} pixels (ingest.max_pixels)") from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:  # a decoder meets damaged bytes with nearly any exception: each rejects this file alone
        message = re.sub(r"0x[0-9a-f]+", "", " ".join(str(error).split()))
        reason = Reason.TRUNCATED if isinstance(error, EOFError) or "truncated" in message else Reason.UNREADABLE
        raise RejectedSample(reason, f"{type(error).__name__}: {message}") from error
    return _upright(image)


def _open(data: bytes, check: Callable[[int, int], None]) -> Image.Image:
    """The image, not decoded; ``check`` has seen its width and height.

    Raises:
        RejectedSample: what ``check`` raises, or because the file holds a preview of what only its maker's programs
            read, or pixels that Pillow takes for others.
    """
    if format_of(data) == "JXL" and "JXL" in installed_plugins():  # which decodes as it opens
        if (stored := jpeg_xl_size(data)) is None:
            raise UnidentifiedImageError
        check(*stored)
    image = Image.open(io.BytesIO(readable_png(data)), formats=formats(data))
    check(*image.size)
    if image.format == "TIFF":
        tags = image.tag_v2
        if tags.get(NEW_SUBFILE_TYPE, 0) & 1 or DNG_VERSION in tags or format_of(data) == "camera raw":
            detail = "a camera's raw file, of which only a small preview could be read; develop it and save it as PNG"
            raise RejectedSample(Reason.UNSUPPORTED_FORMAT, detail)
        of_four_bytes = any(codec == "raw" and mode == "RGBX" for codec, _, _, (mode, *_) in image.tile)
        if tags.get(PHOTOMETRIC) == 6 and of_four_bytes:  # before Pillow 13
            detail = "a TIFF of YCbCr without compression, which Pillow reads from version 13 on; save it as PNG"
            raise RejectedSample(Reason.UNSUPPORTED_FORMAT, detail)
    return image


def _unidentified(data: bytes) -> RejectedSample:
    name = format_of(data)
    if name in (*FORMATS, *installed_plugins()):
        return RejectedSample(Reason.UNREADABLE, f"begins as {name}, but its header is damaged, cut off or unusual")
    if name in PLUGINS:
        extra = PLUGINS[name][0]
        detail = f"{name} is read with the extra {extra} (pip install -e '.[{extra}]'); or save it as PNG"
        return RejectedSample(Reason.UNSUPPORTED_FORMAT, detail)
    if name:
        return RejectedSample(Reason.UNSUPPORTED_FORMAT, f"{name} is not read; save it as PNG")
    detail = f"begins with the bytes {data[:12]!r}, as none of these does: {', '.join(FORMATS)}"
    return RejectedSample(Reason.NOT_AN_IMAGE, detail)


def _check_pixels(width: int, height: int, max_pixels: float) -> None:
    if width * height > max_pixels:
        detail = f"{width}x{height} pixels; at most {max_pixels:,} in all (ingest.max_pixels)"
        raise RejectedSample(Reason.TOO_MANY_PIXELS, detail)


def _check_bounds(width: int, height: int, smallest: Sequence[Size], max_pixels: int, max_aspect_ratio: float) -> None:
    """Raise for a picture, turned or not: tables hold each size lying and standing."""
    _check_pixels(width, height, max_pixels)
    if max(width, height) > max_aspect_ratio * min(width, height):
        detail = f"{width}x{height} pixels; at most {max_aspect_ratio:g} to 1 (ingest.max_aspect_ratio)"
        raise RejectedSample(Reason.TOO_EXTREME_ASPECT, detail)
    size = best_bucket(width, height, smallest)
    if enlargement(width, height, size) > LARGEST_ENLARGEMENT:
        least = Size(*(-(-side // LARGEST_ENLARGEMENT) for side in size))
        detail = f"{width}x{height} pixels; at least {least}, a quarter of the size that it would have, {size}"
        raise RejectedSample(Reason.TOO_SMALL, detail)


def _upright(image: Image.Image) -> Image.Image:
    """The image itself, turned as its EXIF says; with damaged EXIF as it is stored, as viewers show it.

    A JPEG XL has been turned by what its own header says, which its EXIF repeats, unless it holds a whole JPEG.
    """
    if image.format == "JXL" and not image.jpeg:
        return image
    with suppress(Exception):  # which reading damaged EXIF raises, nearly any
        ImageOps.exif_transpose(image, in_place=True)
    return image
