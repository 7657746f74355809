"""Which code drew a picture: one hash of the modules that decide its pixels, for files on disk and in git alike.

A change of anything else (the docs, the ingestion, how a model is trained) leaves it as it is.
"""

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import latentloom

DRAWING = (  # of the package
    "devices.py",
    "diffusion/*.py",
    "encoding/pretrained.py",
    "encoding/text_encoder.py",
    "encoding/vae.py",
    "evaluation/drawing.py",
    "evaluation/pictures.py",
    "evaluation/sampling.py",
    "training/draws.py",
    "training/model_files.py",
    "training/preview.py",
)


def drawing_code() -> str:
    """The hash of the code that draws in this process: 64 hexadecimal digits."""
    package = Path(latentloom.__file__).parent
    files = [path for pattern in DRAWING for path in package.glob(pattern)]
    return drawing_code_of({path.relative_to(package).as_posix(): _blob(path) for path in files})


def drawing_code_of(blobs: Mapping[str, str]) -> str:
    """The hash of the drawing modules among ``blobs``: path in the package -> git's id of the file's content."""
    drawing = [name for name in blobs if any(fnmatchcase(name, pattern) for pattern in DRAWING)]
    listed = "".join(f"{blobs[name]} {name}\n" for name in sorted(drawing))
    return hashlib.sha256(listed.encode()).hexdigest()


def _blob(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
