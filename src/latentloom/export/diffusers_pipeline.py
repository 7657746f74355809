"""The model as a pipeline of diffusers: `ImageGenerator` behind the arguments that people of that library know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from PIL import Image, ImageOps
from tqdm import tqdm

from latentloom.diffusion.decoding import decode_latents, encode_pixels
from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.diffusion.text import Labels, Text
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.text_embedder import TextEmbedder
from latentloom.evaluation.image_generator import STRENGTH, ImageGenerator, Shape, StartImage
from latentloom.sizes import Size

CODE = ""


class LatentLoomPipeline(DiffusionPipeline):
    """Generates images of prompts; on a CPU the same bytes as `latentloom sample` with the same model and settings.

    vae, text_encoder, tokenizer:  of diffusers and transformers.
    unet, scheduler:               of this folder.
    pooling:                       how the text encoder's token states become one vector: mean, cls or projection.
    max_tokens:                    that are read of a prompt.
    vae_scale_factor:              pixels that one row or column of a latent stands for.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    code = CODE

    # Without annotations: diffusers would compare components with the text that those are under `annotations`.
    def __init__(
        self, vae, text_encoder, tokenizer, unet, scheduler, pooling="mean", max_tokens=77, vae_scale_factor=8
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(pooling=pooling, max_tokens=max_tokens, vae_scale_factor=vae_scale_factor)
        # As the model is loaded where it was trained: in another memory layout sums are rounded otherwise.
        for module in (unet, vae):
            module.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        image: Image.Image | None = None,
        strength: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of one or more prompts, those of a prompt one after the other.

        Args:
            prompt: what to generate.
            height: in pixels; None: the model's own.
            width: likewise.
            num_inference_steps: sampling steps, 2 to 1000; None, here and below: as the model was measured.
            guidance_scale: w of classifier-free guidance: 1 is the plain conditional model.
            negative_prompt: what all are guided away from; None: what the model makes without any text.
            num_images_per_prompt: each from other noise, the same for all prompts.
            generator: what the noise is from; or one for each image. None: the noise is a function of ``seed`` and the
                number of the image, as in `latentloom sample`.
            output_type: ``pil``; ``np`` or ``pt``, from 0 to 1; ``latent``, standardised latents.
            return_dict: False: a tuple.
            image: to start from, instead of noise alone; its centre is resized. With a blank prompt no text is asked.
            strength: how much of the picture is made anew, from 0 to 1; None: 0.6.
            seed: of the noise, from 0; None: 0.
            options: ``sampler``, ``guidance_interval``, ``guidance_rescale``, ``threshold``, ``precision``, ``first``,
                as in `latentloom sample`.

        Raises:
            ValueError: naming the option that is wrong, and what is allowed.
        """
        if self.code != CODE:  # diffusers runs all pipelines of folders as one module: the last one's code is there
            raise RuntimeError(
                "since this pipeline was loaded, one that another version of Latent Loom exported was, and diffusers "
                "keeps the code of one alone: load this one again, or use the two in processes of their own"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type = {output_type!r}: must be one of pil, np, pt, latent")
        if generator is not None and not (seed is None and "first" not in options):
            raise ValueError("give seed and first, or a generator that the noise is from; not both")
        names = {"steps": num_inference_steps, "guidance": guidance_scale, "count": num_images_per_prompt, "seed": seed}
        names |= {"size": self._size(height, width), "negative": negative_prompt}
        given = {name: value for name, value in names.items() if value is not None}
        settings = SamplingSettings.from_dict(dict(self.scheduler.config.sampling))
        request = SampleRequest.of(settings, given | options)

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt = []: give at least one")
        images = self._image_generator(generator, len(prompts) * request.count)
        start = _start_image(image, strength, images.image_size(request.size))
        for remark in images.remarks(prompts, request, start=start):
            logging.get_logger(__name__).warning(remark)
        latents = images.asked_latents(prompts, request, start=start)
        found = torch.stack(latents) if output_type == "latent" else _as_type(images.pixels(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=found) if return_dict else (found,)

    def _size(self, height: int | None, width: int | None) -> str | None:
        if height is None and width is None:
            return None
        _, own_height, own_width = (side * self.config.vae_scale_factor for side in self.unet.config.latent_shape)
        return f"{width or own_width}x{height or own_height}"

    def _image_generator(self, generator: torch.Generator | list[torch.Generator] | None, count: int) -> ImageGenerator:
        unet, scheduler = self.unet.config, self.scheduler.config
        shape, shapes = tuple(unet.latent_shape), [tuple(own) for own in unet.latent_shapes or [unet.latent_shape]]
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images: give one, or one for each image")
        embedder = TextEmbedder(
            self.tokenizer, self.text_encoder, self.config.pooling, self.config.max_tokens, unet.text_dim
        )
        return PipelineGenerator(
            TensorsOfText(self.unet),
            SimpleNamespace(
                latent_shape=shape,
                trained_shapes=shapes,
                token_dim=unet.token_dim,
                schedule=scheduler.schedule,
                latent_bound=scheduler.latent_bound,
            ),
            LatentCodec(unet.latent_mean, unet.latent_std, lambda: VaeOfCodec(self.vae, self.config.vae_scale_factor)),
            embedder,
            self,
            None if generator is None else iter(generator if isinstance(generator, list) else [generator] * count),
        )


@dataclass(frozen=True)
class PipelineGenerator(ImageGenerator):
    """An `ImageGenerator` of a pipeline's parts, with the pipeline's progress bar, and noise from where it is told."""

    pipeline: LatentLoomPipeline
    generators: Iterator[torch.Generator] | None  # of each image's noise; None: a function of the seed

    def starting_noise(self, name: str, seed: int, shape: Shape | None = None) -> torch.Tensor:
        """The noise (C, h, w) that the next sample starts from."""
        if self.generators is None:
            return super().starting_noise(name, seed, shape)
        given = next(self.generators)
        return torch.randn(shape or self.config.latent_shape, generator=given, device=given.device).cpu()

    def progress_bar(self, total: int) -> tqdm:
        """The pipeline's own, which `set_progress_bar_config` changes."""
        return self.pipeline.progress_bar(total=total)


@dataclass(frozen=True)
class TensorsOfText:
    """The network as a `Diffuser` asks it."""

    unet: Any

    @property
    def multiple(self) -> int:
        """What the sides of a latent must be multiples of."""
        return self.unet.multiple

    def parameters(self) -> Iterable[torch.Tensor]:
        """Of the network: they say where it computes, and in which precision."""
        return self.unet.parameters()

    def __call__(self, x_t: torch.Tensor, noise_levels: torch.Tensor, labels: Labels) -> torch.Tensor:
        text = (labels.pooled, labels.tokens, labels.mask) if isinstance(labels, Text) else (labels,)
        return self.unet(x_t, noise_levels, *text)


@dataclass(frozen=True)
class VaeOfCodec:
    """The VAE as a `LatentCodec` asks it."""

    module: Any
    factor: int

    def encode(self, pixels: np.ndarray) -> dict[str, torch.Tensor]:
        """Pixels, uint8 (B, H, W, 3), as raw latents, see `encode_pixels`."""
        return encode_pixels(pixels, vae=self.module)

    def decode(self, raw: torch.Tensor, *, batch_size: int) -> np.ndarray:
        """Raw latents (B, C, h, w) as pixels, uint8 (B, H, W, 3)."""
        return decode_latents(
            raw, 1.0, vae=self.module, latent_channels=raw.shape[1], layout="nchw", batch_size=batch_size
        )


def _start_image(image: Image.Image | None, strength: float | None, size: Size) -> StartImage | None:
    """The centre of a picture at ``size``, as it is shown on white."""
    if image is None:
        if strength is not None:
            raise ValueError("strength needs image, the picture to start from")
        return None
    upright = ImageOps.exif_transpose(image).convert("RGBA")
    shown = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    pixels = np.array(ImageOps.fit(shown, size, Image.Resampling.LANCZOS))
    return StartImage(pixels, "", STRENGTH if strength is None else strength)


def _as_type(images: np.ndarray, output_type: str) -> Any:
    """Images, uint8 (N, H, W, 3), in the form that is asked for."""
    if output_type == "pil":
        return [Image.fromarray(image) for image in images]
    shares = images.astype(np.float32) / 255
    return shares if output_type == "np" else torch.from_numpy(shares).permute(0, 3, 1, 2)
