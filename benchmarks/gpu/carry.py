"""What a bare machine with a GPU is given for `benchmarks/on_gpu.py`: a folder of caches and of packages it lacks.

    FOLDER/data/images, latents, text   OpenMoji by --preset: ingested and encoded here, so nothing is fetched there
    FOLDER/text_encoder                 the text encoder's config and tokenizer; its 90 MB of weights stay here, since
                                        random ones take the same time
    FOLDER/wheels                       packages for --python on Linux x86-64, in the versions of requirements.lock

    PYTHONPATH=src python benchmarks/gpu/carry.py FOLDER [--preset presets/h200.yaml] [--limit 512] [--python 3.12]

On two cores all of OpenMoji takes about ten minutes and comes to some 40 MB. There, the wheels are installed by

    python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/wheels/*.whl
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from latentloom.encoding.references import text_folder

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("ingest", "encode_images", "encode_text")
CACHES = ("images", "latents", "text")
# What such a machine has no version of, or too old a one; torch, accelerate, transformers and the like are there.
PACKAGES = (
    "annotated-types",
    "diffusers",
    "importlib-metadata",
    "pydantic",
    "pydantic-core",
    "ruamel-yaml",
    "typing-extensions",
    "typing-inspection",
    "zipp",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def make_caches(preset: Path, folder: Path, limit: int | None) -> None:
    """Run the stages that prepare data, in a temporary folder, and leave their caches in ``folder``."""
    params = yaml.safe_load(preset.read_text())
    if limit:
        params["ingest"]["limit"] = limit
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "params.yaml").write_text(yaml.safe_dump(params))
        for stage in STAGES:
            script = ROOT / "pipelines" / f"{stage}.py"
            subprocess.run([sys.executable, script], cwd=name, env=environment, check=True)
        for cache in CACHES:
            shutil.rmtree(folder / cache, ignore_errors=True)
            shutil.copytree(Path(name) / "data" / cache, folder / cache)


def copy_text_encoder(reference: str, folder: Path) -> None:
    """Config and tokenizer of a text encoder, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in text_folder(reference).iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copy(path, folder)


def download_wheels(folder: Path, python: str) -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {match[1]: line for line in lines if (match := re.match(r"([\w.-]+)==", line))}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*command, *(locked[package] for package in PACKAGES)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", type=Path, default=ROOT / "presets" / "h200.yaml")
    parser.add_argument("--limit", type=int, help="images; all by default")
    parser.add_argument("--python", default="3.12", help="the version there")
    arguments = parser.parse_args()
    download_wheels(arguments.folder / "wheels", arguments.python)
    preset = yaml.safe_load(arguments.preset.read_text())
    copy_text_encoder(preset["encode_text"]["model"], arguments.folder / "text_encoder")
    make_caches(arguments.preset, arguments.folder / "data", arguments.limit)
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    print(f"{arguments.folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
