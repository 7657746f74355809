"""How near each sampler gets in how many steps: the project's own model against 1000 steps of DDIM from the same noise.

    distance   mean absolute difference to the 1000-step latents, in standard deviations of a latent
    recall     share of samples whose nearest training latent is that of their caption

Guidance and thresholding are those of params.yaml, all in fp32. Needs a finished `dvc repro`.

    TQDM_DISABLE=1 PYTHONPATH=src python benchmarks/samplers.py [--captions 32] [--steps 10 20 35 70]
"""

import argparse

import torch

from latentloom.devices import choose_device
from latentloom.diffusion import SAMPLERS, SamplingSettings
from latentloom.encoding.dataset import load_caches
from latentloom.evaluation.recall import memorisation_recall
from latentloom.evaluation.text_to_image import load_text_to_image
from latentloom.layout import LATENTS, MODEL, TEXT
from latentloom.params_file import load_params

REFERENCE_STEPS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 35, 70])
    arguments = parser.parse_args()
    if not MODEL.exists():
        print(f"{MODEL} does not exist yet: run `dvc repro` first")
        return
    params, device = load_params(), choose_device()
    model = load_text_to_image(MODEL, device=device)
    train = load_caches(LATENTS, TEXT, device=device).train
    known = train.take(min(arguments.captions, len(train)))
    settings = params.evaluate.sampling.changed(precision="fp32")

    def sample(settings: SamplingSettings) -> tuple[torch.Tensor, float]:
        latents = torch.stack(model.latents(known.primary_embeddings(), known.names(), settings, seed=params.seed))
        return latents, memorisation_recall(latents, known, train).mean()

    exact, recall = sample(settings.changed(sampler="ddim", diffusion_steps=REFERENCE_STEPS))
    print(f"{len(known)} captions, guidance {settings.class_guidance:g}; reference: recall {recall:.3f}", flush=True)
    print("| steps |" + "".join(f" {name}: distance | recall |" for name in SAMPLERS))
    print("|---|" + "---|---|" * len(SAMPLERS))
    for steps in arguments.steps:
        cells = []
        for name in SAMPLERS:
            latents, recall = sample(settings.changed(sampler=name, diffusion_steps=steps))
            cells.append(f" {(latents - exact).abs().mean().item():.4f} | {recall:.3f} |")
        print(f"| {steps} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
