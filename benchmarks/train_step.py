"""Images a second of our training step against diffusers and denoising_diffusion_pytorch, networks of like size.

    ours        `train` of latentloom/training/loop.py on synthetic latents: draw, noise, UNet, L1 loss, backward, clip,
                AdamW, moving average
    diffusers   `UNet2DConditionModel` of the same widths, layers a block, heads, and attention at all levels but the
                finest, in a step written as its example train_text_to_image.py does (with --use_ema): DDPM noise,
                squared error of the noise, AdamW, clip, `EMAModel`. Its up blocks have one layer more than ours, its
                attention has feed-forward layers; text is one token, which is cheaper for it than our eight.
                `channels-last` is the same in the memory format that its script does not use.
    ddpm        `Unet` and `GaussianDiffusion` of denoising_diffusion_pytorch with the same widths, in a step as its
                `Trainer` does. It takes no text, and has two blocks a level at every --depth.

Everyone computes under the same autocast, and with --compile is compiled. Rounds of all contenders alternate, so that
another load on the machine meets all alike; figures are medians over the rounds. FLOPs are counted by torch's
`FlopCounterMode`, forward and backward; beside them stands what a plain matrix product of the same dtype reaches in the
same rounds, at its best size. So images/s compare whole programs, and the last column the execution alone.

A peer that cannot be imported is skipped. denoising_diffusion_pytorch imports torchvision for its Trainer alone, so a
stand-in is put in its place for the import; install it into a folder of its own:

    pip install --no-deps --target /tmp/peer denoising_diffusion_pytorch==2.3.4 einops ema-pytorch
    PYTHONPATH=src:/tmp/peer python benchmarks/train_step.py [--precision fp32] [--rounds 7] [--steps 8]

--profile shows where our step's time goes, operator by operator, instead (OMP_NUM_THREADS=1: on one core).
On a GPU: --widths 128,256,512 --depth 2 --batch 256,1024,4096 --compile
"""

import argparse
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from latentloom.devices import autocast, autocast_dtype, choose_device
from latentloom.diffusion import UNet, get_network
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.dataset import LatentDataset, Split
from latentloom.encoding.image_captions import Captions, CaptionTexts
from latentloom.encoding.row_sources import InMemoryRows
from latentloom.params import Compile, DiffusionParams, TrainParams

ROOT = Path(__file__).resolve().parents[1]
CHANNELS, SIZE, TEXT_DIM = 4, 16, 384
ROWS = 16_384  # synthetic latents in memory
MATRIX_SIZES = (1024, 2048, 4096)  # and 8192 on a GPU


@dataclass(frozen=True)
class Settings:
    """What all contenders share."""

    widths: tuple[int, ...]
    depth: int
    batch: int
    dtype: torch.dtype | None  # for autocast; None computes in fp32
    device: torch.device
    compile: Compile  # by our own loop as `machine.compile` says; the others are compiled where it is true
    rows: int = ROWS  # of synthetic data
    optimizer: str = "adamw"  # of ours, as `train.optimizer` names it; the others have AdamW or Adam


@dataclass(frozen=True)
class Contender:
    """A network, an input of two rows for it, and its training step."""

    name: str
    network: nn.Module
    example: tuple[torch.Tensor, ...]
    step: Callable[[], object]


def our_network(settings: Settings, *, size_condition: bool = False) -> UNet:
    torch.manual_seed(0)
    network = get_network(
        SIZE,
        settings.depth,
        256,
        CHANNELS,
        widths=settings.widths,
        text_dim=TEXT_DIM,
        size_condition=size_condition,
    )
    return network.to(settings.device, memory_format=torch.channels_last)


def our_params(settings: Settings) -> tuple[TrainParams, DiffusionParams]:
    """Those of the shipped params.yaml, for batches of this size and no end of steps."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    changed = {"steps": 10**9, "batch_size": settings.batch, "gradient_accumulation": 1}
    return TrainParams(**(params["train"] | changed)), DiffusionParams(**params["diffusion"])


def ours(settings: Settings, network: UNet | None = None, data: LatentDataset | Split | None = None) -> Contender:
    """All that this script knows of our training loop."""
    from latentloom.training.loop import TrainingState, train

    network = network or our_network(settings)
    train_params, diffusion = our_params(settings)
    train_params = train_params.model_copy(update={"optimizer": settings.optimizer})
    steps = train(
        TrainingState.start(network, train_params, settings.dtype),
        data or synthetic_data(settings),
        params=train_params,
        diffusion=diffusion,
        seed=0,
        dtype=settings.dtype,
        compiled=settings.compile,
    )
    example = (latents(2, settings.device), torch.rand(2).to(settings.device), texts(2, settings.device))
    return Contender("ours", network, example, lambda: next(steps))


def synthetic_data(settings: Settings) -> LatentDataset:
    rows, device = settings.rows, settings.device
    return LatentDataset(
        ids=np.zeros((rows, 32), np.uint8),
        latents=InMemoryRows({"mean": latents(rows, device)}),
        codec=LatentCodec([0.0] * CHANNELS, [1.0] * CHANNELS),
        text=InMemoryRows({"embedding": texts(rows, device)}),
        texts=CaptionTexts(Path()),  # nobody asks for one
        captions=Captions(torch.arange(rows, dtype=torch.int32), torch.arange(rows), torch.ones(rows).int()),
    )


def latents(rows: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, CHANNELS, SIZE, SIZE).to(device)


def texts(rows: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, TEXT_DIM).to(device)


def diffusers_network(widths: Sequence[int], depth: int, text_dim: int, device: torch.device) -> nn.Module:
    """diffusers' UNet of the same widths, depth, heads of 64 channels, and attention at all levels but the finest."""
    from diffusers import UNet2DConditionModel

    deeper = len(widths) - 1
    network = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=tuple(widths),
        layers_per_block=depth,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
        up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
        norm_num_groups=math.gcd(32, *widths),  # 32, its default, wherever that divides
        cross_attention_dim=text_dim,
        attention_head_dim=tuple(max(width // 64, 1) for width in widths),  # it means the number of heads
    )
    return network.to(device)


def diffusers(settings: Settings, channels_last: bool) -> Contender:
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    network = diffusers_network(settings.widths, settings.depth, TEXT_DIM, settings.device)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-2)
    average = EMAModel(network.parameters(), model_cls=UNet2DConditionModel, model_config=network.config)
    data, text = latents(settings.rows, settings.device), texts(settings.rows, settings.device).unsqueeze(1)

    def step() -> float:
        rows = torch.randint(settings.rows, (settings.batch,), device=settings.device)
        clean = data[rows]
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (settings.batch,), device=settings.device)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        if channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with autocast(settings.dtype, settings.device):
            predicted = network(noisy, timesteps, text[rows]).sample
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        return loss.item()  # its script logs every step

    timesteps = torch.zeros(2, dtype=torch.long, device=settings.device)
    example = (data[:2], timesteps, text[:2])
    return Contender("diffusers channels-last" if channels_last else "diffusers", network, example, step)


def ddpm(settings: Settings) -> Contender:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    multiples = tuple(width // settings.widths[0] for width in settings.widths)
    network = Unet(settings.widths[0], dim_mults=multiples, channels=CHANNELS).to(settings.device)
    diffusion = GaussianDiffusion(network, image_size=SIZE, auto_normalize=False).to(settings.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10).to(settings.device)
    data = latents(settings.rows, settings.device)

    def step() -> float:
        with autocast(settings.dtype, settings.device):
            loss = diffusion(data[torch.randint(settings.rows, (settings.batch,), device=settings.device)])
        shown = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return shown

    example = (data[:2], torch.zeros(2, dtype=torch.long, device=settings.device))
    return Contender("ddpm", network, example, step)


def importable(module: str) -> bool:
    """Whether a peer is there; if not, a line says so. torchvision and pytorch_fid are stood in for meanwhile."""
    stand_ins = ("torchvision", "pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception")
    stand_ins = [name for name in stand_ins if module != "diffusers" and name not in sys.modules]
    sys.modules.update({name: MagicMock() for name in stand_ins})
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module} is left out: {error}")
        return False
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return True


def gflops(contender: Contender) -> tuple[float, float]:
    """GFLOP an image: forward, and forward with backward."""
    rows = len(contender.example[0])
    # Attention as plain products: the counter knows not every fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = contender.network(*contender.example)
        forward = counter.get_total_flops()
        getattr(out, "sample", out).sum().backward()
    contender.network.zero_grad()
    return forward / rows / 1e9, counter.get_total_flops() / rows / 1e9


def seconds(action: Callable[[], object], times: int, device: torch.device) -> float:
    """How long ``action`` takes, ``times`` times over, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        action()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def matrix_gflops(dtype: torch.dtype, device: torch.device, sizes: Sequence[int] | None = None) -> float:
    """The GFLOP/s of a square matrix product, at the best of several sizes."""
    rates = []
    for size in sizes or (MATRIX_SIZES if device.type == "cpu" else (*MATRIX_SIZES, 8192)):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(left)

        def multiply(left=left, right=right, product=product) -> None:
            torch.mm(left, right, out=product)

        multiply()
        times = max(3, int(0.2 / seconds(multiply, 1, device)))
        rates.append(2 * size**3 * times / seconds(multiply, times, device) / 1e9)
    return max(rates)


def compare(settings: Settings, peers: list[str], rounds: int, steps: int) -> None:
    contenders = [ours(settings)]
    if "diffusers" in peers:
        contenders += [diffusers(settings, channels_last) for channels_last in (False, True)]
    if "ddpm" in peers:
        contenders.append(ddpm(settings))
    print(
        f"\n{CHANNELS}x{SIZE}x{SIZE} latents, text of {TEXT_DIM}, widths {settings.widths}, depth {settings.depth}, "
        f"batch {settings.batch}, {settings.dtype or 'fp32'}{', compiled' if settings.compile else ''}, on "
        f"{settings.device} ({torch.get_num_threads()} threads), torch {torch.__version__}; {rounds} rounds of "
        f"{steps} steps"
    )
    costs = {contender.name: gflops(contender) for contender in contenders}  # before any graph is compiled
    for contender in contenders:
        if settings.compile and contender.name != "ours":  # our loop compiles by itself
            contender.network.compile()
        seconds(contender.step, 3, settings.device)  # first calls choose kernels, and compile
    measured: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    products = []
    for _ in range(rounds):
        products.append(matrix_gflops(settings.dtype or torch.float32, settings.device))
        for contender in contenders:
            taken = seconds(contender.step, steps, settings.device)
            measured[contender.name].append(settings.batch * steps / taken)
    product = median(products)
    print(f"matrix product: {product:,.0f} GFLOP/s")
    print(f"{'':24}{'parameters':>12}{'forward':>9}{'training':>10}{'images/s':>10}{'GFLOP/s':>10}{'of product':>12}")
    print(f"{'':36}{'GFLOP an image':>19}")
    for contender in contenders:
        forward, whole = costs[contender.name]
        rate = median(measured[contender.name])
        parameters = sum(weight.numel() for weight in contender.network.parameters()) / 1e6
        share = median(whole * one / per for one, per in zip(measured[contender.name], products, strict=True))
        print(
            f"{contender.name:24}{parameters:11.2f}M{forward:9.3f}{whole:10.3f}{rate:10,.1f}{whole * rate:10,.0f}"
            f"{share:12.1%}"
        )
    for contender in contenders[1:]:
        ratios = sorted(own / its for own, its in zip(measured["ours"], measured[contender.name], strict=True))
        print(f"ours / {contender.name}: {median(ratios):.2f} (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})")


def show_profile(settings: Settings, steps: int) -> None:
    """Our step's operators, by the time that they themselves take."""
    step = ours(settings).step
    seconds(step, 3, settings.device)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (settings.device.type == "cuda")
    with profile(activities=kinds) as profiled:
        seconds(step, steps, settings.device)
    order = f"self_{settings.device.type}_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40))


def numbers(value: str) -> tuple[int, ...]:
    return tuple(int(number) for number in value.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=numbers, default=(64, 128, 256), help="64,128,256")
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--batch", type=numbers, default=(64,), help="one or several: 256,1024")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", type=torch.device, default=choose_device())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="of ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="a round")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peers", nargs="*", choices=("diffusers", "ddpm"), default=("diffusers", "ddpm"))
    arguments = parser.parse_args()
    modules = {"diffusers": "diffusers", "ddpm": "denoising_diffusion_pytorch"}
    asked = [] if arguments.profile else arguments.peers
    peers = [peer for peer in asked if importable(modules[peer])]
    for batch in arguments.batch:
        settings = Settings(
            arguments.widths,
            arguments.depth,
            batch,
            autocast_dtype(arguments.precision, arguments.device),
            arguments.device,
            arguments.compile,
            optimizer=arguments.optimizer,
        )
        if arguments.profile:
            show_profile(settings, arguments.steps)
        else:
            compare(settings, peers, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
