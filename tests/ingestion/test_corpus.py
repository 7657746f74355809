"""A corpus of broken and odd files, given through each source: every kind is kept, or rejected with its reason."""

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentloom.ingestion.ingest import IngestReport, ingest
from latentloom.ingestion.shards import read_metadata
from latentloom.params import IngestParams

SIZE = 32
SOURCES = ("folder", "webdataset", "parquet")


# Pillow 12 writes it, and then takes it for pixels of four bytes.
YCBCR_IN_A_TIFF = "kept" if int(PIL.__version__.partition(".")[0]) >= 13 else "unsupported_format"


@dataclass(frozen=True)
class Kind:
    """One file and what is to become of it: ``kept``, or the reason of its reject. ``make(seed)`` gives its bytes."""

    name: str
    make: Callable[[int], bytes]
    outcome: str = "kept"
    extension: str = "png"
    caption: bytes | None = b"a caption"


def picture(seed: int, height: int = 48, width: int = 40) -> Image.Image:
    """Coloured squares, which lossy formats keep nearly as they are; another seed, other colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def as_(file_format: str, mode: str = "RGB", **options) -> Callable[[int], bytes]:
    return lambda seed: saved(picture(seed).convert(mode), file_format, **options)


def grey(file_format: str, dtype: str, highest: float) -> Callable[[int], bytes]:
    return lambda seed: saved(
        Image.fromarray((np.asarray(picture(seed))[..., 0] / 255 * highest).astype(dtype)), file_format
    )


def palette_with_alpha(seed: int) -> bytes:
    return saved(picture(seed).convert("P").convert("PA"), "TIFF")


def animated(file_format: str) -> Callable[[int], bytes]:
    return lambda seed: saved(
        picture(seed), file_format, save_all=True, append_images=[picture(seed + 1000), picture(seed + 2000)]
    )


def turned(orientation: int, file_format: str = "JPEG") -> Callable[[int], bytes]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return as_(file_format, exif=exif)


def cut(file_format: str, share: float) -> Callable[[int], bytes]:
    def make(seed: int) -> bytes:
        data = saved(Image.effect_noise((64, 64), 90 + seed).convert("RGB"), file_format)
        return data[: int(share * len(data))]

    return make


def sized(width: int, height: int) -> Callable[[int], bytes]:
    return lambda seed: saved(picture(seed, height, width), "PNG")


def png_of_16_bit_rgb(seed: int) -> bytes:
    rows = np.random.default_rng(seed).integers(0, 2**16, (SIZE, SIZE, 3), dtype=np.uint16).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return png_of(SIZE, SIZE, zlib.compress(lines), depth=16)


def png_of(width: int, height: int, pixels: bytes, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def with_a_wrong_checksum(seed: int) -> bytes:
    data = bytearray(as_("PNG")(seed))
    data[data.index(b"IDAT") + 20] ^= 255
    return bytes(data)


def with_bytes_behind_its_end(seed: int) -> bytes:
    return as_("JPEG")(seed) + b"appended by a camera" * 50


def content(data: bytes) -> Callable[[int], bytes]:
    return lambda seed: data


SOUND = as_("PNG")

KINDS = (
    # modes of Pillow
    Kind("mode 1", as_("PNG", "1")),
    Kind("mode L", as_("PNG", "L")),
    Kind("mode LA", as_("PNG", "LA")),
    Kind("mode P", as_("PNG", "P")),
    Kind("mode PA", palette_with_alpha, extension="tiff"),
    Kind("mode RGB", as_("PNG", "RGB")),
    Kind("mode RGBA", as_("PNG", "RGBA")),
    Kind("mode CMYK in a JPEG", as_("JPEG", "CMYK"), extension="jpg"),
    Kind("mode CMYK in a TIFF", as_("TIFF", "CMYK"), extension="tif"),
    Kind("mode YCbCr", as_("TIFF", "YCbCr", compression="tiff_lzw"), extension="tiff"),
    Kind("mode YCbCr, uncompressed", as_("TIFF", "YCbCr"), YCBCR_IN_A_TIFF, extension="tiff"),
    Kind("mode LAB", lambda seed: saved(Image.new("LAB", (SIZE, SIZE), (50, seed, 128)), "TIFF"), extension="tiff"),
    Kind("mode I;16", grey("PNG", "uint16", 65535)),
    Kind("mode I", grey("TIFF", "int32", 65535), extension="tiff"),
    Kind("mode F from 0 to 1", grey("TIFF", "float32", 1.0), extension="tiff"),
    Kind("mode F beyond 1", grey("TIFF", "float32", 1000.0), "unsupported_pixels", "tiff"),
    Kind("RGB of 16 bits", png_of_16_bit_rgb),
    # formats
    Kind("JPEG", as_("JPEG"), extension="jpg"),
    Kind("progressive JPEG", as_("JPEG", progressive=True), extension="jpeg"),
    Kind("WebP", as_("WEBP"), extension="webp"),
    Kind("BMP", as_("BMP"), extension="bmp"),
    Kind("AVIF", as_("AVIF"), extension="avif"),
    Kind("animated GIF", animated("GIF"), extension="gif"),
    Kind("animated WebP", animated("WEBP"), extension="webp"),
    Kind("animated PNG", animated("PNG")),
    Kind("TIFF of three pages", animated("TIFF"), extension="tif"),
    *(Kind(f"EXIF orientation {turn}", turned(turn), extension="jpg") for turn in range(1, 9)),
    *(Kind(f"orientation 6 in {name}", turned(6, name), extension=name.lower()) for name in ("WEBP", "PNG", "TIFF")),
    Kind("damaged EXIF", as_("JPEG", exif=b"Exif\0\0nothing of the sort"), extension="jpg"),
    # names that lie
    Kind("JPEG that is called PNG", as_("JPEG")),
    Kind("PNG that is called JPEG", SOUND, extension="jpg"),
    Kind("extension in capitals", SOUND, extension="PNG"),
    # broken files
    Kind("no bytes", content(b""), "empty_file"),
    Kind("web page", content(b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"), "not_an_image", "jpg"),
    Kind("SVG", content(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "unsupported_format"),
    Kind("zeros", content(b"\0" * 4096), "not_an_image"),
    Kind("JPEG without its last half", cut("JPEG", 0.5), "truncated", "jpg"),
    Kind("JPEG without its last tenth", cut("JPEG", 0.9), "truncated", "jpg"),
    Kind("JPEG of 1 % of its bytes", cut("JPEG", 0.01), "unreadable", "jpg"),
    Kind("PNG without its last half", cut("PNG", 0.5), "truncated"),
    Kind("PNG of 1 % of its bytes", cut("PNG", 0.003), "unreadable"),
    Kind("GIF without its last half", cut("GIF", 0.5), "truncated", "gif"),
    Kind("WebP without its last half", cut("WEBP", 0.5), "unreadable", "webp"),
    Kind("BMP without its last half", cut("BMP", 0.5), "truncated", "bmp"),
    Kind("PNG with a wrong checksum", with_a_wrong_checksum, "unreadable"),
    Kind("JPEG with bytes behind its end", with_bytes_behind_its_end, extension="jpg"),
    # sizes
    Kind("20,000x1", sized(20_000, 1), "too_extreme_aspect"),
    Kind("1x20,000", sized(1, 20_000), "too_extreme_aspect"),
    Kind("just too wide", sized(6 * SIZE, SIZE - 1), "too_extreme_aspect"),
    Kind("just not too wide", sized(6 * SIZE, SIZE)),
    Kind("3x3", sized(3, 3), "too_small"),
    Kind("PNG bomb", content(png_of(60_000, 60_000, zlib.compress(bytes(1000)))), "too_many_pixels"),
    Kind("more pixels than allowed", sized(1001, 1000), "too_many_pixels"),
    # captions
    Kind("caption missing", SOUND, "no_caption", caption=None),
    Kind("caption empty", SOUND, "empty_caption", caption=b""),
    Kind("caption of white space", SOUND, "empty_caption", caption=b" \t\r\n \xc2\xa0\n"),
    Kind("caption in Latin-1", SOUND, "caption_not_utf8", caption=b"caf\xe9"),
    Kind("caption in UTF-16", SOUND, "caption_not_utf8", caption="café".encode("utf-16")),
    Kind("caption cut inside a character", SOUND, "caption_not_utf8", caption="café".encode()[:-1]),
    Kind("caption with Windows newlines", SOUND, caption=b"one\r\ntwo\r\n"),
    Kind("caption with a byte order mark", SOUND, caption=b"\xef\xbb\xbfmarked"),
    Kind("caption with NUL", SOUND, caption=b"before\0after"),
    Kind("caption in Chinese", SOUND, caption="一只猫".encode()),
    Kind("caption of 100,000 characters", SOUND, caption=b"word " * 20_000),
    # copies
    Kind("copy of another format", lambda seed: saved(picture(0).convert("1"), "BMP"), "duplicate", "bmp"),
)
FILES = {
    kind.name: (f"{seed:02} {kind.name.replace(',', '').replace('.', '')}.{kind.extension}", kind.make(seed), kind)
    for seed, kind in enumerate(KINDS)
}


def stem(name: str) -> str:
    return name.rpartition(".")[0]


def folder(path: Path) -> dict[str, str]:
    """Images with text files beside them, and metadata that names what it should not; what becomes of those."""
    path.mkdir()
    for name, data, kind in FILES.values():
        (path / name).write_bytes(data)
        if kind.caption is not None:
            (path / stem(name)).with_suffix(".txt").write_bytes(kind.caption)
    (path.parent / "secret.png").write_bytes(SOUND(500))
    (path / "folder.png").mkdir()
    (path / "loose link.png").symlink_to("nowhere.png")
    rows = [
        '{"file_name": "../secret.png", "text": "leaves the folder"}',
        '{"file_name": "/etc/secret.png", "text": "absolute"}',
        '{"file_name": "gone.png", "text": "no such file"}',
        '{"file_name": "gone.png", "text": "named twice"}',
        '{"file_name": "folder.png", "text": "a folder"}',
        "this is not JSON",
        '{"text": "of no file"}',
    ]
    (path / "metadata.jsonl").write_bytes("\r\n".join(rows).encode())
    return {
        "../secret.png": "outside_folder",
        "/etc/secret.png": "outside_folder",
        "gone.png": "missing_file",
        "folder.png": "missing_file",
        "loose link.png": "missing_file",
        "metadata.jsonl:6": "bad_row",
        "metadata.jsonl:7": "bad_row",
    }


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
    tar.addfile(member, io.BytesIO(data))


def webdataset(path: Path) -> dict[str, str]:
    path.mkdir()
    with tarfile.open(path / "00000.tar", "w") as tar:
        for name, data, kind in FILES.values():
            add(tar, name, data)
            if kind.caption is not None:
                add(tar, f"{stem(name)}.txt", kind.caption)
        add(tar, "../up.png", SOUND(501))
        add(tar, "a/../../up.png", SOUND(502))
        add(tar, "/etc/absolute.png", SOUND(503))
        add(tar, "C:\\absolute.png", SOUND(504))
        add(tar, "link.png", kind=tarfile.SYMTYPE)
        add(tar, "hard link.png", kind=tarfile.LNKTYPE)
        add(tar, "device.png", kind=tarfile.CHRTYPE)
        add(tar, "folder.png", kind=tarfile.DIRTYPE)
        add(tar, "notes.md", b"skipped")
        add(tar, "._hidden.png", b"skipped")
        add(tar, "lonely.txt", b"a caption without an image")
        add(tar, "dotted.v2.png", SOUND(505))
        add(tar, "twins.png", SOUND(506))
        add(tar, "twins.jpg", as_("JPEG")(507))
        add(tar, "twins.txt", b"two images of one key")
        add(tar, "bad json.png", SOUND(508))
        add(tar, "bad json.json", b"{'caption': 1}")
        add(tar, "list.png", SOUND(509))
        add(tar, "list.json", b'["a list"]')
        add(tar, "again.png", SOUND(510))
        add(tar, "again.txt", b"first")
        add(tar, "other.png", SOUND(511))
        add(tar, "other.json", json.dumps({"caption": "in between", "width": 9}).encode())
        add(tar, "again.png", SOUND(512))
        add(tar, "again.txt", b"second")
    whole = (path / "00000.tar").read_bytes()
    (path / "00001.tar").write_bytes(whole[:700])
    (path / "00002.tar").write_bytes(b"")
    (path / "00003.tar").write_bytes(b"<!DOCTYPE html>" * 100)
    return {
        "00000.tar/../up.png": "unsafe_path",
        "00000.tar/a/../../up.png": "unsafe_path",
        "00000.tar//etc/absolute.png": "unsafe_path",
        "00000.tar/C:\\absolute.png": "unsafe_path",
        "00000.tar/link.png": "unsafe_path",
        "00000.tar/hard link.png": "unsafe_path",
        "00000.tar/device.png": "unsafe_path",
        "00000.tar/lonely": "missing_file",
        "00000.tar/dotted.v2.png": "missing_file",
        "00000.tar/twins": "kept",
        "00000.tar/twins.jpg": "duplicate_key",
        "00000.tar/bad json": "bad_row",
        "00000.tar/list": "bad_row",
        "00000.tar/again": ["duplicate_key", "kept"],
        "00000.tar/other": "kept",
        "00001.tar": "truncated",
        "00002.tar": "empty_file",
        "00003.tar": "unreadable",
    }


def parquet(path: Path) -> dict[str, str]:
    path.mkdir()
    captions = pa.array([kind.caption for _, _, kind in FILES.values()], pa.binary())
    images = pa.array([{"bytes": data, "path": name} for name, data, _ in FILES.values()])
    table = pa.table({"image": images, "caption": captions.cast(pa.string(), safe=False)})
    pq.write_table(table, path / "kinds.parquet", row_group_size=20)
    odd = pa.array([None, {"bytes": None, "path": "elsewhere.png"}, {"bytes": SOUND(600), "path": None}], images.type)
    pq.write_table(pa.table({"image": odd, "text": [["x"], ["x"], ["one", "two"]]}), path / "odd.parquet")
    (path / "page.parquet").write_bytes(b"<!DOCTYPE html>")
    (path / "half.parquet").write_bytes((path / "kinds.parquet").read_bytes()[:5000])
    return {
        "odd.parquet:0": "missing_file",
        "odd.parquet:1": "missing_file",
        "odd.parquet:2": "kept",
        "page.parquet": "unreadable",
        "half.parquet": "unreadable",
    }


KEYS = {  # what a source calls the file of this position and name
    "folder": lambda position, name: name,
    "webdataset": lambda position, name: f"00000.tar/{stem(name)}",
    "parquet": lambda position, name: f"kinds.parquet:{position}",
}


def hashes(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@dataclass(frozen=True)
class Ingested:
    source: str
    expected: dict[str, str]
    report: IngestReport
    outcomes: dict[str, str | list[str]]
    captions: dict[str, list[str]]
    sizes: dict[str, tuple[int, int]]
    before: dict[str, str]
    after: dict[str, str]


@pytest.fixture(scope="module", params=SOURCES)
def ingested(request, tmp_path_factory) -> Ingested:
    """The corpus, written for one of the sources and ingested from it."""
    root = tmp_path_factory.mktemp(request.param)
    expected = {"folder": folder, "webdataset": webdataset, "parquet": parquet}[request.param](root / "source")
    key = KEYS[request.param]
    expected |= {key(at, name): kind.outcome for at, (name, _, kind) in enumerate(FILES.values())}
    params = IngestParams(
        source=request.param,
        path=str(root / "source"),
        shape="square",
        image_size=SIZE,
        bucket_multiple=32,
        max_bucket_ratio=2.0,
        limit=None,
        skin_tones=0,
        val_fraction=0.2,
        max_pixels=1_000_000,
        max_aspect_ratio=6.0,
        near_duplicate_distance=None,
        max_reject_fraction=1.0,
    )
    before = hashes(root)
    out = root / "out"
    report = ingest(params, out / "images", out / "rejects.parquet", out / "near_duplicates.parquet", progress=False)
    after = {name: digest for name, digest in hashes(root).items() if not name.startswith("out/")}
    kept, rejects = read_metadata(root / "out" / "images"), pd.read_parquet(root / "out" / "rejects.parquet")
    met = [(own, "kept") for own in kept["key"]] + list(zip(rejects["key"], rejects["reason"], strict=True))
    outcomes: dict[str, str | list[str]] = {}
    for own, outcome in sorted(met):
        outcomes[own] = [outcomes[own], outcome] if own in outcomes else outcome
    captions = dict(zip(kept["key"], kept["captions"], strict=True))
    sizes = dict(zip(kept["key"], zip(kept["width"], kept["height"], strict=True), strict=True))
    return Ingested(request.param, expected, report, outcomes, captions, sizes, before, after)


def test_every_kind_is_kept_or_rejected_with_its_reason(ingested):
    assert ingested.outcomes == ingested.expected


def test_what_is_found_is_kept_or_rejected_and_all_of_it_is_in_the_tables(ingested):
    rows = sum(len(outcome) if isinstance(outcome, list) else 1 for outcome in ingested.outcomes.values())
    assert ingested.report.found == ingested.report.kept + ingested.report.rejected == rows


def test_the_source_is_left_as_it_was(ingested):
    assert ingested.before == ingested.after


@pytest.mark.parametrize(
    "name", ["EXIF orientation 6", *(f"orientation 6 in {name}" for name in ("WEBP", "PNG", "TIFF"))]
)
def test_a_picture_of_any_format_is_turned_upright_through_each_source(ingested, name):
    key = KEYS[ingested.source](list(FILES).index(name), FILES[name][0])
    assert picture(0).size == (40, 48)
    assert ingested.sizes[key] == (48, 40)


def test_captions_of_odd_files_are_read_as_they_were_meant(ingested):
    def captions(name: str) -> list[str]:
        position = list(FILES).index(name)
        return ingested.captions[KEYS[ingested.source](position, FILES[name][0])]

    lines = ["one two"] if ingested.source == "parquet" else ["one", "two"]  # only text files have lines
    assert captions("caption with Windows newlines") == lines
    assert captions("caption with a byte order mark") == ["marked"]
    assert captions("caption with NUL") == ["before after"]
    assert captions("caption in Chinese") == ["一只猫"]
    assert captions("caption of 100,000 characters") == [" ".join(["word"] * 20_000)]
