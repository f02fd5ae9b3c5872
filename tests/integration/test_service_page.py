"""The page in a real browser, against the real web process, with a worker whose steps the test allows."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.page_browser import DESK, Page, picture
from tests.integration.page_service import STEPS, Web, Worker, until

KEY = "a-key-of-the-tests-0123456789"

pytestmark = pytest.mark.timeout(600)  # a browser on a crowded machine


def test_submit_watch_and_play(page: Page) -> None:
    page.worker.hold(4)
    page.generate("a red circle moves left")
    bar = page.row("a red circle").locator("progress")
    until(lambda: bar.evaluate("bar => bar.value") == 2 + 88 * 4 // STEPS)
    assert page.row("a red circle").locator(".where").text_content() == f"Step 4 of {STEPS}"
    assert page.tab.title() == "46% · opensora"
    page.worker.hold(6)  # told by an event or the next look, whichever is first
    until(lambda: page.row("a red circle").locator(".where").text_content() == f"Step 6 of {STEPS}")
    page.worker.go()
    card = page.card("a red circle")
    card.wait_for()
    assert page.row("a red circle").count() == 0
    job = page.jobs()[0]
    assert f"seed\u00a0{job.request['sampling']['seed']}" in card.locator(".meta").text_content()
    until(lambda: card.locator(".play img").evaluate("image => image.naturalWidth") == 64)
    card.locator(".play").click()
    video = card.locator("video")
    until(lambda: video.evaluate("video => video.currentTime > 0.2 && !video.error"))
    assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [64, 36]
    with page.tab.expect_download() as download:
        card.locator(".download").click()
    assert download.value.suggested_filename == f"{job.id}.mp4"
    assert Path(download.value.path()).read_bytes() == page.worker.store.video(job.id).read_bytes()


def test_cancel_what_runs_and_what_waits(page: Page) -> None:
    page.worker.hold(3)
    for prompt in ("the first", "the second", "the third"):
        page.generate(prompt)
    until(lambda: page.row("the first").get_attribute("data-state") == "in_progress")
    until(lambda: page.row("the third").locator(".where").text_content() == "1 job before it")
    order = page.tab.locator(".job .prompt").all_text_contents()
    assert order == ["the first", "the second", "the third"]
    page.row("the second").locator(".cancel").click()
    page.card("the second").wait_for()
    assert page.card("the second").locator(".failed").text_content() == "Cancelled"
    page.row("the first").locator(".cancel").click()
    page.card("the first").wait_for()
    until(lambda: page.row("the third").get_attribute("data-state") == "in_progress")
    page.worker.go()
    page.card("the third").locator(".play").wait_for()
    assert [job.state for job in page.jobs()] == ["completed", "cancelled", "cancelled"]
    assert page.tab.locator("#queue-section").is_hidden()


def test_a_failed_job_says_why(page: Page) -> None:
    page.worker.fails = True
    page.generate("too much")
    page.card("too much").wait_for()
    assert page.card("too much").locator(".failed").text_content() == "Failed: 12 GiB asked"
    assert page.card("too much").locator(".play, .download, .side").count() == 0
    until(lambda: "Failed: too much" in page.tab.locator("#spoken").text_content())


def test_reload_and_restart_of_the_service(page: Page) -> None:
    page.worker.hold(3)
    page.generate("before the restart")
    page.generate("waits behind it")
    page.tab.fill("#prompt", "a draft")
    page.tab.reload()
    page.ready()
    page.row("before the restart").wait_for()
    assert page.tab.locator(".job").count() == 2
    assert page.tab.input_value("#prompt") == "a draft"

    page.bears = (
        "ERR_CONNECTION_REFUSED",
        "ERR_CONNECTION_RESET",
        "ERR_INCOMPLETE_CHUNKED_ENCODING",
        "ERR_EMPTY_RESPONSE",
    )
    page.web.stop()
    page.tab.locator("#lost", has_text="Connection lost. Trying again").wait_for()
    assert page.tab.locator("#service").get_attribute("data-state") == "lost"
    page.tab.click("#submit")
    page.tab.locator("#form-error", has_text="Generate again").wait_for()
    assert page.tab.locator(".job").count() == 2  # what is known stays in sight
    page.worker.hold(5)  # jobs go on without the web process
    page.web.start()
    page.tab.locator("#lost").wait_for(state="hidden")
    until(lambda: page.row("before the restart").locator(".where").text_content() == f"Step 5 of {STEPS}")
    page.tab.click("#submit")
    page.worker.go()
    for prompt in ("before the restart", "waits behind it", "a draft"):
        page.card(prompt).locator(".play").wait_for()
    assert [job.state for job in page.jobs()] == ["completed"] * 3


def test_an_answer_that_is_lost_makes_no_second_job(page: Page) -> None:
    page.bears = ("ERR_FAILED",)
    lost: list[int] = []

    def lose(route: Any) -> None:
        if not lost and route.request.method == "POST":
            lost.append(route.fetch().status)
            route.abort()
        else:
            route.continue_()

    page.tab.route("**/v1/videos", lose)
    page.tab.fill("#prompt", "only one")
    page.tab.click("#submit")
    page.tab.locator("#form-error", has_text="Generate again").wait_for()
    page.tab.click("#submit")
    page.tab.locator("#form-error").wait_for(state="hidden")
    page.card("only one").wait_for()
    assert lost == [200] and len(page.jobs()) == 1
    page.tab.click("#submit")  # but asked for once more it is another
    until(lambda: len(page.jobs()) == 2)


def test_without_events_looks_are_enough(page: Page) -> None:
    page.bears = ("ERR_FAILED",)
    page.tab.route("**/events", lambda route: route.abort())
    page.worker.hold(2)
    page.generate("no stream")
    until(lambda: page.row("no stream").locator(".where").text_content() == f"Step 2 of {STEPS}")
    page.worker.go()
    page.card("no stream").wait_for()


def test_side_by_side(page: Page) -> None:
    page.call(prompt="a short one", num_frames=17, seed=5)
    page.call(prompt="a long one", num_frames=33, seed=6)
    page.card("a short one").locator(".side").click()
    page.tab.locator("#tray").wait_for()
    page.card("a long one").locator(".side").click()
    dialog = page.tab.locator("#compare")
    dialog.wait_for()
    times = "videos => videos.map(video => video.currentTime)"
    videos = dialog.locator("video")
    until(lambda: videos.count() == 2 and min(videos.evaluate_all(times)) > 0.3)
    apart = []
    for _ in range(10):
        first, second = videos.evaluate_all(times)
        if max(first, second) < 2.0:  # the short one ends at 17/8 s and waits
            apart.append(abs(first - second))
        time.sleep(0.05)
    assert sorted(apart)[len(apart) // 2] < 0.15, apart
    until(lambda: videos.evaluate_all(times)[1] > 2.5 or videos.evaluate_all(times)[0] > 2.5)
    dialog.locator("#compare-play").click()
    dialog.locator("#compare-time").fill("250")  # a quarter of 33/8 s
    until(lambda: np.allclose(videos.evaluate_all(times), 33 / 8 / 4, atol=0.01))
    dialog.locator("#compare-next").click()  # one frame of 1/8 s
    until(lambda: np.allclose(videos.evaluate_all(times), 33 / 8 / 4 + 1 / 8, atol=0.01))
    assert dialog.locator("tr.differs th").all_text_contents() == ["Prompt", "Length", "Frames", "Seed"]
    page.tab.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert page.tab.locator('.side[aria-pressed="true"]').count() == 0
    assert page.tab.locator("#tray").is_hidden()


def test_use_again_makes_the_same_job(page: Page) -> None:
    """All that was asked for, also what the form has no field for, and a seed that no number of JavaScript holds."""
    fields = {
        "prompt": "again\nand again", "seed": 2**63 - 25, "size": "60x40", "num_frames": 17, "num_inference_steps": 5,
        "guidance_scale": 2.25, "negative_prompt": "", "fps": 12.5, "motion_score": 7, "guidance_img": None,
        "cache": {"kind": "first_block", "threshold": 0.125},
    }  # fmt: skip
    page.call(**fields)
    page.card("again").locator(".again").click()
    assert page.tab.input_value("#seed") == str(2**63 - 25)
    assert "motion_score 7" in page.tab.locator("#others").text_content()
    assert page.tab.locator("#sizes input:checked").input_value() == "60x40"
    page.tab.click("#submit")
    second, first = until(lambda: len(page.jobs()) == 2 and page.jobs())
    assert second.request == first.request and second.prompt == first.prompt and second.steps == first.steps
    page.tab.click("#defaults")
    page.tab.click("#submit")
    third = until(lambda: len(page.jobs()) == 3 and page.jobs())[0]
    assert third.request["neg"] == "blurry"
    assert set(third.request["sampling"]) == {"seed", "width", "height", "num_frames"}


def test_choices_are_those_of_the_model(page: Page) -> None:
    assert page.tab.locator("#sizes label").all_text_contents() == ["64×36", "48×48", "36×64", "640×360"]
    assert page.tab.locator("#sizes input:checked").input_value() == "64x36"
    words = []
    for index in range(5):
        page.tab.locator("#length").fill(str(index))
        words.append(page.tab.locator("#length-text").text_content())
    frames = ["0.6 s, 5 frames", "1.1 s, 9 frames", "2.1 s, 17 frames", "4.1 s, 33 frames"]
    assert words == ["still picture", *frames]
    page.tab.locator("#length").fill("0")
    page.generate("a still")
    page.card("a still").locator(".play").click()
    until(lambda: page.card("a still").locator("img.clip").evaluate("image => image.naturalWidth") == 64)
    with page.tab.expect_download() as download:
        page.card("a still").locator(".download").click()
    assert download.value.suggested_filename.endswith(".png")


def test_what_cannot_be_is_refused_with_the_reason(page: Page) -> None:
    forecast, submit = page.tab.locator("#forecast"), page.tab.locator("#submit")
    until(lambda: "About 5 s" in forecast.text_content())  # 8 steps of 0.5 s, and 1 s
    assert "1.9 GiB of 172 GiB memory" in forecast.text_content()
    page.tab.locator("#steps").evaluate("field => field.closest('details').open = true")
    page.tab.fill("#steps", "100")
    until(lambda: "About 51 s" in forecast.text_content())
    page.tab.locator("#sizes label", has_text="640×360").click()
    page.tab.fill("#prompt", "too large")
    until(lambda: "Needs 193 GiB of memory, and a device has 172 GiB." in forecast.text_content())
    assert submit.get_attribute("aria-disabled") == "true"
    submit.press("Enter")  # it can be reached, and says why it does nothing
    assert "Needs 193 GiB" in page.tab.locator("#form-error").text_content()
    page.tab.locator("#length").fill("1")
    until(lambda: submit.get_attribute("aria-disabled") == "false")
    page.tab.fill("#seed", "-1")
    submit.click()
    assert "A seed is a whole number" in page.tab.locator("#form-error").text_content()
    assert page.jobs() == []


DROP = """([target, type, bytes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
    const more = type === "paste" ? {clipboardData: data} : {dataTransfer: data};
    const made = type === "paste" ? new ClipboardEvent(type, {...more, bubbles: true, cancelable: true})
                                  : new DragEvent(type, {...more, bubbles: true, cancelable: true});
    document.querySelector(target).dispatchEvent(made);
}"""


def test_references_are_chosen_dropped_and_pasted(page: Page) -> None:
    red, green, blue = (picture(colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200)))
    page.tab.set_input_files("#file", {"name": "red.png", "mimeType": "image/png", "buffer": red})
    page.tab.locator("#pictures img").wait_for()
    assert page.tab.locator("#kind option").all_text_contents() == ["first frame"]
    page.eval(DROP, ["#prompt", "drop", list(green)])
    until(lambda: page.tab.locator("#pictures img").count() == 2)
    assert page.tab.locator("#kind option").all_text_contents() == ["first and last frame"]
    page.tab.get_by_role("button", name="Remove reference red.png").click()
    assert page.tab.locator("#pictures img").count() == 1
    page.eval(DROP, ["#prompt", "paste", list(blue)])
    until(lambda: page.tab.locator("#pictures img").count() == 2)
    page.generate("from green to blue")
    job = until(page.jobs)[0]
    assert job.request["cond_type"] == "i2v_loop"
    assert [colour_of(page.worker.store.reference(name)) for name in job.references] == [(0, 200, 0), (0, 0, 200)]
    page.tab.set_input_files("#file", {"name": "text.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    page.tab.locator("#form-error", has_text="files are PNG, JPEG").wait_for()
    assert page.tab.locator("#pictures img").count() == 2


def colour_of(path: Path) -> tuple[int, ...]:
    from PIL import Image

    with Image.open(path) as image:
        return tuple(image.convert("RGB").getpixel((5, 5)))  # type: ignore[arg-type]


def test_delete_asks_once_more(page: Page) -> None:
    page.generate("to be deleted")
    button = page.finished("to be deleted").locator(".delete")
    button.click()
    assert "Delete for good" in button.text_content() and page.jobs()
    page.tab.keyboard.press("Tab")  # looking away takes it back
    until(lambda: "sure" not in (button.get_attribute("class") or ""))
    button.click()
    button.click()
    page.card("to be deleted").wait_for(state="detached")
    assert page.jobs() == [] and list(page.worker.store.videos.iterdir()) == []
    assert page.eval("() => document.activeElement.id") == "gallery-title"


@pytest.mark.parametrize("burst", [False, True])
def test_what_is_deleted_elsewhere_goes_and_what_is_older_comes(page: Page, burst: bool) -> None:
    """Also where all are of one second, within which times do not tell their order."""

    def in_one_second(route: Any) -> None:
        answer = route.fetch()
        found = answer.json()
        route.fulfill(response=answer, json=found | {"data": [job | {"created_at": 1} for job in found["data"]]})

    if burst:
        page.tab.route("**/v1/videos?limit=*", in_one_second)
    ids = [page.call(prompt=f"clip {number}", num_frames=1) for number in range(27)]
    until(lambda: page.tab.locator(".card").count() == 24)
    page.tab.locator("#more-clips").click()
    until(lambda: page.tab.locator(".card").count() == 27)
    page.finished("clip 26")
    page.tab.request.delete(f"{page.web.url}v1/videos/{ids[26]}")
    until(lambda: page.tab.locator(".card").count() == 26)


def test_a_key_is_asked_for(chromium: Any, start_service: Callable[..., tuple[Web, Worker]], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    web, worker = start_service(keys=str(tmp_path / "keys"))
    context = chromium.new_context(viewport=DESK)
    page = Page(context.new_page(), web, worker, bears=("status of 401",)).open()
    dialog = page.tab.locator("#key-dialog")
    dialog.wait_for()
    page.tab.fill("#key", "another-key-0123456789")
    page.tab.keyboard.press("Enter")
    page.tab.locator("#key-error", has_text="does not know this key").wait_for()
    page.tab.fill("#key", KEY)
    page.tab.keyboard.press("Enter")
    page.ready()
    worker.hold(3)
    page.generate("with a key")
    until(lambda: page.row("with a key").locator(".where").text_content() == f"Step 3 of {STEPS}")
    page.tab.reload()  # the tab still knows it
    page.row("with a key").wait_for()
    assert dialog.is_hidden()
    worker.go()
    card = page.card("with a key")
    until(lambda: card.locator(".play img").evaluate("image => image.naturalWidth") == 64)
    card.locator(".play").click()
    until(lambda: card.locator("video").evaluate("video => video.currentTime > 0.1"))
    assert card.locator("video").get_attribute("src").startswith("blob:")
    with page.tab.expect_download() as download:
        card.locator(".download").click()
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"
    assert KEY not in page.tab.content() and page.eval("() => Object.values(localStorage).join()").find(KEY) < 0
    context.close()
    assert page.mistakes == []


def test_a_full_queue_is_said(chromium: Any, start_service: Callable[..., tuple[Web, Worker]]) -> None:
    web, worker = start_service(quota={"queued_per_key": 1})
    context = chromium.new_context(viewport=DESK)
    page = Page(context.new_page(), web, worker, bears=("status of 429",)).open().ready()
    worker.hold(1)
    page.generate("runs")
    until(lambda: page.row("runs").get_attribute("data-state") == "in_progress")
    page.generate("waits")
    page.tab.fill("#prompt", "one too many")
    page.tab.click("#submit")
    page.tab.locator("#form-error").wait_for()
    assert page.tab.input_value("#prompt") == "one too many" and len(page.jobs()) == 2
    context.close()
    assert page.mistakes == []
