"""The report for a browser, one page: the data at a glance, and each check with what was observed.

Great Expectations' own Data Docs load Bootstrap, jQuery and a logo from the network, name no data asset, link to pages
that nobody wrote, hold times and random ids, and of a check say no more than which percentage is unexpected. So the
template beside this file makes the page of its results: plain HTML and CSS with the pictures in it, the same bytes for
the same data.
"""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from latentloom.files import write_text
from latentloom.validation.overview import Overview
from latentloom.validation.report import ValidationReport


def write_data_docs(folder: Path, report: ValidationReport, overview: Overview) -> None:
    """Write ``index.html`` into ``folder``, over what is there."""
    environment = Environment(
        loader=PackageLoader("latentloom.validation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(folder / "index.html", environment.get_template("index.j2").render(report=report, overview=overview))
