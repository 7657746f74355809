"""params.yaml: the shipped files are valid, and everything else is rejected by key, value and what is allowed."""

import copy
import functools
import itertools
import json
import operator
import re
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_yaml

from latentloom.params_file import ADDED, RENAMED, ParamsError, load_params

ROOT = Path(__file__).parents[1]
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_shipped_params_file_is_valid_and_dvc_changes_one_line_for_one_value(tmp_path, path):
    """As `dvc exp run -S` and, after it, `dvc exp apply` do: shipped files are in the form that DVC writes."""
    copy = tmp_path / "params.yaml"
    copy.write_bytes(path.read_bytes())
    apply_overrides(copy, ["train.learning_rate=0.00123"])
    before, after = (own.read_text(encoding="utf-8").splitlines() for own in (path, copy))
    (changed,) = [pair for pair in itertools.zip_longest(before, after) if pair[0] != pair[1]]
    assert [line.split("#")[0].split(":")[0].strip() for line in changed] == ["learning_rate"] * 2
    assert load_params(copy).train.learning_rate == 0.00123


def rejected(tmp_path, change) -> str:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    change(params)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "steps", 0, "train.steps = 0: input should be greater than or equal to 1"),
        ("train", "steps", True, "train.steps = True: input should be a valid integer"),
        ("train", "steps", 1.5, "train.steps = 1.5: input should be a valid integer"),
        ("train", "learning_rate", "fast", "train.learning_rate = 'fast': input should be a valid number"),
        ("train", "learning_rate", float("nan"), "train.learning_rate = nan"),
        ("train", "precision", "fp8", "train.precision = 'fp8': input should be 'auto', 'fp32' or 'bf16'"),
        ("diffusion", "schedule", "cosine", "diffusion.schedule = 'cosine': input should be 'vp' or 'linear'"),
        ("diffusion", "label_dropout", 1.0, "diffusion.label_dropout = 1.0: input should be less than 1"),
        ("ingest", "skin_tones", -1, "ingest.skin_tones = -1: input should be greater than or equal to 0"),
        ("ingest", "skin_tones", True, "ingest.skin_tones = True: input should be a valid integer"),
        ("ingest", "source", "imagenet", "ingest.source = 'imagenet': input should be 'openmoji', 'folder'"),
        ("ingest", "source", "parquet", "source: parquet needs path, a Parquet file"),
        ("ingest", "source", "folder", "source: folder needs path"),
        ("ingest", "source", "webdataset", "source: webdataset needs path"),
        ("ingest", "source", [{"source": "folder"}], "ingest.source.0: source: folder needs path"),
        (
            "ingest",
            "source",
            [{"source": "openmoji", "wieght": 2}],
            "source.0.wieght = 2: unknown key (did you mean weight?",
        ),
        (
            "ingest",
            "source",
            [{"source": "openmoji", "weight": 0}],
            "ingest.source.0.weight = 0: input should be greater",
        ),
        ("ingest", "source", [{"source": "openmoji"}] * 2, "two sources are called 'openmoji'; give each a name"),
        (
            "ingest",
            "source",
            [{"source": "openmoji", "name": 3}],
            "ingest.source.0.name = 3: input should be a valid str",
        ),
        ("ingest", "source", [], "ingest.source = []: list should have at least 1 item"),
        (
            "ingest",
            "source",
            [{"source": "folder", "path": "x", "key": "last_dot"}],
            "ingest.source.0: source: folder takes no key, which is for webdataset",
        ),
        (
            "ingest",
            "source",
            [{"source": "parquet", "path": "x", "captions": "file"}],
            "source: parquet takes no captions, which is for folder and webdataset",
        ),
        (
            "ingest",
            "source",
            [{"source": "parquet", "path": "x", "splits": ["train"]}],
            "source: parquet takes no splits, which is for huggingface",
        ),
        (
            "ingest",
            "source",
            [{"source": "folder", "path": "x", "captions": "line"}],
            "ingest.source.0.captions = 'line': input should be 'lines', 'file', 'file_name' or 'folder_name'",
        ),
        (
            "ingest",
            "source",
            [{"source": "folder", "path": "x", "caption_column": []}],
            "ingest.source.0: caption_column names no column; null is for the usual names",
        ),
        (
            "ingest",
            "source",
            [{"source": "folder", "path": "x", "caption_column": {"long": 0.7}}],
            "ingest.source.0.caption_column.long = 0.7: input should be a valid integer",
        ),
        (
            "ingest",
            "source",
            [{"source": "folder", "path": "x", "caption_column": [{"long": 2}]}],
            "ingest.source.0.caption_column = [{'long': 2}]: must be a column's name, a list of names, or {name: how",
        ),
        ("ingest", "path", "pictures", "set source: folder"),
        ("ingest", "image_size", 100, "ingest.image_size = 100: input should be a multiple of 8"),
        ("ingest", "image_size", [128, 100], "ingest.image_size.1 = 100: input should be a multiple of 8"),
        ("ingest", "image_size", [192, 128], "ingest.image_size = [192, 128]: sizes are listed from the smallest"),
        ("validate", "latent_std", [2, 1], "must be [lowest, highest] with lowest < highest"),
        ("train", "gradient_accumulation", 3, "batch_size 64 does not divide into gradient_accumulation 3 equal parts"),
        ("train", "ema_images", 0, "train.ema_images = 0: input should be greater than 0"),
        ("train", "lr_schedule", "linear", "train.lr_schedule = 'linear': input should be 'cosine', 'constant' or"),
        ("machine", "data_memory_share", 2, "machine.data_memory_share = 2: input should be less than or equal to 1"),
        ("evaluate", "prompts", [], "evaluate.prompts = []"),
        ("evaluate", "prompts", ["seed ${seed}"], "evaluate.prompts.0 = 'seed ${seed}': `dvc exp run -S` takes ${...}"),
        ("evaluate", "sizes", ["128"], "evaluate.sizes.0 = '128': '128' is no size: it is written as WIDTHxHEIGHT"),
        ("evaluate", "features", "", "evaluate.features = '': string should have at least 1 character"),
        ("evaluate", "real_images", "all", "evaluate.real_images = 'all': input should be 'held_out' or 'training'"),
        ("evaluate", "sampler", "euler", "evaluate.sampler = 'euler'"),
        ("evaluate", "diffusion_steps", 1, "evaluate.diffusion_steps = 1"),
        ("evaluate", "smapler", "ddim", "evaluate.smapler = 'ddim': unknown key (did you mean sampler?"),
        ("evaluate", "guidance_interval", [0.9, 0.1], "must be [lowest, highest] noise level with lowest < highest"),
        ("evaluate", "sweep", {"class_guidance": [], "diffusion_steps": [20]}, "evaluate.sweep.class_guidance = []"),
        ("evaluate", "sweep", {"class_guidanc": [1]}, "unknown key (did you mean class_guidance?"),
        ("registry", "max_copied_share", 2, "registry.max_copied_share = 2: input should be less than or equal to 1"),
        ("model", "widths", [64, 60], "model.widths.1 = 60: input should be a multiple of 16"),
        (
            "train",
            "learning_rat",
            1,
            "train.learning_rat = 1: unknown key (did you mean learning_rate?); allowed here: init",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(tmp_path, section, key, value, message):
    assert message in rejected(tmp_path, lambda params: params[section].update({key: value}))


@pytest.mark.parametrize("section", sorted(SHIPPED))
def test_a_missing_section_is_named(tmp_path, section):
    assert f"  {section}: missing" in rejected(tmp_path, lambda params: params.pop(section))


@pytest.mark.parametrize(
    ("section", "key"),
    [(s, k) for s, keys in SHIPPED.items() if isinstance(keys, dict) for k in keys if f"{s}.{k}" not in ADDED],
)
def test_a_missing_key_is_named(tmp_path, section, key):
    assert f"  {section}.{key}: missing" in rejected(tmp_path, lambda params: params[section].pop(key))


def test_a_decay_that_does_not_fit_into_the_steps_is_rejected(tmp_path):
    decay = {"lr_schedule": "warmup_stable_decay", "warmup_steps": 50, "decay_steps": SHIPPED["train"]["steps"]}
    message = rejected(tmp_path, lambda params: params["train"].update(decay))
    assert f"warmup_steps 50 and decay_steps {decay['decay_steps']} do not fit" in message


def test_all_faults_are_named_at_once(tmp_path):
    def break_two(params):
        params["trian"] = params.pop("train")
        params["seed"] = -1

    message = rejected(tmp_path, break_two)
    assert "trian" in message
    assert "did you mean train?" in message
    assert "seed = -1" in message


@pytest.mark.parametrize("text", ["seed: [", "- a\n- b\n", "", "\xff"])
def test_what_is_no_params_file_is_rejected(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        load_params(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ParamsError, match="does not exist: run from the project's root"):
        load_params(tmp_path / "params.yaml")


def with_line(tmp_path: Path, key: str, line: str) -> Path:
    """The shipped file with another line in the place of the first one of ``key``."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^ *{key}:.*$", text, re.MULTILINE)[:1]
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(found, line, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "line", "value"),
    [
        ("seed", "seed: 010", 10),
        ("seed", "seed: 0o10", 8),
        ("train.learning_rate", "  learning_rate: 1e-3", 0.001),
        ("ingest.limit", "  limit: 1_000", 1000),
        ("ingest.path", "  path: ~", None),
        ("encode_images.vae", "  vae: no", "no"),
        ("encode_images.vae", "  vae: 1:30", "1:30"),
    ],
)
def test_a_value_is_what_dvc_takes_it_for(tmp_path, name, line, value):
    path = with_line(tmp_path, name.rpartition(".")[2], line)
    read, recorded = load_params(path).model_dump(by_alias=True), load_yaml(path)
    assert functools.reduce(operator.getitem, name.split("."), read) == value
    assert functools.reduce(operator.getitem, name.split("."), recorded) == value


@pytest.mark.parametrize(
    ("key", "line", "message"),
    [
        ("flip", "  flip: yes", "encode_images.flip = 'yes': input should be a valid boolean; write true"),
        ("flip", "  flip: Off", "input should be a valid boolean; write false"),
        ("steps", "  steps: 2e4", "train.steps = 20000.0: input should be a valid integer; write 20000"),
        ("steps", "  steps: 1:30", "train.steps = '1:30': input should be a valid integer"),
        ("vae", "  vae: true", "encode_images.vae = True: input should be a valid string; put it in quotes"),
        ("vae", "  vae: 2026-01-02", "input should be a valid string; put it in quotes"),
        ("limit", "  limit: 1\n  limit: 2", 'line 13: found duplicate key "limit" with value "2"'),
        ("limit", "\tlimit: 2", "not valid YAML: line 12: found character"),
        ("path", "  path: 2026-13-41", "is not valid YAML: month must be in 1..12"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks_is_rejected_with_what_to_write(tmp_path, key, line, message):
    with pytest.raises(ParamsError) as caught:
        load_params(with_line(tmp_path, key, line))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def vae_of(factor: int, folder: Path) -> str:
    folder.mkdir(parents=True)
    channels = [32] * factor.bit_length()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": channels}))
    return str(folder)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("ingest", {"image_size": 200}, "ingest.image_size = 200: the VAE (bundled) makes images smaller by 8, and a"),
        ("ingest", {"image_size": 200}, "it must be a multiple of 32; set it to 192 or 224"),
        ("ingest", {"image_size": 72}, "set it to 64 or 96"),
        ("ingest", {"image_size": [128, 200]}, "ingest.image_size = 200: the VAE (bundled) makes images smaller by 8"),
        ("ingest", {"shape": "buckets", "bucket_multiple": 16}, "ingest.bucket_multiple = 16: the VAE (bundled) makes"),
        (
            "ingest",
            {"shape": "buckets", "image_size": 96, "bucket_multiple": 64},
            "must be a multiple of ingest.bucket_multiple, 64; set it to 64 or 128",
        ),
        (
            "evaluate",
            {"sizes": ["128x64", "128x100"]},
            "evaluate.sizes: 100 in 128x100: the VAE (bundled) makes images",
        ),
        ("model", {"widths": [16] * 6}, "must be a multiple of 256; set it to 256, or give another number"),
        ("train", {"warmup_steps": 1001}, "train: warmup_steps 1001 are more than steps 1000"),
        ("ingest", {"limit": 15}, "ingest.limit = 15: validate.min_train_images asks for 16 images"),
        ("train", {"keep": "best"}, "train.keep = best: with ingest.val_fraction = 0 nothing is held out"),
    ],
)
def test_settings_that_do_not_go_together_are_rejected_before_any_work(tmp_path, section, values, message):
    def change(params):
        params["ingest"]["val_fraction"] = 0 if "keep" in values else 0.1
        params[section].update(values)

    assert message in rejected(tmp_path, change)


def test_the_size_of_images_is_checked_for_the_vae_that_is_named(tmp_path, monkeypatch):
    """A VAE of factor 16 in a folder, and from a hub whose cache has its config; of one that is not here, nothing."""
    folder = vae_of(16, tmp_path / "vae")
    cached = Path(vae_of(16, tmp_path / "models--owner--name/snapshots/main"))
    (tmp_path / "models--owner--name/refs").mkdir()
    (tmp_path / "models--owner--name/refs/main").write_text("main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached.is_dir()

    def check(vae):
        return lambda params: (params["encode_images"].update(vae=vae), params["ingest"].update(image_size=96))

    for vae in (folder, "owner/name"):
        assert f"the VAE ({vae}) makes images smaller by 16" in rejected(tmp_path, check(vae))
    params = copy.deepcopy(SHIPPED)
    check("owner/not-here")(params)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert load_params(tmp_path / "params.yaml").ingest.image_size == 96


def test_a_file_of_the_version_before_is_read_with_a_warning_that_names_each_key(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key, value in ADDED.items():
        section, name = key.split(".")
        params[section][name] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    now = load_params(path)
    for key in ADDED:
        section, name = key.split(".")
        del params[section][name]
    path.write_text(yaml.safe_dump(params))
    with pytest.warns(UserWarning, match="of an earlier version") as caught:
        assert load_params(path) == now
    assert all(f"add {key}: " in str(caught[0].message) for key in ADDED)


@pytest.mark.parametrize(("old", "now"), RENAMED.items())
def test_a_key_of_an_earlier_version_is_told_its_present_name(tmp_path, old, now):
    assert f"train.{old} is now {now}" in rejected(tmp_path, lambda params: params["train"].update({old: 1}))


def test_a_key_that_another_section_has_is_named_where_it_belongs(tmp_path):
    message = rejected(tmp_path, lambda params: params["train"].update(validation_images=10))
    assert "train.validation_images = 10: unknown key (did you mean monitor.validation_images?)" in message
