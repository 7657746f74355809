"""Prompts in, images out, with a network, a codec and a text encoder that are loaded.

    prompts --text encoder--> embeddings (P, dim) --Diffuser--> latents (P N, C, h, w) --codec--> images (P, N, H, W, 3)

A sample is a function of the model, its prompt, the seed, its number and the settings, and of nothing else. So on a CPU
`generate` computes each by itself: in a batch, sums would be rounded in another order with each other size. Samples of
one number start from the same noise whatever their prompt, so prompts can be compared.

An exported model carries this module (see `latentloom.export`), so it knows nothing of files.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from latentloom.devices import autocast_dtype
from latentloom.diffusion.diffuser import Diffuser
from latentloom.diffusion.interpolation import between_noise, between_texts
from latentloom.diffusion.sampling_settings import LARGEST, SampleRequest, SamplingSettings
from latentloom.diffusion.text import Labels, concatenate, drop, trimmed
from latentloom.encoding.codec import LatentCodec, batches_by_shape
from latentloom.encoding.text_embedder import TextEmbedder, embed
from latentloom.errors import UserError
from latentloom.randomness import generator
from latentloom.sizes import Size

if TYPE_CHECKING:
    from latentloom.diffusion.unet import UNet
    from latentloom.encoding.text_encoder import TextEncoder
    from latentloom.model_files import ModelConfig

BATCH_SIZE = 64
LARGEST_SIDE = 2048  # pixels, of an image that is asked for
STRENGTH = 0.6  # of a picture that samples start from, unless another is asked for

Shape: TypeAlias = tuple[int, int, int]  # (C, h, w)
OnSamplePrediction: TypeAlias = Callable[[int, int, torch.Tensor], None]


@dataclass(frozen=True)
class StartImage:
    """A picture that samples begin from, instead of noise alone.

    ``pixels``, uint8 (H, W, 3), have the size that is asked for, and ``id`` names them (`ingestion.images.image_id`).
    ``strength`` says how much of the sampling is done on them: 0 gives what the VAE makes of the picture, 1 forgets it.
    """

    pixels: np.ndarray
    id: str
    strength: float

    def __post_init__(self) -> None:
        if self.strength is None or not 0 <= self.strength <= 1:
            raise UserError(f"strength = {self.strength}: must be a number, from 0 to 1")


@dataclass(frozen=True)
class ImageGenerator:
    """A network and what turns prompts into its inputs and its outputs into pixels."""

    network: UNet  # predicts clean latents, standardised
    config: ModelConfig  # what the network was trained on and for
    codec: LatentCodec  # between latents and pixels
    text_encoder: TextEncoder | TextEmbedder  # reads the prompts

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.network.parameters()).device

    @property
    def batch_size(self) -> int:
        """How many samples are computed at a time."""
        return 1 if self.device.type == "cpu" else BATCH_SIZE

    def generate(
        self,
        prompts: Sequence[str],
        request: SampleRequest,
        *,
        start: StartImage | None = None,
        on_prediction: OnSamplePrediction | None = None,
    ) -> np.ndarray:
        """The samples of each prompt that are asked for, uint8 (P, count, H, W, 3).

        Args:
            prompts: what to generate. With a picture to start from, a blank one asks for no text at all.
            request: which samples, and how.
            start: the picture.
            on_prediction: as that of `denoise`; samples are numbered through the prompts one after the other.
        """
        images = self.pixels(self.asked_latents(prompts, request, start=start, on_prediction=on_prediction))
        return images.reshape(len(prompts), request.count, *images.shape[1:])

    def asked_latents(
        self,
        prompts: Sequence[str],
        request: SampleRequest,
        *,
        start: StartImage | None = None,
        on_prediction: OnSamplePrediction | None = None,
    ) -> list[torch.Tensor]:
        """What `generate` decodes: P * count standardised latents (C, h, w)."""
        texts = self.embed(prompts)
        if start:
            texts = drop(texts, torch.tensor([bool(prompt.strip()) for prompt in prompts]))
        embeddings = texts[torch.arange(len(prompts)).repeat_interleave(request.count)]
        numbers = range(request.first, request.first + request.count)
        shape = self.latent_shape(request.size)
        noise = [self.starting_noise(str(number), request.seed, shape) for _ in prompts for number in numbers]
        begin = self.codec.encode(start.pixels[None])[0] if start else None
        strength = start.strength if start else 1.0
        return self._asked(noise, embeddings, request, start=begin, strength=strength, on_prediction=on_prediction)

    def between(
        self, prompts: Sequence[str], request: SampleRequest, *, pictures: int, to_seed: int | None = None
    ) -> np.ndarray:
        """Pictures on the way from one sample to another, uint8 (pictures, H, W, 3); the first and last are these two.

        Args:
            prompts: of the two; one: they have the same.
            request: its seed is the first sample's; both have the number ``first``.
            pictures: how many, the ends included.
            to_seed: the last sample's seed; None: the same as the first's.

        Raises:
            UserError: for less than two pictures, more than two prompts, or two samples that are the same.
        """
        if pictures < 2:
            raise UserError(f"between = {pictures}: must be a whole number, from 2, the pictures at both ends included")
        seeds = (request.seed, request.seed if to_seed is None else to_seed)
        same = len(set(prompts)) == 1 and seeds[0] == seeds[1]
        known = isinstance(seeds[1], int) and 0 <= seeds[1] <= LARGEST
        if same or not known or not 1 <= len(prompts) <= 2:
            raise UserError(
                "between: give two prompts, or one prompt and another seed, a whole number from 0, to go to; or both"
            )
        shape, name = self.latent_shape(request.size), str(request.first)
        texts = [self.embed([prompts[0]]), self.embed([prompts[-1]])]
        noise = [self.starting_noise(name, seed, shape) for seed in seeds]
        shares = [place / (pictures - 1) for place in range(pictures)]
        noise = [between_noise(*noise, share) if seeds[0] != seeds[1] else noise[0] for share in shares]
        return self.pixels(self._asked(noise, concatenate([between_texts(*texts, share) for share in shares]), request))

    def pixels(self, latents: Sequence[torch.Tensor]) -> np.ndarray:
        """Standardised latents (C, h, w) of one shape as images, uint8 (N, H, W, 3)."""
        return np.stack(self.codec.decode_each(latents, batch_size=self.batch_size))

    def _asked(
        self, noise: list[torch.Tensor], texts: Labels, request: SampleRequest, **more: Any
    ) -> list[torch.Tensor]:
        """What `denoise` makes of noise and texts, with the settings and the negative prompt of a request."""
        negative = self.embed([request.negative]) if request.negative else None
        return self.denoise(noise, texts, request.settings, negative=negative, batch_size=self.batch_size, **more)

    def latent_shape(self, size: str | None) -> Shape:
        """The latent (C, h, w) of an image of ``size``, ``WIDTHxHEIGHT`` in pixels; None: the model's own.

        Raises:
            UserError: when it is no size, or one that VAE and network cannot make, naming the nearest that they can.
        """
        if size is None:
            return self.config.latent_shape
        try:
            width, height = Size.parse(size)
        except ValueError as error:
            raise UserError(f"size: {error}") from error
        multiple = self.codec.vae.factor * self.network.multiple
        nearest = Size(*(min(max(round(side / multiple), 1) * multiple, LARGEST_SIDE) for side in (width, height)))
        if nearest != (width, height):
            raise UserError(
                f"size: {size} is none that this model makes: sides are multiples of {multiple} pixels, up to "
                f"{LARGEST_SIDE}; the nearest is {nearest}"
            )
        return self.config.latent_shape[0], height // self.codec.vae.factor, width // self.codec.vae.factor

    def image_size(self, size: str | None) -> Size:
        """The size in pixels of an image of ``size``, see `latent_shape`."""
        _, height, width = self.latent_shape(size)
        return Size(width * self.codec.vae.factor, height * self.codec.vae.factor)

    def remarks(self, prompts: Sequence[str], request: SampleRequest, *, start: StartImage | None = None) -> list[str]:
        """What is worth a warning about a request, a sentence each.

        Raises:
            UserError: when a prompt is no text, or the size is none that can be made.
        """
        read = [prompt for prompt in prompts if prompt.strip() or not start]
        remarks = [remark for remark in map(self.unread, read) if remark]
        if request.negative:
            unread = self.unread(request.negative)
            remarks += [unread.replace("the prompt", "the negative prompt")] if unread else []
            if request.settings.class_guidance == 1:
                remarks.append("the negative prompt has no effect: with guidance 1 nothing is guided away from")
        asked, trained = self.latent_shape(request.size), self.config.trained_shapes
        if asked not in trained:
            factor = self.codec.vae.factor
            size, *known = (str(Size(width * factor, height * factor)) for _, height, width in (asked, *trained))
            remarks.append(f"the model was trained on {', '.join(known)}; at {size} its samples may be worse")
        return remarks

    def unread(self, prompt: str) -> str | None:
        """What the model does not read of a prompt, in a sentence; None where it reads all of it.

        Raises:
            UserError: when the prompt is no text: bytes that are not UTF-8 reach Python as lone surrogates.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt {prompt!a} is not in UTF-8") from error
        if not prompt.strip():
            return "the prompt is empty: nothing is asked for, and the sample shows what such a prompt happens to give"

        encoder = self.text_encoder
        parts = encoder.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if unknown := parts.count(encoder.tokenizer.unk_token_id):
            return (
                f"the text encoder does not know {unknown} of {len(parts)} parts of the prompt, as those in a script "
                "that it was not trained on, and reads each as it would any other that it does not know"
            )

        def is_cut(length: int) -> bool:
            return encoder.count_tokens([prompt[:length]])[0] > encoder.max_tokens

        if not is_cut(len(prompt)):
            return None
        read = prompt[: bisect.bisect_left(range(1, len(prompt)), True, key=is_cut)]  # the longest that is not cut
        return (
            f"the prompt has {len(prompt):,} characters, and the text encoder reads the first {len(read):,} "
            f"({encoder.max_tokens} tokens), up to “…{read[-40:]}”; what follows has no effect"
        )

    def embed(self, prompts: Sequence[str]) -> Labels:
        """What the network reads of prompts: embeddings (P, dim), or a `Text` of these and token states; on the CPU."""
        return embed(self.text_encoder, prompts, tokens=self.config.token_dim is not None)

    def latents(
        self,
        embeddings: Labels,
        names: Sequence[str],
        settings: SamplingSettings,
        *,
        seed: int,
        shapes: Sequence[Shape] | None = None,
    ) -> list[torch.Tensor]:
        """A standardised latent (C, h, w) for each text embedding (B, dim) or text, on the network's device.

        The noise that a sample starts from is a function of ``seed``, its name and shape alone, so asking for more
        samples does not change those already asked for.

        Args:
            embeddings: what `embed` gives.
            names: one per sample.
            settings: of all samples.
            seed: of the noise.
            shapes: of each latent; None: all of them the model's own.
        """
        noise = [self.starting_noise(name, seed, shapes and shapes[place]) for place, name in enumerate(names)]
        return self.denoise(noise, embeddings, settings)

    def denoise(
        self,
        noise: Sequence[torch.Tensor],
        embeddings: Labels,
        settings: SamplingSettings,
        *,
        negative: Labels | None = None,
        start: torch.Tensor | None = None,
        strength: float = 1.0,
        batch_size: int = BATCH_SIZE,
        on_prediction: OnSamplePrediction | None = None,
    ) -> list[torch.Tensor]:
        """A standardised latent (C, h, w) for each draw of noise of such a shape, on the network's device.

        Args:
            noise: what samples start from.
            embeddings: what `embed` gives, one per sample.
            settings: of all samples.
            negative: one text that all are guided away from; None: no text.
            start: the latent (C, h, w) that all begin from, see `Diffuser.reverse_diffusion`, and its ``strength``.
            batch_size: how many are computed at a time.
            on_prediction: called for each sample and step with the sample's place, the number of the step, from 0, and
                the present prediction of the clean latent (C, h, w).
        """
        diffuser = Diffuser(
            self.network,
            settings=settings,
            schedule=self.config.schedule,
            bound=self.config.latent_bound,
            latent_channels=self.config.latent_shape[0],
            autocast_dtype=autocast_dtype(settings.precision, self.device),
        )
        samples: dict[int, torch.Tensor] = {}
        with self.progress_bar(len(noise)) as progress:
            for part in batches_by_shape([own.shape for own in noise], batch_size):

                def pass_on(step: int, predictions: torch.Tensor, part: Sequence[int] = part) -> None:
                    for place, prediction in zip(part, predictions, strict=True):
                        on_prediction(place, step, prediction)

                latents = diffuser.reverse_diffusion(
                    torch.stack([noise[place] for place in part]).to(self.device),
                    trimmed(embeddings[torch.tensor(part)]).to(self.device),
                    layout="nchw",
                    negative=None if negative is None else trimmed(negative[[0] * len(part)]).to(self.device),
                    start=None if start is None else start.to(self.device).expand(len(part), *start.shape),
                    strength=strength,
                    on_prediction=on_prediction and pass_on,
                )
                samples |= zip(part, latents, strict=True)
                progress.update(len(part))
        return [samples[place] for place in range(len(noise))]

    def starting_noise(self, name: str, seed: int, shape: Shape | None = None) -> torch.Tensor:
        """The noise (C, h, w) that the sample of that name starts from; ``shape`` None: the model's own."""
        return torch.randn(shape or self.config.latent_shape, generator=generator("cpu", seed, "sample", name))

    def progress_bar(self, total: int) -> tqdm:
        """What shows how many of ``total`` samples there are yet."""
        return tqdm(total=total, desc="sample", unit="image")
