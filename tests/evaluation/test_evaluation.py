"""Samples depend on what was asked, recall counts what is right, and the sheet shows it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_data import TensorDataset
from PIL import Image
from torch import nn

from latentloom.diffusion import Diffuser
from latentloom.encoding.dataset import Caches, LatentDataset
from latentloom.evaluation import run
from latentloom.evaluation.run import evaluate
from latentloom.evaluation.sampling import Sampler, nearest
from latentloom.evaluation.sheet import CELL, Row, Section, draw_sheet, save_sheet
from latentloom.ingestion.shards import read_metadata
from latentloom.model_files import FORMAT_VERSION, EncoderReference, ModelConfig
from latentloom.params import load_params

REFERENCE = EncoderReference(reference="bundled", class_name="X", fingerprint="0" * 64)
CONFIG = ModelConfig(
    format_version=FORMAT_VERSION,
    latent_shape=(4, 4, 4),
    widths=(16, 32),
    block_depth=1,
    emb_size=16,
    text_dim=8,
    schedule="vp",
    latent_mean=(0.0,) * 4,
    latent_std=(1.0,) * 4,
    latent_bound=10.0,
    vae=REFERENCE,
    text_encoder=REFERENCE,
    attribution="Drawn by somebody",
    licence=None,
)


class Remembers(nn.Module):
    """A network that knows the latent of each label by heart; of a label it does not know, zero."""

    def __init__(self, labels, latents):
        super().__init__()
        self.labels, self.latents = nn.Parameter(labels, requires_grad=False), latents

    def forward(self, x_t, noise_levels, labels):
        known = (labels[:, None] == self.labels).all(-1)
        return torch.einsum("bn,nchw->bchw", known.float(), self.latents)


class Grey:
    """A decoder whose pictures show the latents' mean as a shade."""

    def decode(self, latents):
        shade = latents.mean((1, 2, 3)).mul(50).add(128).clamp(0, 255).to(torch.uint8).numpy()
        return np.broadcast_to(shade[:, None, None, None], (len(latents), 32, 32, 3)).copy()


class Hashing:
    def encode(self, captions):
        return np.stack([np.random.default_rng(len(caption)).normal(size=8) for caption in captions]).astype(np.float32)


def sampler(network, *, guidance=1.0, steps=8, **settings) -> Sampler:
    return Sampler(network, CONFIG, guidance=guidance, steps=steps, threshold_percentile=99.5, dtype=None, **settings)


@pytest.fixture
def caches(prepare_images) -> tuple[Caches, Path]:
    images = prepare_images(range(16))
    metadata = read_metadata(images)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(16, 8, generator=generator)

    def split(name: str) -> LatentDataset:
        rows = torch.from_numpy(np.flatnonzero(metadata["split"] == name))
        return TensorDataset.from_tensors(
            ids=metadata["id"].iloc[rows.numpy()].tolist(),
            mean=torch.randn(len(rows), 4, 4, 4, generator=generator),
            std=None,
            embeddings=embeddings,
            texts=[f"caption {row}" for row in range(16)],
            captions=rows[:, None],
            caption_counts=torch.ones(len(rows), dtype=torch.long),
        )

    return Caches(split("train"), split("validation"), {}, {}), images


@pytest.fixture
def params():
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    update = {"prompts": ["one", "three"], "recall_captions": 8, "held_out_captions": 3}
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update=update)})


def test_a_model_that_knows_its_captions_has_full_recall(caches, params):
    data, images = caches
    network = Remembers(data.train.primary_embeddings(), data.train.mean)
    result = evaluate(params, sampler(network), data, images, decoder=Grey(), embedder=Hashing())
    assert result.metrics["caption_recall_at_1"] == 1.0
    assert result.metrics["recall_captions"] == 8


def test_a_model_that_mixes_two_captions_up_loses_just_those(caches, params):
    data, images = caches
    order = torch.arange(12)
    order[[0, 1]] = torch.tensor([1, 0])
    network = Remembers(data.train.primary_embeddings(), data.train.mean[order])
    result = evaluate(params, sampler(network), data, images, decoder=Grey(), embedder=Hashing())
    assert result.metrics["caption_recall_at_1"] == 6 / 8


def test_the_validation_error_is_of_the_validation_split(caches, params):
    data, images = caches
    network = Remembers(data.validation.primary_embeddings(), data.validation.mean)
    result = evaluate(params, sampler(network), data, images, decoder=Grey(), embedder=Hashing())
    assert result.metrics["val_mae"] == 0.0
    assert all(math.isfinite(value) for value in result.metrics.values())


def test_without_a_validation_split_there_is_still_an_evaluation(caches, params):
    data, images = caches
    data = Caches(data.train, data.validation.take(0), {}, {})
    network = Remembers(data.train.primary_embeddings(), data.train.mean)
    result = evaluate(params, sampler(network), data, images, decoder=Grey(), embedder=Hashing())
    assert "val_mae" not in result.metrics
    assert result.metrics["caption_recall_at_1"] == 1.0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "8 steps of ddim, guidance 3, seed 0;"),
        (
            {"sampler": "dpmpp_2m", "guidance_interval": (0.2, 0.8), "guidance_rescale": 0.7},
            "8 steps of dpmpp_2m, guidance 3 at noise levels 0.2 to 0.8, rescaled by 0.7, seed 0;",
        ),
    ],
)
def test_the_sheets_footer_says_how_the_samples_were_made(caches, params, monkeypatch, settings, told):
    footers = []
    monkeypatch.setattr(run, "draw_sheet", lambda sections, footer: footers.append(footer))
    data, images = caches
    network = Remembers(data.train.primary_embeddings(), data.train.mean)
    evaluate(params, sampler(network, guidance=3.0, **settings), data, images, decoder=Grey(), embedder=Hashing())
    assert footers[0].startswith(told)


@pytest.mark.parametrize(
    "settings", [{"sampler": "dpmpp_2m"}, {"guidance_interval": (0.2, 0.8)}, {"guidance_rescale": 0.7}]
)
def test_a_samplers_settings_reach_its_diffuser(settings):
    torch.manual_seed(0)
    network = CONFIG.build().eval()
    embeddings, names = torch.randn(2, 8), ["a", "b"]
    made = sampler(network, guidance=3.0, **settings)
    noise = torch.stack([made.starting_noise(name, 1) for name in names])
    diffuser = Diffuser(network, 3.0, 8, bound=CONFIG.latent_bound, **settings)
    latents = made.latents(embeddings, names, seed=1)
    torch.testing.assert_close(latents, diffuser.reverse_diffusion(noise, embeddings, layout="nchw"))
    assert not torch.equal(latents, sampler(network, guidance=3.0).latents(embeddings, names, seed=1))


def test_a_sample_does_not_depend_on_what_else_is_asked_for():
    torch.manual_seed(0)
    network = CONFIG.build().eval()
    network.head.weight.data *= 10  # before its training it guesses near 0, whatever it is asked
    embeddings = torch.randn(5, 8)
    names = list("abcde")
    together = sampler(network, guidance=3.0).latents(embeddings, names, seed=1)
    alone = sampler(network, guidance=3.0).latents(embeddings[2:3], names[2:3], seed=1)
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=1e-4)
    other_seed = sampler(network, guidance=3.0).latents(embeddings, names, seed=2)
    assert not torch.allclose(other_seed, together, atol=1e-2)


def test_the_nearest_training_latent_is_found_as_numpy_finds_it(monkeypatch):
    monkeypatch.setattr("latentloom.evaluation.sampling.PART", 6)
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(7, 4, 4, 4)).astype(np.float32)
    references = generator.normal(size=(20, 4, 4, 4)).astype(np.float32)
    references[13] = references[2]  # of two alike, the first
    samples[0] = references[13]
    distances = np.linalg.norm(samples.reshape(7, 1, -1) - references.reshape(1, 20, -1), axis=2)
    train = TensorDataset.from_tensors(
        ids=[f"image{row}" for row in range(20)],
        mean=torch.from_numpy(references),
        std=None,
        embeddings=torch.zeros(1, 8),
        texts=["caption"],
        captions=torch.zeros(20, 1, dtype=torch.long),
        caption_counts=torch.ones(20, dtype=torch.long),
    )
    assert nearest(torch.from_numpy(samples), train).tolist() == distances.argmin(1).tolist()


def test_the_sheet_shows_every_picture_whole_and_grows_with_their_number(tmp_path):
    red = np.zeros((9, 32, 32, 3), dtype=np.uint8)
    red[..., 0] = 255
    section = Section(
        "Title", [f"a label {i} that is long enough to be wrapped" for i in range(9)], [Row("sample", red)]
    )
    sheet = draw_sheet([section], "a footer")
    is_red = (np.asarray(sheet) == [255, 0, 0]).all(-1).sum()
    assert is_red == 9 * CELL * CELL
    assert draw_sheet([section, section], "a footer").height > 1.7 * sheet.height
    save_sheet(sheet, tmp_path / "deep" / "sheet.png")
    save_sheet(sheet, tmp_path / "again.png")
    assert (tmp_path / "deep" / "sheet.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    with Image.open(tmp_path / "again.png") as opened:
        assert opened.size == sheet.size
