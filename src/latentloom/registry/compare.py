"""Two models side by side: their figures with intervals, a verdict in words, and samples of the same prompts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentloom.diffusion.sampling_settings import SampleRequest
from latentloom.errors import UserError
from latentloom.evaluation.sheet import COLUMNS, Section, render_sheet, save_sheet
from latentloom.evaluation.text_to_image import default_settings, load_text_to_image
from latentloom.files import read_table
from latentloom.layout import COMPARISONS, PARAMS, TEXT
from latentloom.params_file import load_params
from latentloom.registry.figures import SHOWN_FIRST, VAL_MAE, WAYS, Figures, Share, gain, in_the_same_way, in_words
from latentloom.registry.gate import seen_by_base
from latentloom.registry.models import FoundModel, find_model, stored_model
from latentloom.registry.registry import known_figures
from latentloom.tracking.store import existing_store


@dataclass(frozen=True)
class Side:
    """One of the two models: what it was called, its files, and the figures that are compared."""

    reference: str
    found: FoundModel
    figures: Figures

    @property
    def title(self) -> str:
        """What it was called, and its version."""
        named = self.found.version is None or self.reference == self.found.version
        return self.reference if named else f"{self.reference} (version {self.found.version})"


@dataclass(frozen=True)
class Comparison:
    """Two models, whether their figures compare, and in words which is better."""

    a: Side
    b: Side
    comparable: bool
    verdict: str

    @property
    def names(self) -> list[str]:
        """Of the figures that both have; FID and the like only where they were measured with the same params."""
        a, b = self.a.figures, self.b.figures
        same = a.beside_real == b.beside_real
        return [name for name in a.names if name in b.values and (same or name in SHOWN_FIRST)]

    @property
    def differences(self) -> dict[str, Share]:
        """How much more B has of each share that both have; empty where they do not compare."""
        shares = {name: (self.a.figures.share(name), self.b.figures.share(name)) for name in self.names}
        return {name: b.minus(a) for name, (a, b) in shares.items() if a and b and self.comparable}

    def text(self) -> str:
        """A table of the figures, and the verdict below it."""
        rows = [("", self.a.title, self.b.title, "difference" if self.comparable else "")]
        rows.append(("model", *(f"{side.found.sha256[:12]}…" for side in (self.a, self.b)), ""))
        a, b, differences = self.a.figures, self.b.figures, self.differences
        for name in self.names:
            difference = differences.get(name) or f"{b.values[name] - a.values[name]:.4g}"
            rows.append((name, a.in_words(name), b.in_words(name), str(difference) if self.comparable else ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    def json(self, sheet: Path) -> str:
        """All of it, for scripts."""
        document: dict[str, Any] = {
            name: {
                "reference": side.reference,
                "sha256": side.found.sha256,
                "run_id": side.found.run_id,
                "version": side.found.version,
                "figures": dict(side.figures.values),
                "measured": {way: getattr(side.figures, way) for way in WAYS},
            }
            for name, side in (("a", self.a), ("b", self.b))
        }
        document["differences"] = {name: vars(difference) for name, difference in self.differences.items()}
        return json.dumps(document | {"verdict": self.verdict, "sheet": str(sheet)}, indent=2)


def compare(a: str, b: str, root: Path) -> Comparison:
    """Compare two models, each named as `find_model` takes it.

    Raises:
        UserError: when one of them is not found, or both are the same model.
        mlflow.exceptions.MlflowException: when the store cannot be reached.
    """
    models = [find_model(reference, root) for reference in (a, b)]
    if models[0].sha256 == models[1].sha256:
        raise UserError(f"{a} and {b} are the same model, {models[0].sha256[:12]}…")
    known = [figures_known(found, root) for found in models]
    pair = in_the_same_way(*known)
    shown = pair or [figures[0] if figures else Figures() for figures in known]
    sides = [Side(*each) for each in zip((a, b), models, shown, strict=True)]
    doubts = [f"{side.title}: {doubt}" for side in sides for doubt in _doubts(side.found, root)]
    verdict = _verdict(*sides, comparable=pair is not None)
    return Comparison(*sides, pair is not None, "; but ".join([verdict, *doubts]))


def make_sheet(
    compared: Comparison, root: Path, *, prompts: Sequence[str] | None, seed: int, count: int, path: Path | None
) -> Path:
    """Write a sheet of the same prompts and the same noise for both models, into `COMPARISONS` by default; its path.

    Args:
        prompts: what to generate; None: ``evaluate.prompts``, or captions of the data where there are none.
        count: samples per prompt and model.
    """
    a, b = compared.a, compared.b
    prompts = prompts or load_params(root / PARAMS).evaluate.prompts or _captions(root)
    settings = default_settings(a.found.folder, root / PARAMS)
    try:
        request = SampleRequest(settings, seed=seed, count=count)
    except ValueError as error:
        raise UserError(str(error)) from error
    samples = [load_text_to_image(side.found.folder).generate(prompts, request) for side in (a, b)]
    sections = [
        Section(f"Seed {seed}, sample {number}", prompts, {"A": samples[0][:, number], "B": samples[1][:, number]})
        for number in range(count)
    ]
    footer = f"A: {a.title}. B: {b.title}. {in_words(settings)}. {compared.verdict}"
    path = path or COMPARISONS / f"{_file_name(a.reference)}-{_file_name(b.reference)}.png"
    save_sheet(render_sheet(sections, footer), path)
    return path


def figures_known(found: FoundModel, root: Path) -> list[Figures]:
    """All figures that MLflow has of a model; none where there is no store, or it does not know the model."""
    try:
        client = existing_store(root)
    except UserError:
        return []
    return known_figures(client, stored_model(client, found.sha256, found.run_id, found.evaluation_id))


def _doubts(found: FoundModel, root: Path) -> list[str]:
    """About a model's held-out figures, as far as MLflow knows its training."""
    try:
        client = existing_store(root)
    except UserError:
        return []
    run = stored_model(client, found.sha256, found.run_id).run
    return seen_by_base(client, run) if run else []


def _captions(root: Path) -> list[str]:
    """The first captions of the data by their hashes, which is as good as at random."""
    captions = read_table(root / TEXT / "index.parquet", ["id", "text"])
    return captions.sort_values("id")["text"].head(COLUMNS).tolist()


def _verdict(a: Side, b: Side, *, comparable: bool) -> str:
    without = [side.title for side in (a, b) if not side.figures.decisive]
    if without:
        return f"not known: {' and '.join(without)} has no held-out figures (`dvc repro evaluate`)"
    if not comparable:
        ways = "; ".join(a.figures.differences(b.figures))
        return f"not known: they were measured otherwise: {ways}. `latentloom promote` measures a champion again"
    found = gain(b.figures, a.figures)
    if found is None:
        return "not known: they have no figure in common that decides"
    name, difference = found
    better = b if difference.low > 0 else a if difference.high < 0 else None
    if better is None:
        return f"they cannot be told apart: {name} differs by {difference}, which may be chance"
    if name == VAL_MAE:
        return f"{better.title} has the lower {VAL_MAE}, which has no interval: it may be chance"
    return f"{better.title} is better: {name} differs by {difference}"


def _file_name(reference: str) -> str:
    return re.sub(r"[^\w.]+", "-", reference).strip("-")[:60]
