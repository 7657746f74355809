"""What `latentloom push` shows is what it sends; the hub is a small server of the test's own."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from latentloom.cli import app

TOKEN = "hf_of_the_test"


@pytest.fixture
def folder(tmp_path) -> Path:
    files = {"README.md": "---\nlicense: mit\n---\n", "latentloom.json": "{}", "unet/weights.safetensors": "weights"}
    for name, text in files.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "out"


@pytest.fixture
def hub(monkeypatch) -> Iterator[SimpleNamespace]:
    """A hub: ``repositories`` by id, each whether it is private and its files."""
    state = SimpleNamespace(repositories={}, asked=[], tokens=set())

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def answer(self, document: dict, status: int = 200) -> None:
            written = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(written)))
            self.end_headers()
            self.wfile.write(written)

        def do_GET(self) -> None:
            name = self.path.removeprefix("/api/models/").partition("?")[0]
            state.asked.append(self.path)
            if name not in state.repositories:
                self.answer({"error": "Repository not found"}, 404)
            else:
                self.answer({"id": name, "private": state.repositories[name]["private"], "siblings": [], "tags": []})

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            state.asked.append(self.path)
            state.tokens.add(self.headers["Authorization"])
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                self.answer({"error": "Invalid username or password."}, 401)
            elif self.path == "/api/repos/create":
                asked = json.loads(sent)
                name = f"{asked['organization']}/{asked['name']}"
                there = name in state.repositories
                private = asked.get("private", asked.get("visibility") == "private")
                state.repositories.setdefault(name, {"private": private, "files": {}})
                self.answer({"url": f"{state.address}/{name}"}, 409 if there else 200)
            elif self.path == "/api/validate-yaml":
                self.answer({"warnings": [], "errors": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(sent)["files"]
                ]
                self.answer({"files": files})
            else:
                name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in map(json.loads, sent.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        state.repositories[name]["files"][line["value"]["path"]] = content
                self.answer({"commitUrl": f"{state.address}/{name}/commit/1", "commitOid": "1", "success": True})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield state
    server.shutdown()
    server.server_close()


def push(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_dry_run_names_repository_visibility_and_files_and_asks_nothing(hub, folder):
    code, output = push(folder, "ada/loom", "--dry-run")
    shown = ("/ada/loom\n", "private", "unet/weights.safetensors", "7 bytes", "3 files", "nothing was sent")
    assert (code, [part for part in shown if part not in output], hub.asked) == (0, [], [])


def test_what_was_shown_is_sent_and_private_unless_asked_otherwise(hub, folder):
    code, output = push(folder, "ada/loom")
    assert (code, output.splitlines()[-1]) == (0, f"{hub.address}/ada/loom/commit/1")
    sent = {file: (folder / file).read_bytes() for file in ("README.md", "latentloom.json", "unet/weights.safetensors")}
    assert hub.repositories == {"ada/loom": {"private": True, "files": sent}}
    hub.repositories["ada/loom"]["files"].clear()
    code, output = push(folder, "ada/loom", "--public")
    assert (code, "is there already, and private" in output) == (1, True)
    assert hub.repositories == {"ada/loom": {"private": True, "files": {}}}
    assert push(folder, "ada/open", "--public")[0] == 0
    assert not hub.repositories["ada/open"]["private"]


def test_what_keeps_it_from_being_sent_is_said_in_a_sentence(hub, folder, tmp_path, monkeypatch):
    for arguments, said in (
        ((tmp_path, "ada/loom"), "is no exported model"),
        ((folder, "loom"), "give OWNER/NAME"),
        ((folder, "ada/lo om"), "is no id of the hub"),
    ):
        code, output = push(*arguments)
        assert (code, said in output, len(output.splitlines())) == (1, True, 1)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert (
        push(folder, "ada/loom")[1].splitlines()[-1].startswith("not sent to ada/loom: Invalid username or password.")
    )
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token of the hub: run `hf auth login`" in push(folder, "ada/loom")[1]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, output = push(folder, "ada/loom")
    assert (code, output.splitlines()[-1].startswith("not sent to ada/loom: ")) == (1, True)
    assert hub.repositories == {}
