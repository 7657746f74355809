"""Generate with exported folders where `latentloom` cannot be imported: python without_package.py CASES.json OUT.npz"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class NoLatentLoom(MetaPathFinder):
    """Finds this package nowhere, whichever way it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "latentloom":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoLatentLoom())
try:
    import latentloom
except ModuleNotFoundError:
    pass
else:
    sys.exit(f"latentloom is still there: {latentloom}")

import numpy as np  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from PIL import Image  # noqa: E402

found = {}
cases, output = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
for folder, calls in cases.items():
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    for name, (arguments, *_) in calls.items():
        if "image" in arguments:
            arguments["image"] = Image.open(arguments["image"])
        found[f"{Path(folder).name}: {name}"] = np.stack([np.asarray(image) for image in pipeline(**arguments).images])
np.savez(output, **found)
