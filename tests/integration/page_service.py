"""The real web process for tests of the page, and a worker that makes clips of plain colours instead of sampling.

The worker talks to the queue as a group of processes does; how far it goes is the test's to say.
"""

import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opensora.config.schema import plain
from opensora.config.strict_yaml import to_yaml_text
from opensora.sampling.options import SamplingOption
from opensora.serve.config import ServeConfig
from opensora.serve.jobs import Job, JobError
from opensora.serve.model_info import Cost, ModelInfo
from opensora.serve.queues import open_queue
from opensora.serve.store import Store
from opensora.utils.files.video_writer import write_image, write_video
from tests.conftest import ROOT
from tests.patience import patience

LIMIT_S = 60.0  # generous: machines of tests are crowded
STEPS = 8
ENDLESS = 10**9


def until(true: Callable[[], Any], what: str = "") -> Any:
    """What ``true`` gives, once it is true; an AssertionError if that takes too long."""
    end = time.monotonic() + patience(LIMIT_S)
    while not (value := true()):
        assert time.monotonic() < end, what or "it never came to be"
        time.sleep(0.05)
    return value


def model(**more: Any) -> ModelInfo:
    """A model of small clips; the largest size does not fit its memory from 9 frames on."""
    sizes = ((64, 36), (48, 48), (36, 64), (640, 360))
    option = SamplingOption(width=64, height=36, num_frames=9, num_steps=STEPS, guidance=3.0, fps=8.0)
    costs = [_cost(width, height, frames) for width, height in sizes for frames in (1, 33)]
    told: dict[str, Any] = {
        "name": "demo",
        "created": 1_700_000_000,
        "defaults": plain(option),
        "neg": "blurry",
        "multiple": 4,
        "sizes": sizes,
        "frames": (1, 5, 9, 17, 33),
        "cond_types": ("t2v", "i2v_head", "i2v_loop"),
        "references": {"t2v": 0, "i2v_head": 1, "i2v_loop": 2},
        "room_bytes": 640 * 360 * 8 * 100_000,
        "costs": tuple(sorted(costs, key=lambda cost: cost.tokens)),
    }
    return ModelInfo(**{**told, **more})


def _cost(width: int, height: int, frames: int) -> Cost:
    pixels = width * height * frames
    return Cost(
        width=width, height=height, frames=frames, tokens=pixels, peak_bytes=pixels * 100_000, step_s=0.5, other_s=1.0
    )


@dataclass
class Worker:
    """Claims jobs in a thread; each step waits until ``allow`` says so."""

    cfg: ServeConfig
    models: list[ModelInfo] = field(default_factory=lambda: [model()])
    fails: bool = False

    def __post_init__(self) -> None:
        self.store = Store(self.cfg.out)
        self.queue = open_queue(self.cfg, self.store)
        self._allowed, self._changed, self._ends = ENDLESS, threading.Condition(), threading.Event()
        for info in self.models:
            self.queue.publish(info.name, info.plain(), time.time())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def hold(self, steps: int) -> None:
        """From now on jobs come to so many steps, and stay there; ``go`` lets them on."""
        with self._changed:
            self._allowed = steps
            self._changed.notify_all()

    def go(self) -> None:
        self.hold(ENDLESS)

    def empty(self) -> None:
        """No job is left, nor a file of one."""
        self.go()
        self.fails = False
        while jobs := self.queue.page("", limit=100, after=None, order="asc")[0]:
            for job in jobs:
                self.queue.request_cancel(job.id, "", time.time())
                if self.queue.remove(job.id, ""):
                    self.store.remove(job.id, job.references)
            time.sleep(0.02)

    def close(self) -> None:
        self._ends.set()
        self.go()
        self._thread.join(LIMIT_S)
        self.queue.close()

    def _run(self) -> None:
        names = [info.name for info in self.models]
        while not self._ends.is_set():
            now = time.time()
            self.queue.beat("tests", {"models": names, "ready": True}, now)
            job = self.queue.claim("tests", names, now, lease_s=600.0, attempts=3)
            if job is None:
                self._ends.wait(0.05)
            else:
                self._make(job)

    def _make(self, job: Job) -> None:
        for step in range(1, job.steps + 1):
            self.queue.report(job, time.time(), step=step, progress=2 + 88 * step // job.steps, batch=1)
            with self._changed:
                while step >= self._allowed and not self._stops(job):
                    self._changed.wait(0.05)
            if self._stops(job):
                self.queue.finish(job, time.time(), "cancelled")
                return
        if self.fails:
            self.queue.finish(job, time.time(), "failed", error=JobError(code="out_of_memory", message="12 GiB asked"))
            return
        self.queue.finish(job, time.time(), "completed", result=write(self.store, job))

    def _stops(self, job: Job) -> bool:
        return self._ends.is_set() or bool(self.queue.cancel_requested([job]))


def write(store: Store, job: Job) -> dict[str, Any]:
    """A clip in a colour of the seed, brighter from frame to frame, and what a finished job says of it."""
    asked = job.request["sampling"]
    width, height, frames = asked["width"], asked["height"], asked["num_frames"]
    fps = frames / job.request["seconds"]
    colour = np.array([asked["seed"] * step % 200 for step in (1, 7, 31)])
    clip = np.zeros((frames, height, width, 3), np.uint8)  # (T, H, W, 3)
    clip[:] = (colour + 55 * np.arange(frames)[:, None] // frames)[:, None, None]
    kind = "png" if frames == 1 else "mp4"
    if frames == 1:
        write_image(store.video(job.id, kind), clip[0])
    else:
        write_video(store.video(job.id, kind), clip, fps)
    _thumbnail(store.video(job.id, "webp"), clip[0])
    told = {"width": width, "height": height, "frames": frames, "fps": fps, "seconds_used": 1.5}
    return {**told, "file": f"{job.id}.{kind}", "bytes": store.video(job.id, kind).stat().st_size}


def _thumbnail(path: Path, frame: Any) -> None:
    from PIL import Image

    Image.fromarray(frame).save(path)


class Web:
    """The web process, which can end and begin again at the same address."""

    def __init__(self, folder: Path, **more: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        told = {"out": str(folder / "out"), "port": self.port, **more}
        self.cfg = ServeConfig(**told)
        self._file, self._log = folder / "serve.yaml", folder / "web.log"
        self._file.write_text(to_yaml_text(told))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Does nothing where it runs."""
        if self._process is not None:
            return
        with open(self._log, "ab") as log:
            command = [sys.executable, "-m", "opensora.serve.web", str(self._file)]
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        until(self._answers, "the web process did not start")

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(LIMIT_S)
        self._process = None

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
