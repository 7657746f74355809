"""A whole training: which weights become the model, where it goes on from, and how it stops."""

import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

from latentloom.encoding.dataset import Caches
from latentloom.model_files import load_model
from latentloom.params import Params
from latentloom.tracking.runs import TrackedRun
from latentloom.training.checkpoints import Checkpoint, Checkpoints
from latentloom.training.denoising_error import denoising_error
from latentloom.training.interruption import StopRequest
from latentloom.training.run import TrainingResult, run_training, usable_checkpoint

SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
QUICK = {"steps": 40, "batch_size": 8, "warmup_steps": 2, "precision": "fp32", "log_every": 4, "validate_every": 4}
QUICK |= {"sample_every": 1000, "sample_count": 2, "ema_images": 40, "decay_steps": 10, "learning_rate": 1e-2}


def quick(**train) -> Params:
    return Params.model_validate(
        SHIPPED
        | {
            "model": {"widths": [16, 32], "block_depth": 1, "emb_size": 16},
            "train": SHIPPED["train"] | QUICK | train,
        }
    )


class GreyDecoder:
    def decode(self, latents):
        return torch.full((len(latents), 8, 8, 3), 128, dtype=torch.uint8).numpy()


@pytest.fixture
def caches(make_data) -> Caches:
    made_by = {"reference": "somewhere", "class": "AutoencoderTiny", "fingerprint": "0" * 16}
    latents = {"mean": [0.0] * 4, "std": [1.0] * 4, "vae": made_by, "attribution": None, "licence": None}
    return Caches(make_data(6), make_data(9, prefix="held out"), latents, {"dim": 12, "encoder": made_by})


@pytest.fixture
def run(caches, tmp_path):
    """Train as the stage does; checkpoints and outs lie in ``tmp_path``."""

    def run(params: Params, *, resumed: Checkpoint | None = None) -> TrainingResult:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run_training(
                params,
                caches,
                accelerator=Accelerator(cpu=True),
                checkpoints=kept(tmp_path),
                resumed=resumed,
                model_folder=tmp_path / "model",
                curves_folder=tmp_path / "plots",
                tracked=TrackedRun(),
                load_decoder=GreyDecoder,
            )

    return run


def kept(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", "f" * 16, keep=2, limit=10**9)


def error_of_model(folder: Path, caches: Caches) -> float:
    network, _ = load_model(folder / "model")
    return denoising_error(network, caches.validation, schedule="vp", noise_levels="cosine")["mae"]


@pytest.mark.slow
def test_the_last_averages_or_those_of_the_lowest_validation_error_become_the_model(run, caches, tmp_path):
    last = run(quick(keep="last"))
    assert error_of_model(tmp_path, caches) == pytest.approx(last.val_mae, abs=1e-6)
    best = run(quick(keep="best"))
    assert error_of_model(tmp_path, caches) == pytest.approx(best.metrics["best_val_mae"], abs=1e-4)
    assert best.metrics["best_val_mae"] < last.val_mae  # six images are soon learnt by heart
    assert best.metrics == last.metrics


def test_without_a_validation_split_the_best_averages_are_the_last(run, caches, tmp_path, monkeypatch):
    object.__setattr__(caches, "validation", caches.validation.take(0))
    run(quick(keep="best"))
    best = (tmp_path / "model/model.safetensors").read_bytes()
    result = run(quick(keep="last"))
    assert (tmp_path / "model/model.safetensors").read_bytes() == best
    assert result.val_mae is None
    assert "best_step" not in result.metrics


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_learns_the_same_within_rounding(run):
    few = {"steps": 8, "log_every": 1}
    plain = run(quick(**few))
    compiled = run(quick(**few, compile=True))
    assert compiled.val_mae == pytest.approx(plain.val_mae, abs=1e-3)


def test_without_a_compiler_compiling_is_refused_before_any_work(run, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"train\.compile = True: torch\.compile needs a C\+\+ compiler"):
        run(quick(compile=True))


def facts(params: Params) -> dict:
    settings = params.train
    open_ended = {"cosine": 0, "constant": settings.steps, "warmup_stable_decay": settings.steps - settings.decay_steps}
    return {
        "steps": settings.steps,
        "decay_steps": settings.decay_steps,
        "open_ended_steps": open_ended[settings.lr_schedule],
    }


@pytest.mark.parametrize(
    ("written_by", "step", "wanted_by", "usable"),
    [
        ({"lr_schedule": "cosine"}, 20, {"lr_schedule": "cosine"}, True),
        ({"lr_schedule": "constant"}, 40, {"lr_schedule": "constant", "steps": 60}, True),
        ({"lr_schedule": "constant"}, 40, {"lr_schedule": "constant", "steps": 39}, False),
        ({"lr_schedule": "warmup_stable_decay"}, 30, {"lr_schedule": "warmup_stable_decay", "steps": 60}, True),
        ({"lr_schedule": "warmup_stable_decay"}, 31, {"lr_schedule": "warmup_stable_decay", "steps": 60}, False),
        ({"lr_schedule": "warmup_stable_decay"}, 31, {"lr_schedule": "warmup_stable_decay"}, True),
        ({"lr_schedule": "warmup_stable_decay"}, 30, {"lr_schedule": "warmup_stable_decay", "steps": 35}, False),
        (
            {"lr_schedule": "warmup_stable_decay"},
            31,
            {"lr_schedule": "warmup_stable_decay", "decay_steps": 5},
            False,
        ),
    ],
)
def test_a_checkpoint_is_gone_on_from_where_the_run_would_have_come_by_it(
    tmp_path, written_by, step, wanted_by, usable
):
    kept(tmp_path).save(Checkpoint(step, {"weights": torch.zeros(1)}, facts(quick(**written_by))))
    assert (usable_checkpoint(kept(tmp_path), quick(**wanted_by)) is not None) == usable


def test_the_first_signal_is_a_request_and_a_later_ctrl_c_interrupts(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), StopRequest() as request:
        assert request.number == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert request.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, by way of a launcher
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)  # whoever wants more than a request has SIGKILL
        assert request.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
