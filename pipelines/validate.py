"""Stage ``validate``: all that the earlier stages left -> ``reports/validation.json`` and ``reports/data_docs/``.

Where a check fails, ``validate.on_failure`` decides: ``stop`` ends with exit 1, ``warn`` says the same and goes on.
"""

import sys
from pathlib import Path

from latentloom.encoding.text_encoder import text_fingerprint
from latentloom.encoding.vae import vae_fingerprint
from latentloom.files import write_text
from latentloom.params import Params
from latentloom.stage import run_stage
from latentloom.validation import ValidationFailed, validate

REPORTS = Path("reports")


def main(params: Params) -> str:
    report = validate(
        Path("data"),
        params.validate_,
        val_fraction=params.ingest.val_fraction,
        expected_vae_fingerprint=vae_fingerprint(params.encode_images.vae),
        expected_text_fingerprint=text_fingerprint(params.encode_text.model),
        docs_folder=REPORTS / "data_docs",
    )
    write_text(REPORTS / "validation.json", report.to_json())
    what = f"{report.rows['latents']} images and {report.rows['captions']} captions"
    if report.success:
        return f"{len(report.checks)} checks passed on {what}"
    explanation = f"{report.explain()}\n\nThe whole report: {REPORTS / 'data_docs' / 'index.html'}"
    if params.validate_.on_failure == "stop":
        raise ValidationFailed(explanation)
    print(f"validate: {explanation}", file=sys.stderr)
    return f"{len(report.failures)} of {len(report.checks)} checks failed on {what}; on_failure: warn goes on"


if __name__ == "__main__":
    run_stage("validate", main)
