"""Any image file becomes upright RGB pixels on white, of its centred square; the rest is rejected with its reason."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from latentloom.ingestion import images
from latentloom.ingestion.images import image_id, prepare_image
from latentloom.ingestion.near_duplicates import find_near_duplicates, signature
from latentloom.ingestion.rejects import Reason, RejectedSample
from latentloom.sizes import Size, bucket_table

SIZE = 32
TABLES = [bucket_table(64, 16, 2.0)]
BOUNDS = {"max_pixels": 178_956_970, "max_aspect_ratio": 100.0}


def saved(image: Image.Image | np.ndarray, file_format: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def prepared(data: bytes, size: int = SIZE) -> np.ndarray:
    return prepare_image(data, [[Size(size, size)]], **BOUNDS).pixels


def reason(data: bytes, **bounds: float) -> Reason:
    with pytest.raises(RejectedSample) as caught:
        prepare_image(data, [[Size(SIZE, SIZE)]], **(BOUNDS | bounds))
    assert caught.value.detail
    return caught.value.reason


def gradient(height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """A smooth picture, which lossy formats keep nearly as it is."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 128 + 0 * x], axis=-1).astype(np.uint8)


def lanczos(image: np.ndarray, size: int) -> np.ndarray:
    """Lanczos with three lobes, widened by the scale against aliasing, in float64: one axis after the other."""
    for axis in (0, 1):
        length = image.shape[axis]
        scale = length / size
        support = 3 * max(scale, 1)
        centres = (np.arange(size) + 0.5) * scale
        distance = (np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1)
        weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
        assert support <= length
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image.astype(np.float64), (1, axis)), 0, axis)
    return np.clip(image, 0, 255)


def test_a_picture_of_the_right_size_keeps_its_pixels(picture):
    assert np.array_equal(prepared(saved(picture(0))), picture(0))


@pytest.mark.parametrize(("height", "width"), [(SIZE, 77), (90, SIZE), (SIZE, 33), (35, SIZE)])
def test_the_centred_square_is_kept(picture, height, width):
    pixels = picture(1, height, width)
    top, left = (height - SIZE) // 2, (width - SIZE) // 2
    assert np.array_equal(prepared(saved(pixels)), pixels[top : top + SIZE, left : left + SIZE])


@pytest.mark.parametrize(("height", "width"), [(200, 301), (97, 64), (20, 24)])
def test_resizing_is_an_antialiased_lanczos_of_the_square_alone(picture, height, width):
    pixels = 64 + picture(2, height, width) // 2  # so that nothing overshoots, which Pillow clips after each axis
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    expected = lanczos(pixels[top : top + side, left : left + side], SIZE)
    assert np.abs(prepared(saved(pixels)).astype(float) - expected).max() < 1.6


def test_the_original_size_is_that_of_the_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = prepare_image(saved(gradient(40, 60), "JPEG", exif=exif), [[Size(SIZE, SIZE)]], **BOUNDS)
    assert (image.width, image.height) == (40, 60)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_turned_upright(orientation, file_format):
    stored = Image.fromarray(gradient(48, 36))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, file_format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    expected = np.asarray(ImageOps.fit(expected, (36, 36)))
    assert np.abs(prepared(data, 40).astype(int).mean((0, 1)) - expected.mean((0, 1))).max() < 2
    corners = [(2, 2), (2, -3), (-3, 2), (-3, -3)]
    for row, column in corners:
        assert np.abs(prepared(data, 40)[row, column].astype(int) - expected[row, column]).max() < 16


def test_damaged_exif_leaves_the_picture_as_it_is_stored(picture):
    data = saved(Image.fromarray(picture(3)), exif=b"Exif\0\0not a TIFF header")
    assert np.array_equal(prepared(data), picture(3))


def test_grey_becomes_three_equal_channels(picture):
    grey = picture(4)[..., 0]
    assert np.array_equal(prepared(saved(grey)), np.repeat(grey[..., None], 3, axis=2))


def test_one_bit_is_black_and_white():
    bits = np.indices((SIZE, SIZE)).sum(0) % 2 == 0
    assert np.array_equal(prepared(saved(bits))[..., 0], bits * 255)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled_not_clipped(file_format, byte_order):
    values = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    mode = "I;16" if byte_order == "<u2" or file_format == "PPM" else "I;16B"
    image = Image.frombytes(mode, (SIZE, SIZE), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    expected = np.rint(values / 257)
    assert np.array_equal(prepared(saved(image, file_format))[..., 1], expected)


def test_sixteen_bit_grey_with_a_transparent_value_shows_white():
    values = np.full((SIZE, SIZE), 1000, np.uint16)
    values[:, : SIZE // 2] = 40000
    data = saved(values)
    chunk = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = data.index(b"IDAT") - 4
    pixels = prepared(data[:at] + chunk + data[at:])
    assert (pixels[:, SIZE // 2 :] == 255).all()
    assert (pixels[:, : SIZE // 2] == round(40000 / 257)).all()


def test_floats_from_0_to_1_are_scaled_and_others_rejected():
    values = np.linspace(0, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    assert np.array_equal(prepared(saved(values, "TIFF"))[..., 0], np.rint(values.astype(np.float64) * 255))
    assert reason(saved(values * 1000, "TIFF")) is Reason.UNSUPPORTED_PIXELS
    assert reason(saved(np.full((SIZE, SIZE), np.nan, np.float32), "TIFF")) is Reason.UNSUPPORTED_PIXELS


def test_alpha_is_composed_over_white(picture):
    alpha = picture(5)[..., :1]
    rgb = picture(6)
    expected = rgb * (alpha / 255.0) + 255.0 * (1 - alpha / 255.0)
    for file_format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        pixels = prepared(saved(np.concatenate([rgb, alpha], -1), file_format, **options))
        assert np.abs(pixels - expected).max() <= 1


def test_alpha_is_composed_before_resizing_so_that_hidden_colours_do_not_bleed():
    rgba = np.zeros((4 * SIZE, 4 * SIZE, 4), np.uint8)
    rgba[::2] = (0, 0, 255, 255)
    rgba[1::2] = (255, 0, 0, 0)
    pixels = prepared(saved(rgba))[8:-8, 8:-8].astype(float)
    assert np.abs(pixels - [127.5, 127.5, 255]).max() < 2


def test_grey_with_alpha_is_composed_over_white():
    la = np.zeros((SIZE, SIZE, 2), np.uint8)
    la[:, : SIZE // 2, 1] = 255
    pixels = prepared(saved(Image.fromarray(la, "LA")))
    assert (pixels[:, : SIZE // 2] == 0).all()
    assert (pixels[:, SIZE // 2 :] == 255).all()


def test_the_transparent_colour_of_a_palette_shows_white():
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (0, 0, SIZE, SIZE // 2))
    for file_format in ("PNG", "GIF"):
        pixels = prepared(saved(image, file_format, transparency=0))
        assert (pixels[: SIZE // 2] == (0, 255, 0)).all()
        assert (pixels[SIZE // 2 :] == 255).all()


def test_the_transparent_colour_of_rgb_shows_white():
    image = Image.new("RGB", (SIZE, SIZE), (10, 20, 30))
    image.paste((1, 2, 3), (0, 0, SIZE, SIZE // 2))
    pixels = prepared(saved(image, transparency=(10, 20, 30)))
    assert (pixels[: SIZE // 2] == (1, 2, 3)).all()
    assert (pixels[SIZE // 2 :] == 255).all()


def test_cmyk_becomes_rgb_whether_jpeg_or_tiff():
    cmyk = Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0))
    for file_format in ("JPEG", "TIFF"):
        assert np.abs(prepared(saved(cmyk, file_format)).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(file_format):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert (prepared(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO"])
def test_the_common_formats_are_read(file_format):
    pixels = prepared(saved(gradient(), file_format, **({"sizes": [(SIZE, SIZE)]} if file_format == "ICO" else {})))
    assert np.abs(pixels.astype(int) - gradient()).mean() < 6


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_a_file_cut_anywhere_is_rejected_or_read_but_never_crashes(picture, file_format, share):
    data = saved(picture(8, 64, 64), file_format)
    try:
        assert prepared(data[: int(len(data) * share)]).shape == (SIZE, SIZE, 3)
    except RejectedSample as rejected:
        assert rejected.reason in (Reason.TRUNCATED, Reason.UNREADABLE, Reason.NOT_AN_IMAGE)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_flipped_bytes_are_rejected_or_read_but_never_crash(picture, file_format):
    data = saved(picture(9, 48, 48), file_format)
    random = np.random.default_rng(0)
    for _ in range(40):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = random.integers(0, min(len(data), 400), 4)
        damaged[places] = random.integers(0, 256, 4)
        try:
            prepared(damaged.tobytes())
        except RejectedSample as rejected:
            assert not re.search(r"\b0x", rejected.detail)


def test_a_side_below_a_quarter_of_the_size_is_too_small():
    assert reason(saved(gradient(SIZE // 4 - 1, 100))) is Reason.TOO_SMALL
    assert prepared(saved(gradient(SIZE // 4, 100))).shape == (SIZE, SIZE, 3)


def test_with_buckets_a_picture_must_fill_a_quarter_of_its_own(picture):
    def size(height, width):
        return prepare_image(saved(picture(7, height, width)), TABLES, **BOUNDS).pixels.shape[:2]

    assert size(12, 24) == (48, 96)
    assert size(24, 12) == (96, 48)
    with pytest.raises(RejectedSample, match="24x11 pixels; at least 24x12, a quarter of the size"):
        size(11, 24)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_is_cropped_to_the_ratio_of_its_bucket_once_it_is_upright(picture, orientation):
    upright, exif = picture(8, 48, 101), Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else np.rot90(upright)
    image = prepare_image(saved(Image.fromarray(stored), exif=exif), TABLES, **BOUNDS)
    assert (image.width, image.height) == (101, 48)
    assert np.array_equal(image.pixels, upright[:, 2:98])


def test_near_duplicates_are_compared_whole_whatever_their_buckets():
    """The same photo at two resolutions, and squeezed, is cropped to three ratios."""
    photo = Image.fromarray(np.random.default_rng(9).integers(0, 256, (8, 12, 3), np.uint8))
    photo = photo.resize((180, 120), Image.Resampling.BICUBIC)
    tables = [bucket_table(64, 16, 2.0), bucket_table(96, 16, 2.0)]
    shapes, signatures = set(), []
    for size in [(180, 120), (100, 66), (80, 66)]:
        image = prepare_image(saved(photo.resize(size, Image.Resampling.LANCZOS)), tables, **BOUNDS)
        shapes.add(image.pixels.shape[:2])
        signatures.append(np.frombuffer(signature(image.compared), np.uint8))
    assert len(shapes) == 3
    assert len(find_near_duplicates(np.stack(signatures), 8)) == 3


def test_pixels_and_aspect_are_looked_at_before_decoding():
    header = saved(gradient(40, 100))[:60]  # nothing to decode follows
    assert reason(header, max_pixels=3999) is Reason.TOO_MANY_PIXELS
    assert reason(header, max_aspect_ratio=2.49) is Reason.TOO_EXTREME_ASPECT
    assert reason(header, max_pixels=4000, max_aspect_ratio=2.5) is Reason.TRUNCATED
    assert reason(saved(gradient(2, 20)), max_aspect_ratio=9.9) is Reason.TOO_EXTREME_ASPECT
    assert reason(saved(gradient(2, 20)), max_aspect_ratio=10.0) is Reason.TOO_SMALL


def test_more_pixels_than_pillow_allows_are_allowed_by_the_param_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # beyond twice of which Pillow rejects an image
    data = saved(gradient(60, 60), "TIFF")
    with images.pillow_settings(3600):
        assert prepare_image(data, [[Size(SIZE, SIZE)]], max_pixels=3600, max_aspect_ratio=1.0).width == 60
        assert reason(data, max_pixels=3599) is Reason.TOO_MANY_PIXELS
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_the_settings_of_pillow_are_restored_whatever_happens(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(KeyboardInterrupt), images.pillow_settings(9000):
        assert Image.MAX_IMAGE_PIXELS == 9000
        raise KeyboardInterrupt
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_file_of_too_many_bytes_is_rejected_unopened(monkeypatch, picture):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert reason(saved(picture(12))) is Reason.TOO_MANY_BYTES


def test_an_id_is_that_of_pixels_and_shape(picture):
    pixels = picture(13)
    assert image_id(pixels) == image_id(pixels.copy())
    assert image_id(pixels) == image_id(np.asfortranarray(pixels))
    assert image_id(pixels) != image_id(pixels.reshape(SIZE // 2, SIZE * 2, 3))
    changed = pixels.copy()
    changed[5, 5, 1] ^= 1
    assert image_id(pixels) != image_id(changed)
    assert len(image_id(pixels)) == 64
