"""What the shipped params cost: validation takes at most a twentieth of a training's time, at any size of data."""

from pathlib import Path

import pytest

from latentloom.diffusion.denoising_error import LEVELS_PER_ROW
from latentloom.params_file import load_params

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))], ids=lambda p: p.name
)
def test_validation_costs_at_most_five_percent_of_a_training(path):
    params = load_params(path)
    forward_passes = params.monitor.validation_images * LEVELS_PER_ROW
    trained = params.monitor.validate_every * params.train.batch_size
    assert (
        forward_passes / (3 * trained) <= 0.05
    )  # a trained image costs a forward pass and a backward one of twice that
