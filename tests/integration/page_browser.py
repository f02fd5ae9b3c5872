"""The page in a real browser, for tests: fixtures, which conftest.py takes up, and what they give."""

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opensora.serve.jobs import Job
from tests.integration.page_service import LIMIT_S, Web, Worker, model, until
from tests.patience import patience

CHROMIUM = Path("/usr/bin/chromium")
DESK = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}; Debian's package is called chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=options, timeout=patience(120) * 1000)
        yield opened
        opened.close()


@dataclass
class Page:
    """A tab, and what its console said."""

    tab: Any
    web: Web
    worker: Worker
    said: list[str] = field(default_factory=list)
    bears: tuple[str, ...] = ()  # errors of the console that a test makes happen

    def open(self) -> "Page":
        self.tab.on("console", lambda message: self._heard(message.type, message.text))
        self.tab.on("pageerror", lambda error: self.said.append(f"exception: {error}"))
        self.tab.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.tab.goto(self.web.url)
        return self

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.said.append(f"{kind}: {text}")

    @property
    def mistakes(self) -> list[str]:
        return [text for text in self.said if not any(re.search(one, text) for one in self.bears)]

    def ready(self) -> "Page":
        self.tab.locator("#sizes input").first.wait_for(state="attached")
        return self

    def generate(self, prompt: str) -> None:
        self.tab.fill("#prompt", prompt)
        self.tab.click("#submit")
        self.tab.locator(".job, .card", has_text=prompt[:40]).first.wait_for()

    def row(self, prompt: str) -> Any:
        return self.tab.locator(".job", has_text=prompt)

    def card(self, prompt: str) -> Any:
        return self.tab.locator(".card", has_text=prompt)

    def finished(self, prompt: str) -> Any:
        """A clip's card, once its thumbnail is there: that of a clip deleted before would be a 404 in the console."""
        card = self.card(prompt)
        until(lambda: card.locator(".play img").evaluate("image => image.naturalWidth") > 0)
        return card

    def eval(self, script: str, value: Any = None) -> Any:
        return self.tab.evaluate(script, value)

    def jobs(self) -> list[Job]:
        """All of nobody's key, the newest first."""
        return self.worker.queue.page("", limit=100, after=None, order="desc")[0]

    def call(self, **fields: Any) -> str:
        """A job that another client asks for."""
        answer = self.tab.request.post(f"{self.web.url}v1/videos", data={"model": "demo", **fields})
        assert answer.status == 200, answer.text()
        return str(json.loads(answer.text())["id"])


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., tuple[Web, Worker]]]:
    started: list[Any] = []

    def start(**more: Any) -> tuple[Web, Worker]:
        models = more.pop("models", [model()])
        web = Web(tmp_path, **more)
        worker = Worker(web.cfg, models)
        started.extend((web, worker))
        return web, worker

    yield start
    for one in started:
        one.stop() if isinstance(one, Web) else one.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Web, Worker]]:
    """One for the tests of a file; each leaves it empty."""
    web = Web(tmp_path_factory.mktemp("service"))
    worker = Worker(web.cfg)
    yield web, worker
    web.stop()
    worker.close()


@pytest.fixture
def page(chromium: Any, service: tuple[Web, Worker]) -> Iterator[Page]:
    """A tab at the page; nothing may be said in its console but what the test bears with."""
    web, worker = service
    context = chromium.new_context(viewport=DESK)
    context.set_default_timeout(patience(LIMIT_S) * 1000)
    opened = Page(context.new_page(), web, worker).open().ready()
    yield opened
    context.close()
    web.start()
    worker.empty()
    assert opened.mistakes == []


def picture(colour: tuple[int, int, int]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, "PNG")
    return file.getvalue()
