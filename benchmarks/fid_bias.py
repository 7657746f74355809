"""How large FID comes out of few pictures, and how sure KID is: the table in docs/evaluation.md.

Two sets of features are drawn from one Gaussian (768 dimensions, the k-th with a variance in proportion to 1/k, 1 in
all), so their true distance is 0; then the second from one that is 10 % wider, where FID is 0.01. KID, whose kernel
divides by the dimensions, gets the same features with a variance of 1 per dimension, which is about what vision models
give. No pictures are made: what is shown is what their number does, and no model can do anything about it.

    PYTHONPATH=src python benchmarks/fid_bias.py [--sizes 30 100 300 1000 3000] [--rounds 3]
"""

import argparse

import numpy as np

from latentloom.evaluation.distances import frechet_distance, kernel_distance

DIMENSIONS = 768
WIDER = 1.1


def main(sizes: list[int], rounds: int) -> None:
    deviations = np.sqrt(1 / np.arange(1, DIMENSIONS + 1))
    deviations /= np.sqrt(np.square(deviations).sum())
    print(
        f"FID of all there is: 0 of one distribution, {np.square(deviations * (WIDER - 1)).sum():.3f} of one 10 % wider"
    )
    print(f"{'pictures':>8}  {'fid':>6}  {'10 % wider':>10}  standard error of kid, the least and the most")
    for size in sizes:
        rows = []
        for seed in range(rounds):
            random = np.random.default_rng(seed)
            real, same = (random.standard_normal((size, DIMENSIONS)) * deviations for _ in range(2))
            wider = WIDER * same
            fids = [frechet_distance(real, samples) for samples in (same, wider)]
            scale = np.sqrt(DIMENSIONS)
            errors = [kernel_distance(scale * real, scale * samples)[1] for samples in (same, wider)]
            rows.append((*fids, *errors))
        fid, wide = np.mean(rows, axis=0)[:2]
        errors = np.array(rows)[:, 2:]
        print(f"{size:>8,}  {fid:>6.2f}  {wide:>10.2f}  {errors.min():.2g} to {errors.max():.2g}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[30, 100, 300, 1000, 3000])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.sizes, arguments.rounds)
