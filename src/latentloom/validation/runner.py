"""Great Expectations over all that the earlier stages left: is this data worth a training?

Files on disk -> scalar tables (``tables``) -> checks of their columns (``checks``), which are run here, with that
library kept quiet and out of the files -> one ``ValidationReport`` (``report``) as JSON and text, and a page for a
browser (``overview``).

Great Expectations takes seconds to import, all of it with its first name, so that happens after the files have been
read: a damaged one is reported at once.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from latentloom.ingestion.shards import sizes_of
from latentloom.params import ValidateParams
from latentloom.sizes import Size
from latentloom.validation.report import CheckResult, ValidationReport
from latentloom.validation.tables import Table, read_data

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
    from great_expectations.expectations import Expectation

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
logging.getLogger("great_expectations").setLevel(logging.ERROR)

SHOWN = 5  # offending rows that a check names


def validate(
    folder: Path,
    params: ValidateParams,
    *,
    val_fraction: float,
    expected_vae_fingerprint: str,
    expected_text_fingerprint: str,
    docs_folder: Path | None,
) -> ValidationReport:
    """Check what the earlier stages left in ``folder``, which is ``data``, and return what was found.

    Into ``docs_folder`` goes ``index.html``, also when a check fails; None: nowhere.

    Raises:
        UserError: naming the file that is missing or damaged and what to do. A failing check is not an error here: it
            is in the report.
    """
    data = read_data(folder)
    tables = data.tables
    from latentloom.validation.checks import checks
    from latentloom.validation.overview import write_data_docs

    asked = {"vae_fingerprint": expected_vae_fingerprint, "text_fingerprint": expected_text_fingerprint}
    results = _run(checks(params, data, val_fraction=val_fraction, **asked), tables)
    report = ValidationReport(
        checks=tuple(_result(item, tables[name]) for name, result in results.items() for item in result.results),
        rows={name: len(table) for name, table in tables.items()},
        notices=(
            *_nothing_held_out(tables["dataset"].columns, len(tables["latents"]), val_fraction),
            *_rare_sizes(sizes_of(data.manifest), params.min_train_images),
        ),
    )
    if docs_folder is not None:
        write_data_docs(docs_folder, report, data)
    return report


def _nothing_held_out(dataset: pd.DataFrame, images: int, val_fraction: float) -> tuple[str, ...]:
    """A notice where the validation split is empty, and why."""
    if dataset["validation_images"].any():
        return ()
    reason = (
        "ingest.val_fraction is 0"
        if val_fraction == 0
        else f"of {images} images, ingest.val_fraction = {val_fraction} chose none, or none but near duplicates "
        "of training images (reports/ingest.json counts those moved to train)"
    )
    return (f"no held-out image: {reason}; training can neither measure val/mae nor keep the best model",)


def _rare_sizes(sizes: Mapping[Size, int], fewest: int) -> tuple[str, ...]:
    """A notice where there are several sizes, some of them of few images."""
    rare = ", ".join(f"{size} ({count})" for size, count in sizes.items() if count < fewest)
    if len(sizes) < 2 or not rare:
        return ()
    return (
        f"sizes of fewer than {fewest} images (validate.min_train_images): {rare}; the model learns little of them. A "
        "lower ingest.max_bucket_ratio or a larger ingest.bucket_multiple makes fewer sizes",
    )


def _run(
    expectations: Sequence["Expectation"], tables: dict[str, Table]
) -> dict[str, "ExpectationSuiteValidationResult"]:
    """What Great Expectations found, by table."""
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    results = {}
    for name, table in tables.items():
        suite = gx.ExpectationSuite(name, expectations=[own for own in expectations if own.meta["table"] == name])
        # SUMMARY gives the row numbers of the first offenders, which _result turns into ids. To have the ids from
        # `unexpected_index_column_names` costs 50 s for each check that all of a million rows fail.
        results[name] = context.data_sources.pandas_default.read_dataframe(table.columns).validate(
            suite, result_format={"result_format": "SUMMARY", "partial_unexpected_count": SHOWN}
        )
    return results


def _result(item: "ExpectationValidationResult", table: Table) -> CheckResult:
    check = item.expectation_config
    if "unexpected_count" not in item.result:
        raise RuntimeError(f"the check {check.meta['name']} could not be computed: {item.exception_info}")
    offenders = item.result["partial_unexpected_index_list"]
    whole, column = check.meta["table"] == "dataset", table.columns[check.kwargs["column"]]
    return CheckResult(
        name=check.meta["name"],
        table=check.meta["table"],
        column=column.name,
        requirement=check.description,
        protects=check.meta["protects"],
        success=bool(item.success),
        seen=_seen(column),
        offending=int(item.result["unexpected_count"]),
        ids=() if whole else tuple(table.ids(offenders)),
        observed=tuple(_scalar(value) for value in (column if whole else column.iloc[offenders]).tolist()),
        advice=check.notes,
    )


def _seen(column: pd.Series) -> str:
    values = column.dropna()
    if values.empty:
        return "nothing"
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return " to ".join(str(_scalar(value)) for value in dict.fromkeys([values.min().item(), values.max().item()]))
    counts = values.value_counts()
    others = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
    return ", ".join(str(value) for value in counts.index[:SHOWN]) + others


def _scalar(value: float | int | str | bool) -> float | int | str | bool:
    """The value as JSON can hold it: float32 without the digits that it never had, NaN and infinity as words."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
