"""Latent Loom: from a folder of captioned images to a versioned, tracked, evaluated text-to-image model."""

__version__ = "0.1.0"
