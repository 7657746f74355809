"""Images per second of guided sampling: our `Diffuser` beside diffusers' `StableDiffusionPipeline`.

Both go from noise to latents of 4x16x16 by DDIM, with the same images, steps and guidance (both halves in one batch),
and decode nothing. The networks have the same widths, depth and levels with attention, and 64 channels per head, with
random weights; text is 8 tokens of 256, which ours makes from an embedding of 384 and the peer is given. They are not
the same network: the peer's has one more layer per level on the way up and a feed-forward part in each attention block,
so parameters and operations are printed too. Ours thresholds each prediction, the peer does not.

    fp32   as they are
    bf16   ours under autocast; the peer's cast to bf16, or under autocast; left out where the device has to emulate it

In each precision the peer runs in the fastest of its ways (memory format, cast or autocast), found by a short run of
each. Then all take turns; figures are medians over the rounds.

    PYTHONPATH=src python benchmarks/sample.py [--images 36] [--steps 70] [--rounds 5] [--device cpu]
        [--widths 64 128 256] [--depth 1]
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_step import CHANNELS, SIZE, TEXT_DIM, diffusers_network

from latentloom.devices import autocast_dtype, choose_device
from latentloom.diffusion import Diffuser, UNet, get_network

GUIDANCE = 3.0
TOKENS, TOKEN_DIM = 8, 256
SHORT = 2  # steps in which the peer's ways are compared

Sample = Callable[[int], torch.Tensor]


def our_network(widths: Sequence[int], depth: int, device: torch.device) -> UNet:
    network = get_network(SIZE, depth, TOKEN_DIM, CHANNELS, widths=widths, text_dim=TEXT_DIM)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def peer_network(widths: Sequence[int], depth: int, device: torch.device) -> nn.Module:
    return diffusers_network(widths, depth, TOKEN_DIM, device).eval().requires_grad_(False)


def our_sampling(network: UNet, images: int, device: torch.device, dtype: torch.dtype) -> Sample:
    noise = torch.randn(images, CHANNELS, SIZE, SIZE, device=device)
    labels = torch.randn(images, TEXT_DIM, device=device)
    half = None if dtype == torch.float32 else dtype

    def sample(steps: int) -> torch.Tensor:
        diffuser = Diffuser(network, GUIDANCE, steps, bound=3.0, autocast_dtype=half)
        return diffuser.reverse_diffusion(noise, labels, layout="nchw")

    return sample


def peer_sampling(
    network: nn.Module, images: int, device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None
) -> Sample:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=network,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    given = {"device": device, "dtype": dtype}
    tensors = {
        "latents": torch.randn(images, CHANNELS, SIZE, SIZE, **given),
        "prompt_embeds": torch.randn(images, TOKENS, TOKEN_DIM, **given),
        "negative_prompt_embeds": torch.zeros(images, TOKENS, TOKEN_DIM, **given),
    }

    def sample(steps: int) -> torch.Tensor:
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            return pipeline(**tensors, guidance_scale=GUIDANCE, num_inference_steps=steps, output_type="latent").images

    return sample


def fastest_peer(
    widths: Sequence[int], depth: int, images: int, device: torch.device, dtype: torch.dtype
) -> tuple[str, Sample]:
    """The peer's fastest way of running in ``dtype``, and what it is called."""
    ways = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for autocast in [None] if dtype == torch.float32 else [None, dtype]:
            stored = torch.float32 if autocast else dtype
            network = peer_network(widths, depth, device).to(stored, memory_format=memory_format)
            name = str(memory_format).removeprefix("torch.") + (", autocast" if autocast else "")
            ways[name] = peer_sampling(network, images, device, stored, autocast)
    for sample in ways.values():
        sample(SHORT)  # first calls choose kernels
    taken = {name: min(seconds(sample, SHORT) for _ in range(2)) for name, sample in ways.items()}
    best = min(taken, key=taken.get)
    return best, ways[best]


def seconds(sample: Sample, steps: int) -> float:
    """How long a sampling takes, the device's work included."""
    started = time.perf_counter()
    if not sample(steps).isfinite().all():  # waits for the device
        raise RuntimeError("the samples are not finite")
    return time.perf_counter() - started


def describe(name: str, network: nn.Module, *inputs: torch.Tensor) -> float:
    """Print a network's size; its operations in one forward pass of one image, in GFLOP."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    gflop = counter.get_total_flops() / 1e9
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(f"{name:>5}  {parameters:6.1f}M parameters  {gflop:6.3f} GFLOP a forward pass of one image")
    return gflop


def main() -> None:
    import diffusers
    from diffusers.models.attention_processor import AttnProcessor

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=36)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=choose_device())
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--depth", type=int, default=1)
    arguments = parser.parse_args()
    widths, depth, images, device = arguments.widths, arguments.depth, arguments.images, arguments.device
    diffusers.logging.set_verbosity_error()
    torch.manual_seed(0)
    ours = our_network(widths, depth, device)
    latent, level = torch.randn(1, CHANNELS, SIZE, SIZE, device=device), torch.ones(1, device=device)
    print(f"{images} images, {arguments.steps} steps, widths {widths}, depth {depth}, on {device}", end="")
    print(f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    gflop = describe("ours", ours, latent, level, torch.randn(1, TEXT_DIM, device=device))
    tokens = torch.randn(1, TOKENS, TOKEN_DIM, device=device)
    spelt_out = peer_network(widths, depth, device)
    spelt_out.set_attn_processor(AttnProcessor())  # the fused kernel's operations are not counted on a CPU
    peer_gflop = describe("peer", spelt_out, latent, level, tokens)
    precisions = {"fp32": torch.float32}
    if autocast_dtype("auto", device) is torch.bfloat16:
        precisions["bf16"] = torch.bfloat16
    else:
        print("bf16 is left out: this device has no instructions for it")
    ways, samplings = {}, {}
    for name, dtype in precisions.items():
        samplings[f"ours {name}"] = our_sampling(ours, images, device, dtype)
        samplings[f"ours {name}"](SHORT)
        ways[name], samplings[f"peer {name}"] = fastest_peer(widths, depth, images, device, dtype)
    rounds = [
        {name: seconds(sample, arguments.steps) for name, sample in samplings.items()} for _ in range(arguments.rounds)
    ]
    for name in samplings:
        taken = median(one[name] for one in rounds)
        print(f"{name}  {taken:8.2f} s  {images / taken:8.2f} images/s")
    for name in precisions:
        ratio = median(one[f"peer {name}"] / one[f"ours {name}"] for one in rounds)
        print(f"{name}: peer ({ways[name]}) / ours {ratio:.2f}; an operation {ratio * gflop / peer_gflop:.2f}")
    print(f"the machine's load: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
