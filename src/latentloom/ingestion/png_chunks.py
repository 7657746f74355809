"""A PNG's bytes, mended where a chunk beside the pixels would stop Pillow, or make it read the pixels wrongly.

Text and colour profiles are stored compressed, so that a small file can inflate to fill the memory. Pillow rejects the
whole image beyond its bound. The pixels are sound, so here the chunk goes instead; all bounds stay as they are.
"""

import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT = (b"tEXt", b"zTXt", b"iTXt")
GREY, RGB = 0, 2  # colour types
KEY_BYTES = {GREY: 2, RGB: 6}  # of the transparent colour


def readable_png(data: bytes) -> bytes:
    """The same PNG with chunks that Pillow can read; ``data`` itself where that is so already, or it is no PNG.

    - Text beyond Pillow's bounds is left out, and so is a transparent colour that is not whole.
    - A colour profile beyond them is empty, which tells that there was one.
    - A transparent colour is in the values that Pillow decodes the pixels to, which is 8 bits a channel.
    """
    if not data.startswith(SIGNATURE) or len(data) < 33:
        return data
    depth, colour_type = data[24], data[25]
    room = PngImagePlugin.MAX_TEXT_MEMORY
    pieces, copied = [], 0
    for start, end in _chunks(data):
        name, body = data[start + 4 : start + 8], memoryview(data)[start + 8 : end - 4]
        mended: bytes | None = None  # as it is
        if name in TEXT:
            room -= (size := _text_size(name, body))
            if size > PngImagePlugin.MAX_TEXT_CHUNK or room < 0:
                mended = b""
        elif name == b"iCCP" and _inflated_size(body, 2 + bytes(body[:80]).find(b"\0")) > PngImagePlugin.MAX_TEXT_CHUNK:
            mended = _chunk(name, b"too large\0\0")
        elif name == b"tRNS" and colour_type in KEY_BYTES:
            mended = _transparent_colour(body, depth, colour_type)
        if mended is not None:
            pieces += [data[copied:start], mended]
            copied = end
    return b"".join([*pieces, data[copied:]]) if pieces else data


def _chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each whole chunk begins and ends."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            return
        yield start, end
        start = end


def _chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def _text_size(name: bytes, body: memoryview) -> int:
    """The bytes of a text, of a compressed one when it is inflated: at most one more than Pillow allows."""
    if name == b"tEXt":
        return len(body)
    after_keyword = 1 + bytes(body[:80]).find(b"\0")
    if name == b"zTXt":
        return _inflated_size(body, after_keyword + 1)
    if bytes(body[after_keyword : after_keyword + 1]) != b"\1":  # its flag of compression
        return len(body)
    languages = bytes(body[after_keyword + 2 :]).split(b"\0", 2)[:2]
    return _inflated_size(body, after_keyword + 2 + sum(len(language) + 1 for language in languages))


def _inflated_size(body: memoryview, start: int) -> int:
    try:
        return len(zlib.decompressobj().decompress(body[start:], PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return len(body)  # Pillow leaves a damaged one out


def _transparent_colour(body: memoryview, depth: int, colour_type: int) -> bytes | None:
    if len(body) != KEY_BYTES[colour_type]:
        return b""
    values = [int.from_bytes(body[at : at + 2], "big") for at in range(0, len(body), 2)]
    if colour_type == GREY and depth in (2, 4):
        values = [value * 255 // (2**depth - 1) for value in values]
    elif colour_type == RGB and depth == 16:
        values = [value >> 8 for value in values]  # colours that differ in their lower bytes alone are one by then
    else:
        return None
    return _chunk(b"tRNS", b"".join((value & 0xFFFF).to_bytes(2, "big") for value in values))
