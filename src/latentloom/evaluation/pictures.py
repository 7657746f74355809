"""A picture that says what drew it: the PNG's text chunks hold all that is needed to draw the same bytes again.

pixels, facts -> PNG with `prompt`, `seed`, `model_sha256`, `mlflow_run_id`, and `latentloom`: the facts as JSON
"""

import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter, ValidationError

from latentloom.files import atomic_path

CHUNK = "latentloom"


@dataclass(frozen=True)
class PictureFacts:
    """What decided the pixels of a picture.

    Attributes:
        prompts: one a row of the picture.
        seed: of the noise that the samples start from.
        first: the number of each prompt's first sample; a sample's noise is a function of the seed and its number.
        count: samples a prompt, one a column.
        steps: denoising steps.
        guidance: 1 is the plain conditional model; more follows the prompt more closely.
        sampler: a name that the `Diffuser` knows.
        guidance_interval: the lowest and the highest noise level at which guidance acts.
        guidance_rescale: how far contrast that guidance added is taken back, from 0 to 1.
        threshold: the percentile of dynamic thresholding.
        precision: what the model computed in, ``fp32`` or ``bf16``.
        model_sha256: names the model, see `model_files.model_hash`.
        mlflow_run_id: of the model's training, where it is known.
        vae: the fingerprint of the VAE that decoded.
        text_encoder: the fingerprint of the encoder that read the prompts.
        code: the hash of the code that drew, see `drawing_code`; None in pictures that are older than this.
    """

    prompts: tuple[str, ...]
    seed: int
    first: int
    count: int
    steps: int
    guidance: float
    sampler: str
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    threshold: float
    precision: Literal["fp32", "bf16"]
    model_sha256: str
    mlflow_run_id: str | None
    vae: str
    text_encoder: str
    code: str | None = None


def together(samples: np.ndarray) -> np.ndarray:
    """Samples (P, N, H, W, 3) as one picture (P·H, N·W, 3): a prompt's samples side by side, prompts in rows."""
    prompts, count, height, width, channels = samples.shape
    return samples.swapaxes(1, 2).reshape(prompts * height, count * width, channels)


def encode_picture(image: np.ndarray, facts: PictureFacts) -> bytes:
    """A picture, uint8 (H, W, 3), as PNG with its facts; the same picture and facts give the same bytes."""
    chunks = PngInfo()
    chunks.add_text("prompt", "\n".join(facts.prompts))
    chunks.add_text("seed", str(facts.seed))
    chunks.add_text("model_sha256", facts.model_sha256)
    if facts.mlflow_run_id:
        chunks.add_text("mlflow_run_id", facts.mlflow_run_id)
    chunks.add_text(CHUNK, json.dumps(asdict(facts)))
    written = io.BytesIO()
    Image.fromarray(image).save(written, format="PNG", pnginfo=chunks)
    return written.getvalue()


def save_picture(path: Path, image: np.ndarray, facts: PictureFacts) -> None:
    """Write a picture, uint8 (H, W, 3), as PNG with its facts, atomically.

    Raises:
        OSError: when it cannot be written, naming it.
    """
    data = encode_picture(image, facts)
    with atomic_path(path, room=len(data)) as temporary:
        temporary.write_bytes(data)


def read_facts(path: Path) -> PictureFacts:
    """What drew a picture that `save_picture` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is no PNG of ours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            chunk = image.info.get(CHUNK) if image.format == "PNG" else None
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if chunk is None:
        raise ValueError(
            f"{path} does not say what drew it: it is no PNG of `latentloom sample`, or a program has saved it again "
            "without its text chunks"
        )
    try:
        return TypeAdapter(PictureFacts).validate_json(chunk)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise ValueError(f"{path}: its text chunk {CHUNK!r} cannot be read: {where}: {first['msg']}") from error


def redraw_command(
    facts: PictureFacts,
    model: str = "models/unet",
    output: str = "again.png",
    program: Sequence[str] = ("latentloom",),
) -> str:
    """The command that draws the same bytes again, for a shell.

    Args:
        facts: the picture's.
        model: where the model with its hash is, as ``--model`` takes it.
        output: the file to write.
        program: how `latentloom` is called.
    """
    low, high = facts.guidance_interval
    settings = {
        "model": model,
        "seed": facts.seed,
        "first": facts.first,
        "count": facts.count,
        "steps": facts.steps,
        "guidance": facts.guidance,
        "sampler": facts.sampler,
        "guidance-rescale": facts.guidance_rescale,
        "threshold": facts.threshold,
        "precision": facts.precision,
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    options += ["--guidance-interval", str(low), str(high), "-o", output]
    prompts = list(facts.prompts)
    ordered = [*options, "--", *prompts] if any(p.startswith("-") for p in prompts) else [*prompts, *options]
    return shlex.join([*program, "sample", *ordered])
