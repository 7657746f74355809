"""Train a tiny network on vectors and token states, alone or as one of several processes; save what it saw and got.

    python train_in_processes.py OUT [FAIL]     # or: python -m torch.distributed.run --nproc-per-node 2 ...

Writes OUT/RANK.safetensors: the network's inputs in this process, in order, and each step's loss over all processes;
and of the first steps of whole batches the gradient norms, where gradients are sent in fp32 and in bf16.
With FAIL, the training then continues, and the process of that rank raises an error in the next step.
"""

import sys
from itertools import islice
from pathlib import Path

import torch
from latent_data import TensorDataset
from safetensors.torch import save_file

from latentloom.diffusion.unet import UNet, get_network
from latentloom.encoding.dataset import LatentDataset
from latentloom.params import Params
from latentloom.params_file import load_params
from latentloom.training.loop import TrainingState, train
from latentloom.training.processes import make_accelerator

ROWS, STEPS, BATCH, PARTS, FEW = 21, 20, 8, 2, 4


def make_data() -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(ROWS, 4, 8, 8, generator=generator)
    return TensorDataset.from_tensors(
        ids=[f"image{row}" for row in range(ROWS)],
        mean=mean,
        std=torch.full_like(mean, 0.1),
        embeddings=torch.randn(ROWS, 12, generator=generator),
        texts=[f"caption {row}" for row in range(ROWS)],
        captions=torch.arange(ROWS)[:, None],
        token_states=[torch.randn(1 + row % 5, 10, generator=generator) for row in range(ROWS)],
    )


def small_network(widths: tuple[int, ...] = (16, 32)) -> UNet:
    torch.manual_seed(0)
    network = get_network(8, 1, 16, 4, widths=widths, text_dim=12, token_dim=10)
    return network.to(memory_format=torch.channels_last)


def gradient_norms(params: Params, reduce_precision: str) -> torch.Tensor:
    """Of a network whose text tokens nobody uses, which hardly moves: so they differ by what is sent alone."""
    changed = {"steps": FEW, "batch_size": BATCH, "warmup_steps": 0, "reduce_precision": reduce_precision}
    changed["learning_rate"] = 1e-5
    settings = params.train.model_copy(update=changed)
    accelerator = make_accelerator(torch.device("cpu"), static_graph=True)
    state = TrainingState.start(small_network(widths=(16,)), settings)
    steps = train(state, make_data(), params=settings, diffusion=params.diffusion, seed=0, accelerator=accelerator)
    return torch.stack([step.gradient_norm for step in steps])


def main(out: Path, failing: int | None = None) -> None:
    """Train and save, in this process alone or as one of several."""
    accelerator = make_accelerator(torch.device("cpu"))
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    settings = params.train.model_copy(update={"steps": 2 * STEPS, "batch_size": BATCH, "gradient_accumulation": PARTS})
    network = small_network()
    seen: list[tuple[torch.Tensor, ...]] = []

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if accelerator.process_index == failing and len(seen) == STEPS * PARTS:
            raise RuntimeError("the power of this node went out")
        noisy, levels, text = inputs
        seen.append((noisy, levels, text.pooled, text.tokens * text.mask.unsqueeze(2)))

    network.register_forward_pre_hook(see)
    state = TrainingState.start(network, settings)
    steps = train(state, make_data(), params=settings, diffusion=params.diffusion, seed=0, accelerator=accelerator)
    losses = [float(accelerator.reduce(step.loss, "mean")) for step in islice(steps, STEPS)]
    noisy, levels, labels, tokens = (torch.stack(values) for values in zip(*seen, strict=True))
    out.mkdir(parents=True, exist_ok=True)
    tensors = {"noisy": noisy, "levels": levels, "labels": labels, "tokens": tokens, "loss": torch.tensor(losses)}
    tensors |= {f"norm_{precision}": gradient_norms(params, precision) for precision in ("fp32", "bf16")}
    save_file(tensors, out / f"{accelerator.process_index}.safetensors")
    if failing is not None:
        list(steps)
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
