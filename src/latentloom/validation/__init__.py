"""Great Expectations over both caches: is this data worth a training?

Index files and statistics on disk -> scalar tables (``tables``) -> expectations over their columns (``expectations``)
-> one ``ValidationReport`` (``report``) as JSON and text, and pages for a browser (``data_docs``).
"""

from latentloom.validation.report import Check, ValidationFailed, ValidationReport
from latentloom.validation.runner import validate

__all__ = ["Check", "ValidationFailed", "ValidationReport", "validate"]
