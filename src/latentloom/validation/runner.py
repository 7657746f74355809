"""Runs the checks as Great Expectations over the tables, with that library kept quiet and out of the files.

The context is ephemeral: no project folder is made. Great Expectations takes seconds to import, all of it with its
first name, so that happens after the files have been read: a damaged one is reported at once.
"""

import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from latentloom.params import ValidateParams
from latentloom.validation.checks import Between, Check, Equals, checks
from latentloom.validation.overview import describe
from latentloom.validation.report import CheckResult, ValidationReport
from latentloom.validation.tables import read_data

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
    from great_expectations.expectations import Expectation

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
    """Check what the earlier stages left, write the pages for a browser, and return what was found.

    Args:
        folder: ``data``, with ``images``, ``rejects.parquet``, ``near_duplicates.parquet``, ``latents`` and ``text``.
        params: the bounds.
        val_fraction: the share of validation images that ``ingest`` was asked for.
        expected_vae_fingerprint: that of the VAE in params.
        expected_text_fingerprint: that of the text encoder in params.
        docs_folder: where ``index.html`` and a page for each table go, also when a check fails; None: nowhere.

    Raises:
        UserError: naming the file that is missing or damaged and what to do. A failing check is not an error here: it
            is in the report.
    """
    data = read_data(folder)
    tables = data.tables
    rows = checks(
        params,
        vae_fingerprint=expected_vae_fingerprint,
        text_fingerprint=expected_text_fingerprint,
        val_fraction=val_fraction,
        latents=len(tables["latents"]),
        rejected_latents=len(data.latent_rejects),
    )
    overview = None if docs_folder is None else describe(data)
    results = _run(rows, tables)
    items = {item.expectation_config.meta["name"]: item for result in results.values() for item in result.results}
    report = ValidationReport(
        checks=tuple(_result(check, items[check.name], tables[check.table]) for check in rows),
        rows={name: len(frame) for name, frame in tables.items()},
        notices=_notices(tables["latents"], val_fraction),
    )
    if overview is not None:
        from latentloom.validation.data_docs import write_data_docs

        write_data_docs(docs_folder, report, results, overview)
    return report


def _notices(latents: pd.DataFrame, val_fraction: float) -> tuple[str, ...]:
    """What the user should know, though no check fails for it: that the validation split is empty, and why."""
    if (latents["split"] == "validation").any():
        return ()
    reason = (
        "ingest.val_fraction is 0"
        if val_fraction == 0
        else f"of {len(latents)} images, ingest.val_fraction = {val_fraction} chose none, or none but near duplicates "
        "of training images (reports/ingest.json counts those moved to train)"
    )
    return (f"no held-out image: {reason}; training can neither measure val/mae nor keep the best model",)


def _run(rows: Iterable[Check], tables: dict[str, pd.DataFrame]) -> dict[str, "ExpectationSuiteValidationResult"]:
    """What Great Expectations found, by table."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    results = {}
    for name, frame in tables.items():
        suite = gx.ExpectationSuite(name, expectations=[_expectation(row) for row in rows if row.table == name])
        # SUMMARY gives the row numbers of the first offenders, which _result turns into ids. To have the ids from
        # `unexpected_index_column_names` costs 50 s for each check that all of a million rows fail.
        results[name] = context.data_sources.pandas_default.read_dataframe(frame).validate(
            suite, result_format={"result_format": "SUMMARY", "partial_unexpected_count": SHOWN}
        )
    return results


def _expectation(check: Check) -> "Expectation":
    from great_expectations import expectations as gxe

    words = {"description": check.requirement, "notes": check.advice, "meta": {"name": check.name}}
    match check.rule:
        case Equals(value):
            return gxe.ExpectColumnValuesToBeInSet(column=check.column, value_set=[value], **words)
        case Between(low, high, strict):
            return gxe.ExpectColumnValuesToBeBetween(
                column=check.column, min_value=low, max_value=high, strict_min=strict, **words
            )


def _result(check: Check, item: "ExpectationValidationResult", frame: pd.DataFrame) -> CheckResult:
    if "unexpected_count" not in item.result:
        raise RuntimeError(f"the check {check.name} could not be computed: {item.exception_info}")
    offenders = frame.iloc[item.result["partial_unexpected_index_list"]]
    whole = check.table == "dataset"
    shown = frame if whole else offenders
    return CheckResult(
        name=check.name,
        table=check.table,
        column=check.column,
        requirement=check.requirement,
        protects=check.protects,
        success=bool(item.success),
        offending=int(item.result["unexpected_count"]),
        ids=() if whole else tuple(offenders["id"]),
        observed=tuple(_scalar(value) for value in shown[check.column].tolist()),
        advice=check.advice,
    )


def _scalar(value: float | int | str | bool) -> float | int | str | bool:
    """The value as JSON can hold it: float32 without the digits that it never had, NaN and infinity as words."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
