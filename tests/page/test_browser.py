"""A person's path in a real browser: from opening the page to a saved picture, without a request to elsewhere."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright
from servers import free_port
from tiny_models import save_tiny_unet
from typer.testing import CliRunner

from latentloom.cli import app

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(find_spec("gradio") is None, reason='pip install "latentloom[page]"'),  # its import takes long
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine: apt-get install chromium"),
]
LOCAL = ("127.0.0.1", "localhost")


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The addresses that this process connects to."""
    seen, connect = [], socket.socket.connect

    def recording(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple):
            seen.append(address[0])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recording)
    return seen


@pytest.fixture
def address(tmp_path, monkeypatch, asked) -> Iterator[str]:
    """The page's, over a folder with nothing but a model."""
    from latentloom.page.layout import serve

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    save_tiny_unet(tmp_path / "models" / "unet")
    port = free_port()
    page = serve(tmp_path, "127.0.0.1", port, wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture
def page(address) -> Iterator[Page]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=sandbox)
        opened = browser.new_page(viewport={"width": 1280, "height": 1000})
        opened.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield opened
        browser.close()


def seen(locator: Locator) -> Locator:
    """The one on the tab that is open."""
    return locator.locator("visible=true").first


def test_from_opening_the_page_to_a_saved_picture_nothing_leaves_the_machine(page, address, asked, tmp_path):
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    seen(page.get_by_label("Prompt", exact=True)).fill("a red apple")
    seen(page.get_by_label("Steps", exact=True)).fill("1")
    draw = seen(page.get_by_role("button", name="Draw", exact=True))
    draw.click()
    seen(page.get_by_text("diffusion_steps = 1: must be a whole number from 2 to 1000")).wait_for()
    seen(page.get_by_label("Steps", exact=True)).fill("4")
    seen(page.get_by_label("Count", exact=True)).fill("2")
    seen(page.get_by_label("Prompt", exact=True)).fill("<b>一只猫</b>, a red apple")
    draw.click()
    seen(page.get_by_text("does not know 2 of ")).wait_for()
    seen(page.get_by_text("sample 1", exact=True)).wait_for()
    caption = seen(page.get_by_text("sample 1", exact=True))
    assert caption.evaluate("own => getComputedStyle(own).whiteSpace") == "normal"  # a long one is not cut
    caption.click()
    made = seen(page.locator(".made textarea"))
    expect(made).to_have_value(re.compile("--model models/unet .*--first 1"))
    with page.expect_download() as download:
        seen(page.get_by_text("Download PNG")).click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)

    options = "--steps 4 --first 1 -o typed.png"
    assert CliRunner().invoke(app, ["sample", "<b>一只猫</b>, a red apple", *options.split()]).exit_code == 0
    assert saved.read_bytes() == Path("typed.png").read_bytes()
    assert download.value.suggested_filename == "b-一只猫-b-a-red-apple-0-1.png"
    page.get_by_role("tab", name="Find").click()
    (tmp_path / "notes.png").write_text("no picture")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "notes.png")
    seen(page.get_by_text("notes.png cannot be used: begins with the bytes")).wait_for()
    assert tempfile.gettempdir() not in page.locator(".toast-wrap").inner_text()
    page.locator("#model input").fill("models/none")
    page.locator("#model input").press("Enter")
    seen(page.get_by_text("models/none holds no model")).wait_for()
    page.get_by_role("tab", name="Draw", exact=True).click()
    seen(page.locator(".thumbnails").get_by_label("Thumbnail 1 of 2")).click()  # below the one shown large
    expect(made).to_have_value(re.compile("--model models/unet .*--first 0"))  # whatever model is chosen by now
    page.get_by_role("tab", name="Data").click()
    seen(page.get_by_text("does not exist")).wait_for()
    assert {urlparse(url).hostname for url in requests if url.startswith("http")} == {"127.0.0.1"}
    assert set(asked) <= set(LOCAL)
