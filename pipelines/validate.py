"""Stage ``validate``: both caches -> ``reports/validation.json`` and ``reports/data_docs/``, or an end with exit 1."""

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
        Path("data/latents"),
        Path("data/text"),
        params.validate_,
        val_fraction=params.ingest.val_fraction,
        expected_vae_fingerprint=vae_fingerprint(params.encode_images.vae),
        expected_text_fingerprint=text_fingerprint(params.encode_text.model),
        docs_folder=REPORTS / "data_docs",
    )
    write_text(REPORTS / "validation.json", report.to_json())
    if not report.success:
        raise ValidationFailed(f"{report.explain()}\n\nThe whole report: {REPORTS / 'data_docs' / 'index.html'}")
    return (
        f"{len(report.checks)} checks passed on {report.rows['latents']} images and {report.rows['captions']} captions"
    )


if __name__ == "__main__":
    run_stage("validate", main)
