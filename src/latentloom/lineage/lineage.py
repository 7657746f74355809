"""`latentloom lineage`: the chain behind a picture, a run, a registered version or a model, and the way back to it.

reference -> subject and what is known of its training -> links -> the commands that bring it back
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from latentloom.lineage.dvc_objects import Place
from latentloom.lineage.history import History
from latentloom.lineage.links import Link, gather
from latentloom.lineage.restoring import Step, steps
from latentloom.lineage.training_record import find_training

FORMAT_VERSION = 1
WIDEST = 72  # characters of a name, for the places to stand in a column


@dataclass(frozen=True)
class Lineage:
    """What something came from.

    Attributes:
        of: what was asked for, as it was written.
        links: from there to the sources.
        steps: the commands that bring it back, one after the other.
    """

    of: str
    links: tuple[Link, ...]
    steps: tuple[Step, ...]

    @property
    def missing(self) -> tuple[Link, ...]:
        """The links that are needed, and lost or not known."""
        return tuple(link for link in self.links if link.needed and link.place in (Place.LOST, Place.UNKNOWN))


def trace(reference: str, root: Path) -> Lineage:
    """The lineage of what ``reference`` names; nothing is fetched or changed.

    Args:
        reference: a PNG of `latentloom sample`, a model folder, a name of the registry, or an MLflow run.
        root: the project's root.

    Raises:
        FileNotFoundError: when it is a picture that is not there.
        ValueError: when it names nothing, several things, or a file that is no picture of ours.
        mlflow.exceptions.MlflowException: when it names a run or a version, and the store cannot be reached.
    """
    root, history = root.resolve(), History(root.resolve())
    subject, record = find_training(reference, root)
    links = gather(subject, record, history, root)
    return Lineage(reference, links, steps(subject, record, links, history, root))


def render(lineage: Lineage) -> str:
    """A lineage for a person: a line a link, then the commands, ready to be copied."""
    kind, name = (max(len(getattr(link, part)) for link in lineage.links) for part in ("link", "name"))
    lines = [
        f"{link.link:<{kind}}  {link.name:<{min(name, WIDEST)}}  {link.place}{': ' if link.where else ''}{link.where}"
        for link in lineage.links
    ]
    if lineage.steps:
        lines += ["", "To bring this state back:", ""]
        for step in lineage.steps:
            lines += [f"# {step.why}"] if step.why else []
            lines.append(step.command)
    if lineage.missing:
        told = ", ".join(f"{link.link} ({link.place})" for link in lineage.missing)
        lines += ["", f"Not all of it can be brought back: {told}"]
    return "\n".join(lines)


def to_json(lineage: Lineage) -> str:
    """A lineage for machines, as docs/lineage.md describes it."""
    given = asdict(lineage)
    document = {"format_version": FORMAT_VERSION, "of": lineage.of, "complete": not lineage.missing}
    return json.dumps(document | {"links": given["links"], "steps": given["steps"]}, indent=2, ensure_ascii=False)
