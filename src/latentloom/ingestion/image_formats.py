"""Which files are images, and which of them are read.

A file is an image by its name (`looks_like_image`) or by its first bytes (`format_of`). Those that Pillow decodes
safely are read; two formats need a plugin, which is an extra of this package. Any other is named in its reject.
"""

import re
from contextlib import suppress
from functools import cache

# Pillow's formats without those that start programs (EPS), show a preview alone (PSD), or are seldom photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "QOI")
PLUGINS = {"HEIF": ("heif", "pillow_heif"), "JXL": ("jxl", "pillow_jxl")}  # format -> extra, module
IMAGE_NAME = re.compile(
    r"""\.(
        a?png | avifs? | bmp | dib | gif | hei[cf]s? | hif | ic[bo] | j2[ck] | jif | jfif? | jp[2cfgx] | jpe?g? | jxl
        | mpo | p[bfgnp]m | pjp(eg)? | qoi | tga | tiff? | vda | vst | webp

        # Not read, but images all the same, so each is a reject that says what to do.
        | 3fr | arw | bpg | cr[23w] | cur | dc[mr] | dds | djvu | dng | emf | eps | erf | exr | fits | flif | hdp | hdr
        | icns | iiq | jls | jxr | kdc | kra | mrw | nef | nrw | ora | orf | pcx | pef | psb | psd | raf | ras | rw[2l]
        | sgi | srw | svgz? | wdp | wmf | x3f | xbm | xcf | xpm
    )(?![a-z0-9])[^./]*\.?$""",
    re.VERBOSE | re.IGNORECASE,
)
HEAD = 1024  # bytes by which a format is known
FOOTER_OF_TGA = b"TRUEVISION-XFILE.\0"  # the one sign of a format that any bytes may pass for
SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM....\0\0\0\0",
    "QOI": rb"qoif",
    "AVIF": rb"....ftypavi[fs]",
    "HEIF": rb"....ftyp(hei[cxfms]|hev[cxms]|mif1|msf1)",
    "JXL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "camera raw": rb"II\*\0....CR|IIR[OS]|IIU\0|FUJIFILMCCD-RAW|....ftypcrx |FOVb|\0MRM",
    "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "JPEG XR": rb"II\xbc",
    "Photoshop": rb"8BPS",
    "GIMP": rb"gimp xcf",
    "SVG": rb"\s*(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<(svg:)?svg[\s>]",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "DDS": rb"DDS ",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance HDR": rb"#\?(RADIANCE|RGBE)",
    "icon of macOS": rb"icns",
    "DjVu": rb"AT&TFORM",
    "FITS": rb"SIMPLE  =",
}
KNOWN = {name: re.compile(pattern, re.DOTALL) for name, pattern in SIGNATURES.items()}


def looks_like_image(name: str) -> bool:
    """Whether a file's name is that of an image, read or not: ``cat.JPG``, ``cat.jpg_large``, ``cat.psd``."""
    return IMAGE_NAME.search(name) is not None


def format_of(data: bytes) -> str | None:
    """The image format that the first bytes of a file belong to, whether it is read or not; None: no image's."""
    return next((name for name, pattern in KNOWN.items() if pattern.match(data[:HEAD])), None)


def formats(data: bytes) -> tuple[str, ...]:
    """Pillow's formats that may be tried on the bytes of a file."""
    return (*FORMATS, *installed_plugins(), *(["TGA"] if data.endswith(FOOTER_OF_TGA) else []))


@cache
def installed_plugins() -> tuple[str, ...]:
    """The formats of `PLUGINS` that are read here; Pillow knows them from then on."""
    found = []
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        found.append("HEIF")
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401 (registers itself)

        found.append("JXL")
    return tuple(found)


def jpeg_xl_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG XL from its header (ISO 18181-1, annex D.2): its plugin decodes before it tells them.

    None where the header is not whole.
    """
    start = 0 if data.startswith(b"\xff\x0a") else _start_of_codestream(data)
    if start is None or data[start : start + 2] != b"\xff\x0a":
        return None
    bits, position = int.from_bytes(data[start + 2 : start + 14], "little"), 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        return bits >> (position - count) & (1 << count) - 1

    def length(is_small: int) -> int:
        return 8 * (read(5) + 1) if is_small else read((9, 13, 18, 30)[read(2)]) + 1

    is_small = read(1)
    height = length(is_small)
    ratio = read(3)
    if not ratio:
        return length(is_small), height
    wide, high = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * wide // high, height


def _start_of_codestream(data: bytes) -> int | None:
    """Where the image itself begins in the boxes of a JPEG XL file."""
    at = 0
    while at + 16 <= len(data):
        size, kind, body = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, body = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        if kind in (b"jxlc", b"jxlp"):
            return body + 4 * (kind == b"jxlp")  # a part has its number first
        if size < 8:
            return None
        at += size
    return None
