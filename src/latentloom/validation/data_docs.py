"""The report for a browser: Great Expectations' own Data Docs pages, in a frame that needs no network.

Its stock pages load Bootstrap, jQuery and a logo from the network, show nothing on the index without them, and hold
times and random ids. So its renderer makes the content of a page for each table, and the templates beside this file
make the page around it and the index: plain HTML and CSS with the pictures in it, the same bytes for the same data.
"""

import html
import itertools
from pathlib import Path
from typing import Any

from great_expectations.core import ExpectationSuiteValidationResult
from great_expectations.render import RenderedDocumentContent
from great_expectations.render.renderer import ValidationResultsPageRenderer
from great_expectations.render.view import DefaultJinjaPageView
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from latentloom.files import write_text
from latentloom.validation.overview import Overview
from latentloom.validation.report import ValidationReport

TEMPLATES = PackageLoader("latentloom.validation")


class PageView(DefaultJinjaPageView):
    def __init__(self) -> None:
        super().__init__()
        self.env.loader = ChoiceLoader([TEMPLATES, self.env.loader])
        numbers = itertools.count()
        self.env.filters["generate_html_element_uuid"] = lambda prefix: f"{prefix}{next(numbers)}"


def write_data_docs(
    folder: Path, report: ValidationReport, results: dict[str, ExpectationSuiteValidationResult], overview: Overview
) -> None:
    """Write ``index.html`` and ``TABLE.html`` for each table into ``folder``, over what is there."""
    view = PageView()
    for name, result in results.items():
        write_text(folder / f"{name}.html", view.render(_content(result)))
    environment = Environment(
        loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    index = environment.get_template("index.j2").render(report=report, tables=list(results), overview=overview)
    write_text(folder / "index.html", index)


def _content(result: ExpectationSuiteValidationResult) -> RenderedDocumentContent:
    for item in result.results:
        item.result = _escaped(item.result)
    document = ValidationResultsPageRenderer().render(result)
    overview = document.sections[0]
    # The block that folds away holds load times and run ids, and nothing about the data.
    overview.content_blocks = [block for block in overview.content_blocks if block.content_block_type != "collapse"]
    return document


def _escaped(value: Any) -> Any:
    """``value`` with the markup in its strings made harmless: the renderer puts data into the page as it is."""
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_escaped(item) for item in value)
    return value
