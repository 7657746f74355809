"""The pages in a real browser whose every name lookup fails: what is asked for, what is there, what is drawn."""

import json
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.service,
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine: apt-get install chromium"),
]


@dataclass(frozen=True)
class Browser:
    folder: Path

    def open(self, page: Path, *options: str) -> str:
        """Open a page and return what the browser printed; a log of its network goes to ``net.json``."""
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [
            *[BROWSER, "--headless", "--disable-gpu", "--hide-scrollbars", *root],
            *[f"--user-data-dir={self.folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"],
            *[f"--log-net-log={self.folder / 'net.json'}", *options, page.as_uri()],
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    def requests(self) -> list[str]:
        """What the page last opened asked the network for; what the browser asks for itself has no origin."""
        log = json.loads((self.folder / "net.json").read_text())
        start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        started = [event.get("params", {}) for event in log["events"] if event["type"] == start]
        return [given["url"] for given in started if "url" in given and given["initiator"] != "not an origin"]

    def screenshot(self, page: Path, width: int, height: int) -> np.ndarray:
        file = self.folder / "page.png"
        self.open(page, f"--screenshot={file}", f"--window-size={width},{height}")
        with Image.open(file) as picture:
            return np.array(picture.convert("RGB"))


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    (tmp_path / "browser").mkdir()
    return Browser(tmp_path / "browser")


@pytest.fixture
def docs(caches) -> Path:
    caches.set("latents", [1], mean=np.float32(99.0))
    caches.validate(docs=True)
    return caches.root / "docs"


def test_a_page_that_loads_something_would_be_noticed(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.org/a.png"><link rel="stylesheet" href="https://example.org/b.css">')
    browser.open(page, "--dump-dom")
    assert sorted(browser.requests()) == ["http://example.org/a.png", "https://example.org/b.css"]


def test_no_page_asks_the_network_for_anything_and_each_has_its_content(browser, docs):
    pages = sorted(docs.glob("*.html"))
    assert len(pages) == 7
    for page in pages:
        content = browser.open(page, "--dump-dom")
        assert browser.requests() == [], f"{page} asks for something"
        words = "1 of 20 checks failed" if page.stem == "index" else f"Table {page.stem}"
        assert words in content
    index = browser.open(docs / "index.html", "--dump-dom")
    for words in ("latent_mean_in_range: 1 of 40 latents", "caption number 39", "broken/7.jpg", "wide, over 3:1"):
        assert words in index


@pytest.mark.parametrize("width", [1280, 500])
def test_every_picture_of_the_contact_sheets_is_drawn(browser, docs, caches, width):
    pixels = browser.screenshot(docs / "index.html", width, 6000)
    seen = Counter(map(tuple, pixels.reshape(-1, 3)))
    for number in range(41):
        assert seen[caches.colour(number)] > 1000, f"image {number} is not drawn"
    assert seen[caches.preview] > 3000, "the rejected images are not shown"
    assert pixels[:, -1].std() == 0, "something sticks out of the page to the right"
