"""Train the bundled VAE on rendered OpenMoji. No stage of the DVC graph: the weights that it makes are shipped.

    PYTHONPATH=src:tools python -m bundled_vae.train [PARAMS]

Without PARAMS, those of `train.yaml` beside this file. An interrupted training resumes from its last checkpoint.
"""

import sys
from pathlib import Path

import yaml
from tqdm import tqdm

from bundled_vae.checkpoint import checkpoint_path, resume, save_checkpoint, save_vae
from bundled_vae.data import evaluation_stems, rendered, training_pictures
from bundled_vae.network import Architecture
from bundled_vae.report import figures_table, save_reconstructions
from bundled_vae.training import Recipe, begin, evaluate, finished_vae, train


def main(params_path: Path) -> None:
    params = yaml.safe_load(params_path.read_text(encoding="utf-8"))
    output, cache, pictures = Path(params["output"]), Path(params["cache"]), params["pictures"]
    architecture = Architecture(**{name: tuple(levels) for name, levels in params["architecture"].items()})
    knots = tuple(tuple(knot) for knot in params["recipe"].pop("decay_knots", ()))
    recipe = Recipe(architecture, decay_knots=knots, **params["recipe"])

    training = training_pictures(pictures["size"], pictures["large_size"], pictures["held_out"], cache)
    stems = evaluation_stems(pictures["held_out"])
    held_out = rendered(stems, pictures["size"], cache)
    calibration = training.exact[training.weights > 0]

    state = begin(recipe)
    checkpoint = checkpoint_path(cache, recipe)
    resume(state, checkpoint)
    with tqdm(total=recipe.steps * recipe.batch_size, initial=state.step * recipe.batch_size, unit="image") as bar:
        for _ in train(state, training, recipe):
            bar.update(recipe.batch_size)
            bar.set_postfix(loss=f"{state.losses['loss']:.4f}", refresh=False)
            if state.step % params["checkpoint_every"] == 0:
                save_checkpoint(state, checkpoint)
            if state.step % params["evaluate_every"] == 0:
                vae = finished_vae(state, calibration[::8])
                save_vae(vae, checkpoint.with_suffix(""))
                bar.write(f"step {state.step}: " + figures_table(evaluate(vae, held_out)))

    vae = save_vae(finished_vae(state, calibration), output)
    save_reconstructions(vae, held_out, output / "reconstructions.png")
    print(f"{len(stems)} held-out emoji: " + figures_table(evaluate(vae, held_out)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("train.yaml"))
