"""What is written into a PNG: all that is needed to generate the same bytes again.

pixels, metadata -> PNG with `prompt`, `seed`, `model_sha256`, `mlflow_run_id`, and `latentloom`: the metadata as JSON
"""

import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter

from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.errors import UserError
from latentloom.files import write_bytes

CHUNK = "latentloom"
OPTIONAL = ("size", "negative", "start_image", "strength", "between", "to_seed")


@dataclass(frozen=True)
class ImageMetadata:
    """What decided the pixels of an image."""

    prompts: tuple[str, ...]  # one per row of the image
    seed: int  # of the noise that the samples start from
    first: int  # the number of each prompt's first sample; a sample's noise is a function of the seed and its number
    count: int  # samples per prompt, one per column
    sampling: SamplingSettings  # the settings; ``precision`` is what the model computed in, ``fp32`` or ``bf16``
    model_sha256: str  # names the model, see `model_files.model_hash`
    vae: str  # the fingerprint of the VAE that decoded
    text_encoder: str  # the fingerprint of the encoder that read the prompts
    code: str | None = None  # the hash of the code that generated, see `text_to_image.generating_code`
    provenance: Mapping[str, Any] | None = None  # of the model, where known, see `Provenance.in_images`
    # What not every image has, and is not written where it is None.
    size: str | None = None  # of each sample, ``WIDTHxHEIGHT`` in pixels, where asked for; None: the model's own
    negative: str | None = None  # what the samples were guided away from; None: from no text
    start_image: str | None = None  # the id of the prepared picture that samples began from
    strength: float | None = None  # how much of the sampling was done on it, from 0 to 1
    between: int | None = None  # pictures on the way between two samples, both included, side by side
    to_seed: int | None = None  # of the last of these, where it has another seed than the first

    @property
    def mlflow_run_id(self) -> str | None:
        """Of the model's training, where it is known."""
        return (self.provenance or {}).get("mlflow_run_id")


def encode_png(image: np.ndarray, metadata: ImageMetadata) -> bytes:
    """An image, uint8 (H, W, 3), as PNG with its metadata; the same arguments give the same bytes."""
    chunks = PngInfo()
    chunks.add_text("prompt", "\n".join(metadata.prompts))
    chunks.add_text("seed", str(metadata.seed))
    chunks.add_text("model_sha256", metadata.model_sha256)
    if metadata.mlflow_run_id:
        chunks.add_text("mlflow_run_id", metadata.mlflow_run_id)
    values = {name: value for name, value in asdict(metadata).items() if name not in OPTIONAL or value is not None}
    chunks.add_text(CHUNK, json.dumps(values))
    written = io.BytesIO()
    Image.fromarray(image).save(written, format="PNG", pnginfo=chunks)
    return written.getvalue()


def file_words(prompt: str) -> str:
    """A prompt as a part of a file's name: its words in any script, in at most 60 bytes."""
    return re.sub(r"[^\w]+", "-", prompt).strip("-").encode()[:60].decode(errors="ignore")


def save_image(path: Path, image: np.ndarray, metadata: ImageMetadata) -> None:
    """Write an image, uint8 (H, W, 3), as PNG with its metadata, atomically.

    Raises:
        WriteError: when it cannot be written, naming it.
    """
    write_bytes(path, encode_png(image, metadata))


def read_metadata(path: Path) -> ImageMetadata:
    """The metadata of an image that `save_image` wrote.

    Raises:
        UserError: naming the file, when there is no such file, or it is not a PNG of ours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            chunk = image.info.get(CHUNK) if image.format == "PNG" else None
    except (OSError, SyntaxError) as error:  # the latter of a damaged PNG
        raise UserError(f"{path} cannot be read: {error}") from error
    if chunk is None:
        raise UserError(
            f"{path} does not say how it was generated: it is not a PNG of `latentloom sample`, or a program has saved "
            "it again without its text chunks"
        )
    try:
        return TypeAdapter(ImageMetadata).validate_python(json.loads(chunk))
    except ValueError as error:
        raise UserError(
            f"{path}: its text chunk {CHUNK!r} cannot be read; the first version of this program wrote another: {error}"
        ) from error


def generate_command(
    metadata: ImageMetadata,
    model: str = "models/unet",
    output: str = "again.png",
    program: Sequence[str] = ("latentloom",),
    image: str | None = None,
) -> str:
    """The command that generates the same bytes again, for a shell.

    Args:
        metadata: the image's.
        model: where the model with its hash is, as ``--model`` takes it.
        output: the file to write.
        program: how `latentloom` is called.
        image: the file of the picture that samples began from; None: a name made of its id.
    """
    which = (metadata.seed, metadata.count, metadata.first, metadata.size, metadata.negative)
    options = {"model": model} | SampleRequest(metadata.sampling, *which).options()
    options |= {
        "threshold": "none" if options["threshold"] is None else options["threshold"],
        "image": metadata.start_image and (image or f"{metadata.start_image[:12]}.png"),
        "strength": metadata.strength,
        "between": metadata.between,
        "to_seed": metadata.to_seed,
    }
    words = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    words += ["-o", output]
    prompts = list(metadata.prompts)
    ordered = [*words, "--", *prompts] if any(p.startswith("-") for p in prompts) else [*prompts, *words]
    return shlex.join([*program, "sample", *ordered])
