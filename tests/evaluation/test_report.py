"""Samples depend on what was asked, recall counts what is right, and the sheet shows it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_data import TensorDataset, Texts
from PIL import Image
from torch import nn

from latentloom.diffusion import Diffuser, SamplingSettings
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.dataset import Caches, LatentDataset, Split, all_latents, row_shapes
from latentloom.encoding.row_sources import InMemoryRows
from latentloom.evaluation import report
from latentloom.evaluation.distribution import Distribution, Encoders
from latentloom.evaluation.report import Evaluation, evaluate
from latentloom.evaluation.sheet import CELL, GAP, Section, render_sheet, save_sheet
from latentloom.evaluation.text_to_image import TextToImage
from latentloom.ingestion.shards import iterate_images, read_metadata
from latentloom.model_files import FORMAT_VERSION, EncoderReference, ModelConfig
from latentloom.params_file import load_params

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


COLOURS, SHAPES = ("red", "green", "blue", "grey"), ("cat", "dog", "egg", "bee")
SETTINGS = SamplingSettings(diffusion_steps=8, precision="fp32")


class Remembers(nn.Module):
    """A network that knows the latent of each label by heart; of a label that it does not know at a shape, zero."""

    multiple = 1

    def __init__(self, labels, latents):
        super().__init__()
        self.labels, self.latents = nn.Parameter(labels, requires_grad=False), latents

    def forward(self, x_t, noise_levels, labels):
        known = (labels[:, None] == self.labels).all(-1).float()
        rows = [row for row, latent in enumerate(self.latents) if latent.shape == x_t.shape[1:]]
        if not rows:
            return torch.zeros_like(x_t)
        return torch.einsum("bn,nchw->bchw", known[:, rows], torch.stack([self.latents[row] for row in rows]))


class Grey:
    """A VAE whose images show the latents' mean as a shade."""

    factor = 8

    def decode(self, latents, *, batch_size):
        shade = latents.mean((1, 2, 3)).mul(50).add(128).clamp(0, 255).to(torch.uint8).numpy()
        height, width = (8 * side for side in latents.shape[2:])
        return np.broadcast_to(shade[:, None, None, None], (len(latents), height, width, 3)).copy()


class Hashing:
    def encode(self, captions):
        return np.stack([np.random.default_rng(len(caption)).normal(size=8) for caption in captions]).astype(np.float32)


def model(network) -> TextToImage:
    codec = LatentCodec(CONFIG.latent_mean, CONFIG.latent_std, load_vae=Grey)
    return TextToImage(network, CONFIG, codec, Hashing(), model_sha256="0" * 64)


def means(data: LatentDataset) -> torch.Tensor:
    return data.latents_at(slice(0, len(data)))[0]


@pytest.fixture
def caches(prepare_images) -> tuple[Caches, Path]:
    images = prepare_images(range(16))
    metadata = read_metadata(images).sort_values("id", ignore_index=True)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(16, 8, generator=generator)

    def split(name: str) -> LatentDataset:
        rows = torch.from_numpy(np.flatnonzero(metadata["split"] == name))
        return TensorDataset.from_tensors(
            ids=metadata["id"].iloc[rows.numpy()].tolist(),
            mean=torch.randn(len(rows), 4, 4, 4, generator=generator),
            std=None,
            embeddings=embeddings,
            texts=[f"{COLOURS[(row + row // 4) % 4]} {SHAPES[row // 4]}" for row in range(16)],
            captions=rows[:, None],
        )

    return Caches(split("train"), split("validation"), {}, {}), images


@pytest.fixture
def params():
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    sampling = SETTINGS.changed(class_guidance=1.0)
    update = {"prompts": ["one", "three"], "training_captions": 8, "held_out_captions": 3, "sampling": sampling}
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update=update)})


@pytest.fixture
def evaluated(caches, params):
    """``evaluated("train", ...)``: of a network that knows the latents of a split's captions by heart, or others."""
    data, images = caches

    def run(split: str = "validation", latents: torch.Tensor | None = None, **settings) -> Evaluation:
        known = getattr(data, split)
        network = Remembers(known.primary_embeddings(), means(known) if latents is None else latents)
        changed = params.model_copy(update={"evaluate": params.evaluate.model_copy(update=settings)})
        return evaluate(changed, model(network), data, images)

    return run


def test_a_model_that_knows_its_captions_has_full_recall_and_one_that_mixes_two_up_loses_just_those(caches, evaluated):
    metrics = evaluated("train").metrics
    assert (metrics["memorisation_recall"], metrics["training_captions"]) == (1.0, 8)
    order = torch.arange(12)
    order[[0, 1]] = torch.tensor([1, 0])
    assert evaluated("train", means(caches[0].train)[order]).metrics["memorisation_recall"] == 6 / 8


def test_a_model_that_knows_the_held_out_images_has_full_held_out_recall_and_no_error(evaluated):
    result = evaluated()
    assert result.metrics["held_out_recall_at_1"] == result.metrics["held_out_recall_at_5"] == 1.0
    assert result.metrics["held_out_combinations"] == 3
    low = result.metrics["held_out_recall_at_1_low"]
    assert f"held_out_recall_at_1 1.000 ({low:.2f} to 1.00)" in result.summary
    assert result.metrics["val_mae"] == 0.0
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.fixture
def sheets(monkeypatch) -> list:
    """The sections of each sheet rendered."""
    rendered = []
    monkeypatch.setattr(report, "render_sheet", lambda sections, footer: rendered.append(sections))
    return rendered


def test_the_sheet_begins_with_held_out_captions_beside_the_real_and_the_nearest_training_image(
    caches, evaluated, sheets
):
    data, images = caches
    copied = means(data.train)[[5, 2, 7, 0]]
    evaluated(latents=copied)
    pixels = dict(iterate_images(images))
    first, prompts, trained = sheets[0]
    assert first.title.startswith("Held-out combinations")
    assert first.labels == data.validation.primary_texts()[:3]
    real, sample, nearest = first.rows.values()
    np.testing.assert_array_equal(real, [pixels[name] for name in data.validation.names()[:3]])
    np.testing.assert_array_equal(sample, Grey().decode(copied[:3], batch_size=4))
    np.testing.assert_array_equal(nearest, [pixels[data.train.names()[row]] for row in (5, 2, 7)])
    assert (prompts.title, trained.title) == ("Prompts", "Captions of training images")


def test_captions_are_sampled_in_the_shape_of_their_image_and_prompts_in_each_size(caches, params, sheets):
    data, images = caches

    def of_two_shapes(square: LatentDataset) -> Split:
        wide = [row for row in range(len(square)) if row % 2]
        own = {"ids": square.ids[wide], "captions": square.captions[torch.tensor(wide)]}
        own |= {"latents": InMemoryRows({"mean": torch.randn(len(wide), 4, 2, 6)})}
        rest = [row for row in range(len(square)) if not row % 2]
        left = {"ids": square.ids[rest], "captions": square.captions[torch.tensor(rest)]}
        left |= {"latents": InMemoryRows({"mean": square.mean[rest]})}
        return Split((replace(square, **own), replace(square, **left)))

    data = Caches(of_two_shapes(data.train), of_two_shapes(data.validation), {}, {})
    evaluation = params.evaluate.model_copy(update={"sizes": ["32x32", "48x16"], "held_out_captions": 4})
    network = Remembers(data.validation.primary_embeddings(), all_latents(data.validation))
    result = evaluate(params.model_copy(update={"evaluate": evaluation}), model(network), data, images)
    assert result.metrics["held_out_recall_at_1"] == 1.0
    assert result.metrics["val_mae"] == 0.0
    first, square, wide, trained = sheets[0]
    assert [section.title for section in (square, wide)] == ["Prompts at 32x32", "Prompts at 48x16"]
    assert {image.shape for image in square.rows["sample"]} == {(32, 32, 3)}
    assert {image.shape for image in wide.rows["sample"]} == {(16, 48, 3)}
    pairs = zip(data.validation.names(), data.validation.primary_texts(), row_shapes(data.validation), strict=True)
    _, captions, shapes = zip(*sorted(pairs), strict=True)
    assert list(first.labels) == list(captions)
    for (_, height, width), sample in zip(shapes, first.rows["sample"], strict=True):
        assert sample.shape == (8 * height, 8 * width, 3)
    assert len({image.shape for image in trained.rows["sample"]}) == 2


def test_without_prompts_the_sheet_shows_captions_of_the_data_alone(evaluated, sheets):
    evaluated("train", prompts=None)
    assert [section.title.partition(":")[0] for section in sheets[0]] == [
        "Held-out combinations",
        "Captions of training images",
    ]


def test_captions_with_new_words_have_a_section_of_their_own(caches, params, sheets):
    data, images = caches
    texts = list(data.validation.texts.texts)
    texts[data.validation.captions.primary[1]] = "a wyvern"
    data = replace(data, validation=replace(data.validation, texts=Texts(texts)))
    network = Remembers(data.validation.primary_embeddings(), means(data.validation))
    evaluate(params, model(network), data, images)
    known, new, *_ = sheets[0]
    assert (len(known.labels), new.labels) == (2, ["a wyvern"])
    assert "new words" in new.title


@pytest.mark.parametrize(("count", "farthest", "closest"), [(3, [1], [2, 0]), (1, [], [0])])
def test_the_extremes_are_the_farthest_from_their_real_images_then_the_nearest(
    caches, evaluated, sheets, count, farthest, closest
):
    data, _ = caches
    off = torch.tensor([0.5, 2.0, 0.1, 0.0])[:, None, None, None]
    evaluated(latents=means(data.validation) + off, held_out_captions=count)
    captions = data.validation.primary_texts()
    shown = [section.labels for section in sheets[1]]
    assert shown == [[captions[row] for row in rows] for rows in (farthest, closest) if rows]


def test_without_a_validation_split_there_is_still_an_evaluation(caches, params):
    data, images = caches
    data = Caches(data.train, data.validation.take(0), {}, {})
    network = Remembers(data.train.primary_embeddings(), means(data.train))
    result = evaluate(params, model(network), data, images)
    assert "val_mae" not in result.metrics
    assert "no held-out image: val_mae and held-out recall are not measured" in result.summary
    assert result.metrics["memorisation_recall"] == 1.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "8 steps of ddim, guidance 3, seed 0;"),
        (
            {"sampler": "dpmpp_2m", "guidance_interval": (0.2, 0.8), "guidance_rescale": 0.7},
            "8 steps of dpmpp_2m, guidance 3 at noise levels 0.2 to 0.8, rescaled by 0.7, seed 0;",
        ),
    ],
)
def test_the_sheets_footer_says_how_the_samples_were_made(evaluated, monkeypatch, settings, expected):
    footers = []
    monkeypatch.setattr(report, "render_sheet", lambda sections, footer: footers.append(footer))
    evaluated("train", sampling=SETTINGS.changed(**settings))
    assert len(footers) == 2 and all(footer.startswith(expected) for footer in footers)


@pytest.mark.parametrize(
    "settings", [{"sampler": "dpmpp_2m"}, {"guidance_interval": (0.2, 0.8)}, {"guidance_rescale": 0.7}]
)
def test_the_settings_reach_the_diffuser(settings):
    torch.manual_seed(0)
    network = CONFIG.build().eval()
    embeddings, names, settings = torch.randn(2, 8), ["a", "b"], SETTINGS.changed(**settings)
    made = model(network)
    noise = torch.stack([made.starting_noise(name, 1) for name in names])
    diffuser = Diffuser(network, 3.0, 8, settings=settings, bound=CONFIG.latent_bound)
    latents = made.latents(embeddings, names, settings, seed=1)
    torch.testing.assert_close(torch.stack(latents), diffuser.reverse_diffusion(noise, embeddings, layout="nchw"))
    assert not torch.equal(latents[0], made.latents(embeddings, names, SETTINGS, seed=1)[0])


def test_a_sample_does_not_depend_on_what_else_is_asked_for():
    torch.manual_seed(0)
    network = CONFIG.build().eval()
    network.head.weight.data *= 10  # before its training it predicts near 0, whatever it is asked
    embeddings = torch.randn(5, 8)
    names = list("abcde")
    made = model(network)
    together = made.latents(embeddings, names, SETTINGS, seed=1)
    alone = made.latents(embeddings[2:3], names[2:3], SETTINGS, seed=1)
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=1e-4)
    other_seed = made.latents(embeddings, names, SETTINGS, seed=2)
    assert not torch.allclose(other_seed[0], together[0], atol=1e-2)


def test_figures_beside_real_images_are_in_the_report_or_said_to_be_left_out(evaluated, monkeypatch):
    footers = []
    monkeypatch.setattr(report, "render_sheet", lambda sections, footer: footers.append(footer))
    left_out = "fid, kid, cmmd (evaluate.features is null), clip_score (evaluate.clip is null)"
    assert f"; not measured: {left_out}; see" in evaluated("train").summary
    assert footers[0].endswith(f" Not measured: {left_out}. Drawn by somebody")

    encoder = SimpleNamespace(reference="org/dino", fingerprint="ab" * 32, preprocessing="cd" * 32)
    figures = {"fid": 123.456, "kid": 0.01234, "kid_standard_error": 0.0021}
    figures |= {"distribution_samples": 6, "distribution_images": 4}
    found = Distribution(figures, {"sampling": 2.0, "fid": 0.1}, "clip_score (evaluate.clip is null)")
    monkeypatch.setattr(report, "load_encoders", lambda settings, device: Encoders(encoder, None))
    monkeypatch.setattr(report, "measure_distribution", lambda *arguments, seed: found)
    result = evaluated("train")
    assert figures.items() <= result.metrics.items()
    assert "fid 123, kid 0.0123 ± 0.0021; not measured: clip_score" in result.summary
    assert "; sampling 2.0 s, fid 0.1 s; see" in result.summary
    assert " 6 samples beside 4 held-out images, by features org/dino (abababababab…)." in footers[-1]
    assert " s," not in footers[-1]  # two runs give one picture
    assert result.encoders == {"features": vars(encoder)}


def test_the_sheet_shows_every_image_whole_and_grows_with_their_number(tmp_path):
    red = np.zeros((9, 32, 32, 3), dtype=np.uint8)
    red[..., 0] = 255
    section = Section("Title", [f"a label {i} that is long enough to be wrapped" for i in range(9)], {"sample": red})
    sheet = render_sheet([section], "a footer")
    is_red = (np.asarray(sheet) == [255, 0, 0]).all(-1).sum()
    assert is_red == 9 * CELL * CELL
    assert render_sheet([section, section], "a footer").height > 1.7 * sheet.height
    save_sheet(sheet, tmp_path / "deep" / "sheet.png")
    save_sheet(sheet, tmp_path / "again.png")
    assert (tmp_path / "deep" / "sheet.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    with Image.open(tmp_path / "again.png") as opened:
        assert opened.size == sheet.size


def test_a_sheet_keeps_the_ratio_of_pictures_in_the_middle_of_their_places():
    wide, high = (np.zeros((*shape, 3), dtype=np.uint8) for shape in ((32, 64), (48, 24)))
    wide[..., 0] = high[..., 0] = 255
    is_red = (np.asarray(render_sheet([Section("", ["", ""], {"": [wide, high]})], "")) == [255, 0, 0]).all(-1)
    rows, columns = np.flatnonzero(is_red.any(1)), np.flatnonzero(is_red.any(0))
    top, left = rows[0], columns[0]
    second = left + CELL + GAP + CELL // 4
    assert is_red[top : top + CELL, second : second + CELL // 2].all()
    assert is_red[top + CELL // 4 : top + 3 * CELL // 4, left : left + CELL].all()
    assert is_red.sum() == CELL * CELL


def test_without_held_out_images_the_reports_are_all_there(tmp_path, monkeypatch):
    """DVC fails where an output of the stage is missing, such as the folder of plots."""
    monkeypatch.chdir(tmp_path)
    Evaluation({"memorisation_recall": 1.0}, *[Image.new("RGB", (8, 8))] * 2).save()
    assert json.loads(Path("reports/evaluate/metrics.json").read_text()) == {"memorisation_recall": 1.0}
    assert Path("reports/evaluate/plots/mae_by_noise.csv").read_text() == "noise_level,val_mae\n"
    assert Path("reports/evaluate/samples.png").exists() and Path("reports/evaluate/extremes.png").exists()


def test_errors_by_noise_level_are_a_table_and_the_rest_are_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = {"val_mae": 0.3, "val_mae_noise_0.00-0.25": 0.1, "val_mae_noise_0.75-1.00": 0.5}
    Evaluation(metrics, *[Image.new("RGB", (8, 8))] * 2).save()
    assert json.loads(Path("reports/evaluate/metrics.json").read_text()) == {"val_mae": 0.3}
    table = Path("reports/evaluate/plots/mae_by_noise.csv").read_text()
    assert table == "noise_level,val_mae\n0.125,0.1\n0.875,0.5\n"
