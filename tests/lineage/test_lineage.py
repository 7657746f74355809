"""What `latentloom lineage` says of each link: its bytes are here, in the remote, lost, or nobody can tell."""

import json
import shutil
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from projects import Project, tiny_params
from showcase.pack import convert
from tiny_models import save_tiny_unet, save_tiny_vae
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.dvc_outs import Place, out_hash
from latentloom.errors import UserError
from latentloom.files import write_json
from latentloom.ingestion.fingerprints import fingerprint_sources
from latentloom.lineage.lineage import Lineage, render, to_json, trace
from latentloom.lineage.links import Link
from latentloom.model_files import model_hash, read_config
from latentloom.params import SourceParams
from latentloom.registry import registry
from latentloom.registry.models import find_model
from latentloom.tracking.git import Git
from latentloom.tracking.provenance import HASH_TAG, PROVENANCE, Provenance, collect, save_run_record
from latentloom.tracking.store import open_client

DATA = ("data/images", "data/latents", "data/text", "data/validated.json")
NO_SERVER = "http://ada:secret@127.0.0.1:9"


def git(*arguments: str) -> str:
    identity = ("-c", "user.email=test@example.org", "-c", "user.name=Test")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(message: str) -> str:
    git("add", "-A")
    git("commit", "-q", "-m", message)
    return git("rev-parse", "HEAD")


def link(found: Lineage, name: str) -> Link:
    (own,) = [own for own in found.links if own.link == name]
    return own


def commands(found: Lineage) -> str:
    return "\n".join(step.command for step in found.steps)


@pytest.fixture
def lab(project_root, tiny_unets) -> Path:
    """A project in git and DVC, with a folder as its remote, a source of two files, and small stand-ins of data."""
    git("init", "-q", "-b", "main")
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text(
        f"[core]\n    remote = local\n['remote \"local\"']\n    url = {remote(project_root)}\n"
    )
    Path(".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (project_root / ".gitignore").write_text(
        "/mlflow.db*\n/mlartifacts/\n/.state/\n/.mlflow.lock\n/data/*/\n/models/\n"
    )
    pictures = project_root / "pictures"
    pictures.mkdir()
    for name in "ab":
        (pictures / f"{name}.png").write_text(name)
    params = tiny_params()
    params["ingest"] |= {"source": "folder", "path": str(pictures)}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    Path("src/latentloom").mkdir(parents=True)
    Path("src/latentloom/devices.py").write_text("# some code\n")
    for path in DATA:
        target = Path(path) if path.endswith(".json") else Path(path) / "index.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path)
    write_json("data/validated.json", {"failed": []})
    config = read_config(tiny_unets[0])
    for path, key, encoder in (("latents", "vae", config.vae), ("text", "encoder", config.text_encoder)):
        write_json(f"data/{path}/stats.json", {key: {"reference": "bundled", "fingerprint": encoder.fingerprint}})
        stage = {"latents": "encode_images", "text": "encode_text"}[path]
        write_json(f"reports/{stage}.json", {key: "bundled", f"{key}_fingerprint": encoder.fingerprint})
    write_json(
        "data/sources.json", fingerprint_sources([SourceParams(source="folder", path=str(pictures))], Path("no"))
    )
    counts = {"name": "folder", "source": "folder", "weight": 1.0, "found": 3, "kept": 2, "rejected": 1}
    sizes = [{"size": size, "images": 1} for size in ("96x192", "128x128", "all")]
    write_json("reports/ingest.json", {"kept": 2, "train": 1, "validation": 1, "sources": [counts], "sizes": sizes})
    commit("Some code")
    return project_root


@pytest.fixture
def trained(lab, train, tiny_unets):
    """``trained()`` gives the id of a run in which `tiny_unets[0]` was trained on the lab's data, tracked by DVC."""

    def run(model: Path = tiny_unets[0], name: str = "a run") -> str:
        lock({path: out_hash(Path(path)) for path in DATA})
        started, diff = collect(lab), Git(lab).code_diff()
        shutil.copytree(model, "models/unet", dirs_exist_ok=True)
        for path in (*DATA, "models/unet"):
            put_into_cache(Path(path))
        lock({path: out_hash(Path(path)) for path in (*DATA, "models/unet")})
        finished = started.with_model(Path("models/unet"), model_hash(model), "key")
        run_id = train(model, name=name, provenance=asdict(finished), tags=tags_of(started), code_diff=diff)
        save_run_record(lab, replace(finished, mlflow_run_id=run_id))
        return run_id

    return run


def lock(outs: dict[str, str]) -> None:
    stage = {"cmd": "true", "outs": [{"path": path, "hash": "md5", "md5": out} for path, out in outs.items()]}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"train": stage}}))


def tags_of(known: Provenance) -> dict[str, str]:
    return {"mlflow.source.git.commit": known.commit, "git.dirty": str(known.dirty).lower()}


def put_into_cache(path: Path) -> None:
    """What `dvc commit` does, without the seconds that it takes to start."""
    files = [path] if path.is_file() else sorted(own for own in path.rglob("*") if own.is_file())
    listing = [{"md5": out_hash(own), "relpath": own.relative_to(path).as_posix()} for own in files]
    objects = {out_hash(own): own.read_bytes() for own in files}
    if path.is_dir():
        objects[out_hash(path)] = json.dumps(listing, sort_keys=True).encode()
    for oid, data in objects.items():
        kept = Path(".dvc/cache/files/md5") / oid[:2] / oid[2:]
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data)


def remote(lab: Path) -> Path:
    return lab.parent / f"{lab.name}-remote"


def push(lab: Path) -> None:
    shutil.copytree(".dvc/cache/files/md5", remote(lab) / "files/md5")


def forget(*paths: str, objects: str = "", lab: Path = Path()) -> None:
    """Delete files, and those of DVC's cache whose hash begins with ``objects``."""
    for path in paths:
        shutil.rmtree(path)
    if objects:
        (lab / ".dvc/cache/files/md5" / objects[:2] / objects[2:]).unlink()


def test_the_chain_goes_from_the_model_to_the_sources_with_hashes_and_counts(lab, trained, tiny_unets):
    run_id = trained()
    head = git("rev-parse", "HEAD")
    found = trace(run_id, lab)
    assert [own.link for own in found.links] == [
        *("model", "run", "evaluation", "params", "code", "latents", "text", "images", "validation", "source", "VAE"),
        "text encoder",
    ]
    assert {own.place for own in found.links} == {Place.HERE}
    assert not found.missing
    assert link(found, "model").hash == model_hash(tiny_unets[0])
    assert link(found, "run").hash == run_id
    assert link(found, "code").hash == head
    assert link(found, "latents").hash == out_hash(Path("data/latents"))
    assert "2 images (1 train, 1 validation) of 96x192, 128x128" in link(found, "images").name
    assert link(found, "source").name == f"folder {lab / 'pictures'}: 3 found, 2 kept, 1 rejected"
    assert link(found, "VAE").name.startswith("bundled ")


@pytest.mark.slow
def test_a_run_a_version_an_alias_a_folder_and_an_image_have_one_lineage(lab, trained, tiny_unets):
    run_id = trained(name="gentle")
    registry.promote(find_model("gentle", lab), "champion", lab)
    sampled = CliRunner().invoke(app, ["sample", "a red apple", "--size", "32x64", "--steps", "2", "-o", "drawn.png"])
    assert sampled.exit_code == 0, sampled.output
    references = ("gentle", run_id, "gentle, evaluated", "1", "champion", "models/unet")
    chains = [trace(reference, lab).links for reference in references]
    assert all(chain == chains[0] for chain in chains)
    image = trace("drawn.png", lab)
    assert image.links[1:] == chains[0]
    assert link(image, "picture").name.startswith('"a red apple", sample 0 of seed 0, 2 steps of ddim')
    assert link(image, "picture").name.endswith(", 32x64")


def test_what_was_pushed_is_in_the_remote_and_what_was_not_is_lost(lab, trained):
    run_id = trained()
    push(lab)
    commit("Results")
    oid = out_hash(Path("data/latents"))
    forget("models/unet", "data", ".dvc/cache")
    found = trace(run_id, lab)
    assert {link(found, name).place for name in ("model", "latents", "text", "images")} == {Place.REMOTE}
    assert not found.missing
    assert f"latentloom.dvc_outs {oid}=data/latents" in commands(found)
    (remote(lab) / "files/md5" / oid[:2] / oid[2:]).unlink()
    found = trace(run_id, lab)
    assert [own.link for own in found.missing] == ["latents"]
    assert link(found, "latents").place is Place.LOST
    assert "=data/latents" not in commands(found)
    assert "dvc repro validate" in commands(found)


def test_a_folder_of_which_one_file_is_gone_is_not_here(lab, trained):
    run_id = trained()
    push(lab)
    forget("data", objects=out_hash(Path("data/text/index.parquet")), lab=lab)
    assert link(trace(run_id, lab), "text").place is Place.REMOTE


def test_of_a_remote_that_is_away_nobody_knows_what_it_holds(lab, trained):
    run_id = trained()
    forget("models/unet", "data", ".dvc/cache")
    found = trace(run_id, lab)
    assert link(found, "latents").place is Place.UNKNOWN
    assert str(remote(lab)) in link(found, "latents").where
    config = Path(".dvc/config")
    config.write_text(config.read_text().replace(str(remote(lab)), f"{NO_SERVER}/"))
    assert link(trace(run_id, lab), "model").place is Place.UNKNOWN


def test_data_that_only_the_folder_still_has_are_here_and_are_copied(lab, trained):
    run_id = trained()
    shutil.copytree("data", "kept")
    forget(".dvc/cache", "data")
    shutil.move("kept", "data")
    remote(lab).mkdir()
    found = trace(run_id, lab)
    assert link(found, "images").place is Place.HERE
    assert f"cp -r {lab / 'data/images'} data/images" in commands(found)
    Path("data/images/index.parquet").write_text("changed")
    assert link(trace(run_id, lab), "images").place is Place.LOST


@pytest.mark.slow
def test_a_model_that_only_the_registry_has_comes_from_there(lab, trained, tiny_unets):
    run_id = trained()
    registry.promote(find_model(run_id, lab), "champion", lab)
    forget("models/unet", objects=out_hash(Path("models/unet")), lab=lab)
    remote(lab).mkdir()
    found = trace("champion", lab)
    assert (link(found, "model").place, link(found, "model").where) == (Place.REMOTE, "version 1 of the registry")
    fetching = "\n".join(step.command for step in found.steps if step.why == "model")
    clone = lab / "clone"
    clone.mkdir()
    subprocess.run(["bash", "-ec", fetching], cwd=clone, env=Project(lab).environment, check=True)
    assert model_hash(clone / "models/unet") == model_hash(tiny_unets[0])


def test_a_model_that_was_converted_and_passed_on_needs_neither_the_store_nor_the_caches(
    lab, trained, tiny_unets, tmp_path_factory, monkeypatch
):
    trained()
    record = Provenance.from_dict(json.loads(next(Path(".state/runs").iterdir()).read_text()))
    folder = tmp_path_factory.mktemp("package") / "showcase"
    convert(tiny_unets[0], folder)
    outs = {path: out for path, out in record.outs.items() if path != "models/unet"}
    sha256 = model_hash(folder)
    own = {"converted_from": record.model_sha256, "model_sha256": sha256, "mlflow_run_id": None, "outs": outs}
    write_json(folder / PROVENANCE, asdict(replace(record, **own)))
    monkeypatch.setattr("latentloom.registry.models.SHOWCASE_FOLDER", folder)
    forget("models", "data", ".dvc/cache", ".state", "mlartifacts")
    Path("mlflow.db").unlink()

    sample = ["sample", "a red apple", "--steps", "2", "--model"]
    assert CliRunner().invoke(app, [*sample, "showcase", "-o", "apple.png"]).exit_code == 0
    found = trace("apple.png", lab)
    assert found.links[1:] == trace("showcase", lab).links
    assert not found.missing
    assert (link(found, "code").place, link(found, "code").hash) == (Place.HERE, record.commit)
    assert (link(found, "model").place, link(found, "model").hash) == (Place.HERE, sha256)
    assert link(found, "latents").hash == record.outs["data/latents"]
    assert link(found, "source").place is Place.HERE
    assert f"cp -r {folder} models/unet" in commands(found)
    assert "dvc repro validate" in commands(found)

    shutil.copytree(folder, "models/unet")
    assert CliRunner().invoke(app, [*sample, "models/unet", "-o", "again.png"]).exit_code == 0
    assert Path("again.png").read_bytes() == Path("apple.png").read_bytes()


def test_a_base_is_shown_and_comes_back_to_where_a_training_looks_for_it(lab, trained, tiny_unets):
    shutil.copytree(tiny_unets[1], "old")
    out, sha256 = out_hash(Path("old")), model_hash(tiny_unets[1])
    write_json("data/init.json", {"reference": "old", "sha256": sha256, "out": out})
    run_id = trained()
    base = link(trace(run_id, lab), "base")
    assert (base.name, base.hash, base.place) == (f"old, sha256 {sha256[:12]}", sha256, Place.HERE)
    assert base.command.endswith(f"cp -r {lab / 'old'} .state/models/{sha256}")
    put_into_cache(Path("old"))
    forget("old")
    base = link(trace(run_id, lab), "base")
    assert (base.place, base.where, base.needed) == (Place.HERE, "DVC's cache", False)
    assert base.command.endswith(f"latentloom.dvc_outs {out}=.state/models/{sha256}")
    forget(objects=out, lab=lab)
    found = trace(run_id, lab)
    assert link(found, "base").place is Place.LOST
    assert not found.missing  # the model itself is here
    tags = {HASH_TAG: sha256}
    client = open_client(lab)
    client.create_registered_model("latentloom")
    client.create_model_version("latentloom", "nowhere", run_id, tags=tags)
    base = link(trace(run_id, lab), "base")
    assert (base.place, base.where) == (Place.REMOTE, "version 1 of the registry")
    Path("mlflow.db").unlink()
    commit("Results")
    shutil.rmtree(".state")
    assert link(trace("models/unet", lab), "base").hash == sha256  # by the commit


@pytest.mark.parametrize("known_by", ["run record", "PNG", "commit"])
def test_without_the_store_what_was_written_down_elsewhere_is_the_same(lab, trained, known_by):
    run_id, reference = trained(), "models/unet"
    trained_with = git("rev-parse", "HEAD")
    if known_by == "PNG":
        reference = "apple.png"
        assert CliRunner().invoke(app, ["sample", "a red apple", "--steps", "2", "-o", reference]).exit_code == 0
    results = commit("Results")
    before = trace(reference, lab)
    for path in lab.glob("mlflow.db*"):
        path.unlink()
    shutil.rmtree("mlartifacts")
    if known_by != "run record":
        shutil.rmtree(".state")
    after = trace(reference, lab)
    assert link(after, "run").place is Place.UNKNOWN
    assert not after.missing
    assert link(after, "code").hash == (results if known_by == "commit" else trained_with)
    for name in ("model", "latents", "text", "images"):
        assert (link(after, name).hash, link(after, name).place) == (link(before, name).hash, link(before, name).place)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        trace(run_id, lab)


def test_a_server_that_is_away_does_not_keep_a_model_from_telling_what_is_known_here_and_no_password_is_shown(
    lab, trained, monkeypatch
):
    trained()
    commit("Results")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NO_SERVER)
    found = trace("models/unet", lab)
    assert link(found, "run").place is Place.UNKNOWN
    assert "127.0.0.1:9 does not answer" in link(found, "run").where
    assert not found.missing
    assert "secret" not in to_json(found) + render(found)


def test_where_the_files_of_a_run_do_not_answer_what_they_say_is_not_known(lab, trained):
    Path("src/latentloom/devices.py").write_text("# other code\n")
    run_id = trained()
    with closing(sqlite3.connect("mlflow.db")) as store, store:
        store.execute("UPDATE runs SET artifact_uri = ?", (f"{NO_SERVER}/artifacts",))
    found = trace(run_id, lab)
    changes = link(found, "local changes")
    assert (changes.place, "does not answer" in changes.where) == (Place.UNKNOWN, True)
    assert link(found, "latents").place is Place.HERE  # as this machine's own record says


def test_in_a_clone_that_has_not_pulled_the_models_folder_is_known_by_its_hash(lab, trained, tmp_path_factory):
    trained()
    push(lab)
    oid = out_hash(Path("models/unet"))
    commit("Results")
    clone = tmp_path_factory.mktemp("clones") / "clone"
    git("clone", "-q", str(lab), str(clone))
    found = trace(str(clone / "models/unet"), clone)
    assert (link(found, "model").place, link(found, "model").hash) == (Place.REMOTE, oid)
    assert {link(found, name).place for name in ("VAE", "text encoder", "source")} == {Place.HERE}
    assert link(found, "source").name.endswith("3 found, 2 kept, 1 rejected")
    assert not found.missing


def test_a_picture_of_a_model_that_nothing_tells_of_does_not_get_the_commit_of_another_model(lab, trained, tiny_unets):
    trained()
    commit("Results")
    sample = ["sample", "a red apple", "--model", str(tiny_unets[1]), "--steps", "2", "-o", "foreign.png"]
    assert CliRunner().invoke(app, sample).exit_code == 0
    found = trace("foreign.png", lab)
    assert (link(found, "code").place, link(found, "model").place) == (Place.LOST, Place.UNKNOWN)
    assert not found.steps


def test_changes_that_were_not_committed_are_shown_and_applied(lab, trained):
    Path("src/latentloom/devices.py").write_text("# other code\r\n")
    Path("src/latentloom/new.py").write_text("# new\n")
    run_id = trained()
    git("checkout", "-q", "src")
    Path("src/latentloom/new.py").unlink()
    found = trace(run_id, lab)
    changes = link(found, "local changes")
    assert (changes.place, changes.where) == (Place.HERE, "the run's files")
    assert "-a code.diff" in commands(found)
    assert "git apply" in commands(found)
    shutil.rmtree("mlartifacts")
    found = trace(run_id, lab)
    assert "local changes" in {own.link for own in found.missing}


def test_a_commit_that_is_not_in_this_clone_may_be_fetched(lab, trained):
    run_id = trained()
    shutil.rmtree(".git")
    git("init", "-q", "-b", "main")
    commit("Another history")
    found = trace(run_id, lab)
    assert link(found, "code").place is Place.UNKNOWN
    assert commands(found) == f"git -C {lab} fetch --all --tags"


def test_a_source_that_changed_is_lost_but_not_needed_as_long_as_its_prepared_images_are_there(lab, trained):
    run_id = trained()
    Path("pictures/c.png").write_text("c")
    found = trace(run_id, lab)
    assert link(found, "source").place is Place.LOST
    assert "changed since" in link(found, "source").where
    assert not found.missing
    shutil.rmtree("pictures")
    assert link(trace(run_id, lab), "source").place is Place.UNKNOWN
    remote(lab).mkdir()
    forget("data", ".dvc/cache")
    assert {own.link for own in trace(run_id, lab).missing} >= {"images", "source"}


def test_an_encoder_of_a_folder_is_compared_by_its_fingerprint(lab, trained, tmp_path_factory):
    vae = save_tiny_vae(tmp_path_factory.mktemp("encoders") / "vae")
    model = save_tiny_unet(vae.parent / "unet", vae=str(vae))
    write_json("data/latents/stats.json", {"vae": read_config(model).vae.model_dump()})
    run_id = trained(model)
    assert link(trace(run_id, lab), "VAE").place is Place.HERE
    save_tiny_vae(vae, seed=1)
    found = trace(run_id, lab)
    assert (link(found, "VAE").place, link(found, "VAE").needed) == (Place.LOST, True)
    assert "another one now" in link(found, "VAE").where
    shutil.rmtree(vae)
    assert link(trace(run_id, lab), "VAE").place is Place.UNKNOWN


def test_an_encoder_of_the_hub_is_not_downloaded_to_compare_it(lab, trained):
    write_json("data/latents/stats.json", {"vae": {"reference": "some-owner/some-vae", "fingerprint": "f" * 64}})
    found = trace(trained(), lab)
    assert (link(found, "VAE").place, link(found, "VAE").name) == (Place.REMOTE, "some-owner/some-vae ffffffffffff")


def test_a_run_that_left_no_model_says_how_it_ended(lab, train, tiny_unets):
    client = open_client(lab)
    experiment = client.get_run(train(tiny_unets[0])).info.experiment_id
    run_id = client.create_run(experiment).info.run_id
    client.set_terminated(run_id, "FAILED")
    found = trace(run_id, lab)
    assert link(found, "model").where == "the run is failed"
    assert "model" in [own.link for own in found.missing]


@pytest.mark.parametrize("reference", ["nothing", "data", "params.yaml", "gone.png", "f" * 32, "7"])
def test_what_names_nothing_is_one_clear_line(lab, train, tiny_unets, reference):
    train(tiny_unets[0])
    result = CliRunner().invoke(app, ["lineage", reference])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert reference in result.output


def test_the_json_form_is_the_documented_one_and_the_exit_status_says_whether_all_is_there(lab, trained):
    run_id = trained()
    result = CliRunner().invoke(app, ["lineage", run_id, "--json"])
    given = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (given["format_version"], given["of"], given["complete"]) == (2, run_id, True)
    assert set(given["links"][0]) == {"link", "name", "hash", "place", "where", "needed", "command"}
    assert set(given["steps"][0]) == {"why", "command"}
    forget("models/unet", objects=out_hash(Path("models/unet")), lab=lab)
    remote(lab).mkdir()
    result = CliRunner().invoke(app, ["lineage", run_id, "--json"])
    assert (result.exit_code, json.loads(result.stdout)["complete"]) == (1, False)
    assert CliRunner().invoke(app, ["lineage", run_id]).exit_code == 1


@pytest.mark.slow
def test_of_what_is_in_no_commit_the_bytes_come_back_by_their_hash(lab, trained, tiny_unets):
    """The commit at training cannot name the model that the training makes."""
    run_id = trained()
    Path("dvc.lock").unlink()
    forget("data", "models")
    found = trace(run_id, lab)
    assert not found.missing
    script = "\n".join(step.command for step in found.steps)
    assert "-m latentloom.dvc_outs" in script
    subprocess.run(["bash", "-ec", script], env=Project(lab).environment, check=True)
    (clone,) = lab.parent.glob(f"{lab.name}-????????")
    assert model_hash(clone / "models/unet") == model_hash(tiny_unets[0])
    for path in DATA:
        assert any(own.name.startswith(path) and own.hash == out_hash(clone / path) for own in found.links)
