"""Staged resolution: 64 px for a part of the time, then 128 px from there, against 128 px from noise at equal CPU time.

    val MAE   over eight noise levels of the images that are held out at 128 px, as the stage `evaluate` measures it
    nearest   `held_out_recall_at_1`, of so many of their captions; among five: `held_out_recall_at_5`

The pictures are the project's own, of a finished `dvc repro`. Those that are held out at 128 px are in no training: the
split follows a picture's pixels, so at 64 px it would be another. What a step takes is measured first, on quiet cores,
and makes the time a number of steps: what other work costs later changes neither. Each training's figures are written
to a file as soon as they are known; the same command goes on from there.

    TQDM_DISABLE=1 PYTHONPATH=src python benchmarks/staged.py [--minutes 12] [--share 0.33] [--seeds 0 1 2]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from scipy.stats import t as student

from latentloom.devices import choose_device
from latentloom.diffusion.denoising_error import denoising_error
from latentloom.encoding.dataset import Caches, load_caches
from latentloom.evaluation.held_out import measure
from latentloom.evaluation.text_to_image import load_text_to_image
from latentloom.files import read_json, write_json
from latentloom.layout import IMAGES, LATENTS, TEXT
from latentloom.model_files import load_model
from latentloom.params import Params
from latentloom.training.processes import make_accelerator
from latentloom.training.run import run_training

ROOT = Path(__file__).parents[1]
SMALL = 64  # pixels
COUNTED = (4, 24)  # steps of the two trainings whose difference says what a step takes
ALONE, STAGED = "from noise", "staged"
FIGURES = {"val_mae": "val MAE", "held_out_recall_at_1": "nearest", "held_out_recall_at_5": "among five"}


@dataclass(frozen=True)
class Bench:
    """The data at both sizes, and where models go."""

    sections: dict[str, Any]  # of the params
    large: Caches
    small: Caches
    work: Path

    def params(self, seed: int, steps: int, init: str | None = None) -> Params:
        """The project's, for a training of so many steps that shows nothing and measures at its end alone."""
        train = self.sections["train"] | {"steps": steps, "init": init, "lr_schedule": "cosine", "keep": "last"}
        train["warmup_steps"] = min(train["warmup_steps"], steps // 10)
        monitor = self.sections["monitor"] | {"log_every": steps, "validate_every": steps}
        previews = self.sections["previews"] | {"prompts": []}
        return Params.model_validate(
            self.sections | {"seed": seed, "train": train, "monitor": monitor, "previews": previews}
        )

    def train(self, caches: Caches, params: Params, name: str, base: Path | None = None) -> Path:
        """The folder of a trained model."""
        folder = self.work / name
        run_training(
            params,
            caches,
            accelerator=make_accelerator(caches.train.device),
            checkpoints=None,
            resumed=None,
            model_folder=folder,
            curves_folder=self.work / "curves",
            logger=None,
            base=base,
        )
        return folder

    def seconds_per_step(self, caches: Caches) -> float:
        """CPU time."""
        took = []
        for steps in COUNTED:
            started = time.process_time()
            self.train(caches, self.params(0, steps), "counted")
            took.append(time.process_time() - started)
        return (took[1] - took[0]) / (COUNTED[1] - COUNTED[0])

    def error(self, folder: Path, params: Params) -> float:
        """The error of a model on what is held out at 128 px."""
        network, config = load_model(folder, self.large.validation.device)
        return denoising_error(
            network, self.large.validation, schedule=config.schedule, noise_levels=params.diffusion.noise_levels
        )["mae"]

    def figures(self, folder: Path, params: Params) -> dict[str, float]:
        model = load_text_to_image(folder, device=self.large.validation.device)
        held_out = self.large.validation.take(params.evaluate.held_out_captions)
        samples = model.latents(
            held_out.primary_embeddings(), held_out.names(), params.evaluate.sampling, seed=params.seed
        )
        measured = measure(samples, held_out, self.large).figures
        return {"val_mae": self.error(folder, params)} | {name: measured[name] for name in FIGURES if name in measured}

    def from_noise(self, seed: int, seconds: float, costs: dict[str, float]) -> dict[str, float]:
        params = self.params(seed, round(seconds / costs["large"]))
        folder = self.train(self.large, params, ALONE)
        return {"steps": params.train.steps} | self.figures(folder, params)

    def staged(self, seed: int, seconds: float, costs: dict[str, float], share: float) -> dict[str, float]:
        first = self.params(seed, round(seconds * share / costs["small"]))
        base = self.train(self.small, first, "small")
        then = self.params(seed, round(seconds * (1 - share) / costs["large"]), init=str(base))
        folder = self.train(self.large, then, STAGED, base)
        steps = {"small_steps": first.train.steps, "steps": then.train.steps}
        return steps | {"val_mae_before": self.error(base, first)} | self.figures(folder, then)


def make_small(sections: dict[str, Any], project: Path) -> None:
    """Caches of the training images alone at `SMALL` pixels, by the stages' own scripts, in a project of its own."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(IMAGES.glob("*.parquet")))
    project.mkdir()
    shown = table.filter(pc.field("split") == "train").select(["image", "captions"])
    pq.write_table(shown, project / "training.parquet")
    ingest = {"source": "parquet", "path": "training.parquet", "shape": "square", "image_size": SMALL}
    ingest |= {"limit": None, "skin_tones": None, "val_fraction": 0.0}
    params = sections | {"ingest": sections["ingest"] | ingest}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "DVC_ROOT": str(project)}
    for stage in ("ingest", "encode_images", "encode_text"):
        script = ROOT / "pipelines" / f"{stage}.py"
        subprocess.run([sys.executable, script], cwd=project, env=environment, check=True, stdout=sys.stderr)


def interval(values: Sequence[float]) -> str:
    """The mean, and its 95 % interval by Student's t where there are several."""
    mean = fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def show(results: dict[str, dict[str, dict[str, float]]], minutes: float) -> None:
    seeds = [seed for seed in results[ALONE] if seed in results[STAGED]]
    print(f"{minutes:g} minutes of CPU time each, seeds {', '.join(seeds)}: mean and its 95 % interval\n")
    print("| | " + " | ".join(FIGURES.values()) + " | steps |")
    print("|---" * (len(FIGURES) + 2) + "|")
    for arm in (ALONE, STAGED):
        own = [results[arm][seed] for seed in seeds]
        cells = [interval([one[name] for one in own]) for name in FIGURES if name in own[0]]
        steps = " + ".join(str(round(own[0][name])) for name in ("small_steps", "steps") if name in own[0])
        print(f"| {arm} | {' | '.join(cells)} | {steps} |")
    pairs = [(results[STAGED][seed], results[ALONE][seed]) for seed in seeds]
    names = [name for name in FIGURES if name in pairs[0][0]]
    differences = [interval([staged[name] - alone[name] for staged, alone in pairs]) for name in names]
    print(f"| the difference | {' | '.join(differences)} | |")
    before = interval([own["val_mae_before"] for own, _ in pairs])
    print(f"\nval MAE at 128 px of the model of {SMALL} px, before it is trained further: {before}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="of CPU time, for each training from noise")
    parser.add_argument("--share", type=float, default=0.33, help=f"of the time, at {SMALL} px")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--captions", type=int, help="held-out captions that are sampled; by default as in params.yaml")
    parser.add_argument("--results", type=Path, default=Path(".state/staged.json"), help="where figures are kept")
    arguments = parser.parse_args()
    if not TEXT.exists():
        print(f"{TEXT} does not exist yet: run `dvc repro` first")
        return
    sections = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    if arguments.captions:
        sections["evaluate"]["held_out_captions"] = arguments.captions
    given = {"minutes": arguments.minutes, "share": arguments.share, "params": sections}
    kept = read_json(arguments.results) if arguments.results.exists() else {}
    if kept.get("given") != given:
        kept = {"given": given, "costs": {}, "results": {ALONE: {}, STAGED: {}}}
    if missing := [seed for seed in arguments.seeds if any(str(seed) not in own for own in kept["results"].values())]:
        run(missing, arguments, sections, kept)
    show(kept["results"], arguments.minutes)


def run(seeds: Sequence[int], arguments: argparse.Namespace, sections: dict[str, Any], kept: dict[str, Any]) -> None:
    """Train what ``kept`` lacks of each seed, and add its figures."""
    with tempfile.TemporaryDirectory() as name:
        project = Path(name) / "small"
        make_small(sections, project)
        device = choose_device()
        large, small = (load_caches(own / LATENTS, own / TEXT, device=device) for own in (Path(), project))
        bench = Bench(sections, large, small, Path(name))
        for size, caches in (("large", large), ("small", small)):
            kept["costs"][size] = kept["costs"].get(size) or bench.seconds_per_step(caches)
        seconds, costs = arguments.minutes * 60, kept["costs"]
        arms: dict[str, Callable[[int], dict[str, float]]] = {
            ALONE: lambda seed: bench.from_noise(seed, seconds, costs),
            STAGED: lambda seed: bench.staged(seed, seconds, costs, arguments.share),
        }
        for seed in seeds:
            for arm, measured in arms.items():
                if str(seed) not in kept["results"][arm]:
                    kept["results"][arm][str(seed)] = measured(seed)
                    write_json(arguments.results, kept)
                print(f"seed {seed}, {arm}: {kept['results'][arm][str(seed)]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
