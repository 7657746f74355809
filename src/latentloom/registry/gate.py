"""What a model must be to get a name of the registry: valid data, within the limits, no worse than the champion.

"Worse" and "beyond a limit" mean beyond the 95 % intervals: what chance may have done rejects no model. Figures of
held-out images count only where no model that the training started from has trained on these.
"""

from typing import TYPE_CHECKING

from latentloom.params import RegistryParams
from latentloom.registry.figures import COPIED, RECALLS, VAL_MAE, Figures, gain
from latentloom.registry.models import run_provenance, stored_model
from latentloom.tracking.provenance import Provenance

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

NO_LIMITS = RegistryParams(min_held_out_recall_at_1=None, max_copied_share=None)
# Of `ingest`: they decide an image's pixels, which decide whether it is held out.
SPLIT = ("shape", "image_size", "bucket_multiple", "max_bucket_ratio", "val_fraction")


def objections(figures: Figures, provenance: Provenance, limits: RegistryParams) -> list[str]:
    """What speaks against a model, whoever is the champion; empty: nothing."""
    failed, found = provenance.failed_checks, _beyond(figures, limits)
    if failed is None:
        return ["the result of its data's validation is not known: the run does not hold it", *found]
    return [f"the validation of its data failed: {', '.join(failed)}", *found] if failed else found


def worse(figures: Figures, champion: Figures) -> str | None:
    """Why a model may not take a champion's place; None: it may. Both must have been measured in the same way."""
    found = gain(figures, champion)
    if found is None or found[1].high >= 0:
        return None
    name, less = found
    own, others = figures.in_words(name), champion.in_words(name)
    interval = "" if name == VAL_MAE else f": the difference is {less}"
    return f"{name} is {own}, worse than the champion's {others}{interval}"


def seen_by_base(client: "MlflowClient", run: "Run") -> list[str]:
    """Why a base of the model that ``run`` trained, or a base's own, may have seen what is held out now; the first."""
    now = run.data.params
    while base := (run_provenance(client, run) or Provenance()).base:
        named = f"it started from {base['reference']} (model {base['sha256'][:12]})"
        too_good = "which may have seen what is held out now: its held-out figures may be too good"
        run = stored_model(client, base["sha256"]).run
        if run is None:
            return [f"{named}, of whose training this store knows nothing, and {too_good}"]
        then = run.data.params
        keys = [f"ingest.{name}" for name in SPLIT if then.get(f"ingest.{name}") != now.get(f"ingest.{name}")]
        if keys:
            other = ", ".join(f"{key} {then.get(key, 'not known')} instead of {now.get(key)}" for key in keys)
            return [f"{named}, which was trained with {other}, and {too_good}"]
    return []


def _beyond(figures: Figures, limits: RegistryParams) -> list[str]:
    """Which limits the figures exceed, or may exceed since they are not known."""
    if not figures.decisive:
        names = f"{' nor '.join(RECALLS)} nor {VAL_MAE}"
        return [f"it has neither {names}: run `dvc repro evaluate`; all need a validation split"]
    found = []
    floor, recall = limits.min_held_out_recall_at_1, figures.share(RECALLS[0])
    if floor is not None and recall and recall.high < floor:
        found.append(f"{RECALLS[0]} is {recall}, below {floor:g} (registry.min_held_out_recall_at_1)")
    most, copied = limits.max_copied_share, figures.share(COPIED)
    if most is not None and copied is None:
        found.append(
            f"{COPIED} is not known: set evaluate.held_out_captions to 1 or more and run `dvc repro evaluate`, or "
            "registry.max_copied_share to null"
        )
    if most is not None and copied and copied.low > most:
        found.append(
            f"{COPIED} is {copied}, above {most:g} (registry.max_copied_share): look at the nearest training images in "
            "samples.png"
        )
    return found
