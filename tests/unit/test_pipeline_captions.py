"""Captions of files, of a server that is slow, refuses, or talks nonsense, and of what was measured."""

import base64
import io
import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.captioning import endpoint as endpoint_module
from data_pipeline.captioning.beside import caption_beside, captions_files
from data_pipeline.captioning.endpoint import CaptionError, Endpoint, EndpointConfig
from data_pipeline.captioning.template import template_caption
from data_pipeline.limits import SourceLimits
from data_pipeline.rows import Row, to_table
from data_pipeline.stages.base import Unit, has_failed
from data_pipeline.stages.captions import CaptionsConfig, CaptionsStage
from opensora.utils.errors import UserError
from opensora.utils.files.video_writer import write_video
from tests.caption_server import CaptionServer, Reply, says

MEASURED = {"luma": 100.0, "camera_motion": "pan left", "motion_score": 3.0}
SOON = time.monotonic() + 10_000


@pytest.fixture
def server() -> Iterator[CaptionServer]:
    found = CaptionServer()
    yield found
    found.stop()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_FIRST_PAUSE_S", 0.001)


def settings(server: CaptionServer, **more: Any) -> EndpointConfig:
    return EndpointConfig(**{"url": server.url, "model": "seer", **more})


def clip(out: Path, name: str, count: int = 16) -> Row:
    """The row of ``cut`` of a clip whose frame i is of grey 8 * i."""
    path = f"media/{name[:2]}/{name}.mp4"
    frames = np.broadcast_to((8 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, 64, 96, 3))
    write_video(out / path, frames, 8.0)
    return {"path": path, "sha256": name, "num_frames": count, "height": 64, "width": 96, "fps": 8.0}


def captions(
    out: Path, rows: list[Row], cfg: CaptionsConfig, before: list[Row | None] | None = None, **beside: str
) -> list[Row]:
    stage = CaptionsStage(cfg, SourceLimits(), str(out), "")
    given: dict[str, list[Row]] = {"cut": rows, "measure": [MEASURED] * len(rows)}
    given["beside"] = [{"text": "", "reason": "no caption", "detail": "none"} | beside]
    found = stage.run(Unit(source="a.mp4", file="a.mp4", rows=given, before=before))
    return to_table(found, stage.columns).to_pylist()


def asks(server: CaptionServer, pauses: list[float] | None = None, **more: Any) -> Any:
    """One caption, with pauses that are noted and not made."""
    with Endpoint(settings(server, **more), sleep=(pauses if pauses is not None else []).append) as endpoint:
        return endpoint.caption([b"jpeg"], SOON)


def test_what_is_asked_and_what_is_noted(
    server: CaptionServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEER_KEY", "sk-secret")
    cfg = CaptionsConfig(kinds=["endpoint"], endpoint=settings(server, key_variable="SEER_KEY", prompt="What is it?"))
    (row,) = captions(tmp_path, [clip(tmp_path, "aa01")], cfg)
    ((headers, body),) = server.asked
    assert headers["Authorization"] == "Bearer sk-secret" and body["path"] == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("seer", 300, 0.0)
    *shown, words = body["messages"][0]["content"]
    assert words == {"type": "text", "text": "What is it?"} and len(shown) == 8
    greys = []
    for one in shown:
        head, _, data = one["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.size == (96, 64)
        greys.append(round(np.asarray(picture).mean() / 8))
    assert greys == [0, 2, 4, 6, 8, 10, 12, 15]
    assert row == {
        "text": "A cat sits.", "caption_source": "endpoint", "caption_error": None, "caption_model": "seer-7b",
        "caption_prompt": "What is it?", "caption_prompt_hash": cfg.endpoint.prompt_hash,
        "prompt_tokens": 100, "tokens": 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(429, b"{}"),
        Reply(500, b"oops"),
        Reply(503, b'{"error": {"message": "loading"}}'),
        Reply(drop=True),
        Reply(200, b"<html>"),
        Reply(200, b"{}"),
        Reply(200, b'{"choices": []}'),
        Reply(200, b"[" * 100_000),
        Reply(200, b"x" * ((1 << 20) + 1)),
        Reply(200, b"\xff\xfe"),
        says(""),
        says(" \n "),
        says(None),
        says(7),
        says([1, "x", {"text": None}]),
        Reply(200, b"[]"),
        Reply(200, b'{"choices": [{"message": "A cat."}]}'),
        says("nan"),
        says("lost \ufffd"),
        says("bell \x07"),
        Reply(200, says("late").body, wait_s=1.5),
    ],
    ids=lambda trouble: repr(trouble)[:60],
)
def test_what_may_pass_is_asked_again(server: CaptionServer, trouble: Reply) -> None:
    server.replies = [trouble, trouble]
    answer = asks(server, timeout_s=0.5 if trouble.wait_s else 30.0)
    assert answer.text == "A cat sits." and len(server.asked) == 3


def test_an_answer_in_parts_and_on_lines_is_one_line(server: CaptionServer) -> None:
    server.replies = [says([{"type": "text", "text": "A cat\n\n"}, {"type": "text", "text": " sits."}], usage=None)]
    answer = asks(server)
    assert (answer.text, answer.prompt_tokens, answer.tokens) == ("A cat sits.", None, None)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 302])
def test_what_will_not_pass_is_asked_once(server: CaptionServer, status: int) -> None:
    server.replies = [Reply(status, b'{"error": {"message": "no such\\nmodel"}}', {"Location": "http://127.0.0.1:9/"})]
    with pytest.raises(CaptionError, match=rf"^HTTP status {status} \(no such model\)$"):
        asks(server)
    assert len(server.asked) == 1


def test_pauses_grow_and_are_never_shorter_than_the_server_asks(server: CaptionServer) -> None:
    server.replies = [Reply(500), Reply(500), Reply(429, headers={"Retry-After": "17"}), Reply(503), Reply(500)]
    pauses: list[float] = []
    asks(server, pauses)
    assert pauses == [1.0, 2.0, 17.0, 8.0, 16.0]
    at = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    server.replies, pauses[:] = (
        [Reply(429, headers={"Retry-After": at}), Reply(429, headers={"Retry-After": "soon"})],
        [],
    )
    asks(server, pauses)
    assert 25 < pauses[0] <= 30 and pauses[1] == 2.0


def test_retries_and_time_have_an_end(server: CaptionServer) -> None:
    server.usual = lambda _: Reply(500, b"down")
    with pytest.raises(CaptionError, match=r"^HTTP status 500 \(down\), after 4 tries$"):
        asks(server, retries=3)
    assert len(server.asked) == 4
    server.usual = lambda _: Reply(429, headers={"Retry-After": "3600"})
    with pytest.raises(CaptionError, match=r"HTTP status 429 .* after 1 try$"):
        asks(server, give_up_s=60)
    server.usual = lambda _: Reply(200, says("late").body, wait_s=5)
    began = time.monotonic()
    with pytest.raises(CaptionError, match=r"no answer within 0\.3 s"):
        asks(server, give_up_s=0.3)
    assert time.monotonic() - began < 4


def test_a_server_that_is_lost_costs_the_next_clips_one_try(server: CaptionServer) -> None:
    server.usual = lambda _: Reply(500)
    with Endpoint(settings(server, retries=3), sleep=lambda _: None) as endpoint:
        for tries in (4, 5, 6):
            with pytest.raises(CaptionError):
                endpoint.caption([b""], SOON)
            assert len(server.asked) == tries
        server.usual = lambda _: says("Back.")
        assert endpoint.caption([b""], SOON).text == "Back."
        server.replies = [Reply(500), Reply(500)]
        assert endpoint.caption([b""], SOON).text == "Back."


def test_nobody_is_there(server: CaptionServer) -> None:
    server.stop()
    with pytest.raises(CaptionError, match=r"^cannot be reached \(ConnectError: .*\), after 2 tries$"):
        asks(server, retries=1)


def test_the_key_is_in_no_row(server: CaptionServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEER_KEY", "sk-secret")
    server.replies = [Reply(401, b'{"error": "Bearer sk-secret is no key"}'), says("You sent sk-secret.")]
    cfg = CaptionsConfig(kinds=["endpoint"], endpoint=settings(server, key_variable="SEER_KEY", concurrency=1))
    rows = captions(tmp_path, [clip(tmp_path, "aa01"), clip(tmp_path, "aa02")], cfg)
    assert "sk-secret" not in json.dumps(rows)
    assert rows[0]["caption_error"] == "endpoint: HTTP status 401 (Bearer *** is no key)" and rows[0]["text"] is None
    monkeypatch.delenv("SEER_KEY")
    with pytest.raises(UserError, match=r"captions\.endpoint\.key_variable=SEER_KEY: the environment has no"):
        CaptionsStage(cfg, SourceLimits(), str(tmp_path), "")


@pytest.mark.usefixtures("hasty")
def test_nothing_is_lost_and_only_what_failed_is_asked_again(server: CaptionServer, tmp_path: Path) -> None:
    clips = [clip(tmp_path, f"aa0{number}") for number in range(6)]
    clips.insert(2, dict.fromkeys(clips[0]))  # one that is not kept
    server.usual = lambda _: Reply(400, b"full") if len(server.asked) % 2 else says(f"Text {len(server.asked)}.")
    cfg = CaptionsConfig(kinds=["endpoint", "template"], endpoint=settings(server, concurrency=1))
    rows = captions(tmp_path, clips, cfg)
    assert len(server.asked) == 6
    assert [row["caption_source"] for row in rows] == [
        "template",
        "endpoint",
        None,
        "template",
        "endpoint",
        "template",
        "endpoint",
    ]
    assert {row["caption_error"] for row in rows} == {None, "endpoint: HTTP status 400 (full)"}
    assert all(row["text"] for row, given in zip(rows, clips, strict=True) if given["path"])
    assert has_failed(CaptionsStage(cfg, SourceLimits(), "", ""), "", to_table(rows, CaptionsStage.columns))
    server.asked.clear()
    server.usual = lambda _: says("Later.")
    known = [None if row["caption_error"] else row for row in rows]  # what --retry leaves of them
    again = captions(tmp_path, clips, cfg, before=known)
    assert len(server.asked) == 3
    assert [row["text"] for row in again] == ["Later.", "Text 2.", None, "Later.", "Text 4.", "Later.", "Text 6."]
    assert not any(row["caption_error"] for row in again)
    assert not has_failed(CaptionsStage(cfg, SourceLimits(), "", ""), "", to_table(again, CaptionsStage.columns))


def test_several_are_asked_at_once_and_no_more(server: CaptionServer, tmp_path: Path) -> None:
    clips = [clip(tmp_path, f"aa{number:02}") for number in range(9)]
    server.usual = lambda body: Reply(200, says(f"{len(body['messages'][0]['content'])}").body, wait_s=0.2)
    rows = captions(tmp_path, clips, CaptionsConfig(kinds=["endpoint"], endpoint=settings(server, concurrency=3)))
    assert 2 <= server.most <= 3 and [row["text"] for row in rows] == ["9"] * 9


def test_how_patiently_is_asked_makes_nothing_anew(server: CaptionServer) -> None:
    def config(**more: Any) -> Any:
        cfg = CaptionsConfig(kinds=["endpoint"], endpoint=settings(server, **more))
        return CaptionsStage(cfg, SourceLimits(), "", "").config

    assert config(retries=9, timeout_s=1, concurrency=2, give_up_s=5, url="http://other/v1") == config()
    assert config(model="other") != config() != config(prompt="Other?") and config(frames=4) != config()


def test_a_file_goes_before_the_others(tmp_path: Path) -> None:
    clips = [clip(tmp_path, "aa01"), clip(tmp_path, "aa02")]
    rows = captions(tmp_path, clips, CaptionsConfig(), text="A dog.", reason="", detail="")
    assert [(row["text"], row["caption_source"]) for row in rows] == [("A dog.", "file")] * 2
    (row, _) = captions(tmp_path, clips, CaptionsConfig())
    assert row["caption_source"] == "template" and row["caption_error"] is None
    (row, _) = captions(tmp_path, clips, CaptionsConfig(), reason="caption too long", detail="a.txt has 9")
    assert row["caption_source"] == "template" and row["caption_error"] == "file: caption too long: a.txt has 9"
    (row, _) = captions(tmp_path, clips, CaptionsConfig(kinds=["file"]))
    assert row["text"] is None and row["caption_error"] == "file: no caption: none"
    (row, _) = captions(tmp_path, clips, CaptionsConfig(kinds=["none"]))
    assert set(row.values()) == {None}


def test_files_beside_a_video(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a", "b", "c", "d", "e"):
        (videos / f"{name}.mp4").touch()
    (tmp_path / "captions.csv").write_text('path,text\nvideos/a.mp4,"Of the table"\n')
    (videos / "b.txt").write_text("Beside it\n")
    (videos / "c.mp4.json").write_text('{"other": 1, "caption": "  Of JSON "}')
    (videos / "d.json").write_text('{"caption": ')
    files = captions_files("", str(videos))
    assert files == (str(tmp_path / "captions.csv"),)
    found = [caption_beside(str(videos / f"{name}.mp4"), files) for name in "abcde"]
    assert [one.text for one in found] == ["Of the table", "Beside it", "Of JSON", "", ""]
    assert [one.reason for one in found] == ["", "", "", "caption cannot be read", "no caption"]
    (tmp_path / "captions.csv").write_text('path,text\nvideos/a.mp4,"Of the new table"\n')
    assert caption_beside(str(videos / "a.mp4"), files).text == "Of the new table"
    with pytest.raises(UserError, match=r"^captions.file=none.csv: no such captions file$"):
        captions_files("none.csv", str(videos))


@pytest.mark.parametrize(
    ("clip", "measured", "wanted"),
    [
        ({}, MEASURED, "A wide video clip of 2.0 seconds. The camera pans left. Some of it moves."),
        (
            {"height": 96, "width": 64, "num_frames": 28},
            {"luma": 20.0, "camera_motion": "static", "motion_score": 0.1},
            "A tall video clip of 3.5 seconds. The camera stands still. Almost nothing moves. The picture is dark.",
        ),
        (
            {"height": 64, "width": 64},
            {"luma": 220.0, "camera_motion": "unheard of", "motion_score": 12.0},
            "A square video clip of 2.0 seconds. A lot moves. The picture is bright.",
        ),
        ({}, dict.fromkeys(MEASURED), "A wide video clip of 2.0 seconds."),
    ],
)
def test_a_template_says_what_was_measured(clip: Row, measured: Row, wanted: str) -> None:
    assert template_caption({"height": 64, "width": 96, "num_frames": 16, "fps": 8.0} | clip, measured) == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kinds": []}, "kinds=[]: must be some of file, endpoint, template, none, each once"),
        ({"kinds": ["file", "film"]}, "kinds=['file', 'film']: must be some of"),
        ({"kinds": ["template", "file"]}, "kinds=['template', 'file']: template and none must be the last"),
        ({"kinds": ["endpoint"]}, "endpoint.url='': must be given, as kinds has endpoint"),
    ],
)
def test_refusals(given: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        CaptionsConfig(**given)
    assert str(caught.value).startswith(said)
