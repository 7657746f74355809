"""Runs the expectations over the tables, with Great Expectations kept quiet and out of the files.

The context is ephemeral: no project folder is made. Great Expectations takes seconds to import, so that happens after
the files have been read, and a damaged one is told of at once.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from latentloom.params import ValidateParams
from latentloom.validation.inputs import read_inputs
from latentloom.validation.overview import describe
from latentloom.validation.report import Check, ValidationReport
from latentloom.validation.tables import Tables, derive_tables, shape_text

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuiteValidationResult
    from great_expectations.expectations import Expectation

SHOWN = 5  # offending rows that a check names


def validate(
    data: Path,
    params: ValidateParams,
    *,
    val_fraction: float,
    expected_vae_fingerprint: str,
    expected_text_fingerprint: str,
    docs_folder: Path | None,
) -> ValidationReport:
    """Check what the earlier stages left, write the pages for a browser, and return what was found.

    Args:
        data: the folder with ``images``, ``rejects.parquet``, ``near_duplicates.parquet``, ``latents`` and ``text``.
        params: the bounds.
        val_fraction: the share of validation images that ``ingest`` was asked for.
        expected_vae_fingerprint: that of the VAE in params.
        expected_text_fingerprint: that of the text encoder in params.
        docs_folder: where ``index.html``, its pictures and a page for each table go, also when a check fails; None:
            nowhere.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: naming the file that is damaged and what to do. A failing check is not an error here: it is in
            the report.
    """
    inputs = read_inputs(data)
    tables = derive_tables(inputs)
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    from latentloom.validation.data_docs import write_data_docs
    from latentloom.validation.expectations import Expected, expectations

    expected = Expected(
        vae_fingerprint=expected_vae_fingerprint,
        text_fingerprint=expected_text_fingerprint,
        val_fraction=val_fraction,
        found=sum(source.found for source in inputs.manifest.sources),
        latents=len(tables.latents),
        train_images=int(tables.dataset["train_images"].iloc[0]),
        refused_latents=len(inputs.latent_rejects),
        captions=len(tables.captions),
        latent_shape=shape_text(inputs.latent_stats.latent_shape),
        channels=inputs.latent_stats.latent_shape[0],
        embedding_dim=inputs.text_stats.dim,
    )
    with _quiet():
        results = _run(expectations(params, expected), tables)
        report = ValidationReport(
            checks=tuple(
                _check(item, name, frame) for name, frame in tables.frames().items() for item in results[name].results
            ),
            rows={name: len(frame) for name, frame in tables.frames().items()},
        )
        if docs_folder is not None:
            overview = describe(inputs, tables, val_fraction)
            write_data_docs(docs_folder, report, results, overview)
    return report


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _run(suites: dict[str, list["Expectation"]], tables: Tables) -> dict[str, "ExpectationSuiteValidationResult"]:
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.enable_analytics(False)
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_pandas("data")
    results = {}
    for name, frame in tables.frames().items():
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("whole")
        suite = context.suites.add(gx.ExpectationSuite(name, expectations=suites[name]))
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
        # SUMMARY gives the row numbers of the first offenders, which _check turns into ids. To have the ids from
        # `unexpected_index_column_names` costs 50 s for each check that all of a million rows fail.
        results[name] = definition.run(
            batch_parameters={"dataframe": frame},
            result_format={"result_format": "SUMMARY", "partial_unexpected_count": SHOWN},
        )
    return results


def _check(item: Any, table: str, frame: pd.DataFrame) -> Check:
    config, result = item.expectation_config, item.result
    columns = config.kwargs.get("column_list") or [config.kwargs["column"]]
    if "unexpected_count" not in result:
        raise RuntimeError(f"the check {config.meta['name']} could not be computed: {item.exception_info}")
    offenders = frame.iloc[result["partial_unexpected_index_list"]]
    whole = table == "dataset"
    shown = frame if whole else offenders
    return Check(
        name=config.meta["name"],
        table=table,
        column=", ".join(columns),
        requirement=config.description,
        success=bool(item.success),
        offending=int(result["unexpected_count"]),
        ids=() if whole else tuple(offenders[config.meta["ids"]]),
        observed=tuple(_scalar(value) for value in shown[columns[-1]].tolist()),
        advice=config.notes,
    )


def _scalar(value: Any) -> float | int | str | bool:
    """The value as JSON can hold it: float32 without the digits that it never had, NaN and infinity as words."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
