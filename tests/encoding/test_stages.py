"""The stages `encode_images` and `encode_text`: what they leave does not depend on what earlier runs left."""

import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tqdm
from safetensors.torch import load_file

from latentloom.encoding import cache
from latentloom.files import read_json
from latentloom.params_file import load_params
from latentloom.source_code import deciding_modules

ROOT = Path(__file__).parents[2]
STAGES = {"encode_images": ("data/latents", "latents"), "encode_text": ("data/text", "captions")}


@pytest.fixture
def run_stage(tmp_path, monkeypatch, prepare_images):
    """``run_stage(name)`` runs a stage on 40 images, from an empty out; gives its closing line.

    With ``text`` and ``max_tokens`` as in params.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    prepare_images(range(40), name="data/images")
    shipped = load_params(ROOT / "params.yaml")

    def run(name: str, text: str = "pooled", max_tokens: int | None = None) -> str:
        changed = {
            "model": shipped.model.model_copy(update={"text": text}),
            "encode_text": shipped.encode_text.model_copy(update={"max_tokens": max_tokens}),
        }
        params = shipped.model_copy(update=changed)
        shutil.rmtree(STAGES[name][0], ignore_errors=True)
        return runpy.run_path(str(ROOT / "pipelines" / f"{name}.py"))["main"](params)

    return run


def left(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for own in (folder, "reports") for path in Path(own).rglob("*.*")}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_leaves_is_the_same_whatever_lay_in_the_state_folder(run_stage, prepare_images, stage):
    folder, unit = STAGES[stage]
    outcomes = []
    for line, before in ((r"encoded (\d+), reused 0", []), (r"encoded 0, reused (\d+)", []), ("reused [1-9]", [1, 5])):
        if before:
            shutil.rmtree(".state")
            shutil.move("data/images", "all images")
            prepare_images(before, name="data/images")
            run_stage(stage)
            shutil.rmtree("data/images")
            shutil.move("all images", "data/images")
        assert re.match(rf"\d+ {unit}: .*{line}", run_stage(stage))
        outcomes.append(left(folder))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert f"reports/{stage}.json" in outcomes[0]


def test_token_states_and_where_captions_are_cut_are_as_params_say(run_stage):
    """Captions are "picture 7" and "noise of kind 1": with the two marks four tokens, and six."""
    assert run_stage("encode_text", "tokens", 5) == "43 captions: encoded 43, reused 0; 3 cut at 5 tokens"
    report = read_json(Path("reports/encode_text.json"))
    assert {key: report[key] for key in ("captions", "cut", "max_tokens", "token_dim")} == {
        "captions": 43,
        "cut": 3,
        "max_tokens": 5,
        "token_dim": 384,
    }
    assert load_file("data/text/00000.safetensors")["tokens"].shape == (40 * 4 + 3 * 5, 384)
    assert run_stage("encode_text", max_tokens=5) == "43 captions: encoded 43, reused 0; 3 cut at 5 tokens"
    assert "tokens" not in load_file("data/text/00000.safetensors")
    assert run_stage("encode_text", "tokens", 5) == "43 captions: encoded 0, reused 43; 3 cut at 5 tokens"


@pytest.mark.slow
def test_with_nothing_to_compute_no_model_is_loaded(run_stage):
    for stage in STAGES:
        run_stage(stage)
    code = """
import runpy, sys
from latentloom.params_file import load_params
for script in sys.argv[2:]:
    print(runpy.run_path(script)["main"](load_params(sys.argv[1])))
assert not {"diffusers", "transformers", "accelerate"} & set(sys.modules)
"""
    scripts = [ROOT / "pipelines" / f"{stage}.py" for stage in STAGES]
    command = [sys.executable, "-c", code, ROOT / "params.yaml", *scripts]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("encoded 0") == 2


@pytest.mark.parametrize("stage", STAGES)
def test_the_progress_bar_ends_at_the_end(run_stage, monkeypatch, stage):
    bars = []

    def bar(*arguments, **settings):
        bars.append(tqdm.tqdm(*arguments, **settings, disable=False, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(cache, "tqdm", bar)
    for _ in ("all rows are new", "all rows are known"):
        run_stage(stage)
    assert [own.n for own in bars] == [own.total for own in bars]


def test_no_code_that_computes_rows_decides_what_a_training_reads():
    encoding = ROOT / "src" / "latentloom" / "encoding"
    reached = {path.stem for path in deciding_modules(encoding / "dataset.py", encoding.parent)}
    assert "shard_files" in reached
    assert not reached & {"cache", "latents", "captions", "vae", "text_encoder", "pretrained", "latent_statistics"}
