"""What MLflow's page of runs shows of our experiment: pictures first, each error's curves in one panel, then figures.

By itself that page has one small panel a metric and its pictures last, each below a list of all params. So the
experiment gets a saved view, which MLflow keeps in a tag and offers under *Views*, and `address` is where it opens.
"""

import json
from typing import Any

KEY, NAME = "latentloom", "Latent Loom"
TAG = f"mlflow.sharedViewState.{KEY}"
PICTURES, ERRORS, FIGURES = "Pictures", "Errors", "Figures of the finished model"
FOLDED = ("evaluate", "train", "val", "Model metrics", "System metrics")  # where MLflow puts all other metrics
COLUMNS = (
    "params.`train.learning_rate`",
    "params.`train.steps`",
    "metrics.`val/mae`",
    "metrics.`evaluate/val_mae`",
    "metrics.`evaluate/caption_recall_at_1`",
)


def saved_view(step: int, time: int) -> str:
    """The value of the tag `TAG`.

    Args:
        step: of the pictures that show at first; the slider goes to the others.
        time: when the view was changed, in milliseconds since 1970.
    """
    from latentloom.training.denoising_error import BINS, bin_name  # which brings torch

    charts = [
        *(_pictures(key, step) for key in ("samples", "evaluation")),
        _lines("train/mae"),
        _lines("val/mae", *(f"val/mae_{bin_name(*noise)}" for noise in BINS)),
        *(_chart("BAR", FIGURES, metricKey=f"evaluate/{figure}") for figure in ("caption_recall_at_1", "val_mae")),
    ]
    state = {
        "compareRunCharts": [{"uuid": f"{KEY}-{number}"} | chart for number, chart in enumerate(charts)],
        "compareRunSections": [
            _section(PICTURES, columns=2, cardHeight=440),
            _section(ERRORS, columns=2, cardHeight=400),
            _section(FIGURES, columns=2, cardHeight=300),
            *(_section(name, display=False) for name in FOLDED),
        ],
        "isAccordionReordered": True,  # the sections stay in this order
        "selectedColumns": COLUMNS,  # of the table
    }
    return json.dumps({"name": NAME, "createdAt": time, "updatedAt": time, "state": json.dumps(state)})


def address(server: str, experiment_id: str) -> str:
    """Where the view opens in a browser."""
    return (
        f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs"
        f"?viewStateShareKey={KEY}&compareRunsMode=CHART&workflowType=machine_learning"
    )


def _chart(kind: str, section: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "metricSectionId": section, "deleted": False, "isGenerated": False} | settings


def _pictures(key: str, step: int) -> dict[str, Any]:
    return _chart("IMAGE", PICTURES, imageKeys=[key], step=step, showRunParams=False)


def _lines(*metrics: str) -> dict[str, Any]:
    return _chart(
        "LINE",
        ERRORS,
        metricKey=metrics[0],
        selectedMetricKeys=metrics,
        xAxisKey="step",
        xAxisScaleType="linear",
        scaleType="linear",
        lineSmoothness=0,
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )


def _section(name: str, *, display: bool = True, **size: int) -> dict[str, Any]:
    flags = {"display": display, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": name, "name": name} | flags | size
