"""Train a tiny network for some steps, alone or as one of several processes, and save what it saw and got.

    python train_in_processes.py OUT            # or: python -m torch.distributed.run --nproc-per-node 2 ...

Writes OUT/RANK.safetensors: for each step the network's inputs in this process (latents, noise levels, embeddings), and
over all processes the loss.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from latentloom.diffusion import get_network
from latentloom.params import load_params
from latentloom.training.dataset import LatentDataset
from latentloom.training.loop import TrainingState, train


def main(out: Path, data: LatentDataset) -> None:
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    settings = params.train.model_copy(update={"steps": 20, "batch_size": 8, "gradient_accumulation": 2})
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    network = get_network(8, 1, 16, 4, widths=(16, 32), text_dim=12).to(memory_format=torch.channels_last)
    seen: list[tuple[torch.Tensor, ...]] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    steps = train(
        TrainingState.start(network, settings),
        data,
        params=settings,
        diffusion=params.diffusion,
        seed=0,
        accelerator=accelerator,
    )
    losses = [float(accelerator.reduce(step.loss, "mean")) for step in steps]
    inputs = {
        name: torch.stack(values) for name, values in zip(("x", "level", "text"), zip(*seen, strict=True), strict=True)
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(inputs | {"loss": torch.tensor(losses)}, out / f"{accelerator.process_index}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), torch.load)  # replaced below
