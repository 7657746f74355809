"""A model folder, with the two encoders that its config names, as an `ImageGenerator` that signs its images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import latentloom
from latentloom.devices import autocast_dtype, choose_device
from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.pretrained import has_fingerprint
from latentloom.encoding.text_encoder import load_text_encoder
from latentloom.encoding.vae import load_vae
from latentloom.errors import UserError
from latentloom.evaluation.image_generator import ImageGenerator, StartImage
from latentloom.evaluation.metadata import ImageMetadata
from latentloom.files import read_json, write_json
from latentloom.image_grid import image_grid
from latentloom.layout import PARAMS
from latentloom.model_files import EncoderReference, load_model, model_hash
from latentloom.params_file import load_params
from latentloom.source_code import code_hash, deciding_modules

SETTINGS_FILE = "sampling.json"


@dataclass(frozen=True)
class TextToImage(ImageGenerator):
    """A model folder with its encoders, loaded: it knows what to write into its images."""

    model_sha256: str  # names the model, see `model_files.model_hash`
    provenance: Mapping[str, Any] | None = None  # of the model, as far as it goes into an image's metadata

    def metadata(
        self,
        prompts: Sequence[str],
        request: SampleRequest,
        *,
        start: StartImage | None = None,
        pictures: int | None = None,
        to_seed: int | None = None,
    ) -> ImageMetadata:
        """What to write into an image of the samples that `generate`, or with ``pictures`` `between`, gives."""
        in_fp32 = autocast_dtype(request.settings.precision, self.device) is None
        return ImageMetadata(
            prompts=tuple(prompts),
            seed=request.seed,
            first=request.first,
            count=request.count,
            sampling=replace(request.settings, precision="fp32" if in_fp32 else "bf16"),
            model_sha256=self.model_sha256,
            vae=self.codec.vae.fingerprint,
            text_encoder=self.text_encoder.fingerprint,
            code=generating_code(),
            provenance=self.provenance,
            size=request.size,
            negative=request.negative,
            start_image=start and start.id,
            strength=start and start.strength,
            between=pictures,
            to_seed=to_seed,
        )

    def one_by_one(
        self, prompts: Sequence[str], request: SampleRequest, images: np.ndarray, *, start: StartImage | None = None
    ) -> Iterator[tuple[str, int, np.ndarray, ImageMetadata]]:
        """Each of the images that `generate` gave: its prompt, its number, its pixels, and its own metadata."""
        for prompt, samples in zip(prompts, images, strict=True):
            for number, pixels in enumerate(samples, start=request.first):
                alone = replace(request, first=number, count=1)
                yield prompt, number, pixels, self.metadata([prompt], alone, start=start)


def load_text_to_image(
    folder: Path, *, provenance: Mapping[str, Any] | None = None, device: torch.device | None = None
) -> TextToImage:
    """Load a model folder and its encoders: those that the folder carries, else those that its config refers to.

    Raises:
        UserError: when a file is missing or damaged, or an encoder is not the one that the model was trained with.
    """
    device = device or choose_device()
    network, config = load_model(folder, device)
    vae = _encoder(load_vae, folder / "vae", config.vae, device)
    text_encoder = _encoder(
        partial(load_text_encoder, max_tokens=config.max_tokens), folder / "text_encoder", config.text_encoder, device
    )
    codec = LatentCodec(config.latent_mean, config.latent_std, load_vae=lambda: vae)
    return TextToImage(network, config, codec, text_encoder, model_hash(folder), provenance)


def prompt_grid(samples: np.ndarray) -> np.ndarray:
    """Samples (P, N, H, W, 3) as one image (P H, N W, 3): a prompt's samples side by side, prompts in rows."""
    return image_grid(samples.reshape(-1, *samples.shape[2:]), columns=samples.shape[1])


def default_settings(model: Path, params: Path = PARAMS) -> SamplingSettings:
    """The settings of ``params`` where there is such a file, else those that the model folder carries, else our own.

    Raises:
        UserError: when one of the two files is wrong.
    """
    return load_params(params).evaluate.sampling if params.exists() else stored_settings(model)


def stored_settings(model: Path) -> SamplingSettings:
    """The settings that a model folder carries, or our own.

    Raises:
        UserError: when the file is wrong.
    """
    path = model / SETTINGS_FILE
    if not path.exists():
        return SamplingSettings()
    try:
        return SamplingSettings.from_dict(read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def store_settings(model: Path, settings: SamplingSettings) -> None:
    """Write settings into a model folder, as `stored_settings` reads them."""
    write_json(model / SETTINGS_FILE, asdict(settings))


@cache
def generating_code() -> str:
    """The hash of the modules that decide an image's pixels and its metadata: 64 hexadecimal digits."""
    package = Path(latentloom.__file__).parent
    return code_hash(deciding_modules(package / "evaluation" / "text_to_image.py", package), package.parent)


def _encoder(load: Callable[..., Any], carried: Path, wanted: EncoderReference, device: torch.device) -> Any:
    """The encoder in ``carried`` where there is such a folder, else the one that ``wanted`` refers to."""
    reference = str(carried) if carried.is_dir() else wanted.reference
    encoder = load(reference, device)
    if encoder.fingerprint != wanted.fingerprint and not has_fingerprint(encoder.folder, wanted.fingerprint):
        what = carried.name.replace("_", " ")
        raise UserError(
            f"{carried.parent}: the {what} {reference} is not the one that this model was trained with: its "
            f"fingerprint is {encoder.fingerprint[:12]}…, config.json asks for {wanted.fingerprint[:12]}…. Put the "
            f"files of that {what} back, or train on the new one (`dvc repro`)"
        )
    return encoder
