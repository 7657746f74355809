"""A picture's colours are those of its embedded profile, computed here from the profile's definition in float64."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from latentloom.ingestion.colours import Profile
from latentloom.ingestion.images import prepare_image
from latentloom.sizes import Size

SIZE = 32
BOUNDS = {"max_pixels": 178_956_970, "max_aspect_ratio": 100.0}
D50 = np.array([0.9642, 1.0, 0.8249])
# Linear RGB -> XYZ under D50; sRGB's is IEC 61966-2-1, adapted.
TO_XYZ = {
    "sRGB": [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]],
    "P3": [[0.5151187, 0.2919778, 0.1571035], [0.2411892, 0.6922441, 0.0665668], [-0.0010505, 0.0418791, 0.7840713]],
    "Adobe": [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]],
}
GAMMA = 563 / 256  # of Adobe RGB; given to P3 too, so that a profile is one number a curve


def s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, kind: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile, version 2.4, of these tags."""
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s12s4s", size, b"", 0x02400000, kind, space, pcs, bytes(12), b"acsp")
    header += bytes(28) + s15(*D50)
    return header.ljust(128, b"\0") + table + body


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(name: str) -> bytes:
    matrix = np.array(TO_XYZ[name])
    tags = {b"wtpt": b"XYZ " + bytes(4) + s15(*D50)}
    for channel, column in zip("rgb", matrix.T, strict=True):
        tags[f"{channel}XYZ".encode()] = b"XYZ " + bytes(4) + s15(*column)
        tags[f"{channel}TRC".encode()] = gamma_curve(GAMMA)
    return icc(b"RGB ", b"mntr", tags)


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", b"mntr", {b"wtpt": b"XYZ " + bytes(4) + s15(*D50), b"kTRC": gamma_curve(gamma)})


def press_profile() -> bytes:
    """CMYK in which each ink is a grey: its Lab is the paper's lightness, less 100 times the share of ink."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    lightness = 255 * (1 - corners.sum(1) / 4)
    lab = np.stack([np.rint(lightness), 0 * lightness + 128, 0 * lightness + 128], -1).astype(np.uint8)
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += ramp * 4 + lab.tobytes() + ramp * 3
    return icc(b"CMYK", b"prtr", {b"wtpt": b"XYZ " + bytes(4) + s15(*D50), b"A2B0": lut}, b"Lab ")


def srgb_of_linear(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def converted(pixels: np.ndarray, name: str) -> np.ndarray:
    """What the numbers of a profile are in sRGB."""
    linear = (pixels / 255.0) ** GAMMA
    return srgb_of_linear(linear @ np.array(TO_XYZ[name]).T @ np.linalg.inv(TO_XYZ["sRGB"]).T)


def saved(image: Image.Image, file_format: str, profile: bytes | None) -> bytes:
    buffer = io.BytesIO()
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    image.save(buffer, file_format, icc_profile=profile, **lossless.get(file_format, {}))
    return buffer.getvalue()


def prepared(data: bytes) -> tuple[np.ndarray, Profile]:
    image = prepare_image(data, [[Size(SIZE, SIZE)]], **BOUNDS)
    return image.pixels, image.profile


def colours() -> np.ndarray:
    """Flat squares of 4 by 4 pixels, some of colours that sRGB does not have."""
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


@pytest.mark.parametrize("name", ["P3", "Adobe"])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_of_a_wider_space_become_the_same_colours_in_srgb(name, file_format):
    data = saved(Image.fromarray(colours()), file_format, rgb_profile(name))
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # a JPEG's differ a little from what was saved
    pixels, profile = prepared(data)
    assert profile is Profile.CONVERTED
    # Near black, eight bits of one space are coarse steps of the other.
    assert np.abs(pixels - converted(stored, name)).max() <= 3
    assert np.abs(pixels.astype(int) - stored).max() > 20


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L"])
def test_palettes_alpha_and_grey_are_converted_as_their_colours_are(mode):
    grey = mode in ("LA", "L")
    stored = np.repeat(colours()[..., :1], 3, 2) if grey else colours() // 51 * 51
    image = Image.fromarray(stored).convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else None
    image = image or Image.fromarray(stored).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.where(np.arange(SIZE) < 8, 0, 255).astype(np.uint8)[None].repeat(SIZE, 0)))
    stored = np.asarray(image.convert("RGB"))
    gamma, name = 461 / 256, "Adobe"
    pixels, profile = prepared(saved(image, "PNG", grey_profile(gamma) if grey else rgb_profile(name)))
    expected = srgb_of_linear((stored / 255.0) ** gamma) if grey else converted(stored, name)
    if mode in ("RGBA", "LA"):
        expected[:, :8] = 255
    assert profile is Profile.CONVERTED
    assert np.abs(pixels - expected).max() <= 3


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_is_converted_by_the_profile_of_its_press(file_format):
    ink = np.zeros((SIZE, SIZE, 4), np.uint8)
    ink[:, :16, 0] = 255  # cyan alone: by this profile a light grey
    pixels, profile = prepared(
        saved(Image.frombytes("CMYK", (SIZE, SIZE), ink.tobytes()), file_format, press_profile())
    )
    lightness = 75.0
    expected = srgb_of_linear(np.array(((lightness + 16) / 116) ** 3))
    assert profile is Profile.CONVERTED
    assert np.abs(pixels[:, :16].astype(float) - expected).max() <= 4
    assert np.abs(pixels[:, 16:].astype(float) - 255).max() <= 4


def test_the_profile_of_srgb_changes_no_byte():
    data = saved(Image.fromarray(colours()), "PNG", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    pixels, profile = prepared(data)
    assert profile is Profile.NONE
    assert np.array_equal(pixels, colours())


@pytest.mark.parametrize(
    ("gamma", "chunks", "outcome"),
    [
        (1.0, {}, Profile.CONVERTED),
        (1 / 1.8, {}, Profile.CONVERTED),
        (1 / 2.2, {}, Profile.NONE),
        (1.0, {b"sRGB": b"\0"}, Profile.NONE),
        (0.00001, {}, Profile.IGNORED),
    ],
)
def test_a_png_without_a_profile_goes_by_its_gamma(gamma, chunks, outcome):
    info = PngInfo()
    for name, body in {b"gAMA": struct.pack(">I", round(gamma * 100_000)), **chunks}.items():
        info.add(name, body)
    buffer = io.BytesIO()
    Image.fromarray(colours()).save(buffer, "PNG", pnginfo=info)
    pixels, profile = prepared(buffer.getvalue())
    expected = srgb_of_linear((colours() / 255.0) ** (1 / gamma)) if outcome is Profile.CONVERTED else colours()
    assert profile is outcome
    assert np.abs(pixels - expected).max() <= 0.51


@pytest.mark.parametrize(
    "profile", [b"no profile", rgb_profile("P3")[:200], press_profile(), grey_profile(1.8), b"\0" * 5_000_000]
)
def test_a_profile_that_is_damaged_or_of_other_pixels_is_ignored_and_counted(profile):
    for file_format in ("PNG", "TIFF"):
        pixels, outcome = prepared(saved(Image.fromarray(colours()), file_format, profile))
        assert outcome is Profile.IGNORED
        assert np.array_equal(pixels, colours())


def test_the_report_counts_what_became_of_profiles(corpus):
    corpus.add("none.png", "a")
    corpus.add("p3.png", "b", icc_profile=rgb_profile("P3"))
    corpus.add("damaged.png", "c", icc_profile=b"no profile")
    corpus.add("no caption.png", icc_profile=rgb_profile("P3"))
    report = corpus.ingest()
    assert (report.profiles_converted, report.profiles_ignored) == (1, 1)
    assert ", 1 converted to sRGB, 1 colour profiles ignored, 1 rejected" in str(report)
