"""Stage ``validate``: all that the earlier stages left -> ``reports/validation.json`` and ``reports/data_docs/``.

``data/validated.json`` says which checks failed, and for which data: all that a training depends on. A report that
words the same outcome otherwise, as for another limit that the data meet, too, is no reason to train again.
Where a check fails, ``validate.on_failure`` decides: ``stop`` ends with exit status 1, ``warn`` prints the same and
continues.
"""

from latentloom.encoding.named_encoders import current_fingerprint
from latentloom.errors import UserError, notify
from latentloom.files import sha256_file, write_json, write_text
from latentloom.layout import DATA_DOCS, IMAGES, LATENTS, TEXT, VALIDATED, VALIDATION_REPORT
from latentloom.params import Params
from latentloom.stage import run_stage
from latentloom.validation.runner import validate


def main(params: Params) -> str:
    report = validate(
        IMAGES.parent,
        params.validate_,
        val_fraction=params.ingest.val_fraction,
        expected_vae_fingerprint=current_fingerprint("encode_images.vae", params.encode_images.vae),
        expected_text_fingerprint=current_fingerprint("encode_text.model", params.encode_text.model),
        docs_folder=DATA_DOCS,
    )
    write_text(VALIDATION_REPORT, report.to_json())
    indexes = (LATENTS / "index.parquet", TEXT / "index.parquet", TEXT / "pairs.parquet")
    data = {path.as_posix(): sha256_file(path) for path in indexes}
    write_json(VALIDATED, {"failed": [check.name for check in report.failures], "data": data})
    what = "; ".join([f"{report.rows['latents']} images and {report.rows['captions']} captions", *report.notices])
    if report.success:
        return f"{len(report.checks)} checks passed on {what}"
    explanation = f"{report.explain()}\n\nThe whole report: {DATA_DOCS / 'index.html'}"
    if params.validate_.on_failure == "stop":
        raise UserError(explanation)
    notify(f"validate: {explanation}")
    return f"{len(report.failures)} of {len(report.checks)} checks failed on {what}; continuing (on_failure: warn)"


if __name__ == "__main__":
    run_stage("validate", main)
