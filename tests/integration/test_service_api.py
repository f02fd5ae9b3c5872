"""The API of the service over the network: the client library that such services have, and plain HTTP."""

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests import patient_http
from tests.conftest import ROOT
from tests.patience import patience
from tests.service_process import ServiceProcess, wait_for
from tests.stand_in_worker import FAILS, SLOW

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
    pytest.mark.timeout(900),
]

KEYS = ("first-key-of-a-test", "other-key-of-a-test", "third-key-of-a-test priority=0")
FINAL = ("completed", "failed")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "keys").write_text("# of tests\n" + "\n".join(KEYS) + "\n")
    with ServiceProcess(folder, f"keys={folder / 'keys'}", "quota.queued_per_key=4") as running:
        yield running


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Any]:
    with openai.OpenAI(api_key=KEYS[0], base_url=f"{service.url}/v1", timeout=patience(60)) as made:
        yield made


@pytest.fixture
def http(service: ServiceProcess) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=patience(60)) as made:
        yield made


def picture(width: int = 40, height: int = 24, kind: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def ended(http: httpx.Client, id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        told = http.get(f"/v1/videos/{id}").json()
        return told if told["status"] in FINAL else None

    return wait_for(look, "end of the job")


def made(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """A job that has ended."""
    answer = http.post("/v1/videos", json={"prompt": "a cat", **fields})
    assert answer.status_code == 200, answer.text
    return ended(http, answer.json()["id"])


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"} and told["message"]
    return told


# The client library, unchanged


def test_create_and_poll(client: Any) -> None:
    video = client.videos.create_and_poll(prompt="a cat", model="toy", seconds="1", size="64x32")
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.size, video.seconds, video.model, video.prompt) == ("64x32", "1.125", "toy", "a cat")
    assert video.completed_at >= video.created_at


def test_with_a_reference_and_more_fields(client: Any, service: ServiceProcess) -> None:
    more = {
        "seed": 5,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "cache": {"kind": "first_block"},
        "shift": False,
    }
    file = ("../../evil.png", io.BytesIO(picture(kind="WEBP")), "image/webp")
    video = client.videos.create_and_poll(prompt="a dog", input_reference=file, extra_body=more)
    assert video.status == "completed"
    told = video.x["request"]
    assert (told["seed"], told["num_steps"], told["guidance"], told["cond_type"]) == (5, 3, 1.5, "i2v_head")
    assert told["cache"]["kind"] == "first_block" and told["shift"] is False
    (kept,) = [path for path in (service.out / "references").iterdir() if video.id in path.name]
    assert kept.name == f"{video.id}-0.png"
    assert np.array_equal(np.asarray(Image.open(kept)), np.asarray(Image.open(io.BytesIO(picture(kind="WEBP")))))


def test_download(client: Any) -> None:
    video = client.videos.create_and_poll(prompt="a cat")
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    assert client.videos.download_content(video.id, variant="thumbnail").read()[8:12] == b"WEBP"
    assert client.videos.download_content(video.id, variant="spritesheet").read()[:2] == b"\xff\xd8"


def test_pages(client: Any) -> None:
    ids = [client.videos.create_and_poll(prompt=f"number {k}").id for k in range(5)]
    assert [video.id for video in client.videos.list(limit=2)][:5] == ids[::-1]
    first = client.videos.list(limit=3, order="asc")
    assert len(first.data) == 3 and first.has_more and first.last_id == first.data[-1].id
    assert [video.id for video in client.videos.list(limit=3, after=ids[1])] == [
        video.id for video in client.videos.list() if video.id not in ids[1:]
    ]


def test_remix(client: Any) -> None:
    first = client.videos.create_and_poll(
        prompt="a cat", size="64x32", seconds="2", input_reference=("a.png", picture(), "image/png")
    )
    again = client.videos.remix(first.id, prompt="a red cat")
    assert again.remixed_from_video_id == first.id and again.id != first.id and again.prompt == "a red cat"
    assert (again.size, again.seconds) == (first.size, first.seconds)
    assert again.x["request"] == first.x["request"] and again.x["references"] == 1
    client.videos.delete(first.id)
    assert client.videos.poll(again.id).status == "completed"


def test_delete(client: Any) -> None:
    video = client.videos.create_and_poll(prompt="a cat")
    deleted = client.videos.delete(video.id)
    assert deleted.deleted and deleted.id == video.id and deleted.object == "video.deleted"
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            call(video.id)


def test_a_failed_job_ends_the_poll(client: Any) -> None:
    video = client.videos.create_and_poll(prompt=FAILS)
    assert (video.status, video.error.code) == ("failed", "sampling_failed")
    with pytest.raises(openai.ConflictError):
        client.videos.download_content(video.id)


def test_errors_of_the_client(client: Any, service: ServiceProcess) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean seed") as refused:
        client.videos.create(prompt="a", extra_body={"sed": 1})
    assert refused.value.param == "sed" and refused.value.code == "unknown_field"
    with pytest.raises(openai.NotFoundError, match="must be one of toy"):
        client.videos.create(prompt="a", model="sora-2")
    with pytest.raises(openai.UnprocessableEntityError, match="9 or 13"):
        client.videos.create(prompt="a", extra_body={"num_frames": 11})
    with pytest.raises(openai.UnprocessableEntityError, match="GiB"):
        client.videos.create(prompt="a", size="16384x16384")
    with (
        openai.OpenAI(api_key="x" * 20, base_url=f"{service.url}/v1") as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.videos.list()
    for call in (client.videos.edit, client.videos.extend):
        with pytest.raises(openai.InternalServerError, match="not done") as not_done:
            call(prompt="a", video=b"x", **({"seconds": "4"} if call == client.videos.extend else {}))
        assert not_done.value.status_code == 501


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "toy" and model.x["ready"] and model.x["sizes"][0] == "32x32"
    assert client.models.retrieve("toy").id == "toy"


# Plain HTTP


def test_the_object_has_every_key(http: httpx.Client) -> None:
    told = http.post("/v1/videos", json={"prompt": "a cat"})
    assert set(told.json()) == {
        "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt", "size",
        "seconds", "remixed_from_video_id", "error", "x",
    }  # fmt: skip
    assert 100 <= int(told.headers["openai-poll-after-ms"]) <= 5000
    ended(http, told.json()["id"])


def test_a_seed_and_the_same_again(http: httpx.Client) -> None:
    first = made(http)
    again = made(http, **first["x"]["request"])
    assert again["x"]["seed"] == first["x"]["seed"] and again["x"]["request"] == first["x"]["request"]
    contents = [http.get(f"/v1/videos/{one['id']}/content").content for one in (first, again)]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_reference_as_a_data_url(http: httpx.Client, kind: str) -> None:
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(picture(kind=kind)).decode()}"
    for reference in ({"image_url": url}, [{"image_url": {"url": url}}]):
        told = made(http, input_reference=reference)
        assert told["status"] == "completed" and told["x"]["request"]["cond_type"] == "i2v_head"


def test_a_picture_lies_in_the_store_as_it_is_seen(http: httpx.Client, service: ServiceProcess) -> None:
    exif = Image.Exif()
    exif[274], exif[270] = 6, "where I live"  # turned by 90 degrees
    data = picture(40, 24, "PNG", exif=exif)
    told = http.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": data}).json()
    path = service.out / "references" / f"{told['id']}-0.png"
    with Image.open(path) as kept:
        assert kept.size == (24, 40) and kept.mode == "RGB" and not kept.getexif()
        assert np.array_equal(np.asarray(kept), np.rot90(np.asarray(Image.open(io.BytesIO(data))), -1))
    assert b"where I live" not in path.read_bytes()
    ended(http, told["id"])


def test_a_clip_as_a_reference(http: httpx.Client) -> None:
    clip = http.get(f"/v1/videos/{made(http)['id']}/content").content
    told = http.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": ("x.mp4", clip)}).json()
    assert told["x"]["request"]["cond_type"] == "v2v_head"
    ended(http, told["id"])
    damaged = error(
        http.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": clip[: len(clip) // 3]}), 422
    )
    assert damaged["param"] == "input_reference" and "PNG, JPEG, WebP" in damaged["message"]


def test_an_idempotency_key(http: httpx.Client) -> None:
    once = {"Idempotency-Key": "k1"}

    def post(**form: str) -> httpx.Response:
        files = {"input_reference": picture()}
        return http.post("/v1/videos", data={"prompt": "a", **form}, files=files, headers=once)

    first, again = post(), post()  # the borders of the two forms differ
    assert first.json()["id"] == again.json()["id"]
    error(post(seed="4"), 409)
    other = patient_http.post(f"{http.base_url}/v1/videos", json={"prompt": "b"}, headers=once | _key(1))
    assert other.status_code == 200 and other.json()["id"] != first.json()["id"]
    ended(http, first.json()["id"])


def _key(number: int) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[number].split()[0]}"}


def test_jobs_of_another_key_are_out_of_sight(http: httpx.Client) -> None:
    id = made(http)["id"]
    theirs = httpx.Client(base_url=http.base_url, headers=_key(1))
    for answer in (
        theirs.get(f"/v1/videos/{id}"),
        theirs.get(f"/v1/videos/{id}/content"),
        theirs.get(f"/v1/videos/{id}/events"),
        theirs.post(f"/v1/videos/{id}/cancel"),
        theirs.post(f"/v1/videos/{id}/remix", json={"prompt": "b"}),
        theirs.delete(f"/v1/videos/{id}"),
        theirs.get("/v1/videos", params={"after": id}),
    ):
        error(answer, 404)
    assert id not in theirs.get("/v1/videos").text
    assert http.get(f"/v1/videos/{id}").status_code == 200


def test_a_key_with_a_limit_of_priority(http: httpx.Client) -> None:
    limited = {"headers": _key(2), "url": f"{http.base_url}/v1/videos"}
    assert error(patient_http.post(json={"prompt": "a", "priority": 1}, **limited), 403)["param"] == "priority"
    assert patient_http.post(json={"prompt": "a", "priority": -1}, **limited).status_code == 200


@pytest.mark.parametrize("value", ["", "Bearer", "Basic " + KEYS[0], KEYS[0], "Bearer x" + KEYS[0], "Bearer é"])
def test_no_key(service: ServiceProcess, value: str) -> None:
    headers = {"Authorization": value.encode("latin-1")} if value else {}
    for path in ("/v1/videos", "/v1/models", "/metrics", "/v1/videos/x"):
        answer = patient_http.get(f"{service.url}{path}", headers=headers)
        assert error(answer, 401)["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/favicon.ico"):
        assert patient_http.get(f"{service.url}{path}").status_code == 200


def test_ranges_and_etags(http: httpx.Client) -> None:
    path = f"/v1/videos/{made(http)['id']}/content"
    whole = http.get(path)
    size, tag = len(whole.content), whole.headers["etag"]
    assert whole.headers["content-type"] == "video/mp4" and whole.headers["accept-ranges"] == "bytes"

    def part(value: str, **more: str) -> httpx.Response:
        return http.get(path, headers={"Range": value, **{k.replace("_", "-"): v for k, v in more.items()}})

    for value, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=10-", 10, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=5-{size * 9}", 5, size),
    ):
        answer = part(value)
        assert answer.status_code == 206 and answer.content == whole.content[start:stop]
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    for value in ("bytes=5-3", "lines=1-2", "bytes=-", "bytes=0-1,3-4", "bytes=" + "0-," * 5000, "bytes=0-0" * 99):
        assert part(value).status_code == 200
    beyond = part(f"bytes={size}-")
    assert error(beyond, 416)["code"] == "invalid_range" and beyond.headers["content-range"] == f"bytes */{size}"
    assert http.get(path, headers={"If-None-Match": tag}).status_code == 304
    assert part("bytes=0-0", If_Range=tag).status_code == 206
    assert part("bytes=0-0", If_Range='"other"').status_code == 200


def test_nothing_is_sent_before_it_is_whole(http: httpx.Client) -> None:
    id = http.post("/v1/videos", json={"prompt": SLOW}).json()["id"]
    seen = set()

    def look() -> bool:
        answer = http.get(f"/v1/videos/{id}/content")
        seen.add(answer.status_code)
        return answer.status_code == 200

    wait_for(look, "content")
    assert seen == {409, 200}


def events_of(text: str) -> list[dict[str, str]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]


def test_events(http: httpx.Client) -> None:
    id = http.post("/v1/videos", json={"prompt": SLOW, "num_steps": 8}).json()["id"]
    retry, *events = events_of(http.get(f"/v1/videos/{id}/events").text)
    assert "retry" in retry and {event["event"] for event in events} == {"video"}
    told = [json.loads(event["data"]) for event in events]
    assert told[-1]["status"] == "completed" and len(told) > 3
    progress = [one["progress"] for one in told]
    assert progress == sorted(progress) and len({event["id"] for event in events}) == len(events)
    last = {"Last-Event-ID": events[-1]["id"]}
    assert http.get(f"/v1/videos/{id}/events", headers=last).status_code == 204
    _, again = events_of(http.get(f"/v1/videos/{id}/events", headers={"Last-Event-ID": events[0]["id"]}).text)
    assert again["id"] == events[-1]["id"]


def test_events_of_a_job_that_is_deleted(http: httpx.Client) -> None:
    id = http.post("/v1/videos", json={"prompt": SLOW, "num_steps": 100}).json()["id"]
    with http.stream("GET", f"/v1/videos/{id}/events") as stream:
        lines = stream.iter_lines()
        assert any(line.startswith("id:") for line in lines)
        assert http.delete(f"/v1/videos/{id}").json()["deleted"]
        assert any(line == "event: deleted" for line in lines)


def test_cancel(http: httpx.Client) -> None:
    running, waiting = (http.post("/v1/videos", json={"prompt": SLOW, "num_steps": 400}).json()["id"] for _ in range(2))
    wait_for(lambda: http.get(f"/v1/videos/{running}").json()["status"] == "in_progress", "first step")
    told = http.post(f"/v1/videos/{waiting}/cancel").json()
    assert (told["status"], told["error"]["code"]) == ("failed", "cancelled")
    assert http.post(f"/v1/videos/{running}/cancel").status_code == 200
    told = ended(http, running)
    assert (told["status"], told["error"]["code"]) == ("failed", "cancelled")
    assert http.post(f"/v1/videos/{running}/cancel").status_code == 200  # as it is
    assert error(http.post(f"/v1/videos/{made(http)['id']}/cancel"), 409)["code"] == "already_finished"


def test_a_running_job_is_deleted_when_it_has_ended(http: httpx.Client, service: ServiceProcess) -> None:
    files = {"input_reference": picture()}
    id = http.post("/v1/videos", data={"prompt": SLOW, "num_steps": "400"}, files=files).json()["id"]
    wait_for(lambda: http.get(f"/v1/videos/{id}").json()["status"] == "in_progress", "first step")
    assert http.delete(f"/v1/videos/{id}").json() == {"id": id, "object": "video.deleted", "deleted": True}
    error(http.get(f"/v1/videos/{id}"), 404)
    assert id not in http.get("/v1/videos").text
    out = service.out
    wait_for(lambda: not [path for path in out.rglob("*") if id in path.name], "removal of its files")


def test_too_many_jobs(http: httpx.Client) -> None:
    ids = [http.post("/v1/videos", json={"prompt": SLOW, "num_steps": 400}).json()["id"]]
    try:
        wait_for(lambda: http.get(f"/v1/videos/{ids[0]}").json()["status"] == "in_progress", "first step")
        for _ in range(4):
            ids.append(http.post("/v1/videos", json={"prompt": SLOW, "num_steps": 400}).json()["id"])
        answer = http.post("/v1/videos", json={"prompt": "one too many"})
        assert error(answer, 429)["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) >= 1
        told = [http.get(f"/v1/videos/{id}").json() for id in ids]
        assert [one["x"]["queue_position"] for one in told] == [None, 0, 1, 2, 3]
        assert {one["status"] for one in told[1:]} == {"queued"}
        waits = [one["x"]["eta_s"] for one in told[1:]]
        assert waits == sorted(waits) and waits[-1] > waits[0] > 0
    finally:
        for id in ids:
            http.delete(f"/v1/videos/{id}")


def test_a_forecast(http: httpx.Client) -> None:
    told = http.post("/v1/videos/forecast", json={"size": "64x32", "num_frames": 13}).json()
    more = http.post("/v1/videos/forecast", data={"size": "64x64", "num_frames": "33", "num_steps": "8"}).json()
    assert more["takes_s"] > told["takes_s"] > 0 and more["peak_gib"] > told["peak_gib"]
    assert (told["fits"], told["size"], told["seconds"], told["steps"]) == (True, "64x32", "1.625", 4)
    assert not http.post("/v1/videos/forecast", json={"size": "16384x16384"}).json()["fits"]
    assert error(http.post("/v1/videos/forecast", json={"num_frames": 12}), 422)["param"] == "num_frames"


def test_pages_of_a_list(http: httpx.Client) -> None:
    made(http), made(http)
    assert http.get("/v1/videos", params={"limit": 0}).json()["data"] == []
    for wrong in ({"limit": -1}, {"limit": 101}, {"limit": "x"}, {"order": "up"}):
        assert error(http.get("/v1/videos", params=wrong), 400)["param"] == next(iter(wrong))
    assert error(http.get("/v1/videos", params={"after": "x"}), 404)["param"] == "after"


def test_figures(http: httpx.Client) -> None:
    made(http)
    http.get("/v1/videos/nobody"), http.get("/a/path/of/somebody"), http.request("BREW", "/")
    text = http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['opensora_jobs{model="toy",state="completed"}']) >= 1
    assert float(values['opensora_step_seconds{worker="0"}']) > 0 and values["opensora_workers_ready"] == "1"
    assert float(values['opensora_requests_total{method="POST",route="/v1/videos",status="200"}']) >= 1
    assert values["opensora_mistakes_total"] == "0"
    assert "nobody" not in text and "somebody" not in text and "BREW" not in text


def test_the_description_is_of_what_is_there(http: httpx.Client) -> None:
    told = http.get("/openapi.json").json()
    form = told["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"prompt", "seed", "num_inference_steps", "flow_shift", "cache"} <= form["properties"].keys()
    assert form["properties"]["num_steps"]["maximum"] == 10_000
    assert {"200", "401", "409", "413", "422", "429", "507"} <= told["paths"]["/v1/videos"]["post"]["responses"].keys()
    assert set(told["components"]["schemas"]["Video"]["required"]) >= {"id", "status", "x"}
    page = http.get("/docs").text
    assert all(f"{path}</code>" in page for path in told["paths"]) and "flow_shift" in page and "<script" not in page


def test_every_answer_has_its_headers(http: httpx.Client) -> None:
    for path in ("/", "/v1/videos", "/nothing", "/docs", "/favicon.ico"):
        headers = http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_the_log_holds_no_prompts_queries_and_keys(http: httpx.Client, service: ServiceProcess) -> None:
    made(http, prompt="whisperwhisper")
    http.post("/v1/videos", json={"prompt": "whisper\0whisper"})
    http.get("/v1/videos", params={"after": "hiddenhidden"})
    wait_for(lambda: "GET /v1/videos 404" in service.log(), "line")
    assert "whisper" not in service.log() and "hidden" not in service.log() and KEYS[0] not in service.log()
    assert "Traceback" not in service.log()


# Processes of their own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_streams_and_answers(tmp_path: Path, number: signal.Signals) -> None:
    with ServiceProcess(tmp_path) as own:
        id = patient_http.post(f"{own.url}/v1/videos", json={"prompt": SLOW, "num_steps": 10_000}).json()["id"]
        text: list[str] = []
        thread = threading.Thread(target=lambda: text.append(patient_http.get(f"{own.url}/v1/videos/{id}/events").text))
        thread.start()
        wait_for(lambda: patient_http.get(f"{own.url}/v1/videos/{id}").json()["status"] == "in_progress", "first step")
        wait_for(lambda: b"requests_open 2" in patient_http.get(f"{own.url}/metrics").content, "open stream")
        own.process.send_signal(number)
        assert own.process.wait(60) == 0
        thread.join(60)
        assert text and events_of(text[0])  # to its end, not a broken connection
        assert "Traceback" not in own.log()


def test_a_killed_web_process_has_forgotten_nothing(tmp_path: Path) -> None:
    once = {"Idempotency-Key": "once"}
    with ServiceProcess(tmp_path) as own:
        asked = {"prompt": SLOW, "num_steps": 60}
        id = patient_http.post(f"{own.url}/v1/videos", json=asked, headers=once).json()["id"]
        wait_for(lambda: patient_http.get(f"{own.url}/v1/videos/{id}").json()["x"]["step"] >= 2, "second step")
        with httpx.stream("GET", f"{own.url}/v1/videos/{id}/events", timeout=patience(60)) as stream:
            seen = next(line for line in stream.iter_lines() if line.startswith("id:"))
            own.restart(signal.SIGKILL)
        assert patient_http.post(f"{own.url}/v1/videos", json=asked, headers=once).json()["id"] == id
        headers = {"Last-Event-ID": seen.removeprefix("id: ")}
        _, *events = events_of(patient_http.get(f"{own.url}/v1/videos/{id}/events", headers=headers).text)
        told = [json.loads(event["data"]) for event in events]
        assert told[0]["x"]["step"] >= 2 and told[-1]["status"] == "completed" and told[-1]["x"]["attempt"] == 1
        assert patient_http.get(f"{own.url}/v1/videos/{id}/content").status_code == 200


def test_expiry_and_quota(tmp_path: Path) -> None:
    limits = ("quota.keep_gib=1e-5", "quota.keep_hours=1")
    with ServiceProcess(tmp_path, *limits) as own, httpx.Client(base_url=own.url) as http:
        told = [made(http) for _ in range(3)]
        assert all(3599 <= one["expires_at"] - one["completed_at"] <= 3601 for one in told)
        wait_for(lambda: len(http.get("/v1/videos").json()["data"]) <= 1, "removal of the oldest")
        left = list((tmp_path / "out/videos").iterdir())
        assert sum(path.stat().st_size for path in left) <= 1e-5 * 2**30


def test_a_full_disk(tmp_path: Path) -> None:
    with ServiceProcess(tmp_path, "quota.free_gib=1e9") as own:
        assert error(patient_http.post(f"{own.url}/v1/videos", json={"prompt": "a"}), 507)["code"] == "disk_full"


def test_pages_of_other_addresses(tmp_path: Path) -> None:
    page = "https://pages.example"
    with ServiceProcess(tmp_path, f"origins=[{page}]") as own:

        def post(**headers: str) -> httpx.Response:
            return patient_http.post(f"{own.url}/v1/videos", data={"prompt": "a"}, files={"x": b""}, headers=headers)

        for origin in ("https://evil.example", "null", own.url.replace("http", "https"), f"{own.url}.evil.example"):
            status = 400 if origin.startswith("https://127") else 403
            error(post(Origin=origin), status)
        assert error(post(Origin=own.url), 400)["param"] == "x"
        assert post(Origin=page).headers["access-control-allow-origin"] == page
        error(patient_http.get(f"{own.url}/v1/videos", headers={"Host": "evil.example"}), 403)
        for host in ("localhost", "[::1]", "pages.example"):
            assert patient_http.get(f"{own.url}/v1/videos", headers={"Host": f"{host}:1"}).status_code == 200
        before = patient_http.request(
            "OPTIONS", f"{own.url}/v1/videos", headers={"Origin": page, "Access-Control-Request-Method": "POST"}
        )
        assert before.status_code == 200 and "access-control-allow-credentials" not in before.headers


@pytest.mark.parametrize(
    ("keys", "words"),
    [("short", "16 to 256"), ("", "must hold 1"), ("a key of five words here", "16 to 256"), ("é" * 20, "printable")],
)
def test_a_file_of_keys_that_cannot_be(tmp_path: Path, keys: str, words: str) -> None:
    from opensora.serve.web.auth import Keys
    from opensora.utils.errors import UserError

    (tmp_path / "keys").write_text(keys)
    with pytest.raises(UserError, match=words):
        Keys(tmp_path / "keys")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["port={taken}"], "Address already in use; take another"),
        (["keys=nowhere"], "keys=nowhere: cannot be read"),
        (['origins=["*"]'], "must be as a browser writes it"),
        (["origins=[https://a.example/page]"], "must be as a browser writes it"),
        (["host=0.0.0.0"], "must have keys=FILE"),
        (["queue=redis://a"], "must be empty (SQLite in out), or postgresql://"),
    ],
)
def test_what_the_process_does_not_begin_with(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "serve.yaml").write_text(f"models: {{toy: {{}}}}\nout: {tmp_path / 'out'}\nport: 0\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [word.format(taken=taken.getsockname()[1]) for word in words]
        command = [sys.executable, "-m", "opensora.serve.web", str(tmp_path / "serve.yaml"), *given]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(100))
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: ") and said in ended.stderr


def test_an_idle_connection_stays_open(service: ServiceProcess) -> None:
    """For longer than clients keep one: the second request is on the first one's connection."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=patience(60))
    for pause in (6.0, 0.0):
        connection.request("GET", "/healthz")
        own = connection.sock
        assert connection.getresponse().read() and connection.sock is own is not None
        time.sleep(pause)
    connection.close()
