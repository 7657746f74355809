"""Promotions and demotions, each a short tag of the version that it happened to.

move 2026-11-27 14.35.11.123456: promoted to champion instead of version 1, by ada: sharper outlines
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from latentloom.registry.models import NAME
from latentloom.tracking.provenance import user_name

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Kind = Literal["promote", "force", "demote"]
KEY = "move %Y-%m-%d %H.%M.%S.%f"  # of the tag; MLflow allows no colon on Windows
WORDS: dict[Kind, str] = {
    "promote": "promoted to {alias} instead of {previous}",
    "force": "forced to {alias} instead of {previous}",
    "demote": "demoted from {alias} to {version}",
}
TEXT = re.compile(
    r"(?P<kind>promoted|forced|demoted) (?:to|from) (?P<alias>\S+) (?:instead of|to) (?P<other>version \d+|none)"
    r"(?:, by (?P<by>[^:]*))?(?:: (?P<why>.*))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Move:
    """One change of an alias, from the version ``previous`` to ``version``; None: it named nothing."""

    kind: Kind
    alias: str
    version: str | None
    previous: str | None
    why: str | None
    by: str | None = field(default_factory=user_name)
    when: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def subject(self) -> str:
        """The version that was promoted or demoted."""
        return self.previous if self.kind == "demote" else self.version

    @property
    def text(self) -> str:
        """For people; `of_tag` reads it back."""
        names = {"version": _named(self.version), "previous": _named(self.previous)}
        by = f", by {self.by.replace(':', ' ')}" if self.by else ""
        return WORDS[self.kind].format(alias=self.alias, **names) + by + (f": {self.why}" if self.why else "")

    def save(self, client: "MlflowClient") -> None:
        """Write it down, as a tag of `subject`."""
        client.set_model_version_tag(NAME, self.subject, f"{self.when:{KEY}}", self.text)

    @classmethod
    def of_tag(cls, subject: str, key: str, value: str) -> "Move | None":
        """The reverse of `save`, for the version ``subject``; None where the tag tells of no move."""
        try:
            when = datetime.strptime(key, KEY).replace(tzinfo=UTC)
        except ValueError:
            return None
        if not (found := TEXT.fullmatch(value)):
            return None
        kind: Kind = {"promoted": "promote", "forced": "force", "demoted": "demote"}[found["kind"]]
        other = None if found["other"] == "none" else found["other"].removeprefix("version ")
        version, previous = (other, subject) if kind == "demote" else (subject, other)
        return cls(kind, found["alias"], version, previous, found["why"], found["by"], when)


def all_moves(client: "MlflowClient") -> list[Move]:
    """Of all versions, the oldest first."""
    versions = client.search_model_versions(f"name = '{NAME}'")
    found = [move for version in versions for move in moves_of(str(version.version), version.tags)]
    return sorted(found, key=lambda move: move.when)


def moves_of(version: str, tags: Mapping[str, str]) -> list[Move]:
    """A version's promotions and demotions, the oldest first."""
    found = filter(None, (Move.of_tag(version, key, value) for key, value in tags.items()))
    return sorted(found, key=lambda move: move.when)


def _named(version: str | None) -> str:
    return "none" if version is None else f"version {version}"
