"""Gradio as `gr`, told at its import to send no statistics and to keep uploads and previews until the process ends."""

import os
import tempfile

TEMPORARY = tempfile.TemporaryDirectory(prefix="latentloom-page-")
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_TEMP_DIR": TEMPORARY.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import gradio as gr  # noqa: E402

__all__ = ["gr"]
