"""Requests that mean harm, or are broken, over plain sockets: each is refused within seconds, makes no job, and the
service goes on. And many at once, slow ones beside quick ones, and made-up ones by the service's own description.
"""

import base64
import contextlib
import io
import json
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from PIL import Image

from tests import patient_http
from tests.faults.conftest import Tally
from tests.patience import patience
from tests.service_process import ServiceProcess, wait_for

KEY = "key-of-the-hostile-tests"
pytestmark = pytest.mark.timeout(900)
LIMIT_S = 15.0  # for an answer; a machine with nothing else to do takes a fraction of a second
BODY_MIB = 2


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "keys").write_text(KEY)
    limits = (f"quota.body_mib={BODY_MIB}.0", "quota.image_pixels=1000000", "quota.queued_per_key=1000")
    with ServiceProcess(folder, f"keys={folder / 'keys'}", *limits) as running:
        yield running


def request(
    body: bytes = b"",
    kind: str = "application/json",
    *,
    method: str = "POST",
    path: str = "/v1/videos",
    length: int | str | None = None,
    more: str = "",
    key: str = KEY,
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {key}"]
    lines += [f"Content-Type: {kind}"] if kind else []
    lines += [f"Content-Length: {len(body) if length is None else length}"] if length != "" else []
    return ("\r\n".join([*lines, *([more] if more else []), "", ""])).encode("utf-8", "surrogateescape") + body


def asks(**fields: Any) -> bytes:
    return request(json.dumps({"prompt": "a", **fields}).encode())


def form(parts: bytes, boundary: str = "x") -> bytes:
    return request(parts, f"multipart/form-data; boundary={boundary}")


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"


def upload(data: bytes, filename: str = "a.png") -> bytes:
    return form(part("prompt", b"a") + part("input_reference", data, filename) + b"--x--\r\n")


def picture(kind: str, size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, pixels: bytes) -> bytes:
    """With whatever its header says."""

    def chunk(name: bytes, data: bytes, limit_s: float = LIMIT_S) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def mp4(size: int, rest: bytes) -> bytes:
    return struct.pack(">I", size) + b"ftypisom\0\0\2\0isom" + rest


PIXELS = zlib.compress(b"\0" * 200_000_000, 9)  # 200 MB of black in 200 KB
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
CHUNKED = "Transfer-Encoding: chunked"
HOSTILE: dict[str, bytes] = {
    # prompts
    "a prompt of 1 MB": asks(prompt="x" * 1_000_000),
    "a prompt of 10 MB": asks(prompt="x" * 10_000_000),
    "NUL in a prompt": asks(prompt="a\0b"),
    "an escape in a prompt": asks(prompt="a\x1b[2J"),
    "half of a pair in a prompt": request(b'{"prompt": "\\ud800"}'),
    "a prompt that is no UTF-8": request(b'{"prompt": "\xff\xfe"}'),
    "a prompt of UTF-16": request('{"prompt": "a"}'.encode("utf-16")),
    "a form that is no UTF-8": form(part("prompt", b"\xff\xfe") + b"--x--\r\n"),
    "a prompt that is a list": asks(prompt=["a"]),
    # numbers
    "a negative seed": asks(seed=-1),
    "NaN": request(b'{"prompt": "a", "guidance": NaN}'),
    "infinity by its exponent": request(b'{"prompt": "a", "guidance": 1e999}'),
    "a number of 10,000 digits": request(b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}"),
    "a seed of 10,000 digits in a form": form(part("prompt", b"a") + part("seed", b"9" * 4000) + b"--x--\r\n"),
    "a billion steps": asks(num_steps=10**9),
    "a size of a million": asks(size="1000000x1000000"),
    "a size beyond the memory": asks(size="16384x16384"),
    "frames without end": asks(num_frames=10**9),
    "a negative length": asks(seconds=-4),
    "frames a second without end": asks(fps=1e300),
    # JSON
    "JSON that ends early": request(b'{"prompt": "a"'),
    "no JSON": request(b"prompt=a"),
    "an empty body": request(b""),
    "JSON that is a list": request(b'["a"]'),
    "JSON as deep as a well": request(b"[" * 100_000 + b"]" * 100_000),
    "an object as deep as a well": request(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a name twice": request(b'{"prompt": "a", "prompt": "b"}'),
    "a field of a prototype": asks(__proto__={"admin": True}),
    "100,000 fields": request(json.dumps({"prompt": "a", **{f"f{n}": n for n in range(100_000)}}).encode()),
    # types and forms
    "no type": request(b'{"prompt": "a"}', ""),
    "another type": request(b"<prompt/>", "application/xml"),
    "a pickle": request(b"\x80\x04N.", "application/octet-stream"),
    "a form without its boundary": request(part("prompt", b"a"), "multipart/form-data"),
    "a form with another boundary": form(part("prompt", b"a") + b"--x--\r\n", "y"),
    "a boundary of 10,000 letters": form(b"", "y" * 10_000),
    "a form that ends early": form(part("prompt", b"a")),
    "a part without a name": form(b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"),
    "a part of 100,000 headers": form(b"--x\r\n" + b"A: b\r\n" * 100_000 + b"\r\n--x--\r\n"),
    "10,000 parts": form(part("prompt", b"a") * 10_000 + b"--x--\r\n"),
    "100 files": form(part("input_reference", b"a", "a.png") * 100 + b"--x--\r\n"),
    "a file in another field": form(part("prompt", b"a") + part("output", b"a", "a") + b"--x--\r\n"),
    # paths and addresses
    "a folder to write to": asks(output_path="/etc"),
    "a model that is a path": asks(model="../../../etc/passwd"),
    "an adapter that is a path": asks(lora="/etc/passwd"),
    "a path as a picture": asks(input_reference="/etc/passwd"),
    "an address of a file": asks(input_reference={"image_url": "file:///etc/passwd"}),
    "an address of this network": asks(input_reference={"image_url": "http://169.254.169.254/latest/meta-data"}),
    "a data URL of HTML": asks(input_reference={"image_url": "data:text/html;base64,PGI+"}),
    "a data URL that is none": asks(input_reference={"image_url": "data:image/png;base64,%%%"}),
    "a way up to a file": request(method="GET", path="/page/..%2f..%2f..%2fetc%2fpasswd", length=""),
    "a way up in an id": request(method="GET", path="/v1/videos/..%2f..%2fqueue.sqlite/content", length=""),
    "a way up, plain": request(method="GET", path="/page/../../../../etc/passwd", length=""),
    "NUL in a path": request(method="GET", path="/v1/videos/a%00b", length=""),
    "a path of 60 KB": request(method="GET", path="/" + "a" * 60_000, length=""),
    "headers by an id": request(method="GET", path="/v1/videos/a%0d%0aSet-Cookie:%20x=1", length=""),
    # pictures and clips
    "SVG": upload(SVG),
    "SVG called PNG": upload(SVG, "../../a.png"),
    "text": upload(b"hello"),
    "no bytes": upload(b""),
    "a bomb of pixels": upload(png(20_000, 20_000, PIXELS)),
    "a header of 2^31 pixels": upload(png(2**31 - 1, 2**31 - 1, PIXELS[:1000])),
    "more pixels than are allowed": upload(picture("PNG", (1200, 1200))),
    "half a PNG": upload(picture("PNG", (300, 300))[:100]),
    "half a JPEG": upload(picture("JPEG", (300, 300))[:300]),
    "a GIF": upload(picture("GIF")),
    "a TIFF": upload(picture("TIFF")),
    "PostScript": upload(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run"),
    "a zip behind a head of PNG": upload(b"\x89PNG\r\n\x1a\nPK\x03\x04" + b"\0" * 100),
    "a list of clips": upload(b"ffconcat version 1.0\nfile /etc/passwd", "a.mp4"),
    "a clip of nothing": upload(mp4(20, b""), "a.mp4"),
    "a clip of noise": upload(mp4(20, bytes(range(256)) * 100), "a.mp4"),
    "a picture for a kind of clips": asks(
        cond_type="v2v_head",
        input_reference={"image_url": "data:image/png;base64," + base64.b64encode(picture("PNG")).decode()},
    ),
    # keys, pages, methods
    "no key": request(b'{"prompt": "a"}', key=""),
    "another key": request(b'{"prompt": "a"}', key="x" * 5000),
    "a key in the address": request(method="GET", path=f"/v1/videos?key={KEY}", key="", length=""),
    "a form of another page": request(part("prompt", b"a") + b"--x--\r\n", "multipart/form-data; boundary=x",
                                      more="Origin: https://evil.example"),
    "a page without an address": request(b'{"prompt": "a"}', more="Origin: null"),
    "another method": request(method="PUT", length=0),
    "a method of its own": request(method="BREW", length=0),
    "an upgrade": request(method="GET", path="/v1/videos/x", length="", more="Connection: upgrade\r\nUpgrade: x"),
    # lengths
    "a body beyond the limit": request(b'{"prompt": "' + b"x" * (3 << 20) + b'"}'),
    "a body that is announced and never comes": request(b"", length=10**12),
    "pieces beyond the limit": request(
        b"".join(b"10000\r\n" + b"x" * 65536 + b"\r\n" for _ in range(64)) + b"0\r\n\r\n", length="", more=CHUNKED
    ),
    "a negative length of the body": request(b"{}", length=-1),
    "a length in words": request(b"{}", length="many"),
    "two lengths": request(b"{}", more="Content-Length: 5"),
    "length and pieces": request(b"0\r\n\r\n", length=99999, more=CHUNKED),
    "pieces of no size": request(b"zz\r\nabc\r\n0\r\n\r\n", length="", more=CHUNKED),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "HTTP of a hundred years": b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
    "HTTP of a hundred years, with a job": request(b'{"prompt": "a"}').replace(b"HTTP/1.1", b"HTTP/2.7"),
    "a header without end": b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 200_000,
    "a header of two lines": request(b"{}", more="X: a\r\n b: c\r\nY\r\n"),
    "no host": b"GET /v1/videos HTTP/1.1\r\n\r\n",
    "an Idempotency-Key of control characters": request(b'{"prompt": "a"}', more="Idempotency-Key: \x7f\x01"),
    "an Idempotency-Key of 1000 letters": request(b'{"prompt": "a"}', more="Idempotency-Key: " + "k" * 1000),
}  # fmt: skip


def send(service: ServiceProcess, data: bytes, limit_s: float = LIMIT_S) -> bytes:
    """The answer until the connection is closed or has sent what it says; b"": closed without one."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=patience(limit_s)) as open_socket:
        with contextlib.suppress(ConnectionError, TimeoutError):  # it may answer without reading the rest
            open_socket.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while not _is_whole(answer) and (piece := open_socket.recv(65536)):
                answer += piece
        return answer


def _is_whole(answer: bytes) -> bool:
    head, border, body = answer.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    return bool(border) and bool(lengths) and len(body) >= int(lengths[0])


def jobs(service: ServiceProcess) -> int:
    text = patient_http.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return sum(int(line.split()[-1]) for line in text.splitlines() if line.startswith("opensora_jobs{"))


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(service: ServiceProcess, tally: Tally, case: str) -> None:
    before, began = jobs(service), time.monotonic()
    answer = send(service, HOSTILE[case])
    assert time.monotonic() - began < patience(LIMIT_S)
    if answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 4"), head[:200]
        assert json.loads(body)["error"]["message"] and b"Set-Cookie" not in head and b"root:" not in body
    assert patient_http.get(f"{service.url}/healthz", timeout=patience(LIMIT_S)).status_code == 200
    assert jobs(service) == before
    tally("hostile requests of the service: refused, no job, service lives", 1, 1)


def test_no_request_was_a_mistake_of_ours(service: ServiceProcess) -> None:
    """Of all of the above: no 5xx, nothing left of their files."""
    text = patient_http.get(f"{service.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert "opensora_mistakes_total 0" in text and 'status="5' not in text
    assert not list((service.out / "references").iterdir())
    assert "Traceback" not in service.log() and KEY not in service.log()
    assert all(len(line) < 400 for line in service.lines)


@pytest.mark.parametrize(
    "prompt", ["שלום ‮cat", "🎬👩‍🚀🏽", "x" * 32_000, "a\r\nSet-Cookie: x=1", "'; DROP TABLE jobs; --", "{{7*7}}"]
)
def test_odd_prompts_are_prompts(service: ServiceProcess, prompt: str) -> None:
    answer = patient_http.post(
        f"{service.url}/v1/videos",
        json={"prompt": prompt},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=patience(60),
    )
    assert answer.status_code == 200 and answer.json()["prompt"] == prompt and "set-cookie" not in answer.headers


def test_a_picture_that_is_a_page_too_becomes_pixels(service: ServiceProcess) -> None:
    data = picture("PNG") + b"<script>alert(1)</script>"
    told = json.loads(send(service, upload(data)).partition(b"\r\n\r\n")[2])
    assert b"script" not in (service.out / "references" / f"{told['id']}-0.png").read_bytes()


SLOW: dict[str, Callable[[socket.socket], None]] = {
    "headers, a letter at a time": lambda one: one.sendall(b"X"),
    "a body, a letter at a time": lambda one: one.sendall(b" "),
    "nothing at all": lambda one: None,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_slow_clients_are_cut_off_and_hold_up_nobody(service: ServiceProcess, case: str) -> None:
    begins = {
        "headers, a letter at a time": b"GET / HTTP/1.1\r\n",
        "a body, a letter at a time": request(b"", length=9999),
    }
    sockets = [socket.create_connection(("127.0.0.1", service.port), timeout=patience(1)) for _ in range(50)]
    for one in sockets:
        one.sendall(begins.get(case, b""))

    def closed(one: socket.socket) -> bool:
        try:
            SLOW[case](one)
            one.settimeout(0.001)
            return one.recv(65536) == b""
        except (BlockingIOError, TimeoutError):
            return False
        except OSError:
            return True

    def all_closed() -> bool:
        began = time.monotonic()
        assert patient_http.get(f"{service.url}/healthz", timeout=patience(LIMIT_S)).status_code == 200
        assert time.monotonic() - began < patience(LIMIT_S)
        sockets[:] = [one for one in sockets if not closed(one)]
        time.sleep(0.5)
        return not sockets

    wait_for(all_closed, "end of the slow ones", 90)


def test_many_at_once(service: ServiceProcess, tally: Tally) -> None:
    """A hundred clients that create, look and delete; every call is answered."""
    headers = {"Authorization": f"Bearer {KEY}"}

    def client(number: int) -> bool:
        with httpx.Client(base_url=service.url, headers=headers, timeout=patience(100)) as http:
            id = http.post("/v1/videos", json={"prompt": f"number {number}"}).json()["id"]
            looked = [http.get(f"/v1/videos/{id}").status_code for _ in range(3)]
            return looked == [200] * 3 and http.delete(f"/v1/videos/{id}").json()["deleted"] is True

    with ThreadPoolExecutor(100) as pool:
        answered = list(pool.map(client, range(100)))
    tally("clients of the service at once: every call answered", sum(answered), 100)
    assert all(answered)


def test_large_bodies_at_once_stay_within_the_budget(service: ServiceProcess) -> None:
    """Each is refused or answered, and afterwards there is room again."""
    body = request(b'{"prompt": "' + b"x" * ((BODY_MIB << 20) - 100) + b'"}')
    with ThreadPoolExecutor(40) as pool:
        statuses = {answer[9:12] for answer in pool.map(lambda _: send(service, body, 60), range(40))}
    assert statuses <= {b"400", b"503"} and b"400" in statuses
    assert send(service, body)[9:12] == b"400"


def test_a_client_that_leaves(service: ServiceProcess) -> None:
    """In the middle of its body, of an answer, of a stream of events."""
    told = json.loads(send(service, asks(prompt="x", num_steps=2)).partition(b"\r\n\r\n")[2])
    for data in (
        request(b"{", length=500),
        request(method="GET", path=f"/v1/videos/{told['id']}/events", length=""),
        request(method="GET", path=f"/v1/videos/{told['id']}/content", length=""),
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=patience(LIMIT_S)) as one:
            one.sendall(data)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
    headers = {"Authorization": f"Bearer {KEY}"}

    def rest() -> bool:
        return "opensora_requests_open 1\n" in patient_http.get(f"{service.url}/metrics", headers=headers).text

    wait_for(rest, "end of what was left")
    assert "opensora_mistakes_total 0" in patient_http.get(f"{service.url}/metrics", headers=headers).text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_made_up_requests(tmp_path: Path, tally: Tally) -> None:
    """By the description itself, good ones and bad ones: no 5xx, and every answer is one that the description has."""
    with ServiceProcess(tmp_path, "quota.queued=1000000", "quota.queued_per_key=1000000") as own:
        answered: Counter[tuple[str, int]] = Counter()
        for found in schemathesis.openapi.from_url(f"{own.url}/openapi.json").get_all_operations():
            operation = found.ok()
            if not operation.path.endswith(NOT_TRIED):
                try_out(operation, own.url, answered)
        assert own.is_alive() and "opensora_mistakes_total 0" in patient_http.get(f"{own.url}/metrics").text
        for call, status in (
            ("post /v1/videos", 200), ("post /v1/videos", 400), ("delete /v1/videos/{video_id}", 200),
            ("delete /v1/videos/{video_id}", 404), ("post /v1/videos/{video_id}/remix", 200),
        ):  # fmt: skip
            assert answered[call, status], (call, status)
        tally("made-up requests of the service: answered as described", sum(answered.values()), sum(answered.values()))


NOT_TRIED = ("/events", "/edits", "/extensions", "/characters")  # takes as long as a job; 501


def try_out(operation: Any, url: str, answered: Counter[tuple[str, int]]) -> None:
    """Sixty requests of one call, every other one of a job that there is."""
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import checks

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        if "video_id" in (case.path_parameters or {}) and sum(answered.values()) % 2:
            case.path_parameters["video_id"] = patient_http.post(f"{url}/v1/videos", json={"prompt": "a"}).json()["id"]
        answer = case.call_and_validate(
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ]
        )
        answered[f"{operation.method} {operation.path}", answer.status_code] += 1

    check()
