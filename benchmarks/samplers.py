"""How near each sampler gets in how many steps: the project's own model against 1000 steps of DDIM from the same noise.

    distance   mean absolute difference to the 1000-step latents, in standard deviations of a latent
    recall     share of samples whose nearest training latent is that of their caption

Guidance and thresholding are those of params.yaml, all in fp32. Needs a finished `dvc repro`.

    TQDM_DISABLE=1 PYTHONPATH=src python benchmarks/samplers.py [--captions 32] [--steps 10 20 35 70]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from latentloom.devices import choose_device
from latentloom.diffusion import SAMPLERS
from latentloom.encoding.dataset import load_caches
from latentloom.evaluation.sampling import Sampler, recall_at_1
from latentloom.model_files import load_model
from latentloom.params import load_params

REFERENCE_STEPS = 1000
MODEL = Path("models/unet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 35, 70])
    arguments = parser.parse_args()
    if not MODEL.exists():
        print(f"{MODEL} does not exist yet: run `dvc repro` first")
        return
    params, device = load_params(), choose_device()
    network, config = load_model(MODEL, device)
    train = load_caches(Path("data/latents"), Path("data/text")).to(device).train
    known = train.take(min(arguments.captions, len(train)))
    settings = params.evaluate
    reference = Sampler(
        network,
        config,
        guidance=settings.class_guidance,
        steps=REFERENCE_STEPS,
        threshold_percentile=settings.threshold_percentile,
        dtype=None,
        guidance_interval=tuple(settings.guidance_interval),
        guidance_rescale=settings.guidance_rescale,
    )

    def draw(sampler: Sampler) -> tuple[torch.Tensor, float]:
        latents = sampler.latents(known.primary_embeddings(), known.ids, params.seed)
        return latents, recall_at_1(latents, train)

    exact, recall = draw(reference)
    print(f"{len(known)} captions, guidance {settings.class_guidance:g}; reference: recall {recall:.3f}", flush=True)
    print("| steps |" + "".join(f" {name}: distance | recall |" for name in SAMPLERS))
    print("|---|" + "---|---|" * len(SAMPLERS))
    for steps in arguments.steps:
        cells = []
        for name in SAMPLERS:
            latents, recall = draw(replace(reference, sampler=name, steps=steps))
            cells.append(f" {(latents - exact).abs().mean().item():.4f} | {recall:.3f} |")
        print(f"| {steps} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
