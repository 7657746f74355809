"""Great Expectations over all that the earlier stages left: is this data worth a training?

Files on disk -> scalar tables (``tables``) -> checks of their columns (``checks``, run by ``runner``) -> one
``ValidationReport`` (``report``) as JSON and text, and a page for a browser (``data_docs``), which shows the data
itself, too (``overview``).
"""

from latentloom.validation.report import ValidationReport
from latentloom.validation.runner import validate

__all__ = ["ValidationReport", "validate"]
