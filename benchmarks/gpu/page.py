"""The measurements as a page of Markdown: a section for each part, a table for rows with the same figures."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

PASSED_OVER = ("error", "skipped")
MOST_COLUMNS = 12


def render(measured: Mapping[str, Any]) -> str:
    """The page of what `on_gpu.json` holds."""
    lines = [f"# {measured['title']}", "", measured["about"], ""]
    for part in measured["parts"]:
        lines += [f"## {part['name']}", "", f"{part['about']} {_status(part)}", ""]
        lines += _tables([row for row in part["rows"] if not _passed_over(row)])
        left_out = [row for row in part["rows"] if _passed_over(row)]
        lines += [f"- {row['name']}: {row.get('error') or 'skipped: ' + row['skipped']}" for row in left_out]
        lines += [""] if left_out else []
    return "\n".join(lines).rstrip() + "\n"


def _status(part: Mapping[str, Any]) -> str:
    why = f": {part['why']}" if part["why"] else ""
    return f"({part['status']}{why}; {part['seconds']:.0f} s)"


def _passed_over(row: Mapping[str, Any]) -> bool:
    return any(name in row for name in PASSED_OVER)


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for names, alike in groupby(rows, key=lambda row: tuple(name for name in row if name != "name")):
        if len(names) > MOST_COLUMNS:
            for row in alike:
                lines += [_line([row["name"], ""]), _line(["---"] * 2)]
                lines += [*(_line([name, _shown(row[name])]) for name in names), ""]
            continue
        lines += [_line(["", *names]), _line(["---"] * (len(names) + 1))]
        lines += [_line([row["name"], *(_shown(row[name]) for name in names)]) for row in alike]
        lines.append("")
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    if value is None:
        return ""
    return f"{value:,g}" if isinstance(value, float) else str(value)
