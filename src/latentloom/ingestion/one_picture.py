"""One picture from outside, prepared as `ingest` does: upright, sRGB, on white, its centre at the size asked for."""

from pathlib import Path

import numpy as np

from latentloom.errors import UserError
from latentloom.ingestion.images import image_id, pillow_settings, prepare_image
from latentloom.ingestion.rejects import RejectedSample
from latentloom.sizes import Size

MAX_PIXELS = 178_956_970  # as the shipped params have it
MAX_ASPECT_RATIO = 5.0


def prepare_picture(path: Path, size: Size) -> tuple[np.ndarray, str]:
    """The pixels, uint8 (H, W, 3), of an image file at ``size``, and their id.

    Raises:
        UserError: where the file cannot be read, or is no image that can be used, with the reason.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    with pillow_settings(MAX_PIXELS):
        try:
            prepared = prepare_image(data, [[size]], max_pixels=MAX_PIXELS, max_aspect_ratio=MAX_ASPECT_RATIO)
        except RejectedSample as error:
            raise UserError(f"{path} cannot be used: {error.detail}") from error
    return prepared.pixels.copy(), image_id(prepared.pixels)  # Pillow's own memory cannot be written to
