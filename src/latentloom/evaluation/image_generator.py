"""Prompts in, images out, with a network, a codec and a text encoder that are loaded.

    prompts --text encoder--> embeddings (P, dim) --Diffuser--> latents (P N, C, h, w) --codec--> images (P, N, H, W, 3)

A sample is a function of the model, its prompt, the seed, its number and the settings, and of nothing else. So on a CPU
`generate` computes each by itself: in a batch, sums would be rounded in another order with each other size. Samples of
one number start from the same noise whatever their prompt, so prompts can be compared.

An exported model carries this module (see `latentloom.export`), so it knows nothing of files.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from latentloom.devices import autocast_dtype
from latentloom.diffusion.diffuser import Diffuser
from latentloom.diffusion.sampling_settings import SampleRequest, SamplingSettings
from latentloom.diffusion.text import Labels, trimmed
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

Shape: TypeAlias = tuple[int, int, int]  # (C, h, w)


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

    def generate(self, prompts: Sequence[str], request: SampleRequest) -> np.ndarray:
        """The samples of each prompt that are asked for, uint8 (P, count, H, W, 3)."""
        images = np.stack(self.codec.decode_each(self.asked_latents(prompts, request), batch_size=self.batch_size))
        return images.reshape(len(prompts), request.count, *images.shape[1:])

    def asked_latents(self, prompts: Sequence[str], request: SampleRequest) -> list[torch.Tensor]:
        """The samples of each prompt that are asked for, as P * count standardised latents (C, h, w)."""
        numbers = [str(number) for number in range(request.first, request.first + request.count)]
        embeddings = self.embed(prompts)[torch.arange(len(prompts)).repeat_interleave(request.count)]
        names = numbers * len(prompts)
        shapes = [self.latent_shape(request.size)] * len(names)
        return self.latents(
            embeddings, names, request.settings, seed=request.seed, batch_size=self.batch_size, shapes=shapes
        )

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

    def remarks(self, prompts: Sequence[str], request: SampleRequest) -> list[str]:
        """What is worth a warning about a request, a sentence each.

        Raises:
            UserError: when a prompt is no text, or the size is none that can be made.
        """
        remarks = [remark for remark in map(self.unread, prompts) if remark]
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
        batch_size: int = BATCH_SIZE,
        shapes: Sequence[Shape] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """A standardised latent for each text embedding (B, dim) or text, on the network's device.

        The noise that a sample starts from is a function of ``seed``, its name and shape alone, so asking for more
        samples does not change those already asked for.

        Args:
            embeddings: what `embed` gives.
            names: one per sample.
            settings: of all samples.
            seed: of the noise.
            batch_size: how many are computed at a time.
            shapes: of each latent; None: all of them the model's own.

        Returns:
            A tensor (B, C, h, w) or, where ``shapes`` are given, a list of B tensors (C, h, w).
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
        with self.progress_bar(len(names)) as progress:
            for part in batches_by_shape(shapes or [self.config.latent_shape] * len(names), batch_size):
                noise = [self.starting_noise(names[place], seed, shapes and shapes[place]) for place in part]
                labels = trimmed(embeddings[torch.tensor(part)]).to(self.device)
                latents = diffuser.reverse_diffusion(torch.stack(noise).to(self.device), labels, layout="nchw")
                samples |= zip(part, latents, strict=True)
                progress.update(len(part))
        in_order = [samples[place] for place in range(len(names))]
        return torch.stack(in_order) if shapes is None else in_order

    def starting_noise(self, name: str, seed: int, shape: Shape | None = None) -> torch.Tensor:
        """The noise (C, h, w) that the sample of that name starts from; ``shape`` None: the model's own."""
        return torch.randn(shape or self.config.latent_shape, generator=generator("cpu", seed, "sample", name))

    def progress_bar(self, total: int) -> tqdm:
        """What shows how many of ``total`` samples there are yet."""
        return tqdm(total=total, desc="sample", unit="image")
