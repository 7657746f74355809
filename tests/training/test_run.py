"""A whole training: which weights become the model, what it resumes from, what may fail on its way, how it stops."""

import csv
import gc
import json
import os
import shutil
import signal
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from latent_data import split_of_shapes

from latentloom.diffusion.denoising_error import denoising_error
from latentloom.diffusion.diffuser import Diffuser
from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.encoding.dataset import Caches
from latentloom.errors import UserError
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.model_files import load_model
from latentloom.params import Params
from latentloom.randomness import generator
from latentloom.training import run as run_module
from latentloom.training.checkpoints import Checkpoint, Checkpoints, CodeVersion
from latentloom.training.interruption import StopRequest, TrainingStopped
from latentloom.training.loop import learning_rate_at, open_ended_steps
from latentloom.training.run import TrainingResult, run_training, usable_checkpoint

SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
pytestmark = pytest.mark.filterwarnings("error:the preview at step")
QUICK = {"steps": 40, "batch_size": 8, "warmup_steps": 2, "precision": "fp32", "ema_images": 40, "decay_steps": 10}
QUICK |= {"learning_rate": 1e-2}
OFTEN = {"log_every": 4, "validate_every": 4}
SELDOM = {"every": 1000, "captions": 2, "prompts": []}


def quick(
    *,
    monitor: dict | None = None,
    previews: dict | None = None,
    machine: dict | None = None,
    widths: Sequence[int] = (16, 32),
    text: str = "pooled",
    **train,
) -> Params:
    return Params.model_validate(
        SHIPPED
        | {
            "model": {"widths": list(widths), "block_depth": 1, "emb_size": 16, "text": text},
            "train": SHIPPED["train"] | QUICK | train,
            "monitor": SHIPPED["monitor"] | OFTEN | (monitor or {}),
            "previews": SHIPPED["previews"] | SELDOM | (previews or {}),
            "machine": SHIPPED["machine"] | (machine or {}),
        }
    )


class GreyVae:
    fingerprint = "0" * 16

    def decode(self, latents, *, batch_size):
        assert len(latents) <= 16
        return np.full((len(latents), *latents.shape[2:], 3), 128, dtype=np.uint8)


class MemoryLogger:
    """Keeps what it gets; as a tracked run, it keeps the first of what has the same name and step."""

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, int], float] = {}
        self.images: dict[tuple[str, int], np.ndarray] = {}
        self.tags: dict[str, str] = {}
        self.texts: dict[str, str] = {}

    def log_metrics(self, metrics, step):
        for name, value in metrics.items():
            self.metrics.setdefault((name, step), value)

    def log_image(self, image, key, step):
        self.images[key, step] = image

    def log_text(self, text, name):
        self.texts[name] = text

    def set_tags(self, tags):
        self.tags |= tags


@pytest.fixture
def logger() -> MemoryLogger:
    return MemoryLogger()


@pytest.fixture(params=["pooled"])
def caches(make_data, request) -> Caches:
    made_by = {"reference": "somewhere", "class": "AutoencoderTiny", "fingerprint": "0" * 16}
    latents = {"mean": [0.0] * 4, "std": [1.0] * 4, "bound": 3.0, "vae": made_by, "attribution": None, "licence": None}
    tokens = request.param == "tokens"
    text = {"dim": 12, "token_dim": 10 if tokens else None, "max_tokens": 5, "encoder": made_by}
    if request.param == "shapes":
        train = split_of_shapes(make_data(12), (3, (6, 10)), (9, (8, 8)))
        held_out = split_of_shapes(make_data(11, prefix="held out"), (2, (14, 12)), (9, (8, 8)))
        return Caches(train, held_out, latents | {"latent_shape": [4, 8, 8]}, text)
    return Caches(make_data(6, tokens=tokens), make_data(9, prefix="held out", tokens=tokens), latents, text)


of_two_shapes = pytest.mark.parametrize("caches", ["shapes"], indirect=True)
with_tokens = pytest.mark.parametrize("caches", ["tokens"], indirect=True)


@pytest.fixture
def run(caches, tmp_path, logger, monkeypatch):
    """Train as the stage does; checkpoints and outs lie in ``tmp_path``."""
    monkeypatch.setattr("latentloom.training.preview.Vae", lambda reference, device: GreyVae())

    def run(
        params: Params, *, resumed: Checkpoint | None = None, code: str = "code", base: Path | None = None
    ) -> TrainingResult:
        return run_training(
            params,
            caches,
            accelerator=Accelerator(cpu=True),
            checkpoints=kept(tmp_path, code, pinned=open_ended_steps(params.train)),
            resumed=resumed,
            model_folder=tmp_path / "model",
            curves_folder=tmp_path / "plots",
            logger=logger,
            base=base,
        )

    return run


def kept(folder: Path, code: str = "code", pinned: int = 0) -> Checkpoints:
    version = CodeVersion(code, f"commit of {code}")
    return Checkpoints(folder / "checkpoints" / "f", code=version, keep=2, pinned=pinned, limit=10**9)


def outs(folder: Path) -> dict[str, bytes]:
    files = [*(folder / "model").iterdir(), *(folder / "plots").iterdir()]
    return {path.name: path.read_bytes() for path in files}


def of_curves(logger: MemoryLogger) -> dict[tuple[str, int], float]:
    """What was logged and is in the curves: it must not depend on the machine, or on interruptions."""
    return {key: value for key, value in logger.metrics.items() if key[0].startswith(("train/mae", "train/l", "val/"))}


@pytest.fixture
def stop_after(monkeypatch):
    """``stop_after(step)``: the training that runs next is asked to stop after that step."""

    def arrange(last: int) -> None:
        monkeypatch.setattr(
            run_module, "_asked_to_stop", lambda request, accelerator, step, every: int(step.step == last)
        )

    yield arrange


def stopped_and_resumed_ends_the_same(run, params: Params, folder: Path, stop_after, last: int) -> None:
    """A training of ``params`` has ended; one that is stopped after step ``last``, and resumed, leaves its bytes."""
    whole = outs(folder)
    stop_after(last)
    with pytest.raises(TrainingStopped):
        run(params)
    stop_after(0)
    run(params, resumed=usable_checkpoint(kept(folder), params))
    assert outs(folder) == whole


@of_two_shapes
def test_a_training_of_two_shapes_resumes_to_the_same_bytes_and_its_model_draws_both(
    run, caches, tmp_path, monkeypatch, stop_after
):
    shown = []
    monkeypatch.setattr("latentloom.training.preview.captioned_grid", lambda images, _: shown.append(images))
    params = quick(steps=9, monitor={"validate_every": 4}, previews={"steps": 2, "captions": 8})
    run(params)
    # of the first four by id, and of the first four that are held out
    assert [image.shape[:2] for image in shown[0]] == [(6, 10)] * 3 + [(8, 8)] + [(14, 12)] * 2 + [(8, 8)] * 2
    stopped_and_resumed_ends_the_same(run, params, tmp_path, stop_after, 6)

    network, config = load_model(tmp_path / "model")
    assert (config.latent_shape, config.latent_shapes) == ((4, 8, 8), ((4, 6, 10), (4, 8, 8)))
    assert network.size_projection.weight.any()  # the size was learnt from
    model = TextToImage(network, config, codec=None, text_encoder=None, model_sha256="")
    texts, names = caches.train.primary_embeddings(), caches.train.names()
    shapes = [(4, 8, 8), (4, 6, 10), (4, 8, 8), (4, 10, 6)]  # the last was not trained on
    settings = SamplingSettings(3, 2.0, precision="fp32")
    samples = model.latents(texts[:4], names[:4], settings, seed=1, shapes=shapes)
    for name, text, shape, sample in zip(names, texts, shapes, samples, strict=False):
        noise = torch.randn(1, *shape, generator=generator("cpu", 1, "sample", name))
        alone = Diffuser(network, settings=settings, bound=3.0).reverse_diffusion(noise, text[None], layout="nchw")
        torch.testing.assert_close(sample, alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(model.latents(texts[:1], names[:1], settings, seed=1)[0], samples[0], rtol=0, atol=1e-4)


@of_two_shapes
def test_cuda_graphs_are_rejected_for_several_shapes(caches):
    with pytest.raises(UserError, match=r"machine\.compile = cuda_graphs: a graph is of one shape, .* have 2 "):
        run_module._check_settings(quick(machine={"compile": "cuda_graphs"}), caches, torch.device("cuda"))


def test_a_training_starts_from_the_averaged_weights_and_the_whitening_of_its_base(
    run, caches, make_data, tmp_path, stop_after, capsys
):
    run(quick(steps=6))
    base = shutil.move(tmp_path / "model", tmp_path / "base")
    before = load_model(base)[0].state_dict()
    # Other captions, and latents of another size.
    object.__setattr__(caches, "train", split_of_shapes(make_data(7), (7, (16, 12))).buckets[0])
    capsys.readouterr()
    run(quick(steps=1, warmup_steps=1, learning_rate=1e-30, init="base", init_strict=True), base=base)
    assert "train: starting from base; taken: 128 tensors with" in capsys.readouterr().err
    network, config = load_model(tmp_path / "model")
    assert config.latent_shape == (4, 16, 12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    params = quick(steps=6, init="base", monitor={"log_every": 1, "validate_every": 100})
    run(params, base=base)
    stopped_and_resumed_ends_the_same(partial(run, base=base), params, tmp_path, stop_after, 4)
    with open(tmp_path / "plots" / "train.csv") as file:
        rates = [float(row["train_learning_rate"]) for row in csv.DictReader(file)]
    assert rates == [learning_rate_at(step, params.train) for step in range(6)]  # it warms up again


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


def test_the_best_weights_cannot_be_kept_without_a_validation_split(run, caches, tmp_path):
    object.__setattr__(caches, "validation", caches.validation.take(0))
    with pytest.raises(UserError, match=r"train\.keep = best: the validation split is empty"):
        run(quick(keep="best"))
    assert not any(tmp_path.iterdir())


def test_an_empty_validation_split_is_reported_once(run, caches, capsys):
    object.__setattr__(caches, "validation", caches.validation.take(0))
    result = run(quick(steps=8))
    assert capsys.readouterr().err.count("the validation split is empty") == 1
    assert result.val_mae is None
    assert "best_step" not in result.metrics


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_stopped_training_resumes_to_the_same_bytes_of_model_and_curves(run, tmp_path, logger, stop_after, keep):
    params = quick(keep=keep, steps=10, monitor={"validate_every": 3}, machine={"checkpoint_every": 100})
    run(params)
    whole, logged = outs(tmp_path), of_curves(logger)
    stop_after(5)
    with pytest.raises(TrainingStopped, match="stopped at step 5 of 10; the state is saved"):
        run(params)
    with open(tmp_path / "plots" / "train.csv", "a") as curve:
        curve.write("6,0.5,0.1\n7,")  # what a killed process left
    stop_after(0)
    logger.metrics.clear()  # as a logger that has lost all
    run(params, resumed=usable_checkpoint(kept(tmp_path), params))
    assert outs(tmp_path) == whole
    assert of_curves(logger) == logged


@with_tokens
def test_a_training_on_token_states_whitens_them_tells_how_many_are_read_and_resumes_to_the_same_bytes(
    run, caches, tmp_path, stop_after
):
    params = quick(text="tokens", steps=12, previews={"every": 6}, machine={"checkpoint_every": 100})
    run(params)
    stopped_and_resumed_ends_the_same(run, params, tmp_path, stop_after, 5)
    network, config = load_model(tmp_path / "model")
    assert (config.token_dim, config.max_tokens) == (10, 5)
    text = caches.train.primary_embeddings()
    features = network.token_whitening(text.tokens[text.mask])
    assert not torch.equal(network.token_whitening.matrix, torch.eye(10))
    torch.testing.assert_close(features.square().sum(1), torch.full((len(features),), 10.0))


def test_token_states_that_are_not_in_the_cache_are_asked_of_the_stage_that_makes_them(run):
    with pytest.raises(UserError, match=r"model\.text = tokens: the text cache has no token states; run `dvc repro"):
        run(quick(text="tokens"))


def test_a_training_resumes_with_other_code_and_says_so_once(run, tmp_path, logger, stop_after):
    params = quick(steps=12)
    stop_after(8)
    with pytest.raises(TrainingStopped):
        run(params, code="before")
    stop_after(10)
    with (
        pytest.warns(UserWarning, match=r"by other code \(commit commit of b.* than the present \(commit commit of a"),
        pytest.raises(TrainingStopped),
    ):
        run(params, code="after", resumed=usable_checkpoint(kept(tmp_path), params))
    assert logger.tags == {"resumed.other_code": "true"}
    stop_after(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint was written by other code")
        run(params, code="after", resumed=usable_checkpoint(kept(tmp_path), params))


@pytest.mark.slow
def test_once_it_is_loaded_nothing_holds_a_checkpoints_tensors(run, tmp_path, monkeypatch, stop_after):
    params = quick(keep="best", steps=12)
    stop_after(6)
    with pytest.raises(TrainingStopped):
        run(params)
    loaded: list[weakref.ref] = []
    load_tensors, alive = Checkpoint.load_tensors, []

    def load(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        tensors = load_tensors(checkpoint)
        loaded.extend(map(weakref.ref, tensors.values()))
        return tensors

    def look(request, accelerator, step, every) -> int:
        gc.collect()
        alive.append(sum(tensor() is not None for tensor in loaded))
        return 0

    monkeypatch.setattr(Checkpoint, "load_tensors", load)
    monkeypatch.setattr(run_module, "_asked_to_stop", look)
    run(params, resumed=usable_checkpoint(kept(tmp_path), params))
    assert len(loaded) > 100
    assert alive == [0] * 6


def test_curves_are_appended_at_full_precision(run, tmp_path, logger):
    params = quick(steps=12, learning_rate=1.23456789e-6)
    run(params)
    with open(tmp_path / "plots" / "train.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8, 12]
    for row in rows:
        step = int(row["step"])
        assert float(row["train_learning_rate"]) == learning_rate_at(step - 1, params.train)
        assert float(row["train_mae"]) == logger.metrics["train/mae", step]


def test_no_more_rows_of_each_split_are_measured_than_asked_for_and_both_are_logged_by_noise_level(
    run, caches, logger, tmp_path, monkeypatch
):
    measured = []

    def measure(network, data, *, images, **settings):
        measured.append((data.names(), images))
        return {"mae": 0.5, "mae_noise_0.50-0.75": 0.3 if data.names() == caches.train.names() else 0.6}

    monkeypatch.setattr("latentloom.training.monitor.denoising_error", measure)
    run(quick(steps=8, monitor={"validation_images": 5}))
    assert measured == [(caches.validation.names(), 5), (caches.train.names(), 5)] * 2
    assert logger.metrics["train/mae_noise_0.50-0.75", 8] == 0.3
    assert logger.metrics["val/mae_noise_0.50-0.75", 8] == 0.6
    table = (tmp_path / "plots" / "train_by_noise.csv").read_text()
    assert table == "step,train_mae_noise_0.50-0.75\n4,0.3\n8,0.3\n"


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no VAE"), OSError("gone")])
def test_a_preview_that_fails_costs_a_warning_and_no_weight(run, tmp_path, logger, monkeypatch, error):
    params = quick(steps=8, previews={"every": 5})
    run(params)
    whole = outs(tmp_path)
    assert sorted(logger.images) == [("final_samples", 0), ("samples", 5), ("samples", 8)]
    params = quick(steps=8, previews={"every": 8})
    logger.images.clear()

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(GreyVae, "decode", fail)
    with pytest.warns(UserWarning, match="the preview at step 8 failed, the training continues"):
        run(params)
    assert outs(tmp_path) == whole
    monkeypatch.setattr("latentloom.training.preview.Vae", fail)
    with pytest.warns(UserWarning, match="preparing the previews failed, the training continues"):
        run(params)
    assert outs(tmp_path) == whole
    assert logger.images == {}


def test_the_vae_is_fetched_before_the_first_step_also_by_processes_that_show_nothing(run, monkeypatch, caches):
    fetched = []
    monkeypatch.setattr(
        "latentloom.training.preview.Vae", lambda reference, device: fetched.append(reference) or GreyVae()
    )

    def no_step(*args, **options):
        assert fetched == ["somewhere"]
        raise InterruptedError

    monkeypatch.setattr(run_module, "train", no_step)
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    with pytest.raises(InterruptedError):
        run(quick())


def test_previews_are_generated_in_parts_of_bounded_size(run, logger, make_data, caches):
    object.__setattr__(caches, "train", make_data(30))
    object.__setattr__(caches, "validation", make_data(30, prefix="held out"))
    run(quick(steps=4, monitor={"validate_every": 100}, previews={"every": 4, "captions": 40}))
    assert logger.images["samples", 4].shape == (6 * (8 + 56), 7 * 128, 3)  # each with its caption below


class LatentVae:
    """Shows three channels of the latents themselves."""

    fingerprint = "0" * 16

    def decode(self, latents, *, batch_size):
        return (128 + 40 * latents[:, :3].permute(0, 2, 3, 1)).clamp(0, 255).byte().cpu().numpy()


class AnyTextEncoder:
    def __init__(self, reference, *, max_tokens):
        self.fingerprint = "0" * 16

    def encode(self, captions):
        return np.ones((len(captions), 12), dtype=np.float32)


def test_prompts_of_ones_own_come_first_and_change_neither_weights_nor_the_other_previews(
    run, logger, tmp_path, monkeypatch
):
    monkeypatch.setattr("latentloom.training.preview.Vae", lambda reference, device: LatentVae())
    monkeypatch.setattr("latentloom.training.preview.TextEncoder", AnyTextEncoder)
    run(quick(steps=4, previews={"every": 4}))
    whole, before = outs(tmp_path), logger.images["samples", 4].astype(int)
    run(quick(steps=4, previews={"every": 2, "prompts": ["a prompt"]}))
    assert outs(tmp_path) == whole
    assert sorted(logger.images) == [("final_samples", 0), ("samples", 2), ("samples", 4)]
    index = json.loads(logger.texts["previews.json"])
    assert [own["from"] for own in index] == ["prompt", "training", "validation"]
    assert index[0]["caption"] == "a prompt"
    height, width = before.shape[0], before.shape[1] // 2
    after = logger.images["samples", 4].astype(int)
    for shown, place in ((before[:, :width], after[:height, width:]), (before[:, width:], after[height:, :width])):
        assert np.abs(shown - place).max() <= 1  # batches of another size round otherwise


@pytest.mark.parametrize("missing", ["files", "the same weights"])
def test_without_the_text_encoder_prompts_are_left_out_with_a_warning(run, logger, monkeypatch, caches, missing):
    def gone(*args, **options):
        raise UserError("no such folder")

    if missing == "files":
        monkeypatch.setattr("latentloom.training.preview.TextEncoder", gone)
    else:
        monkeypatch.setattr("latentloom.training.preview.TextEncoder", AnyTextEncoder)
        caches.text_statistics["encoder"] = caches.text_statistics["encoder"] | {"fingerprint": "1" * 16}
    with pytest.warns(UserWarning, match=r"text encoder of previews\.prompts failed, the training continues"):
        run(quick(steps=4, previews={"every": 4, "prompts": ["a prompt"]}))
    assert [own["from"] for own in json.loads(logger.texts["previews.json"])] == ["training", "validation"]
    assert sorted(logger.images) == [("final_samples", 0), ("samples", 4)]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_stopped_twice_and_resumed_uncompiled_learns_the_same_within_rounding(
    run, tmp_path, monkeypatch, stop_after
):
    """The graphs are captured as in earnest; what makes machine code of them is PyTorch's, and takes half a minute."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    few = {"steps": 8, "monitor": {"log_every": 1}, "widths": [16]}
    plain, compiled = quick(**few), quick(**few, machine={"compile": True})
    for last in (3, 6):
        stop_after(last)
        with pytest.raises(TrainingStopped):
            run(compiled, resumed=usable_checkpoint(kept(tmp_path), compiled))
    stop_after(0)
    resumed = usable_checkpoint(kept(tmp_path), plain)
    assert resumed.step == 6
    assert run(plain, resumed=resumed).val_mae == pytest.approx(run(plain).val_mae, abs=1e-3)


def test_without_a_compiler_compiling_is_rejected_before_any_work(run, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"machine\.compile = True: torch\.compile needs a C\+\+ compiler"):
        run(quick(machine={"compile": True}))


def test_cuda_graphs_are_rejected_where_there_is_no_cuda(run):
    with pytest.raises(UserError, match=r"machine\.compile = cuda_graphs: .* computes on cpu; set it to false"):
        run(quick(machine={"compile": "cuda_graphs"}))


def metadata(params: Params) -> dict:
    settings = params.train
    open_ended = {"cosine": 0, "constant": settings.steps, "warmup_stable_decay": settings.steps - settings.decay_steps}
    return {"schedule": {"steps": settings.steps, "open_ended_steps": open_ended[settings.lr_schedule]}}


@pytest.mark.parametrize(
    ("written_by", "step", "wanted_by", "usable"),
    [
        ({"lr_schedule": "cosine"}, 20, {"lr_schedule": "cosine"}, True),
        ({"lr_schedule": "cosine"}, 20, {"lr_schedule": "cosine", "decay_steps": 5}, True),
        # At step 20 another rate would follow, and every step before was at another rate.
        ({"lr_schedule": "cosine"}, 20, {"lr_schedule": "cosine", "steps": 60}, False),
        ({"lr_schedule": "cosine"}, 20, {"lr_schedule": "cosine", "steps": 30}, False),
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
def test_a_checkpoint_is_resumed_where_it_is_on_the_runs_trajectory(tmp_path, written_by, step, wanted_by, usable):
    kept(tmp_path).save(step, {"weights": torch.zeros(1)}, metadata(quick(**written_by)), Path("none"))
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
