"""`latentloom sample`: the same command gives the same bytes, and an image names the command that generated it."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_models import save_clip, save_tiny_unet, save_tiny_vae
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.diffusion import Diffuser, SampleRequest, SamplingSettings, Text
from latentloom.encoding.text_encoder import load_text_encoder
from latentloom.encoding.vae import load_vae
from latentloom.errors import UserError
from latentloom.evaluation.metadata import generate_command, read_metadata
from latentloom.evaluation.text_to_image import (
    generating_code,
    load_text_to_image,
    store_settings,
    stored_settings,
)
from latentloom.model_files import load_model, model_hash
from latentloom.randomness import generator
from latentloom.tracking.provenance import Provenance, save_run_record

ROOT = Path(__file__).parents[2]
QUICK = ("--steps", "3", "--precision", "fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_unet(tmp_path_factory.mktemp("models") / "unet")


@pytest.fixture
def sample(model, tmp_path, monkeypatch):
    """``sample(prompt, ...)`` as at the keyboard, in a folder that has nothing but the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    shutil.copytree(model, tmp_path / "models" / "unet")

    def run(*arguments: str, fails: bool = False) -> str:
        result = CliRunner().invoke(app, ["sample", *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert (result.exit_code != 0) == fails, result.output
        return result.output

    return run


@pytest.mark.parametrize(("size", "shape"), [(None, (8, 8)), ("96x48", (6, 12))])
def test_a_sample_of_any_size_is_what_the_science_gives_step_by_step(sample, model, size, shape):
    asked = ["--size", size] if size else []
    output = sample("a red apple", "--seed", "5", "--guidance", "2.5", *asked, *QUICK, "-o", "a.png")
    assert ("warning: the model was trained on 64x64; at 96x48 its samples may be worse" in output) == bool(size)
    network, config = load_model(model)
    noise = torch.randn(1, 4, *shape, generator=generator("cpu", 5, "sample", "0"))
    label = torch.from_numpy(load_text_encoder("bundled").encode(["a red apple"]))
    latent = Diffuser(network, 2.5, 3, bound=config.latent_bound).reverse_diffusion(noise, label, layout="nchw")
    expected = load_vae("bundled").decode(latent * 0.9 + 0.1)[0]
    with Image.open("a.png") as image:
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_a_model_of_token_states_reads_them_of_each_prompt_as_in_training(tmp_path):
    """Cut at as many tokens as in training; and the same whatever longer prompts are beside it."""
    model = load_text_to_image(save_tiny_unet(tmp_path, tokens=True, max_tokens=6), device=torch.device("cpu"))
    request = SampleRequest(SamplingSettings(3, 2.5, precision="fp32"), seed=5)
    prompt, longer = "a red apple", "a very long prompt about a smiling cat with heart-eyes"
    images = model.generate([prompt, longer], request)
    assert np.array_equal(images[:1], model.generate([prompt], request))
    assert np.array_equal(images[1:], model.generate([longer + " and a hat"], request))  # beyond the cut

    encoded = load_text_encoder("bundled").encode_tokens([prompt])
    states = torch.from_numpy(encoded.states[0])[None]
    label = Text(torch.from_numpy(encoded.pooled), states, torch.ones(1, states.shape[1], dtype=torch.bool))
    noise = torch.randn(1, 4, 8, 8, generator=generator("cpu", 5, "sample", "0"))
    network, config = load_model(tmp_path)
    latent = Diffuser(network, 2.5, 3, bound=config.latent_bound).reverse_diffusion(noise, label, layout="nchw")
    expected = load_vae("bundled").decode(latent * 0.9 + 0.1)[0]
    assert np.abs(images[0, 0].astype(int) - expected).max() <= 1


def test_a_sample_is_the_same_bytes_whatever_is_generated_beside_it(sample):
    sample("a red apple", "a snowman", "--seed", "1", "--count", "3", *QUICK, "-o", "all/")
    sample("a snowman", "--seed", "1", "--first", "2", *QUICK, "-o", "alone.png")
    names = sorted(path.name for path in Path("all").iterdir())
    words = ("a-red-apple", "a-snowman")
    assert names == [f"{row:02d}-{word}-{n}.png" for row, word in enumerate(words, 1) for n in range(3)]
    assert Path("all/02-a-snowman-2.png").read_bytes() == Path("alone.png").read_bytes()
    assert len({path.read_bytes() for path in Path("all").iterdir()}) == 6


def test_a_name_made_of_a_prompt_fits_a_file_system_in_any_script(sample):
    sample("𠜎" * 90, "--steps", "2", "-o", "all/")
    (name,) = [path.name for path in Path("all").iterdir()]
    assert name == f"01-{'𠜎' * 15}-0.png"


def test_several_samples_stand_side_by_side_prompts_in_rows(sample):
    sample("a red apple", "a snowman", "--count", "3", *QUICK, "-o", "sheet.png")
    sample("a red apple", "a snowman", "--count", "3", *QUICK, "-o", "all/")
    with Image.open("sheet.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (2 * 64, 3 * 64, 3)
    with Image.open("all/02-a-snowman-1.png") as image:
        assert (sheet[64:, 64:128] == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("prompts", "threshold", "size"),
    [(['it\'s "red"; $HOME'], "98.5", None), (["-v", "an apple"], "none", "32x80")],
)
def test_the_command_in_the_metadata_generates_the_same_bytes_again(sample, prompts, threshold, size):
    settings = "--seed 3 --first 1 --count 2 --guidance 1.7 --sampler dpmpp_2m --guidance-interval 0.1 0.9"
    settings += f" --guidance-rescale 0.3 --threshold {threshold} -o a.png"
    settings += f" --size {size}" if size else ""
    sample(*settings.split(), *QUICK, "--", *prompts)
    metadata = read_metadata(Path("a.png"))
    with Image.open("a.png") as image:
        assert image.size == ((64, 160) if size else (128, 64))
        assert json.loads(image.info["latentloom"]).get("size") == size
    assert (metadata.prompts, metadata.model_sha256) == (tuple(prompts), model_hash(Path("models/unet")))
    # Other defaults than those that generated it: the command must not depend on them.
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"seed": 99}
    params["evaluate"] |= {"sampler": "ddim", "class_guidance": 9.0, "threshold_percentile": 90.0}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    program, command, *arguments = shlex.split(generate_command(metadata))
    assert (program, command) == ("latentloom", "sample")
    sample(*arguments)
    assert Path("again.png").read_bytes() == Path("a.png").read_bytes()


def test_settings_come_from_the_params_then_from_the_model_then_from_us(sample):
    sample("an apple", "--steps", "3", "-o", "a.png")
    assert read_metadata(Path("a.png")).sampling.class_guidance == SamplingSettings().class_guidance
    store_settings(Path("models/unet"), SamplingSettings(class_guidance=5.0, diffusion_steps=4))
    sample("an apple", "-o", "a.png")
    sampling = read_metadata(Path("a.png")).sampling
    assert (sampling.class_guidance, sampling.diffusion_steps) == (5.0, 4)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["evaluate"] |= {"class_guidance": 6.0, "diffusion_steps": 5, "sampler": "dpmpp_2m"}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    sample("an apple", "--guidance", "7", "-o", "a.png")
    sampling = read_metadata(Path("a.png")).sampling
    assert (sampling.class_guidance, sampling.diffusion_steps, sampling.sampler) == (7.0, 5, "dpmpp_2m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "1"), "diffusion_steps = 1: must be"),
        (("--threshold", "high"), "threshold_percentile = 'high': must be a number, from 50 to 100, or none"),
        (("--sampler", "euler"), "sampler = 'euler': must be"),
        (("--guidance-interval", "0.9", "0.1"), "guidance_interval"),
        (("--size", "100x40"), "multiples of 16 pixels, up to 2048; the nearest is 96x32"),
        (("--size", "9999x3"), "the nearest is 2048x16"),
        (("--size", "96"), "size: '96' is no size: it is written as WIDTHxHEIGHT"),
        (("--seed", "-1"), "seed = -1: must be a whole number from 0 to 9223372036854775807"),
        (("--count", "0"), "count = 0: must be a whole number from 1 to 10000"),
        (("--first", "-1"), "first = -1: must be"),
        (("-o", "picture.jpg"), "-o picture.jpg"),
        (("-o", ""), "-o '': give FILE.png"),
        (("-o", "a" * 300 + ".png"), "File name too long"),
        (("-o", "a" * 250 + ".png"), "could not write"),
        (("-o", "models/unet/config.json/a.png"), "could not write"),
        (("a caf\udce9",), r"the prompt 'a caf\udce9' is not in UTF-8"),
        (("--model", "~nosuchuser/x"), "~nosuchuser"),
        (("--model", "models/other"), "models/other holds no model"),
        (("--image", "none.png"), "none.png cannot be read: No such file"),
        (("--image", "models/unet/config.json"), "config.json cannot be used: begins with the bytes"),
        (("--strength", "0.5"), "--strength needs --image FILE"),
        (("--between", "1", "a cat"), "between = 1: must be a whole number, from 2"),
        (("--between", "3"), "give two prompts, or one prompt and another seed"),
        (("--between", "3", "a cat", "a dog"), "give two prompts, or one prompt and another seed"),
        (("--between", "3", "--count", "2", "a cat"), "--between N goes with --to-seed and -o FILE"),
        (("--to-seed", "3"), "--between N goes with --to-seed and -o FILE"),
        (("-o", "a.webp"), "-o a.webp: give FILE.png"),
    ],
)
def test_what_cannot_be_generated_is_named_and_leaves_no_file(sample, tmp_path, arguments, message):
    assert message in sample("an apple", *arguments, fails=True)
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "the prompt is empty: nothing is asked for"),
        (" \t", "the prompt is empty"),
        ("a red apple", ""),
        ("一只猫, a cat", "does not know 2 of 6 parts of the prompt"),
        # 512 tokens with those that mark start and end, of which each of these words is one
        (" ".join(["apple"] * 600), "reads the first 3,060 (512 tokens), up to “…"),
    ],
)
def test_what_the_model_does_not_read_of_a_prompt_is_said_on_the_side(sample, prompt, said):
    output = sample(prompt, "--steps", "2")
    assert said in output
    assert ("warning" in output) == bool(said)
    assert "samples/sample.png\n" in output
    assert read_metadata(Path("samples/sample.png")).prompts == (prompt,)


@pytest.mark.parametrize(("encoder", "name"), [("vae", "the vae"), ("clip", "the text encoder")])
def test_an_encoder_that_has_changed_since_the_training_is_rejected(sample, tmp_path, encoder, name):
    vae, clip = save_tiny_vae(tmp_path / "vae"), save_clip(tmp_path / "clip")
    save_tiny_unet(tmp_path / "mine", vae=str(vae), text_encoder=str(clip))
    sample("an apple", "--model", "mine", *QUICK, "-o", "a.png")
    {"vae": save_tiny_vae, "clip": save_clip}[encoder](tmp_path / encoder, seed=1)
    message = sample("an apple", "--model", "mine", *QUICK, "-o", "b.png", fails=True)
    assert name in message
    assert str(tmp_path / encoder) in message
    assert not Path("b.png").exists()


@pytest.fixture
def picture(tmp_path) -> Path:
    """A JPEG of 96x64 pixels that lies on its side, as its EXIF says."""
    pixels = np.random.default_rng(0).integers(0, 255, (6, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((64, 96))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "models" / "on its side.jpg", exif=exif, quality=95)
    return tmp_path / "models" / "on its side.jpg"


def test_of_a_picture_strength_0_is_its_reconstruction_and_strength_1_is_the_sample_of_the_prompt(sample, picture):
    with Image.open(picture) as image:
        upright = np.array(image.rotate(-90, expand=True).crop((16, 0, 80, 64)))
    for strength in ("0", "0.5", "1"):
        sample("an apple", "--image", str(picture), "--strength", strength, *QUICK, "-o", f"{strength}.png")
    sample("an apple", *QUICK, "-o", "sampled.png")
    shown = {name: np.asarray(Image.open(f"{name}.png")) for name in ("0", "0.5", "1", "sampled")}
    vae = load_vae("bundled")
    assert np.array_equal(shown["0"], vae.decode(vae.encode(upright[None])["mean"])[0])
    assert np.array_equal(shown["1"], shown["sampled"])
    assert not any(np.array_equal(shown["0.5"], shown[other]) for other in ("0", "1"))


def test_variations_of_a_picture_ask_for_no_text_at_all(sample, model, picture):
    output = sample("--image", str(picture), "--strength", "0.5", "--count", "2", *QUICK, "-o", "a.png")
    assert "warning" not in output
    network, config = load_model(model)
    with Image.open(picture) as image:
        upright = np.array(image.rotate(-90, expand=True).crop((16, 0, 80, 64)))
    vae = load_vae("bundled")
    start = (vae.encode(upright[None])["mean"] - 0.1) / 0.9
    for number in range(2):
        noise = torch.randn(1, 4, 8, 8, generator=generator("cpu", 0, "sample", str(number)))
        diffuser = Diffuser(network, 1.0, 3, bound=config.latent_bound)
        label = torch.zeros(1, config.text_dim)
        latent = diffuser.reverse_diffusion(noise, label, layout="nchw", start=start, strength=0.5)
        expected = vae.decode(latent * 0.9 + 0.1)[0]
        sheet = np.asarray(Image.open("a.png"))[:, 64 * number : 64 * (number + 1)]
        assert np.abs(sheet.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("tokens", [False, True])
def test_a_negative_prompt_is_guided_away_from(tmp_path, tokens):
    model = load_text_to_image(save_tiny_unet(tmp_path, tokens=tokens), device=torch.device("cpu"))
    settings = SamplingSettings(3, 2.5, guidance_interval=(0.1, 0.9), precision="fp32")
    request = SampleRequest(settings, negative="a very long prompt about a cat")
    (images,) = model.generate(["a red apple"], request)
    diffuser = Diffuser(model.network, settings=settings, bound=model.config.latent_bound)
    labels = [model.embed([text]) for text in ("a red apple", request.negative)]
    noise = model.starting_noise("0", 0)[None]
    latent = diffuser.reverse_diffusion(noise, labels[0], layout="nchw", negative=labels[1])
    assert np.array_equal(images, model.codec.decode(latent))
    plain = replace(request, negative=" ")
    assert plain.negative is None
    assert not np.array_equal(images, model.generate(["a red apple"], plain)[0])
    without_guidance = replace(request, settings=replace(settings, class_guidance=1.0))
    assert model.remarks(["a"], without_guidance)[0].startswith("the negative prompt has no effect")


@pytest.mark.parametrize("tokens", [False, True])
def test_between_two_samples_the_ends_are_these_samples(tmp_path, tokens):
    model = load_text_to_image(save_tiny_unet(tmp_path, tokens=tokens), device=torch.device("cpu"))
    request = SampleRequest(SamplingSettings(3, 2.5, precision="fp32"), seed=5, first=2)
    prompts = ["a red apple", "a smiling cat with heart-eyes"]
    pictures = model.between(prompts, request, pictures=3, to_seed=6)
    assert pictures.shape == (3, 64, 64, 3)
    assert np.array_equal(pictures[0], model.generate(prompts[:1], request)[0, 0])
    assert np.array_equal(pictures[2], model.generate(prompts[1:], replace(request, seed=6))[0, 0])
    assert not any(np.array_equal(pictures[1], end) for end in (pictures[0], pictures[2]))


def test_the_way_between_two_seeds_is_a_strip_or_an_animation_there_and_back(sample):
    way = ("a red apple", "--between", "4", "--to-seed", "7", *QUICK)
    for name in ("strip.png", "way.webp", "way.gif"):
        sample(*way, "-o", name)
    with Image.open("strip.png") as image:
        strip = np.asarray(image)
    pictures = [strip[:, 64 * place : 64 * (place + 1)] for place in range(4)]
    with Image.open("way.webp") as animation:
        assert animation.n_frames == 6 and animation.info["loop"] == 0
        for frame, place in enumerate([0, 1, 2, 3, 2, 1]):
            animation.seek(frame)
            assert np.array_equal(np.asarray(animation.convert("RGB")), pictures[place])
    with Image.open("way.gif") as animation:
        assert (animation.n_frames, animation.size) == (6, (64, 64))


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [
        (["an apple"], "--negative -cat"),
        (["an apple", "a cat"], "--between 3 --to-seed 4 --seed 3"),
        (["an apple"], "--image models/mine.png --strength 0.4 --count 2"),
    ],
)
def test_the_command_of_what_is_asked_for_besides_generates_the_same_bytes_again(sample, picture, prompts, settings):
    Image.open(picture).save("models/mine.png")
    sample(*prompts, *settings.split(), *QUICK, "-o", "a.png")
    command = generate_command(read_metadata(Path("a.png")), image="models/mine.png")
    sample(*shlex.split(command)[2:])
    assert Path("again.png").read_bytes() == Path("a.png").read_bytes()


def test_what_this_machine_knows_of_a_models_training_goes_into_the_image(sample, tmp_path):
    trained = Provenance(model_sha256=model_hash(Path("models/unet")), mlflow_run_id="f" * 32, commit="c" * 40)
    save_run_record(tmp_path, replace(trained, model_sha256="0" * 64))
    sample("an apple", *QUICK, "-o", "a.png")
    assert read_metadata(Path("a.png")).mlflow_run_id is None
    save_run_record(tmp_path, trained)
    sample("an apple", *QUICK, "-o", "a.png")
    provenance = read_metadata(Path("a.png")).provenance
    assert (provenance["mlflow_run_id"], provenance["commit"]) == ("f" * 32, "c" * 40)


def test_samples_of_one_number_start_from_the_same_noise_whatever_the_prompt(model):
    seen = []
    loaded = load_text_to_image(model, device=torch.device("cpu"))
    original = loaded.network.forward

    def recording(x_t, noise_levels, labels):
        seen.append((float(noise_levels[0]), x_t[0].clone()))
        return original(x_t, noise_levels, labels)

    loaded.network.forward = recording
    loaded.generate(
        ["a red apple", "a snowman"], SampleRequest(SamplingSettings(diffusion_steps=2, precision="fp32"), seed=4)
    )
    starts = [x for level, x in seen if level == 1.0]
    assert len(starts) == 2
    assert torch.equal(*starts)


def test_a_model_folder_carries_its_settings(tmp_path):
    settings = SamplingSettings(diffusion_steps=20, guidance_interval=(0.2, 0.7), threshold_percentile=None)
    store_settings(tmp_path, settings)
    assert stored_settings(tmp_path) == settings
    (tmp_path / "sampling.json").write_text('{"speed": 9}')
    with pytest.raises(UserError, match=r"sampling\.json: speed: not a setting"):
        stored_settings(tmp_path)


def test_the_generating_code_is_named_by_one_hash(model):
    loaded = load_text_to_image(model, device=torch.device("cpu"))
    metadata = loaded.metadata(["an apple"], SampleRequest(SamplingSettings()))
    assert metadata.code == generating_code() and len(metadata.code) == 64
