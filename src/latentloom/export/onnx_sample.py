"""Prompts in, a picture out, with NumPy, ONNX Runtime, tokenizers and Pillow alone.

    python sample.py "a red apple" -o apple.png

It reads the files beside it: three graphs, the tokenizer, and `sampling.json`. The samplers are those of the model's
training code, in the same names: a noise level alpha runs from 1 to 0, gamma is how much signal there is.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

SIGNAL_LEVELS = {"vp": lambda alpha: math.sqrt((1 - alpha) * (1 + alpha)), "linear": lambda alpha: 1 - alpha}
LEVELS = {"vp": lambda u: math.sin(math.pi / 2 * u), "linear": lambda u: u}


class Sampler:
    """The model in a folder."""

    def __init__(self, folder: Path):
        self.settings = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
        graphs = ("text_encoder", "network", "decoder")
        self.text_encoder, self.network, self.decoder = (
            onnxruntime.InferenceSession(str(folder / f"{name}.onnx")) for name in graphs
        )
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.settings["max_tokens"])

    def generate(self, prompt: str, noise: np.ndarray, **changes: Any) -> np.ndarray:
        """A picture, uint8 (H, W, 3), of a prompt, from standard normal noise (C, h, w); ``changes``: of settings."""
        settings = self.settings | changes
        gamma, threshold = SIGNAL_LEVELS[settings["schedule"]], settings["threshold_percentile"]
        steps, place = settings["diffusion_steps"], LEVELS[settings["schedule"]]
        levels = [1.0, *(place(1 - step / steps) for step in range(1, steps)), 0.0]
        text, x, last = self.read(prompt), noise[None].astype(np.float32), None
        for level, following in pairwise(levels):
            x0 = self.predict(x, level, text, settings)
            if threshold is not None:
                bound = settings["latent_bound"]
                s = max(np.percentile(np.abs(x0), threshold), bound)
                x0 = np.clip(x0, -s, s) * (bound / s)
            direction = x0
            if settings["sampler"] == "dpmpp_2m" and last is not None and following > 0:
                here, there = (math.log(gamma(own) / own) for own in (level, following))
                step = (there - here) / (2 * (here - last[1]))
                direction = last[0] + (1 + step) * (x0 - last[0])
            ratio = following / level
            x = x0 if following == 0 else ratio * x + (gamma(following) - ratio * gamma(level)) * direction
            x = x.astype(np.float32)
            last = x0, math.log(gamma(level) / level) if gamma(level) > 0 else -math.inf
        pixels = self.decoder.run(None, {"latents": x})[0][0]
        return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)

    def read(self, prompt: str) -> dict[str, np.ndarray]:
        """What the network reads of a prompt, and below it what it reads of none."""
        tokens = np.array([self.tokenizer.encode(prompt).ids], np.int64)
        asked = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        pooled, states = self.text_encoder.run(None, asked)
        text = {"pooled": np.concatenate([pooled, np.zeros_like(pooled)])}
        if any(own.name == "tokens" for own in self.network.get_inputs()):
            text["tokens"] = np.concatenate([states, states])
            text["mask"] = np.stack([np.ones(states.shape[1], bool), np.zeros(states.shape[1], bool)])
        return text

    def predict(self, x: np.ndarray, level: float, text: dict[str, np.ndarray], settings: dict) -> np.ndarray:
        """The clean latent: with the text, and past the one without, where guidance acts."""
        low, high = settings["guidance_interval"]
        w, phi = settings["class_guidance"] if low <= level <= high else 1, settings["guidance_rescale"]
        inputs = {"x_t": np.concatenate([x, x]), "noise_levels": np.full(2, level, np.float32), **text}
        with_text, without = np.split(self.network.run(None, inputs)[0], 2)
        guided = w * with_text + (1 - w) * without
        if phi and w not in (0, 1) and guided.std() > 0:
            guided = guided * (1 + phi * (with_text.std() / guided.std() - 1))
        return guided


def main() -> None:
    """Write a picture of a prompt."""
    sampler = Sampler(Path(__file__).parent)
    settings = sampler.settings
    _, height, width = shape = settings["latent_shape"]
    size, multiple = f"{width * settings['factor']}x{height * settings['factor']}", settings["multiple"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", default="sample.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default=size, help=f"WIDTHxHEIGHT in pixels, multiples of {multiple}")
    parser.add_argument("--steps", type=int, default=settings["diffusion_steps"])
    parser.add_argument("--guidance", type=float, default=settings["class_guidance"])
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    if width % multiple or height % multiple or given.steps < 2:
        parser.error(f"sides are multiples of {multiple} pixels, and there are at least 2 steps")
    shape = shape[0], height // settings["factor"], width // settings["factor"]
    noise = np.random.default_rng(given.seed).standard_normal(shape, np.float32)
    picture = sampler.generate(given.prompt, noise, diffusion_steps=given.steps, class_guidance=given.guidance)
    Image.fromarray(picture).save(given.output)
    print(given.output)


if __name__ == "__main__":
    main()
