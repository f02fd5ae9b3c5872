"""The service as people start it, with a model on two processes and the client library that such services have."""

import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.dist.test_adapter_swap import write_adapters
from tests.service_process import WholeService

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]
WEIGHTS, PROMPT = "opensora/pretrained/shapes", "a red circle moves left on a gray background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    adapters = write_adapters(folder)
    listed = ", ".join(f"{name}: {path}" for name, path in adapters.items())
    config = folder / "serve.yaml"
    config.write_text(
        f"models: {{shapes: {{sample: configs/sample/shapes.yaml, loras: {{{listed}}}}}}}\nout: {folder}/out\n"
    )
    service = WholeService(config, folder / "log", f"weights={WEIGHTS}", "quota.free_gib=0")
    with openai.OpenAI(base_url=f"http{service.address}/v1", api_key="none", timeout=120) as made:
        yield made
    service.process.terminate()
    assert service.process.wait(120) == 0


def made(client: openai.OpenAI, **asked: Any) -> tuple[Any, bytes]:
    """The finished job, and its file."""
    more = {name: asked.pop(name) for name in ("seed", "num_steps", "lora") if name in asked}
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body=more, **asked)
    assert video.status == "completed", video
    return video, client.videos.download_content(video.id).read()


def by_command(folder: Path, *words: str) -> bytes:
    """The file that the sampling command writes, on two processes as well."""
    told = [f"save_dir={folder}", f"weights={WEIGHTS}", "--prompt", PROMPT, *words]
    command = ["bash", "launch/torchrun.sh", "2", "scripts/diffusion/inference.py", "configs/sample/shapes.yaml", *told]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ)
    (file,) = folder.rglob("*.mp4")
    return file.read_bytes()


def test_a_clip_is_the_commands(client: openai.OpenAI, tmp_path: Path) -> None:
    _, file = made(client, seconds="1.125", size="32x32", seed=7, num_steps=6)
    assert file == by_command(tmp_path, "sampling.seed=7", "sampling.num_steps=6")


def test_a_clip_with_adapters_is_the_commands(client: openai.OpenAI, folder: Path, tmp_path: Path) -> None:
    """And the next one, without any, is as if there had been none."""
    name, path = next(iter(write_adapters(folder).items()))
    without = made(client, seed=7, num_steps=6)[1]
    adapted = made(client, seed=7, num_steps=6, lora=name)[1]
    assert adapted != without == made(client, seed=7, num_steps=6)[1]
    assert adapted == by_command(tmp_path, "sampling.seed=7", "sampling.num_steps=6", f"lora={path}")


def test_all_calls(client: openai.OpenAI) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture, "PNG")
    first, _ = made(client, num_steps=2, input_reference=("first.png", picture.getvalue(), "image/png"))
    again = client.videos.remix(first.id, prompt="a blue square moves up on a gray background")
    again = client.videos.poll(again.id)
    assert again.status == "completed" and again.remixed_from_video_id == first.id and again.size == first.size
    assert client.videos.download_content(first.id, variant="thumbnail").read()[8:12] == b"WEBP"
    ids = [video.id for video in client.videos.list(limit=2)]  # page by page
    assert {first.id, again.id} <= set(ids) and len(ids) == len(set(ids)) >= 2
    assert client.videos.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(first.id)
    with pytest.raises(openai.UnprocessableEntityError):
        client.videos.create(prompt=PROMPT, extra_body={"num_frames": 8})
    with pytest.raises(openai.BadRequestError, match="did you mean seed"):
        client.videos.create(prompt=PROMPT, extra_body={"sede": 1})
