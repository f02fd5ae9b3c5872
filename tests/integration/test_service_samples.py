"""A clip has the same bytes from the sampling command, from the service, and from a batch of the service."""

from pathlib import Path

import numpy as np
import pytest

from tests.dist.harness import run_distributed
from tests.serving import add, asked, command, configured, jobs_in, queue_of, work

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JOBS = (
    asked(1),
    asked(2, prompt="a blue square moves right on a white background", neg="a red circle"),
    asked(3, num_frames=1),
    asked(4, references=(f"video_{4:032x}-0.png",), cond_type="i2v_head", num_frames=9),
    asked(5, guidance=1.0, num_steps=2),
    asked(6),
)


@pytest.fixture(scope="module", params=[1, 2])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Path]:
    """(processes, the configuration of a service that has made all jobs one by one, of another that had batches)."""
    paths = []
    for batch_size in (1, 4):
        config = configured(tmp_path_factory.mktemp("service"), batch_size=batch_size)
        draw_reference(config)
        add(config, *JOBS)
        assert run_distributed(work, request.param, config, init=False) == [0] * request.param
        paths.append(config)
    return request.param, paths[0], paths[1]


def draw_reference(config: Path) -> None:
    from PIL import Image

    pixels = np.add.outer(np.arange(40) * 3, np.arange(50) * 2)[..., None] % 256 + np.zeros(3)
    Image.fromarray(pixels.astype(np.uint8)).save(queue_of(config)[1].reference(JOBS[3].references[0]))


def file_of(config: Path, number: int) -> bytes:
    job = jobs_in(config)[number]
    assert job.state == "completed", (job.state, job.error)
    path = queue_of(config)[1].videos / job.result["file"]
    assert path.stat().st_size == job.result["bytes"]
    return path.read_bytes()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_the_bytes_of_the_command(made: tuple[int, Path, Path], number: int, tmp_path: Path) -> None:
    processes, config, batched = made
    job, store = JOBS[number - 1], queue_of(config)[1]
    references = [str(store.reference(name)) for name in job.references]
    truth = run_distributed(command, processes, config, tmp_path, job, references, init=False)[0]
    assert file_of(config, number) == truth and file_of(batched, number) == truth


def test_clips_differ_and_say_what_they_are(made: tuple[int, Path, Path]) -> None:
    _, config, _ = made
    assert len({file_of(config, number) for number in range(1, 7)}) == 6
    jobs, (_, store) = jobs_in(config), queue_of(config)
    assert [jobs[number].result["frames"] for number in (1, 3, 4)] == [5, 1, 9]
    assert all((job.result["width"], job.result["height"]) == (32, 24) for job in jobs.values())
    assert all(job.progress == 100 and job.attempt == 1 and job.started_at for job in jobs.values())
    for job in jobs.values():
        assert store.video(job.id, "webp").stat().st_size and store.video(job.id, "jpg").stat().st_size
    assert not [path for path in store.videos.iterdir() if path.name.startswith(".")]
