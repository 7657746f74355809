"""The latent cache, from prepared images by VAEs of both classes."""

import contextlib
import json
import tempfile
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent_data import read_cache
from safetensors.torch import load_file, save_file

from latentloom import sharding
from latentloom.encoding import cache, latents
from latentloom.encoding.latents import encode_images
from latentloom.encoding.pretrained import fingerprint
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.vae import Vae, load_vae
from latentloom.errors import UserError
from latentloom.ingestion.pngs import decode
from latentloom.ingestion.shards import iterate_images, read_metadata


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_vae(str(tiny_models.save_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")))


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    return load_vae(str(tiny_models.save_kl_vae(tmp_path_factory.mktemp("vae") / "kl")))


def test_latents_of_a_deterministic_vae_are_diffusers_own(tiny, prepare_images, tmp_path):
    images = prepare_images(range(6))
    counts = encode_images(tiny, images, tmp_path / "latents", RowStore(tmp_path / "state", 2**30))
    index, tensors, statistics = read_cache(tmp_path / "latents")
    assert (counts.rows, counts.encoded, counts.reused) == (6, 6, 0)
    assert set(tensors) == {"mean"}
    assert statistics["latent_shape"] == [4, 4, 4]
    assert statistics["distribution"] == "mean"
    pixels = np.stack([array for _, array in iterate_images(images)])
    with torch.no_grad():
        direct = tiny.module.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).latents
    torch.testing.assert_close(tensors["mean"].float(), direct, atol=2e-3, rtol=2e-3)
    assert index["id"].tolist() == read_metadata(images)["id"].tolist()


def test_latents_of_a_vae_with_a_distribution_are_moments(kl, prepare_images, tmp_path):
    images = prepare_images(range(3))
    encode_images(kl, images, tmp_path / "latents", RowStore(tmp_path / "state", 2**30))
    _, tensors, statistics = read_cache(tmp_path / "latents")
    assert statistics["distribution"] == "moments"
    pixels = np.stack([array for _, array in iterate_images(images)])
    with torch.no_grad():
        posterior = kl.module.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(tensors["mean"].float(), posterior.mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(tensors["std"].float(), posterior.std, atol=2e-3, rtol=2e-3)


def test_statistics_are_those_of_the_training_split(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(40)), tmp_path / "latents", RowStore(tmp_path / "state", 2**30))
    index, tensors, statistics = read_cache(tmp_path / "latents")
    chosen = tensors["mean"].numpy().astype(np.float64)[(index["split"] == "train").to_numpy()]
    np.testing.assert_allclose(statistics["mean"], chosen.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(statistics["std"], chosen.std((0, 2, 3)), rtol=1e-9)
    assert statistics["train_rows"] == len(chosen) == 30


def test_an_empty_training_split_is_said(tiny, prepare_images, tmp_path):
    with pytest.raises(UserError, match="the training split is empty"):
        encode_images(tiny, prepare_images([3, 7]), tmp_path / "latents", RowStore(tmp_path / "state", 2**30))
    assert not (tmp_path / "latents" / "stats.json").exists()


def test_a_vae_that_gives_no_finite_latent_is_named_rather_than_the_split(prepare_images, tmp_path):
    folder = scaled(tmp_path / "vae", late=float("nan"))
    with pytest.raises(UserError, match=r"no latent of the training split is finite, as computed by the VAE .*vae in"):
        encode_images(load_vae(str(folder)), prepare_images([0, 3]), tmp_path / "out", RowStore(tmp_path / "state", 1))


@pytest.mark.parametrize(("levels", "factor"), [(2, 2), (5, 16)])
def test_a_size_that_the_vae_does_not_divide_is_rejected_before_anything_is_encoded(
    levels, factor, prepare_images, tmp_path
):
    """Its latents would be cut to whole rows, and what is decoded be smaller than what was encoded."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    widths = (8,) * levels
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    blocks = {f"num_{part}_blocks": (1,) * levels for part in ("encoder", "decoder")}
    out = {f"{part}_block_out_channels": widths for part in ("encoder", "decoder")}
    AutoencoderKL(block_out_channels=widths, norm_num_groups=4, latent_channels=4, **kinds).save_pretrained(
        tmp_path / "kl"
    )
    AutoencoderTiny(**out, **blocks).save_pretrained(tmp_path / "tiny")
    images = prepare_images([0, 1, 2], size=24 if factor > 8 else 27)
    for name in ("kl", "tiny"):
        vae = load_vae(str(tmp_path / name))
        assert vae.factor == factor
        assert vae.encode(np.zeros((1, 64, 32, 3), np.uint8))["mean"].shape[2:] == (64 // factor, 32 // factor)
        low = {2: "26 or 28", 16: "16 or 32"}[factor]
        with pytest.raises(
            UserError, match=rf"ingest.image_size = 2[47]: the VAE .* {factor} times smaller.*set {low}"
        ):
            encode_images(vae, images, tmp_path / "out", RowStore(tmp_path / "state", 1))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_index_describes_each_row(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(5)), tmp_path / "latents", RowStore(tmp_path / "state", 2**30))
    index, tensors, _ = read_cache(tmp_path / "latents")
    rows = tensors["mean"].float().flatten(1).numpy()
    np.testing.assert_allclose(index["mean"], rows.mean(1), atol=1e-5)
    np.testing.assert_allclose(index["std"], rows.std(1), atol=1e-5)
    np.testing.assert_allclose(index["abs_max"], np.abs(rows).max(1))
    assert index["finite"].all()
    assert index["key"].is_unique


def test_a_row_does_not_depend_on_its_neighbours_order_or_name(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(40), name="a"), tmp_path / "la", RowStore(tmp_path / "sa", 2**30))
    encode_images(tiny, prepare_images([33, 7, 20], name="b"), tmp_path / "lb", RowStore(tmp_path / "sb", 2**30))
    all_index, all_tensors, _ = read_cache(tmp_path / "la")
    few_index, few_tensors, _ = read_cache(tmp_path / "lb")
    by_id = dict(zip(all_index["id"], all_tensors["mean"], strict=True))
    for own, row in zip(few_index["id"], few_tensors["mean"], strict=True):
        assert torch.equal(row, by_id[own])
    assert set(few_index["key"]) <= set(all_index["key"])


def test_added_images_alone_are_encoded(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(20), name="a"), tmp_path / "la", RowStore(tmp_path / "state", 2**30))
    counts = encode_images(
        tiny, prepare_images(range(22), name="b"), tmp_path / "lb", RowStore(tmp_path / "state", 2**30)
    )
    assert (counts.encoded, counts.reused) == (2, 20)


def test_other_weights_of_the_same_class_are_never_served_from_the_store(tiny, prepare_images, tmp_path):
    other = load_vae(str(tiny_models.save_tiny_vae(tmp_path / "other", seed=1)))
    images = prepare_images(range(4))
    encode_images(tiny, images, tmp_path / "a", RowStore(tmp_path / "state", 2**30))
    counts = encode_images(other, images, tmp_path / "b", RowStore(tmp_path / "state", 2**30))
    assert counts.reused == 0
    assert not torch.equal(read_cache(tmp_path / "a")[1]["mean"], read_cache(tmp_path / "b")[1]["mean"])


def test_two_runs_from_nothing_write_the_same_bytes(tiny, prepare_images, tmp_path):
    images = prepare_images(range(10))
    for name in ("a", "b"):
        encode_images(tiny, images, tmp_path / name, RowStore(tmp_path / f"state-{name}", 2**30))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["00000.safetensors", "index.parquet", "rejects.parquet", "stats.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_as_many_images_are_decoded_at_once_as_there_are_cores_and_the_bytes_are_the_same(
    tiny, prepare_images, tmp_path, monkeypatch
):
    images, made = prepare_images(range(6)), []
    for workers in (1, 3):
        together = threading.Barrier(workers, timeout=10)  # breaks with fewer threads

        def together_decoded(png: bytes, together: threading.Barrier = together):
            together.wait()
            return decode(png)

        monkeypatch.setattr(latents, "decode", together_decoded)
        monkeypatch.setenv("LATENTLOOM_WORKERS", str(workers))
        out = tmp_path / str(workers)
        encode_images(tiny, images, out, RowStore(tmp_path / f"state-{workers}", 2**30))
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1]


def test_decoding_gives_pictures_of_the_size_that_was_encoded(kl):
    decoded = kl.decode(torch.randn(3, 4, 4, 4))
    assert decoded.shape == (3, 32, 32, 3)
    assert decoded.dtype == np.uint8


def test_the_fingerprint_follows_the_weights_not_the_folder(tmp_path):
    first = tiny_models.save_tiny_vae(tmp_path / "first")
    same = tiny_models.save_tiny_vae(tmp_path / "same")
    other = tiny_models.save_tiny_vae(tmp_path / "other", seed=1)
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./nowhere", "neither a folder here nor a hub id"),
        ("just-a-word", "allowed: bundled, a hub id"),
        ("somebody/unheard-of-vae", "could not fetch 'somebody/unheard-of-vae'"),
    ],
)
def test_a_reference_that_leads_nowhere_is_explained(reference, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_vae(reference)
    assert str(caught.value).startswith("encode_images.vae")


def test_another_class_is_rejected(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is a UNet2DModel; supported: AutoencoderKL, AutoencoderTiny"):
        load_vae(str(tmp_path))


def test_pandas_opens_the_index(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(2)), tmp_path / "latents", RowStore(tmp_path / "state", 2**30))
    assert len(pd.read_parquet(tmp_path / "latents" / "index.parquet")) == 2


def scaled(folder: Path, *, early: float = 1.0, late: float = 1.0) -> Path:
    """A tiny VAE whose first and last convolutions of the encoder are scaled."""
    tiny_models.save_tiny_vae(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    convolutions = [name for name in weights if name.startswith("encoder.") and weights[name].ndim == 4]
    order = sorted(convolutions, key=lambda name: int(name.split(".")[2]))
    weights[order[0]] *= early
    weights[order[-1]] *= late
    weights[order[-1].replace("weight", "bias")] *= late
    save_file(weights, path)
    return folder


def test_latents_that_overflow_in_fp16_are_computed_once_more_in_fp32(prepare_images, tmp_path):
    folder = scaled(tmp_path / "vae", early=2e5, late=1e-5)
    images = prepare_images(range(6))
    half = load_vae(str(folder), precision="fp16")
    pixels = np.stack([array for _, array in iterate_images(images)])
    assert not half.encode(pixels)["mean"].isfinite().all()
    counts = encode_images(half, images, tmp_path / "half", RowStore(tmp_path / "s1", 2**30))
    assert (counts.encoded, counts.rejected) == (6, 0)
    encode_images(load_vae(str(folder)), images, tmp_path / "whole", RowStore(tmp_path / "s2", 2**30))
    assert torch.equal(read_cache(tmp_path / "half")[1]["mean"], read_cache(tmp_path / "whole")[1]["mean"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_whose_latent_is_not_finite_is_rejected_with_its_id(tiny, prepare_images, tmp_path, precision):
    images = prepare_images(range(8))
    pixels = np.stack([array for _, array in iterate_images(images)])
    largest = tiny.encode(pixels)["mean"].abs().flatten(1).amax(1)
    worst = int(largest.argmax())
    others = largest[torch.arange(8) != worst].max()
    bound = float((largest[worst] * others).sqrt())  # the largest is above it, all others below
    vae = load_vae(str(scaled(tmp_path / "vae", late=65504 / bound)), precision=precision)
    counts = encode_images(vae, images, tmp_path / "latents", RowStore(tmp_path / "state", 2**30))
    own_id, key = read_metadata(images).loc[worst, ["id", "key"]]
    assert counts.rejected == 1
    index, tensors, statistics = read_cache(tmp_path / "latents")
    rejects = pd.read_parquet(tmp_path / "latents" / "rejects.parquet")
    assert rejects[["id", "source", "key", "reason"]].values.tolist() == [[own_id, "folder", key, "latent_not_finite"]]
    assert precision in rejects["detail"].item()
    assert own_id not in set(index["id"])
    assert len(index) == len(tensors["mean"]) == statistics["rows"] == 7
    assert statistics["rejected"] == 1
    assert tensors["mean"].isfinite().all()
    chosen = tensors["mean"].numpy().astype(np.float64)[(index["split"] == "train").to_numpy()]
    np.testing.assert_allclose(statistics["std"], chosen.std((0, 2, 3)), rtol=1e-9)
    again = encode_images(vae, images, tmp_path / "latents", RowStore(tmp_path / "state", 2**30))
    assert (again.encoded, again.rejected) == (0, 1)


def test_each_precision_has_keys_of_its_own(tmp_path, prepare_images):
    folder = str(tiny_models.save_tiny_vae(tmp_path / "vae"))
    images = prepare_images(range(4))
    keys = {}
    for precision in ("fp32", "bf16", "fp16"):
        vae = load_vae(folder, precision=precision)
        counts = encode_images(vae, images, tmp_path / precision, RowStore(tmp_path / "state", 2**30))
        assert counts.reused == 0
        index, tensors, statistics = read_cache(tmp_path / precision)
        keys[precision] = set(index["key"])
        assert statistics["precision"] == precision
        torch.testing.assert_close(tensors["mean"], read_cache(tmp_path / "fp32")[1]["mean"], atol=0.02, rtol=0.02)
    assert len(set.union(*keys.values())) == 12


@pytest.mark.parametrize(("module", "name"), [(latents, "PREPROCESSING"), (cache, "FORMAT_VERSION")])
def test_another_preprocessing_or_format_is_never_served_from_the_store(
    tiny, prepare_images, tmp_path, monkeypatch, module, name
):
    images = prepare_images(range(4))
    encode_images(tiny, images, tmp_path / "a", RowStore(tmp_path / "state", 2**30))
    monkeypatch.setattr(module, name, "another")
    assert encode_images(tiny, images, tmp_path / "b", RowStore(tmp_path / "state", 2**30)).reused == 0


def test_flip_stores_the_latents_of_the_mirrored_images_too(tiny, kl, prepare_images, tmp_path):
    images = prepare_images(range(6))
    pixels = np.stack([array for _, array in iterate_images(images)])
    for vae in (tiny, kl):
        out, state = tmp_path / vae.class_name, tmp_path / f"state-{vae.class_name}"
        plain = encode_images(vae, images, out, RowStore(state, 2**30))
        before = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
        both = encode_images(vae, images, out, RowStore(state, 2**30), flip=True)
        assert (plain.rows, both.rows, both.encoded, both.reused) == (6, 12, 6, 6)
        assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == before
        _, tensors, statistics = read_cache(out)
        direct = vae.encode(np.ascontiguousarray(pixels[:, :, ::-1]))
        for name, tensor in direct.items():
            torch.testing.assert_close(tensors[f"flipped_{name}"].float(), tensor, atol=2e-3, rtol=2e-3)
        assert statistics["flip"] is True
        encode_images(vae, images, out, RowStore(state, 2**30))
        assert not (out / "flipped").exists()


def test_statistics_with_flip_are_those_of_both_views(tiny, prepare_images, tmp_path):
    encode_images(tiny, prepare_images(range(8)), tmp_path / "out", RowStore(tmp_path / "state", 2**30), flip=True)
    index, tensors, statistics = read_cache(tmp_path / "out")
    is_train = (index["split"] == "train").to_numpy(copy=True)
    both = torch.cat([tensors["mean"][is_train], tensors["flipped_mean"][is_train]]).double().numpy()
    np.testing.assert_allclose(statistics["mean"], both.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(statistics["std"], both.std((0, 2, 3)), rtol=1e-9)


@pytest.mark.slow
def test_one_percent_more_images_cost_at_most_two_percent_of_the_encoders_work(
    tiny, prepare_images, tmp_path, monkeypatch
):
    monkeypatch.setattr(latents, "BATCH_SIZE", 5)  # batches are always full
    work = []
    hook = tiny.module.encoder.register_forward_pre_hook(lambda _, inputs: work.append(len(inputs[0])))
    try:
        encode_images(tiny, prepare_images(range(500), name="a"), tmp_path / "a", RowStore(tmp_path / "s", 2**30))
        whole = sum(work)
        work.clear()
        grown = sorted(range(505), key=lambda seed: seed * 7919 % 505)  # the new ones anywhere in the list
        counts = encode_images(tiny, prepare_images(grown, name="b"), tmp_path / "b", RowStore(tmp_path / "s", 2**30))
    finally:
        hook.remove()
    assert counts.encoded == 5
    assert 0 < sum(work) <= 0.02 * whole


ROW_BYTES = 2 * 4 * 4 * 4
IMAGES = st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=10)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(IMAGES, st.booleans(), st.integers(0, 3)), min_size=1, max_size=4))
def test_after_any_history_the_cache_equals_a_rebuild(tiny, prepare_images, tmp_path, monkeypatch, history):
    """Additions, removals, another order, flip on and off, crashes after a number of batches."""
    monkeypatch.setattr(sharding, "TENSORS", sharding.ShardBytes(*(rows * ROW_BYTES for rows in (3, 2, 5))))
    monkeypatch.setattr(latents, "BATCH_SIZE", 4)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for seeds, flip, batches in history:
        images = prepare_images(seeds, name=f"{folder.name}-images")
        crash = crashing_after(tiny, batches)
        with contextlib.suppress(KeyboardInterrupt, ValueError):  # ValueError: no image of the training split
            encode_images(crash, images, folder / "out", RowStore(folder / "state", 2**30), flip=flip)
    outcomes = []
    for name, state in (("out", "state"), ("rebuilt", "fresh")):
        try:
            encode_images(tiny, images, folder / name, RowStore(folder / state, 2**30), flip=flip)
        except ValueError as error:
            outcomes.append(str(error))
        else:
            outcomes.append(contents(folder / name))
    assert outcomes[0] == outcomes[1]


def crashing_after(vae: Vae, batches: int) -> Vae:
    """``vae``, interrupted in the batch after so many."""
    remaining = iter(range(batches))

    class Interrupted(Vae):
        def encode(self, pixels, **settings):
            if next(remaining, None) is None:
                raise KeyboardInterrupt
            return super().encode(pixels, **settings)

    return Interrupted(vae.reference)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damaged_weights_are_an_error_of_the_users_that_names_the_vae(tmp_path):
    folder = tiny_models.save_tiny_vae(tmp_path / "vae")
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"encode_images\.vae: .*vae cannot be loaded"):
        load_vae(str(folder))


def test_the_bound_is_that_of_the_standardised_training_latents(kl, prepare_images, tmp_path):
    encode_images(kl, prepare_images(range(40)), tmp_path / "out", RowStore(tmp_path / "state", 2**30), flip=True)
    index, tensors, statistics = read_cache(tmp_path / "out")
    chosen = tensors["mean"][(index["split"] == "train").to_numpy(copy=True)].double().numpy()
    scale, center = (np.array(statistics[name])[:, None, None] for name in ("std", "mean"))
    percentiles = np.quantile(np.abs((chosen - center) / scale).reshape(len(chosen), -1), 0.995, axis=1)
    assert statistics["bound"] == pytest.approx(np.quantile(percentiles, 0.99), abs=1e-4)
