"""docs/models.md, run from top to bottom: sampling, promoting, serving over HTTP, and taking back; on a server too."""

import base64
import json
import re
import shlex
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from projects import ROOT, tiny_params
from servers import PATIENCE, answers, free_port, serving
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.evaluation.metadata import read_metadata
from latentloom.model_files import model_hash
from latentloom.registry import registry
from latentloom.registry.models import find_model

pytestmark = [pytest.mark.pipeline, pytest.mark.service]

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


WRONG = [
    ({"params": {"steps": 1}}, "steps = 1: must be a whole number from 2 to 1000"),
    ({"params": {"smapler": "ddim"}}, "smapler: not an option (did you mean sampler?); options are seed, count,"),
    ({"params": {"diffusion_steps": 9}}, "diffusion_steps: not an option (did you mean steps?)"),
    ({"params": {"seed": -1}}, "seed = -1: must be a whole number from 0 to 9223372036854775807"),
    ({"params": {"seed": "1"}}, "seed = '1': must be"),
    ({"params": {"count": 10**9}}, "count = 1000000000: must be a whole number from 1 to 10000"),
    ({"params": {"size": "96x50"}}, "size: 96x50 is none that this model makes: sides are multiples of 16 pixels"),
    ({"params": {"guidance": None}}, "class_guidance = None: must be"),
    ({"params": [1]}, "params = [1]: must be an object"),
    ({"inputs": {"prompt": ["a"], "seed": [1]}}, "seed: the one column is prompt"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def shown(word: str) -> list[list[str]]:
    """The commands of the page that begin with ``word``, as words, in the page's order."""
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and line[0] == word]


def keyboard(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"
    return result.output


@pytest.fixture
def project(project_root, train, tiny_unets) -> Path:
    """Two trainings, `gentle` and the worse `bold`; the last one is in models/unet, the other in `.state`."""
    for name, folder, recall in (("gentle", tiny_unets[0], 0.9), ("bold", tiny_unets[1], 0.5)):
        train(folder, name=name, recall=recall)
    shutil.copytree(tiny_unets[1], "models/unet")
    shutil.copytree(tiny_unets[0], Path(".state/models") / model_hash(tiny_unets[0]))
    params = tiny_params()
    params["evaluate"]["class_guidance"] = 2.5  # what both were evaluated with
    params["evaluate"]["precision"] = "fp32"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    return project_root


def test_every_command_of_the_page_does_what_it_says(project):
    commands = shown("latentloom")
    assert len(commands) == 11
    served = commands.pop()
    printed = [keyboard(*words) for _, *words in commands]
    for name in ("sample.png", "apples.png", "quick.png"):
        assert read_metadata(Path("samples", name)).model_sha256 == model_hash(Path("models/unet"))
    assert read_metadata(Path("samples/apples.png")).count == 4
    assert len(list(Path("samples/apples").iterdir())) == 4
    table = re.search(r"```\n(when .*?)```", PAGE, re.DOTALL)[1]
    assert printed[6].splitlines()[0] == table.splitlines()[0]
    assert printed[6].splitlines()[-1] == table.splitlines()[-1]
    moves = [(move.kind, move.version) for move, _ in registry.history(project)]
    assert moves == [("promote", "1"), ("promote", "1"), ("force", "2"), ("demote", "1")]
    assert "verdict: candidate (version 1) is better: held_out_recall_at_1 differs by -0.4 (" in printed[8]

    port = free_port()
    (command,) = shown("mlflow")
    (script,) = blocks("python")
    decoy = project / "decoy" / "latentloom"  # the server must run the code that was logged, whatever is installed
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('not the code that was logged')")
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}", "PYTHONPATH": str(decoy.parent)}
    with serving([*command[:-1], str(port)], port, project, **environment):
        exec(script.replace("5001", str(port)), {})
        keyboard(*served[1:])
        assert Path("samples/served.png").read_bytes() == Path("samples/served-too.png").read_bytes()
        assert read_metadata(Path("samples/served.png")).model_sha256 == find_model("gentle", project).sha256

        several = {"inputs": {"prompt": ["a red apple", "a snowman"]}, "params": {"seed": 1, "steps": 3, "count": 2}}
        rows = json.loads(ask(port, several))["predictions"]
        options = shlex.split("--model champion --seed 1 --count 2 --steps 3 -o all/")
        keyboard("sample", *several["inputs"]["prompt"], *options)
        sampled = [path.read_bytes() for path in sorted(Path("all").iterdir())]
        assert [base64.b64decode(row["png"]) for row in rows] == sampled
        assert [(row["prompt"], row["number"]) for row in rows[1:3]] == [("a red apple", 1), ("a snowman", 0)]

        options = "--model champion --first 2 --steps 3 --sampler dpmpp_2m --guidance-interval 0.1 0.9 --threshold none"
        options += " --size 96x48 --negative cats"
        keyboard("sample", "a red apple", *shlex.split(options), "-o", "other.png")
        params = {"first": 2, "steps": 3, "sampler": "dpmpp_2m", "guidance_interval": [0.1, 0.9], "threshold": None}
        params |= {"size": "96x48", "negative": "cats"}
        (row,) = json.loads(ask(port, {"inputs": {"prompt": ["a red apple"]}, "params": params}))["predictions"]
        assert (row["number"], base64.b64decode(row["png"])) == (2, Path("other.png").read_bytes())

        for wrong, message in WRONG:
            with pytest.raises(urllib.error.HTTPError) as rejected:
                ask(port, {"inputs": {"prompt": ["a red apple"]}} | wrong)
            assert rejected.value.code == 400
            assert message in json.loads(rejected.value.read())["message"]
    assert not answers(f"http://127.0.0.1:{port}/health")


def ask(port: int, question: dict) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return response.read()


def test_on_a_tracking_server_a_model_is_promoted_and_sampled_by_someone_who_has_nothing_but_the_address(
    project_root, train, tiny_unets, tmp_path_factory, monkeypatch
):
    port, home = free_port(), tmp_path_factory.mktemp("server")
    shutil.copyfile(project_root / "mlflow.db", home / "mlflow.db")
    command = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", str(home / "artifacts")),
    ]
    with serving(command, port, home, MLFLOW_DISABLE_TELEMETRY="true"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "a team's")
        run_id = train(tiny_unets[0])
        registry.promote(find_model(str(tiny_unets[0]), project_root), "champion", project_root)
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        monkeypatch.chdir(elsewhere)
        found = find_model("champion", elsewhere)
        assert (found.sha256, found.run_id, found.version) == (model_hash(tiny_unets[0]), run_id, "1")
        assert model_hash(found.folder) == found.sha256
        keyboard("sample", "a red apple", "--model", "champion", "-o", "a.png")
        assert (read_metadata(Path("a.png")).sampling.diffusion_steps, read_metadata(Path("a.png")).mlflow_run_id) == (
            4,
            run_id,
        )
        assert "champion is version 1" in keyboard("history")
        assert keyboard("demote", "--from", "champion").endswith("none is\n")
