"""A model's figures and how they were measured: read from MLflow's runs, kept as tags of a version, compared.

Two models' figures compare only where both were measured in the same way: on the same data, of as many samples, from
the same seed, with the same settings. A share comes with its 95 % interval, and so does the difference of two.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import hypot
from typing import TYPE_CHECKING, Any

from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.evaluation.text_to_image import SETTINGS_FILE
from latentloom.registry.models import StoredModel, read_artifact

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

METRICS = "evaluate/"  # before the names of figures among a run's metrics
CONTEXT_TAG = "mlflow.data.context"  # of a data set that was logged to a run
RECALLS = ("held_out_recall_at_1", "new_words_recall_at_1")  # the first that both models have decides
COPIED, VAL_MAE = "copied_share", "val_mae"
RECALL_NAMES = tuple(f"{kind}_recall_at_{among}" for kind in ("held_out", "new_words") for among in (1, 5))
KEPT = tuple(f"{name}{bound}" for name in (*RECALLS, COPIED, VAL_MAE) for bound in ("", "_low", "_high"))  # as tags
SHOWN_FIRST = (*RECALL_NAMES, COPIED, VAL_MAE, "memorisation_recall")
COUNTS = ("held_out_combinations", "new_words_captions")  # of the samples of held-out captions
BESIDE_REAL = ("features", "clip", "samples", "real_images")  # what decides FID, KID, CMMD and CLIP score
NO_FIGURES = (*COUNTS, "training_captions", "copied_limit", "distribution_samples", "distribution_images")
ERROR = "_standard_error"  # behind the name of a figure
# How figures were measured, and what a person calls it.
WAYS = {"data": "data", "samples": "number of samples", "seed": "seed", "sampling": "sampling settings"}


@dataclass(frozen=True)
class Share:
    """A share of samples and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.2f} to {self.high:.2f})"

    def minus(self, other: "Share") -> "Share":
        """The difference to another share, and its 95 % interval by both shares' own Wilson intervals.

        Method 10 of Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I
        """
        difference = self.value - other.value
        low = difference - hypot(self.value - self.low, other.high - other.value)
        high = difference + hypot(self.high - self.value, other.value - other.low)
        return Share(difference, low, high)


@dataclass(frozen=True)
class Figures:
    """Figures of a model, and how they were measured; None where that is not known.

    ``values`` are by the names that the stage `evaluate` gives them, a share's interval as ``NAME_low``, ``NAME_high``.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    data: str | None = None  # names all images and captions of the data set, see `Caches.digests`
    samples: int | None = None  # how many held-out captions were sampled
    seed: str | None = None  # of the samples' noise
    sampling: str | None = None  # the sampling settings, as `in_words` gives them
    noise: str | None = None  # the schedule and the noise levels that ``val_mae`` is a mean over
    beside_real: str | None = None  # the params that FID and the like were measured with
    run_id: str | None = None  # of the MLflow run that holds them

    def share(self, name: str) -> Share | None:
        """A share with its interval; None where it is no share, or was not measured."""
        found = [self.values.get(key) for key in (name, f"{name}_low", f"{name}_high")]
        return None if None in found else Share(*found)

    def in_words(self, name: str) -> str:
        """A figure for people, with its interval or its standard error if it has one."""
        error = f" ± {self.values[name + ERROR]:.2g}" if name + ERROR in self.values else ""
        return str(self.share(name) or f"{self.values[name]:.4g}{error}")

    @property
    def names(self) -> list[str]:
        """Of the figures, the main ones first; without what lies behind one, counts, and errors by noise level."""
        behind = {f"{name}{end}" for name in self.values for end in ("_low", "_high", ERROR)}
        # Those with a slash are the seconds that parts of the work took.
        shown = [name for name in self.values if name not in behind and name not in NO_FIGURES and "/" not in name]
        rest = sorted(name for name in shown if name not in SHOWN_FIRST and not name.startswith(f"{VAL_MAE}_noise"))
        return [*(name for name in SHOWN_FIRST if name in shown), *rest]

    @property
    def decisive(self) -> bool:
        """Whether any figure is there that can tell this model from a better one."""
        return VAL_MAE in self.values or any(self.share(name) for name in RECALLS)

    def differences(self, other: "Figures") -> list[str]:
        """In which ways the two were measured otherwise, or may have been; empty: they compare."""
        ways = {words: (getattr(self, name), getattr(other, name)) for name, words in WAYS.items()}
        return [
            f"{words} ({_known(own)} against {_known(others)})"
            for words, (own, others) in ways.items()
            if own is None or own != others
        ]

    def tags(self, prefix: str = "") -> dict[str, str]:
        """What decides, and how it was measured, as tags of one value each."""
        kept = {name: f"{self.values[name]:.6g}" for name in KEPT if name in self.values}
        kept |= {f"measured.{name}": getattr(self, name) for name in (*WAYS, "noise", "run_id")}
        return {f"{prefix}{name}": str(value) for name, value in kept.items() if value is not None}

    @classmethod
    def of_tags(cls, tags: Mapping[str, str], prefix: str = "") -> "Figures":
        """The reverse of `tags`; without any figure where the version has no such tags."""
        own = {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}
        values = {name: float(own[name]) for name in KEPT if name in own}
        ways: dict[str, Any] = {name: own.get(f"measured.{name}") for name in (*WAYS, "noise", "run_id")}
        return cls(values, **ways | {"samples": int(ways["samples"]) if ways["samples"] else None})


def figures_of(client: "MlflowClient", stored: StoredModel) -> Figures:
    """The figures of a model's evaluation; none where MLflow has no run of the model."""
    run = stored.evaluation
    if run is None:
        return Figures()
    metrics = {key: value for key, value in run.data.metrics.items() if key.startswith(METRICS)}
    values = {key.removeprefix(METRICS): value for key, value in metrics.items()}
    params, sampling = run.data.params, sampling_settings(client, stored)
    counts = [int(values[name]) for name in COUNTS if name in values]
    return Figures(
        values,
        data=_digest(run),
        samples=sum(counts) if counts else None,
        seed=params.get("seed"),
        sampling=None if sampling is None else in_words(sampling),
        noise=f"{params.get('diffusion.schedule')}/{params.get('diffusion.noise_levels')}",
        beside_real=", ".join(f"{name} {params.get(f'evaluate.{name}')}" for name in BESIDE_REAL),
        run_id=run.info.run_id,
    )


def sampling_settings(client: "MlflowClient", stored: StoredModel) -> SamplingSettings | None:
    """The settings that a model's figures were measured with; None where no run holds them."""
    written = read_artifact(client, stored.evaluation, SETTINGS_FILE) if stored.evaluation else None
    return None if written is None else SamplingSettings.from_dict(json.loads(written))


def in_words(settings: SamplingSettings) -> str:
    """Settings in one line; the same settings give the same line."""
    return ", ".join(f"{name} {_plain(value)}" for name, value in asdict(settings).items())


def in_the_same_way(own: Iterable[Figures], others: Iterable[Figures]) -> tuple[Figures, Figures] | None:
    """The first of ``own`` and of ``others`` that compare; None where no two do."""
    others = [figures for figures in others if figures.decisive]
    pairs = ((one, other) for one in own if one.decisive for other in others)
    return next(((one, other) for one, other in pairs if not one.differences(other)), None)


def gain(one: Figures, other: Figures) -> tuple[str, Share] | None:
    """The figure by which two models compare, and by how much ``one`` is better; None where none decides.

    Recall decides, of held-out combinations, or of captions with new words where there is none; only where there is
    neither, the validation error, which has no interval, over the same noise levels.
    """
    for name in RECALLS:
        own, others = one.share(name), other.share(name)
        if own and others:
            return name, own.minus(others)
    if one.noise != other.noise or VAL_MAE not in one.values.keys() & other.values.keys():
        return None
    less = other.values[VAL_MAE] - one.values[VAL_MAE]
    return VAL_MAE, Share(less, less, less)


def _digest(run: "Run") -> str | None:
    """Of the validation split that the run was given."""
    for given in run.inputs.dataset_inputs if run.inputs else ():
        if any(tag.key == CONTEXT_TAG and tag.value == "validation" for tag in given.tags):
            return given.dataset.digest
    return None


def _known(value: object) -> str:
    return "not known" if value is None else str(value)


def _plain(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return " to ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, (int, float)) else "none" if value is None else str(value)
