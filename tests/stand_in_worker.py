"""A worker that is none, for tests: claims jobs, says how far it is, writes small files."""

import threading
import time
from typing import Any

import numpy as np
from PIL import Image

from opensora.config.schema import plain
from opensora.sampling.options import SamplingOption
from opensora.serve.jobs import Job, JobError, JobQueue
from opensora.serve.model_info import Cost, ModelInfo
from opensora.serve.store import Store
from opensora.utils.files.video_writer import write_video

FAILS, SLOW = "please fail", "slowly"  # words of prompts
STEP_S = 0.02
LEASE_S = 60.0

TOY = ModelInfo(
    name="toy",
    created=1_700_000_000,
    defaults=plain(
        SamplingOption(
            width=32, height=32, resolution="32px", aspect_ratio="1:1", num_frames=9, num_steps=4, guidance=3.0, fps=8
        )
    ),
    neg="blurred",
    multiple=16,
    sizes=((32, 32), (64, 32), (32, 64)),
    frames=(1, 5, 9, 13, 17, 33),
    cond_types=("t2v", "i2v_head", "i2v_loop", "v2v_head"),
    references={"i2v_head": 1, "i2v_loop": 2, "v2v_head": 1},
    loras=("ink",),
    room_bytes=4 * 2**30,
    costs=tuple(
        Cost(
            width=width,
            height=height,
            frames=frames,
            tokens=frames * width,
            peak_bytes=2**20 + 64 * width * height * frames,
            step_s=1e-6 * width * height * frames,
            other_s=0.1,
        )
        for width, height, frames in ((32, 32, 1), (32, 32, 9), (64, 64, 33), (512, 512, 33))
    ),
)


class StandIn:
    """A thread that works on a queue, which is its own from now on, until it is stopped."""

    def __init__(self, queue: JobQueue, store: Store, *models: ModelInfo) -> None:
        self._queue, self._store = queue, store
        self._models = models or (TOY,)
        self._stop = threading.Event()
        for info in self._models:
            queue.publish(info.name, info.plain(), time.time())
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._queue.close()

    def _work(self) -> None:
        names = [info.name for info in self._models]
        while not self._stop.is_set():
            told = {"models": names, "ready": True, "seconds_per_step": STEP_S, "mfu": 0.5, "memory_bytes": 1 << 20}
            self._queue.beat("stand-in", told, time.time())
            job = self._queue.claim("stand-in", names, time.time(), lease_s=LEASE_S, attempts=3)
            if job is None:
                self._stop.wait(STEP_S)
            else:
                self._make(job)

    def _make(self, job: Job) -> None:
        for step in range(1, job.steps + 1):
            if self._stop.wait(STEP_S * (10 if SLOW in job.prompt else 1)):
                self._queue.put_back(job, time.time())
                return
            self._queue.report(job, time.time(), step=step, progress=2 + 88 * step // job.steps, batch=1)
            if self._queue.cancel_requested([job]):
                self._queue.finish(job, time.time(), "cancelled")
                return
        if FAILS in job.prompt:
            self._queue.finish(
                job, time.time(), "failed", error=JobError(code="sampling_failed", message="as was asked")
            )
            return
        self._queue.finish(job, time.time(), "completed", result=self._write(job))

    def _write(self, job: Job) -> dict[str, Any]:
        sampling = job.request["sampling"]
        shape = (sampling["num_frames"], sampling["height"], sampling["width"], 3)
        frames = np.random.default_rng(sampling["seed"]).integers(0, 255, shape, dtype=np.uint8)
        final = self._store.video(job.id)
        write_video(final.with_suffix(".tmp.mp4"), frames, 8.0).rename(final)
        Image.fromarray(frames[0]).save(self._store.video(job.id, "webp"))
        Image.fromarray(frames[0]).save(self._store.video(job.id, "jpg"))
        facts = {"width": shape[2], "height": shape[1], "frames": shape[0], "fps": 8.0, "seconds_used": 0.1}
        return {"file": final.name, "bytes": final.stat().st_size, **facts}
