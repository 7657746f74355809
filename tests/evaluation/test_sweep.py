"""A sweep samples every combination, counts what is right, and leaves one chart and its table, or nothing."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from latent_data import TensorDataset
from PIL import Image

from latentloom.diffusion import SamplingSettings
from latentloom.encoding.dataset import Caches, LatentDataset
from latentloom.evaluation.sweep import CHART, TABLE, save_sweep, sweep, sweep_chart
from latentloom.params import SweepParams
from latentloom.params_file import load_params

GUIDANCE, STEPS = [1.0, 3.0, 5.0], [20, 70]
COLUMNS = ["class_guidance", "diffusion_steps", "held_out_recall_at_1", "latent_mae"]
POINTS = pd.DataFrame([(w, n, 1 - 0.1 * w, 0.2 + w / n) for n, w in product(STEPS, GUIDANCE)], columns=COLUMNS)


class Drifting:
    """Gives each caption's own latent, shifted by guidance / steps; from guidance 4 on, the next caption's."""

    def latents(self, embeddings, names, settings, *, seed, shapes):
        assert seed == 7 and settings.sampler == "dpmpp_2m"
        rows = [int(name, 16) for name in names]
        if settings.class_guidance >= 4:
            rows = [row + 1 for row in rows]
        return LATENTS[rows] + settings.class_guidance / settings.diffusion_steps


LATENTS = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def split(rows: range) -> LatentDataset:
    """Images 4 to 11 are held out, 5 with a word that no training caption has."""
    return TensorDataset.from_tensors(
        ids=[f"{row:064x}" for row in rows],
        mean=LATENTS[rows],
        std=None,
        embeddings=torch.randn(12, 8, generator=torch.Generator().manual_seed(1)),
        texts=["a b", "c d", "e f", "g h", "a c", "wyvern", "a d", "a e", "a f", "a g", "a h", "b c"],
        captions=torch.tensor(rows)[:, None],
    )


@pytest.fixture
def caches() -> Caches:
    return Caches(split(range(4)), split(range(4, 12)), {}, {})


@pytest.fixture
def settings():
    settings = load_params(Path(__file__).parents[2] / "params.yaml").evaluate
    given = SweepParams(class_guidance=[5, 1, 3, 1], diffusion_steps=[70, 20])
    return settings.model_copy(
        update={
            "held_out_captions": 7,
            "training_captions": 4,
            "sweep": given,
            "sampling": SamplingSettings(sampler="dpmpp_2m"),
        }
    )


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_combination_is_measured_once_on_the_held_out_combinations(caches, settings):
    points = sweep(Drifting(), caches, settings, seed=7)
    assert list(points.columns) == COLUMNS
    assert list(points[["diffusion_steps", "class_guidance"]].itertuples(index=False)) == list(product(STEPS, GUIDANCE))
    known = np.array([4, 6, 7, 8, 9, 10])
    mixed_up = (LATENTS[known + 1] - LATENTS[known]).numpy()
    for point in points.itertuples():
        shift = point.class_guidance / point.diffusion_steps
        right = point.class_guidance < 4
        assert point.held_out_recall_at_1 == (1.0 if right else 0.0)
        expected = shift if right else np.abs(mixed_up + shift).mean()
        assert point.latent_mae == pytest.approx(expected, rel=1e-4)


def test_where_no_combination_is_held_out_training_captions_are_compared_under_their_own_name(caches, settings):
    points = sweep(Drifting(), replace(caches, validation=caches.validation.take(0)), settings, seed=7)
    assert list(points.columns) == [*COLUMNS[:2], "memorisation_recall", "latent_mae"]
    assert (points["memorisation_recall"] == (points["class_guidance"] < 4)).all()
    assert save_sweep(points).shape == save_sweep(POINTS).shape


def test_without_a_sweep_nothing_is_sampled(caches, settings):
    assert sweep(None, caches, settings.model_copy(update={"sweep": None}), seed=7) is None


def test_the_table_has_a_row_per_combination_and_the_chart_a_line_per_step_count():
    chart = save_sweep(POINTS)
    table = pd.read_csv(TABLE)
    pd.testing.assert_frame_equal(table, POINTS, rtol=1e-12)
    with Image.open(CHART) as saved:
        np.testing.assert_array_equal(np.asarray(saved), chart)
    colours = {tuple(pixel) for pixel in chart.reshape(-1, 3)}
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # matplotlib's first three
    assert {blue, orange} <= colours and green not in colours


def test_the_same_figures_give_the_same_bytes_whatever_the_users_matplotlib_settings():
    import matplotlib

    save_sweep(POINTS)
    first = CHART.read_bytes(), TABLE.read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 20}):
        save_sweep(POINTS)
    assert (CHART.read_bytes(), TABLE.read_bytes()) == first


def test_files_of_an_earlier_sweep_do_not_outlive_it():
    save_sweep(POINTS)
    (CHART.parent / "mae_by_noise.csv").write_text("kept")
    assert save_sweep(None) is None
    assert [path.name for path in CHART.parent.iterdir()] == ["mae_by_noise.csv"]


def test_a_single_combination_has_a_chart():
    assert sweep_chart(POINTS[:1]).width == sweep_chart(POINTS).width


def test_the_params_that_the_page_about_sampling_shows_are_allowed(tmp_path):
    root = Path(__file__).parents[2]
    page = (root / "docs" / "sampling.md").read_text(encoding="utf-8")
    shown = [yaml.safe_load(block)["evaluate"] for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    shown += [{"sweep": yaml.safe_load(given)} for given in re.findall(r"-S 'evaluate\.sweep=(.*?)'", page)]
    assert len(shown) == 2
    for number, values in enumerate(shown):
        params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
        params["evaluate"] |= values
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(params), encoding="utf-8")
        assert load_params(path).evaluate.sweep is not None
