"""What MLflow's page of a version shows a person: its figures, its picture, where it comes from, who moved it when."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentloom.layout import SAMPLE_SHEET
from latentloom.registry.figures import Figures
from latentloom.registry.moves import Move
from latentloom.tracking.provenance import Provenance

if TYPE_CHECKING:
    from mlflow.entities import Run

MEANINGS = {
    "held_out_recall_at_1": "generates what captions it has never seen ask for",
    "copied_share": "samples nearer to a training image than 95 % of real held-out images are",
    "val_mae": "error on held-out images",
    "memorisation_recall": "knows its training images by heart",
}


def describe(run: "Run", figures: Figures, provenance: Provenance, moves: Sequence[Move]) -> str:
    """A version in Markdown, by the run of its training and its ``moves``, the oldest first."""
    parts = [f"- {move.when:%Y-%m-%d %H:%M} UTC: {' '.join(move.text.split())}" for move in moves]
    parts.append("\n| figure | value (95 % interval) | |\n|---|---|---|")
    parts += [f"| `{name}` | {figures.in_words(name)} | {MEANINGS.get(name, '')} |" for name in figures.names]
    if figures.samples:
        parts.append(f"\nOf {figures.samples} held-out captions, seed {figures.seed}: {figures.sampling}.")
    # By addresses relative to MLflow's page, wherever its server is.
    parts.append(
        f"\nTrained by the run [{run.info.run_name}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})"
    )
    if provenance.commit:
        parts[-1] += f", code of the commit `{provenance.commit[:10]}`"
    picture = f"get-artifact?path={SAMPLE_SHEET.name}&run_uuid={figures.run_id}"
    parts[-1] += f".\n\n![{SAMPLE_SHEET.name} of the evaluation]({picture})"
    return "\n".join(parts)
