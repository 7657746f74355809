"""params.yaml: the shipped files are valid, and everything else is rejected by key, value and what is allowed."""

from pathlib import Path

import pytest
import yaml

from latentloom.params import ADDED, MOVED, NEW_SECTIONS, ParamsError, load_params

ROOT = Path(__file__).parents[1]
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))], ids=lambda p: p.name
)
def test_every_shipped_params_file_is_valid(path):
    load_params(path)


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
            [{"source": "folder", "path": "x", "captions": "line"}],
            "ingest.source.0.captions = 'line': input should be 'lines', 'file', 'file_name' or 'folder_name'",
        ),
        (
            "ingest",
            "source",
            [{"source": "folder", "path": "x", "caption_column": []}],
            "ingest.source.0: caption_column names no column; null is for the usual names",
        ),
        ("ingest", "path", "pictures", "set source: folder"),
        ("ingest", "image_size", 100, "ingest.image_size = 100: input should be a multiple of 8"),
        ("validate", "latent_std", [2, 1], "must be [lowest, highest] with lowest < highest"),
        ("train", "gradient_accumulation", 3, "batch_size 64 does not divide into gradient_accumulation 3 equal parts"),
        ("train", "ema_images", 0, "train.ema_images = 0: input should be greater than 0"),
        ("train", "lr_schedule", "linear", "train.lr_schedule = 'linear': input should be 'cosine', 'constant' or"),
        ("machine", "data_memory_share", 2, "machine.data_memory_share = 2: input should be less than or equal to 1"),
        ("evaluate", "prompts", [], "evaluate.prompts = []"),
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
            "train.learning_rat = 1: unknown key (did you mean learning_rate?); allowed here: steps",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(tmp_path, section, key, value, message):
    assert message in rejected(tmp_path, lambda params: params[section].update({key: value}))


@pytest.mark.parametrize("section", sorted(SHIPPED.keys() - set(NEW_SECTIONS)))
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


def test_a_number_in_scientific_notation_is_a_number(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("learning_rate: 1.0e-3", "learning_rate: 1e-3")
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert load_params(path).train.learning_rate == 0.001


def test_a_file_of_the_version_before_is_read_with_a_warning_that_names_each_key(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for old, new in MOVED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        params[section][name] = params[new_section][new_name]
    for new in set(MOVED.values()):
        section, name = new.split(".")
        del params[section][name]
    for key in ADDED:
        section, name = key.split(".")
        del params[section][name]
    for section in NEW_SECTIONS:
        assert not params.pop(section)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    with pytest.warns(UserWarning, match="of an earlier version") as caught:
        read = load_params(path)
    assert all(key in str(caught[0].message) for key in (*MOVED, *MOVED.values(), *ADDED))
    now = load_params(ROOT / "params.yaml")
    assert (read.machine, read.evaluate) == (now.machine, now.evaluate)
    assert read.train == now.train.model_copy(update={"optimizer": "adamw"})
    assert read.monitor == now.monitor.model_copy(update={"validation_images": ADDED["monitor.validation_images"]})
    added = {key.removeprefix("previews."): value for key, value in ADDED.items() if key.startswith("previews.")}
    assert read.previews == now.previews.model_copy(update=added)
    assert read.ingest == now.ingest.model_copy(update={"skin_tones": 0})


def test_a_key_that_another_section_has_is_named_where_it_belongs(tmp_path):
    message = rejected(tmp_path, lambda params: params["train"].update(validation_images=10))
    assert "train.validation_images = 10: unknown key (did you mean monitor.validation_images?)" in message
