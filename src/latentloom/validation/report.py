"""What a validation found, as JSON for machines and as text for the user.

Nothing here depends on the time or the machine: the same caches and params give the same bytes.
"""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class CheckResult:
    name: str
    table: str
    column: str
    requirement: str
    protects: str
    success: bool
    seen: str  # what the column holds: the lowest and the highest number, or its values
    offending: int  # rows of the table that break the requirement
    ids: tuple[str, ...]  # of the first few of them; empty for the table "dataset", which has one row
    observed: tuple[float | int | str | bool, ...]  # their values; always filled for the table "dataset"
    advice: str

    @property
    def found(self) -> tuple[float | int | str, ...]:
        """The observed values, where they say more than that the check failed and for which ids."""
        says_nothing = self.observed == self.ids or all(isinstance(value, bool) for value in self.observed)
        return () if says_nothing else self.observed


@dataclass(frozen=True)
class ValidationReport:
    checks: tuple[CheckResult, ...]
    rows: dict[str, int]  # of each table
    notices: tuple[str, ...] = ()  # what the user should know, though no check fails for it

    @property
    def success(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(check for check in self.checks if not check.success)

    def to_json(self) -> str:
        """The report as indented JSON, ``{"success", "notices", "rows": {table: n}, "checks": {name: {…}}}``."""
        checks = [asdict(check) for check in self.checks]
        document = {
            "success": self.success,
            "notices": self.notices,
            "rows": self.rows,
            "checks": {check.pop("name"): check for check in checks},
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def explain(self) -> str:
        """For each failing check: its name, what it requires and why, how many rows break it, which, what to do."""
        if self.success:
            return f"{len(self.checks)} checks passed"
        return "\n".join(
            [f"{len(self.failures)} of {len(self.checks)} checks failed", *(self._explain(c) for c in self.failures)]
        )

    def _explain(self, check: CheckResult) -> str:
        whole = check.table == "dataset"
        lines = [
            f"\n{check.name}: " + ("" if whole else f"{check.offending} of {self.rows[check.table]} {check.table}"),
            f"  required: {check.requirement}",
            f"  why: {check.protects}",
        ]
        if check.found:
            lines.append(f"  found: {', '.join(map(str, check.found))}")
        if check.ids:
            lines.append(f"  first {len(check.ids)} of them:" if check.offending > len(check.ids) else "  these:")
            lines += [f"    {row_id}" for row_id in check.ids]
        lines.append(f"  what to do: {check.advice}")
        return "\n".join(line.rstrip() for line in lines)
