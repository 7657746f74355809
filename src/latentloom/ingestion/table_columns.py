"""Which columns of a table hold images and captions, and what the value of an image's column gives.

Images are bytes, or Hugging Face's struct of ``bytes`` and ``path``; captions are a text or a list of texts. Where
params name no column, it is the first of ``IMAGE_COLUMNS`` that holds images, in upper or lower case, and all that
hold captions (``captions.columns_of_captions``).
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from latentloom.ingestion.captions import CAPTION_COLUMNS, columns_of_captions
from latentloom.ingestion.rejects import Reason, RejectedSample
from latentloom.ingestion.sources import IngestError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")


def table_columns(
    schema: pa.Schema, image_column: str | None, caption_columns: Mapping[str, int] | None, table: str, source: str
) -> list[str]:
    """The column of images, then those of captions.

    Args:
        image_column: None for the first of ``IMAGE_COLUMNS`` that holds some.
        caption_columns: and how often a caption of each counts; None for all of the usual names.
        table: what messages call the table.
        source: that of the params which reads it.

    Raises:
        IngestError: when one is not there, or comes twice; table, columns and param are named.
    """
    with_bytes = {field.name.lower(): field.name for field in reversed(schema) if _holds_bytes(field.type)}
    if image_column is None:
        images = [with_bytes[name] for name in IMAGE_COLUMNS if name in with_bytes][:1]
    else:
        images = [image_column] if image_column in with_bytes.values() else []
    captions = columns_of_captions(schema.names, caption_columns)
    for param, found, wanted, known, what in (
        ("image_column", images, image_column and [image_column], IMAGE_COLUMNS, "encoded images"),
        ("caption_column", captions, caption_columns, CAPTION_COLUMNS, "captions"),
    ):
        if len(found) < len(wanted or [""]):
            there = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise IngestError(
                f"{table} has the columns {there}; none that is called {', '.join(wanted or known)} holds {what}. "
                f"Name it in params.yaml: ingest.source: [{{source: {source}, path: ..., {param}: ...}}]"
            )
        for name in found:
            if schema.names.count(name) > 1:
                raise IngestError(f"{table} has two columns {name!r}; rename one, or remove it")
    return [*images, *captions]


def image_of(value: bytes | dict[str, Any] | None) -> bytes:
    """The bytes of an image that a row holds.

    Raises:
        RejectedSample: ``missing_file``, where it holds none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return data
    detail = "its row holds no image"
    if value and value.get("path"):
        detail = f"its row holds the path {value['path']} without the bytes; embed them, or use the source folder"
    raise RejectedSample(Reason.MISSING_FILE, detail)


def _holds_bytes(arrow_type: pa.DataType) -> bool:
    if types.is_struct(arrow_type):
        inner = [field.type for field in arrow_type if field.name == "bytes"]
        return any(types.is_null(of_bytes) or _holds_bytes(of_bytes) for of_bytes in inner)
    if types.is_dictionary(arrow_type):
        return _holds_bytes(arrow_type.value_type)
    return types.is_binary(arrow_type) or types.is_large_binary(arrow_type) or types.is_binary_view(arrow_type)
