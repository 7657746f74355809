"""`latentloom lineage`: what an image, a run, a registered version or a model came from, and the way back to it.

    reference -> subject and its provenance -> one link per thing: where its bytes are, and the command for them

The commands are for a shell, one after the other, and work in a new clone beside the project. Nothing is fetched or
changed before.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from latentloom.dvc_outs import Place
from latentloom.lineage.links import AT_HAND, Link, gather
from latentloom.lineage.subject import find_subject
from latentloom.tracking.provenance import DATA

FORMAT_VERSION = 2
WIDEST = 72  # characters of a name, for the places to stand in a column


@dataclass(frozen=True)
class Step:
    """A command, and what it is for."""

    why: str
    command: str


@dataclass(frozen=True)
class Lineage:
    """What something came from: the links from what was asked for, as it was written, to the sources."""

    of: str
    links: tuple[Link, ...]

    @property
    def missing(self) -> list[Link]:
        """The links that are needed, and lost or not known."""
        return [link for link in self.links if link.needed and link.place not in AT_HAND]

    @property
    def steps(self) -> list[Step]:
        """The commands that bring it back, one after the other, as far as it can be."""
        links = {link.link: link for link in self.links if link.command}
        code, picture = links.pop("code", None), links.pop("picture", None)
        if code is None or code.place is not Place.HERE:
            return [Step("fetch the commit, then ask again", code.command)] if code else []
        steps = [Step(link.link, link.command) for link in (code, *links.values()) if link.place in AT_HAND]
        lost = {link.link for link in self.links if link.place is Place.LOST} & {"model", *DATA}
        if lost:
            again = "dvc repro train" if "model" in lost else "dvc repro validate"
            steps.append(Step("what is lost, computed again: on the same machine's CPU, the same bytes", again))
        return [*steps, Step("picture; no output means the same bytes", picture.command)] if picture else steps


def trace(reference: str, root: Path) -> Lineage:
    """The lineage of a PNG of `latentloom sample`, a model folder, a name of the registry, or an MLflow run.

    Raises:
        UserError: when it names nothing, several things, or a file that is no PNG of ours.
        mlflow.exceptions.MlflowException: when it names a run or a version, and the store cannot be reached.
    """
    root = root.resolve()
    return Lineage(reference, gather(find_subject(reference, root), root))


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
            lines += [f"# {step.why}", step.command]
    if lineage.missing:
        missing = ", ".join(f"{link.link} ({link.place})" for link in lineage.missing)
        lines += ["", f"Not all of it can be brought back: {missing}"]
    return "\n".join(lines)


def to_json(lineage: Lineage) -> str:
    """A lineage for machines, as docs/lineage.md describes it."""
    document = {
        "format_version": FORMAT_VERSION,
        "of": lineage.of,
        "complete": not lineage.missing,
        "links": [asdict(link) for link in lineage.links],
        "steps": [asdict(step) for step in lineage.steps],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)
