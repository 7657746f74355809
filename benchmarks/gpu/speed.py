"""How fast the device is, and how fast we are on it: training steps, samples, encoders.

Each function is a part of `benchmarks/on_gpu.py` and takes its job and its record. What is measured is what the other
benchmarks measure, by their own functions.
"""

import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import encode
import numpy as np
import sample
import torch
import train_step
from torch import nn
from train_step import Contender, Settings

from gpu import variants
from gpu.parts import Job, Record, Unmeasurable
from latentloom.devices import autocast_dtype, choose_device
from latentloom.encoding.shard_files import INDEX

COMPILING = 75.0  # seconds that compiling a step may take


def machine(job: Job, record: Record) -> None:
    """What the device is, and what it can do at best."""
    device = choose_device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record.add(
            "device",
            device=properties.name,
            memory_GiB=round(properties.total_memory / 2**30, 1),
            multiprocessors=properties.multi_processor_count,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )
    else:
        record.add("device", device=str(device), threads=torch.get_num_threads())
    record.measure("copies", lambda: {"GB/s": _copy_rate(device, job.sizes.matrices[-1])})
    for name, dtype, context in (
        ("bf16", torch.bfloat16, variants.tf32(False)),
        ("fp32", torch.float32, variants.tf32(False)),
        ("fp32 with TF32", torch.float32, variants.tf32(True)),
    ):
        record.measure(f"matrix product, {name}", partial(_product, dtype, device, job.sizes.matrices, context))


def _product(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...], context: AbstractContextManager
) -> dict[str, Any]:
    with context:
        return {"GFLOP/s": round(train_step.matrix_gflops(dtype, device, sizes))}


def _copy_rate(device: torch.device, side: int) -> float:
    """GB/s of a copy on the device, bytes read and written."""
    source = torch.zeros(16, side, side, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    return round(2 * source.nbytes * 10 / train_step.seconds(copy, 10, device) / 1e9, 1)


def step(job: Job, record: Record) -> None:
    """The training step in several sizes and ways, one change at a time."""
    first = job.sizes.batches[0]
    name = "bf16" if _settings(job, first).dtype else "fp32"
    for batch in job.sizes.batches:
        _measure_step(job, record, f"{name}, batch {batch}", _settings(job, batch))
    usual = _settings(job, first)
    for what, context in (
        ("plain convolutions", variants.plain_convolutions()),
        ("cuDNN tries its algorithms", variants.cudnn_benchmark()),
        ("norms in fp32, as autocast has them", variants.norms(nn.GroupNorm.forward)),
        ("norms that stay channels-last", variants.norms(variants.norm_in_channels_last)),
    ):
        _measure_step(job, record, f"{name}, batch {first}: {what}", usual, context)
    for what, allowed in (("TF32", True), ("no TF32", False)):
        in_fp32 = replace(usual, dtype=None)
        _measure_step(job, record, f"fp32, batch {first}: {what}", in_fp32, variants.tf32(allowed))


def graphs(job: Job, record: Record) -> None:
    """The training step as CUDA graphs: the network alone, as the training has it, or all but drawing the batch."""
    for batch in sorted(job.sizes.batches):
        settings = _settings(job, batch)
        static = partial(_static_step, settings)
        _measure_step(job, record, f"batch {batch}: inputs that stay in place, no graph", settings, make=static)
        if settings.device.type != "cuda":
            continue
        whole = partial(_static_step, settings, graph=True)
        _measure_step(job, record, f"batch {batch}: the whole step a graph", settings, make=whole)
        network = replace(settings, compile="cuda_graphs")
        _measure_step(job, record, f"batch {batch}: the network's passes as graphs", network)


def _settings(job: Job, batch: int) -> Settings:
    device, sizes = choose_device(), job.sizes
    return Settings(sizes.widths, sizes.depth, batch, autocast_dtype("auto", device), device, False, sizes.rows)


def _static_step(settings: Settings, graph: bool = False) -> Contender:
    static = variants.StaticStep(settings)
    return Contender("ours", static.state.network, (), variants.as_graph(static) if graph else static.run)


def compiled(job: Job, record: Record) -> None:
    """The training step compiled, for each batch size anew."""
    if choose_device().type == "cpu":
        raise Unmeasurable("compiling for a CPU takes minutes: `train_step.py --compile` measures it")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise Unmeasurable("torch.compile needs a C++ compiler")
    first = job.sizes.batches[0]
    for batch, what, contexts in (
        (first, "", ()),
        (first, ": norms that stay channels-last", (variants.norms(variants.norm_in_channels_last),)),
        *((batch, "", ()) for batch in job.sizes.batches[1:]),
    ):
        torch._dynamo.reset()  # else what was compiled before would count against its limit
        settings = replace(_settings(job, batch), compile=True)
        _measure_step(job, record, f"compiled, batch {batch}{what}", settings, *contexts, needs=COMPILING)


def peers(job: Job, record: Record) -> None:
    """diffusers' UNet of the same widths, in the step of its own example."""
    if not train_step.importable("diffusers"):
        raise Unmeasurable("diffusers cannot be imported")
    settings = _settings(job, job.sizes.batches[0])
    for channels_last in (False, True):
        make = partial(train_step.diffusers, settings, channels_last)
        what = "diffusers, channels-last" if channels_last else "diffusers, as its script runs"
        _measure_step(job, record, f"{what}, batch {settings.batch}", settings, make=make, theirs=True)


def _measure_step(
    job: Job,
    record: Record,
    name: str,
    settings: Settings,
    *contexts: AbstractContextManager,
    make: Callable[[], Contender] | None = None,
    theirs: bool = False,
    needs: float = 0.0,
) -> None:
    """Add the row of one contender, ours unless ``make`` gives another, within ``contexts``.

    ``theirs``: it has another network than ours.
    """
    make = make or partial(train_step.ours, settings)

    def rate() -> dict[str, Any]:
        gflop = None if theirs else _our_gflop(settings.widths, settings.depth, settings.device)
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return _step_rate(job, settings, make(), gflop)

    try:
        record.measure(name, rate, needs=needs or 4 * job.sizes.seconds)
    finally:
        _free(settings.device)


def _step_rate(job: Job, settings: Settings, contender: Contender, gflop: float | None) -> dict[str, Any]:
    device = settings.device
    if gflop is None:
        gflop = train_step.gflops(contender)[1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    contender.step()
    train_step.synchronize(device)
    first = time.perf_counter() - started
    train_step.seconds(contender.step, 2, device)
    one = train_step.seconds(contender.step, 1, device)
    steps = max(3, round(job.sizes.seconds / one))
    rate = settings.batch * steps / train_step.seconds(contender.step, steps, device)
    figures = {
        "images/s": round(rate, 1),
        "ms a step": round(1000 * settings.batch / rate, 2),
        "GFLOP an image": round(gflop, 3),
        "of the product": _share(job, settings.dtype, gflop * rate),
        "first step s": round(first, 2),
    }
    if device.type == "cuda":
        figures["peak GiB"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return figures


@cache
def _our_gflop(widths: tuple[int, ...], depth: int, device: torch.device) -> float:
    """GFLOP an image, of the network as it is: a variant that takes more of them puts them to no better use."""
    network = train_step.our_network(Settings(widths, depth, 2, None, device, False))
    example = train_step.latents(2, device), torch.rand(2, device=device), train_step.texts(2, device)
    return train_step.gflops(Contender("ours", network, example, int))[1]


def _share(job: Job, dtype: torch.dtype | None, gflops: float) -> str | None:
    """Of the rate that the matrix product of the same dtype reached; for fp32 that without TF32."""
    wanted = f"matrix product, {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    product = next((row.get("GFLOP/s") for row in job.earlier.get("machine", []) if row["name"] == wanted), None)
    return f"{gflops / product:.0%}" if product else None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sampling(job: Job, record: Record) -> None:
    """Guided sampling of a network with random weights, and decoding."""
    device, sizes = choose_device(), job.sizes
    dtype = autocast_dtype("auto", device) or torch.float32
    network = sample.our_network(sizes.widths, sizes.depth, device)

    def generate(images: int, steps: int, at_once: int, decode: Callable[[torch.Tensor], object]) -> None:
        for done in range(0, images, at_once):
            decode(sample.our_sampling(network, min(at_once, images - done), device, dtype)(steps))

    def measure(images: int, at_once: int, pictures: bool) -> dict[str, Any]:
        decode = _vae(device).decode if pictures else torch.Tensor.size
        generate(images, 2, at_once, decode)  # what is chosen once
        taken = train_step.seconds(lambda: generate(images, sizes.steps, at_once, decode), 1, device)
        return {"s": round(taken, 3), "images/s": round(images / taken, 1)}

    for name, images, at_once, pictures in (
        (f"{sizes.pictures} latents, {sizes.steps} steps", sizes.pictures, sizes.pictures, False),
        (f"{sizes.pictures} pictures, {sizes.steps} steps", sizes.pictures, sizes.pictures, True),
        (f"{sizes.samples} latents, {sizes.steps} steps", sizes.samples, sizes.samples, False),
        (f"{sizes.samples} pictures, 64 at once", sizes.samples, 64, True),
    ):
        record.measure(name, partial(measure, images, at_once, pictures), needs=4 * sizes.seconds)


def _vae(device: torch.device) -> Any:
    from latentloom.encoding.vae import load_vae

    try:
        return load_vae("bundled", device)
    except ImportError as error:
        raise Unmeasurable(f"the VAE needs diffusers ({error})") from error


def encoding(job: Job, record: Record) -> None:
    """Images and captions a second, from prepared shards."""
    if job.carry is None:
        raise Unmeasurable("no folder of prepared images was given (--carry)")
    device = choose_device()
    images = job.carry / "data" / "images"
    record.measure("images", partial(_encode_images, images, device))
    record.measure("captions", partial(_encode_captions, job.carry, device))


def _encode_images(images: Path, device: torch.device) -> dict[str, Any]:
    vae = _vae(device)
    batches = encode.batches_in_memory(vae, images)
    count = sum(map(len, batches))
    encode.encode_bare(vae, batches[:2])  # first calls choose kernels
    with tempfile.TemporaryDirectory() as folder:
        whole = train_step.seconds(lambda: encode.encode_whole(vae, images, Path(folder)), 1, device)
    bare = train_step.seconds(lambda: encode.encode_bare(vae, batches), 1, device)
    decoding = train_step.seconds(lambda: encode.decode(images), 1, device)
    names = {"images/s": whole, "bare VAE images/s": bare, "PNG decoding images/s": decoding}
    return {"images": count} | {name: round(count / taken, 1) for name, taken in names.items()}


def _encode_captions(carry: Path, device: torch.device) -> dict[str, Any]:
    """Of an encoder whose weights are random: they take the same time."""
    import pandas as pd
    import transformers

    from latentloom.encoding.text_encoder import load_text_encoder

    texts = pd.read_parquet(carry / "data" / "text" / INDEX, columns=["text"])["text"].tolist()
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(carry / "text_encoder", name, dirs_exist_ok=True)
        config = transformers.AutoConfig.from_pretrained(name)
        getattr(transformers, config.architectures[0])(config).save_pretrained(name)
        encoder = load_text_encoder(name, device)
        encoder.encode(texts[:200])
        embeddings: list[np.ndarray] = []
        taken = train_step.seconds(lambda: embeddings.append(encoder.encode(texts)), 1, device)
    return {"captions": len(texts), "captions/s": round(len(texts) / taken, 1)}
