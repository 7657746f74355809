"""Curves by noise level: both splits in a panel for each bin, from what a training left."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from latentloom.diffusion.denoising_error import BINS, bin_name
from latentloom.evaluation.noise_curves import CHART, render_noise_curves, save_noise_curves


def table(split: str, errors: list[float]) -> pd.DataFrame:
    columns = {f"{split}_mae_{bin_name(*bounds)}": np.array(errors) + number for number, bounds in enumerate(BINS)}
    return pd.DataFrame({"step": [100, 200, 300]} | columns)


@pytest.fixture
def plots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "plots"
    folder.mkdir()
    table("val", [0.5, 0.4, 0.45]).assign(val_mae=0.3).to_csv(folder / "validation.csv", index=False)
    table("train", [0.5, 0.3, 0.2]).to_csv(folder / "train_by_noise.csv", index=False)
    return folder


def test_the_chart_is_left_and_the_same_curves_give_the_same_bytes(plots):
    shown = save_noise_curves(plots)
    first = CHART.read_bytes()
    np.testing.assert_array_equal(shown, np.asarray(Image.open(CHART)))
    save_noise_curves(plots)
    assert CHART.read_bytes() == first


def test_each_bin_has_a_panel_with_both_curves(monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *rest, **more: drawn.append(figure) or save(figure, *rest, **more)
    )
    val, train = table("val", [0.5, 0.4, 0.45]), table("train", [0.5, 0.3, 0.2])
    val = val.drop(columns=f"val_mae_{bin_name(*BINS[0])}")  # no level that is measured fell into it
    render_noise_curves({"train": train, "val": val})
    first, *others = drawn[0].axes
    assert [line.get_label() for line in first.lines] == ["training images"]
    for number, ax in enumerate(others, start=1):
        assert [line.get_label() for line in ax.lines] == ["training images", "held-out images"]
        np.testing.assert_allclose(
            [line.get_ydata() for line in ax.lines], np.array([[0.5, 0.3, 0.2], [0.5, 0.4, 0.45]]) + number
        )


def test_without_a_validation_split_no_chart_is_left(plots):
    save_noise_curves(plots)
    (plots / "validation.csv").unlink()
    assert save_noise_curves(plots) is None
    assert not CHART.exists()
