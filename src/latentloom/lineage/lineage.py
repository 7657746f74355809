"""`latentloom lineage`: what an image, a run, a registered version or a model came from, and the way back to it.

    reference -> subject and its provenance -> one link per thing, and where its bytes are -> commands

Nothing is fetched or changed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from latentloom.dvc_outs import Place
from latentloom.lineage.commands import Step, commands
from latentloom.lineage.links import Link, gather
from latentloom.lineage.subject import find_subject

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
    """The lineage of what ``reference`` names.

    Args:
        reference: a PNG of `latentloom sample`, a model folder, a name of the registry, or an MLflow run.
        root: the project's root.

    Raises:
        UserError: when it names nothing, several things, or a file that is no PNG of ours.
        mlflow.exceptions.MlflowException: when it names a run or a version, and the store cannot be reached.
    """
    root = root.resolve()
    subject = find_subject(reference, root)
    links = gather(subject, root)
    return Lineage(reference, links, commands(subject, links, root))


def render(lineage: Lineage) -> str:
    """A lineage for the user: one line per link, then the commands, ready to be copied."""
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
        missing = ", ".join(f"{link.link} ({link.place})" for link in lineage.missing)
        lines += ["", f"Not all of it can be brought back: {missing}"]
    return "\n".join(lines)


def to_json(lineage: Lineage) -> str:
    """A lineage for machines, as docs/lineage.md describes it."""
    document = {"format_version": FORMAT_VERSION, "of": lineage.of, "complete": not lineage.missing}
    parts = {key: value for key, value in asdict(lineage).items() if key in ("links", "steps")}
    return json.dumps(document | parts, indent=2, ensure_ascii=False)
