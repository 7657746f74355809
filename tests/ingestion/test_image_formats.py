"""What is an image by its name or first bytes is read, or rejected with what to do; odd PNG chunks cost no picture."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from latentloom.ingestion import image_formats, images
from latentloom.ingestion.image_formats import format_of, jpeg_xl_size, looks_like_image
from latentloom.ingestion.images import prepare_image
from latentloom.ingestion.png_chunks import readable_png
from latentloom.ingestion.rejects import Reason, RejectedSample
from latentloom.sizes import Size

SIZE = 32
BOUNDS = {"max_pixels": 1_000_000, "max_aspect_ratio": 100.0}
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


def saved(image: Image.Image | np.ndarray, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def prepared(data: bytes) -> np.ndarray:
    return prepare_image(data, [[Size(SIZE, SIZE)]], **BOUNDS).pixels


def rejected(data: bytes, **bounds: float) -> RejectedSample:
    with pytest.raises(RejectedSample) as caught:
        prepare_image(data, [[Size(SIZE, SIZE)]], **(BOUNDS | bounds))
    return caught.value


def with_chunk(png: bytes, name: bytes, body: bytes, *, behind: bytes = b"IHDR") -> bytes:
    """A PNG with one chunk more."""
    at = png.index(behind) - 4
    at += 12 + int.from_bytes(png[at : at + 4], "big")
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return png[:at] + chunk + png[at:]


def grey_png(depth: int, values: np.ndarray) -> bytes:
    """A grey PNG of ``depth`` bits."""
    bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :].reshape(len(values), -1)
    return png(depth, 0, np.packbits(bits, axis=1))


def png(depth: int, colour_type: int, rows: np.ndarray) -> bytes:
    data = saved(PIXELS[:SIZE, :SIZE])[:8]
    header = struct.pack(">IIBBBBB", SIZE, SIZE, depth, colour_type, 0, 0, 0)
    scanlines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    for name, body in ((b"IHDR", header), (b"IDAT", scanlines), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data


LARGE = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize("behind", [b"IHDR", b"IDAT"])
@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"zTXt", b"workflow\0\0" + LARGE),
        (b"iTXt", b"workflow\0\1\0en\0\0" + LARGE),
        (b"iTXt", b"workflow\0\0\0\0\0" + bytes(3_000_000)),
        (b"tEXt", b"prompt\0" + b"x" * 3_000_000),
        (b"iCCP", b"display\0\0" + LARGE),
        (b"zTXt", b"damaged\0\0" + LARGE[:100]),
        (b"zTXt", b"no end"),
        (b"tRNS", b"\0"),
    ],
    ids=["zTXt", "compressed iTXt", "plain iTXt", "tEXt", "iCCP", "cut off", "no keyword", "short tRNS"],
)
def test_a_png_is_kept_whatever_its_text_and_profile_inflate_to(name, body, behind):
    data = with_chunk(saved(PIXELS), name, body, behind=behind)
    assert np.array_equal(prepared(data), PIXELS)


def test_many_texts_of_a_size_that_is_allowed_are_kept_too(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**21)  # of all together
    data = saved(PIXELS)
    for number in range(5):
        data = with_chunk(data, b"zTXt", f"text {number}".encode() + b"\0\0" + zlib.compress(bytes(1_000_000)))
    assert np.array_equal(prepared(data), PIXELS)


def test_the_orientation_beside_a_large_text_is_kept():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = with_chunk(saved(PIXELS, exif=exif), b"zTXt", b"workflow\0\0" + LARGE)
    assert np.array_equal(prepared(data), PIXELS[::-1, ::-1])


def test_a_sound_png_is_not_copied_and_the_bound_on_memory_holds():
    sound = saved(PIXELS, icc_profile=b"small")
    assert readable_png(sound) is sound
    mended = readable_png(with_chunk(sound, b"zTXt", b"workflow\0\0" + LARGE))
    assert mended == sound
    assert len(LARGE) < 10_000 and PngImagePlugin.MAX_TEXT_CHUNK == 2**20
    with images.pillow_settings(1000):
        assert PngImagePlugin.MAX_TEXT_CHUNK == images.MAX_PNG_CHUNK < 3 * 2**21
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_grey_of_any_depth_shows_white(depth):
    values = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 2**depth
    key = min(2, 2**depth - 2)
    expected = np.where(values == key, 255, values * 255 // (2**depth - 1))
    data = with_chunk(grey_png(depth, values), b"tRNS", struct.pack(">H", key))
    assert np.array_equal(prepared(data)[..., 0], expected)


def test_the_transparent_colour_of_16_bits_a_channel_shows_white():
    rows = np.full((SIZE, SIZE, 3), [0x1234, 0x5678, 0x9ABC], ">u2")
    rows[:, 16:] = [0x1000, 0x2000, 0x3000]
    pixels = prepared(with_chunk(png(16, 2, rows), b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)))
    assert (pixels[:, :16] == 255).all()
    assert (pixels[:, 16:] == [0x10, 0x20, 0x30]).all()


@pytest.mark.parametrize(
    ("name", "is_image"),
    [
        *(
            (f"a.{extension}", True)
            for extension in ("JPG", "tga", "psd", "svg", "mpo", "j2k", "jpx", "jxl", "heic", "CR2")
        ),
        *(
            (name, True)
            for name in ("a.jpg_large", "a.jpg!d", "a.png~", "a.jpg (1)", "a.jpg?w=100", "a.b.png", "a.png.")
        ),
        *((name, False) for name in ("a.txt", "a.jpg.txt", "a.png.json", "a", "a.jpgx", "png", "a.png/notes")),
    ],
)
def test_names_that_look_like_images(name, is_image):
    assert looks_like_image(name) is is_image


def tiff_with_tag(tag: int, value: int) -> bytes:
    return saved(PIXELS, "TIFF", tiffinfo={tag: value})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"8BPS\0\1" + bytes(30), "Photoshop"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"\x76\x2f\x31\x01" + bytes(30), "OpenEXR"),
        (b"FUJIFILMCCD-RAW 0201", "camera raw"),
        (tiff_with_tag(254, 1), "a camera's raw file"),  # a small version of an image that follows, as in NEF and DNG
        (tiff_with_tag(50706, 1), "a camera's raw file"),
    ],
)
def test_images_that_are_not_read_are_rejected_with_what_to_do(data, says):
    error = rejected(data)
    assert error.reason is Reason.UNSUPPORTED_FORMAT
    assert says in error.detail and "save it as PNG" in error.detail


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "QOI", "BMP"])
def test_an_image_that_is_cut_off_is_never_called_something_else(file_format):
    data = saved(PIXELS, file_format)
    assert format_of(data) == file_format
    assert rejected(data[: len(data) // 4 + 12]).reason in (Reason.UNREADABLE, Reason.TRUNCATED)


def test_more_formats_are_read():
    first, second = Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1])
    mpo = saved(first, "MPO", save_all=True, append_images=[second])
    assert np.abs(prepared(mpo).astype(int) - PIXELS).mean() < 20 < np.abs(PIXELS[::-1].astype(int) - PIXELS).mean()
    for file_format in ("TGA", "QOI"):
        assert np.array_equal(prepared(saved(PIXELS, file_format)), PIXELS)


@pytest.mark.parametrize(
    ("head", "extra"), [(b"\0\0\0\x1cftypheic" + bytes(40), "heif"), (b"\xff\x0a" + bytes(40), "jxl")]
)
def test_without_its_plugin_an_image_is_rejected_with_the_extra_that_reads_it(head, extra, monkeypatch):
    for module in (image_formats, images):
        monkeypatch.setattr(module, "installed_plugins", tuple)
    error = rejected(head)
    assert error.reason is Reason.UNSUPPORTED_FORMAT
    assert f"the extra {extra} (pip install -e '.[{extra}]')" in error.detail


@pytest.mark.parametrize(("file_format", "plugin"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_with_its_plugin_an_image_is_read_within_the_bounds(file_format, plugin):
    pytest.importorskip(plugin)
    assert file_format in image_formats.installed_plugins()
    data = saved(PIXELS[:, :24], file_format, quality=95)
    image = prepare_image(data, [[Size(24, 24)]], **BOUNDS)
    assert (image.width, image.height) == (24, 32)
    assert np.abs(image.pixels.astype(int) - PIXELS[4:28, :24]).mean() < 8
    assert rejected(data, max_pixels=700).reason is Reason.TOO_MANY_PIXELS
    assert rejected(data[: len(data) // 2]).reason in (Reason.UNREADABLE, Reason.TRUNCATED)
    assert images.preview(data) and not images.preview(data, 700)


def test_a_jpeg_xl_is_turned_once(tmp_path):
    pytest.importorskip("pillow_jxl")
    image_formats.installed_plugins()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[:, :24]).save(tmp_path / "a.jpg", exif=exif)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.jxl", lossless_jpeg=True)
    image = prepare_image((tmp_path / "a.jxl").read_bytes(), [[Size(24, 24)]], **BOUNDS)
    assert (image.width, image.height) == (32, 24)
    # Its own header says upright, whatever the EXIF beside it repeats.
    image = prepare_image(saved(PIXELS[:, :24], "JXL", exif=exif.tobytes()), [[Size(24, 24)]], **BOUNDS)
    assert (image.width, image.height) == (24, 32)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (160, 90), (100, 99), (5, 700)])
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded(size):
    pytest.importorskip("pillow_jxl")
    image_formats.installed_plugins()
    data = saved(Image.new("RGB", size), "JXL")
    assert jpeg_xl_size(data) == size
    assert jpeg_xl_size(data[:1]) is None
