"""The page for everybody: small screens, dark ones, keyboards, screen readers; and for those who mean harm."""

import re
import secrets
import time
from typing import Any

import pytest

from tests.integration.page_browser import Page, picture
from tests.integration.page_service import until

PHONE = {"width": 390, "height": 844}
HOSTILE = (
    '<img src=x onerror="window.hurt=1">',
    "<script>window.hurt=1</script>",
    '"><svg onload=window.hurt=1>',
    "javascript:window.hurt=1",
    "'; window.hurt=1; //",
    "{{constructor.constructor('window.hurt=1')()}}",
    "</li></ul><iframe srcdoc='<script>parent.hurt=1</script>'>",
    "\u202egnp.tac\u202c right to left",
    '"seed":123,"x":{"seed": 9} \\"seed\\": 7',
)

pytestmark = pytest.mark.timeout(600)  # a browser on a crowded machine


def test_hostile_prompts_are_text(page: Page) -> None:
    page.worker.hold(2)
    for prompt in HOSTILE:
        page.call(prompt=prompt, negative_prompt=prompt, num_frames=5)
    shown = page.tab.locator(".job .prompt")
    until(lambda: shown.all_text_contents() == [" ".join(prompt.split()) for prompt in HOSTILE])
    page.worker.go()
    until(lambda: page.tab.locator(".card .play").count() == len(HOSTILE))
    assert set(page.tab.locator(".card .card-text .prompt").all_text_contents()) == set(HOSTILE)
    for card in page.tab.locator(".card").all():
        card.locator(".again").click()
        prompt = card.locator(".card-text .prompt").text_content()
        assert page.tab.input_value("#prompt") == prompt and page.tab.input_value("#negative") == prompt
    assert page.eval("() => window.hurt") is None
    assert page.tab.locator("main iframe, main script, main svg[onload]").count() == 0


def fill_page(page: Page) -> None:
    """One of everything: a clip, a failed one, one that runs, one that waits; a word that has no end."""
    endless = secrets.token_hex(200)
    page.generate(f"done {endless}")
    page.card("done").wait_for()
    page.worker.fails = True
    page.generate("failed")
    page.card("failed").wait_for()
    page.worker.fails = False
    page.worker.hold(3)
    page.generate(f"runs {endless}")
    page.generate("waits")
    page.row("waits").wait_for()
    until(lambda: page.row("runs").get_attribute("data-state") == "in_progress")


def test_phone_width(page: Page) -> None:
    fill_page(page)
    page.tab.set_viewport_size(PHONE)
    page.tab.locator("#more summary").click()
    page.card("done").locator("summary").click()
    page.tab.set_input_files(
        "#file", {"name": "x" * 200 + ".png", "mimeType": "image/png", "buffer": picture((9, 9, 9))}
    )
    page.tab.locator("#pictures img").wait_for()
    width = "() => [document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert page.eval(width) == [390, 390]
    outside = """() => [...document.querySelectorAll("main *, header *")].filter(one => {
        const box = one.getBoundingClientRect();
        return box.width > 1 && (box.right > 391 || box.left < -1) && !one.closest(".unseen");
    }).map(one => one.outerHTML.slice(0, 80))"""
    assert page.eval(outside) == []
    small = """() => [...document.querySelectorAll("main button, main a")].filter(one => {
        const box = one.getBoundingClientRect();
        return box.width && (box.height < 24 || box.width < 24);
    }).map(one => one.outerHTML.slice(0, 80))"""
    assert page.eval(small) == []


CONTRASTS = """() => {
    const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgba = (colour) => {
        paint.clearRect(0, 0, 1, 1);
        paint.fillStyle = colour;
        paint.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, ground) => [0, 1, 2].map(i => top[i] * top[3] + ground[i] * (1 - top[3])).concat(1);
    const ground = (one) => {
        const stack = [];
        for (let at = one; at; at = at.parentElement) {
            stack.push(rgba(getComputedStyle(at).backgroundColor));
            if (stack.at(-1)[3] === 1) break;
        }
        return stack.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    };
    const light = ([r, g, b]) => {
        const line = [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2];
    };
    const found = [];
    for (const one of document.querySelectorAll("body *")) {
        const text = [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())
            || one.matches("input:not([type=range]), textarea, select");
        const box = one.getBoundingClientRect();
        if (!text || !box.width || one.closest(".unseen, [hidden], noscript") || !one.checkVisibility()) continue;
        for (const pseudo of one.placeholder ? [null, "::placeholder"] : [null]) {
            const below = ground(one);
            const colour = over(rgba(getComputedStyle(one, pseudo).color), below);
            const [high, low] = [light(colour), light(below)].sort((a, b) => b - a);
            found.push([(high + 0.05) / (low + 0.05), `${one.tagName}.${one.className} ${colour} on ${below}`]);
        }
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page: Page, scheme: str) -> None:
    page.tab.emulate_media(color_scheme=scheme)
    fill_page(page)
    page.tab.locator("#more summary").click()
    page.card("done").locator("summary").click()
    page.card("done").locator(".side").click()
    page.card("failed").locator(".delete").click()
    page.tab.fill("#prompt", "")
    page.tab.click("#submit")  # says an error
    grounds = {"light": 200, "dark": 60}
    body = page.eval("() => getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (min(body) > grounds["light"]) if scheme == "light" else (max(body) < grounds["dark"])
    found = page.eval(CONTRASTS)
    assert len(found) > 40
    assert [told for contrast, told in found if contrast < 4.5] == []


def test_every_control_has_a_name(page: Page) -> None:
    """By the browser's own tree of what assistive technology is told."""
    fill_page(page)
    page.tab.locator("#more summary").click()
    page.tab.set_input_files("#file", {"name": "one.png", "mimeType": "image/png", "buffer": picture((1, 2, 3))})
    page.card("done").locator(".play").click()
    page.card("done").locator("video").wait_for()
    named = names(page)
    roles = [role for role, _ in named]
    for role in ("button", "link", "textbox", "radio", "slider", "ProgressIndicator", "Video", "spinbutton", "image"):
        assert role.lower() in map(str.lower, roles) or (role == "ProgressIndicator" and "progressbar" in roles), (
            role,
            sorted(set(roles)),
        )
    assert [(role, name) for role, name in named if not name.strip()] == []
    labels = [name for role, name in named if role == "button"]
    assert "Cancel: waits" in labels and "Delete: failed" in labels
    assert page.eval("() => document.documentElement.lang") == "en"
    assert page.eval("() => [...document.querySelectorAll('h1,h2')].map(one => one.tagName)")[:3] == ["H1", "H2", "H2"]
    doubled = (
        "() => [...document.querySelectorAll('[id]')].map(one => one.id).filter((id, at, all) => all.indexOf(id) < at)"
    )
    assert page.eval(doubled) == []


CONTROLS = {
    "button", "link", "textbox", "radio", "slider", "progressbar", "combobox", "spinbutton", "image", "img", "Video",
    "ProgressIndicator", "form", "region", "DisclosureTriangle", "checkbox", "dialog",
}  # fmt: skip


def names(page: Page) -> list[tuple[str, str]]:
    tree = page.tab.context.new_cdp_session(page.tab).send("Accessibility.getFullAXTree")["nodes"]
    shown = (node for node in tree if not node.get("ignored"))
    told = ((node["role"]["value"], node.get("name", {}).get("value", "")) for node in shown)
    return [(role, name) for role, name in told if role in CONTROLS]


def test_changes_are_said_aloud(page: Page) -> None:
    page.worker.hold(2)
    page.generate("listen")
    spoken = page.tab.locator("#spoken[aria-live=polite]")
    until(lambda: "The clip is in the queue." in spoken.text_content())
    until(lambda: "Step 2" in (page.row("listen").locator("progress").get_attribute("aria-valuetext") or ""))
    page.worker.go()
    until(lambda: "Done: listen" in spoken.text_content())


def test_a_row_that_moves_keeps_the_focus(page: Page) -> None:
    """What the service last told of two jobs of one second may have them in the other order."""
    rows = page.tab.locator(".job .prompt")

    def swapped(route: Any) -> None:
        answer = route.fetch()
        data = answer.json()["data"]
        for job in data:
            other = {"queue_position": int(job["prompt"] == "the first")}
            job.update(status="queued", x=job["x"] | other)
        route.fulfill(response=answer, json=answer.json() | {"data": data})

    page.worker.hold(2)
    for prompt in ("the first", "the second"):
        page.generate(prompt)
    page.tab.route("**/v1/videos?limit=*", swapped)
    until(lambda: rows.all_text_contents() == ["the second", "the first"])
    page.row("the first").locator(".cancel").focus()
    page.tab.unroute("**/v1/videos?limit=*")
    until(lambda: rows.all_text_contents() == ["the first", "the second"])
    assert "the first" in page.eval("() => document.activeElement.closest('.job')?.textContent ?? ''")


def test_by_keyboard_alone(page: Page) -> None:
    """From the address bar to a clip that plays: Tab, arrows, Space, Enter, Escape."""
    press, focus = page.tab.keyboard.press, "() => document.activeElement.id || document.activeElement.className"

    def tab_to(selector: str) -> None:
        for _ in range(60):
            press("Tab")
            if page.eval("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"the focus never came to {selector}")

    tab_to("#prompt")
    page.tab.keyboard.type("typed")
    tab_to("#file")
    assert page.eval("() => getComputedStyle(document.querySelector('#drop')).outlineStyle") == "solid"
    tab_to("#sizes input")
    press("ArrowRight")
    tab_to("#length")
    press("ArrowLeft")
    tab_to("#more summary")
    press("Enter")
    tab_to("#seed")
    page.tab.keyboard.type("77")
    press("Escape")
    assert page.eval("() => document.querySelector('#more').open") is False
    page.worker.hold(2)
    press("Control+Enter")
    page.row("typed").wait_for()
    press("Control+Enter")
    until(lambda: len(page.jobs()) == 2)
    asked = page.jobs()[0].request["sampling"]
    assert [asked[name] for name in ("width", "height", "num_frames", "seed")] == [48, 48, 5, 77]
    until(lambda: page.tab.locator(".job").count() == 2)
    tab_to(".job:nth-child(2) .cancel")
    press("Enter")
    until(lambda: page.tab.locator(".job").count() == 1)
    assert "cancel" in page.eval(focus)  # the focus is not lost with the row
    page.worker.go()
    page.tab.locator(".play").wait_for()
    page.eval("() => document.querySelector('#gallery-title').focus()")
    tab_to(".play")
    press("Enter")
    video = page.tab.locator(".card video")
    until(lambda: video.evaluate("video => video.currentTime > 0.1"))
    assert page.eval("() => document.activeElement.tagName") == "VIDEO"


def test_reduced_motion(page: Page) -> None:
    page.tab.emulate_media(reduced_motion="reduce")
    fill_page(page)
    page.worker.go()
    page.card("waits").wait_for()
    moving = """() => [...document.querySelectorAll("*")].filter(one => {
        const style = getComputedStyle(one);
        return style.animationName !== "none" || style.transitionDuration !== "0s";
    }).length"""
    assert page.eval(moving) == 0
    page.card("waits").locator(".side").click()
    page.card("runs").locator(".side").click()
    page.tab.locator("#compare video").nth(1).wait_for()
    time.sleep(0.5)
    assert page.tab.locator("#compare video").evaluate_all("all => all.every(one => one.paused)")


def test_nothing_from_elsewhere(page: Page) -> None:
    """No inline script or style, no other address; the policy that the service sends forbids them too."""
    asked: list[str] = []
    page.tab.on("request", lambda request: asked.append(request.url))
    answer = page.tab.reload()
    page.ready()
    page.generate("one")
    page.card("one").wait_for()
    assert asked and all(url.startswith((page.web.url, "blob:", "data:")) for url in asked)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    source = answer.text()
    assert not re.search(r"<style|style=|\son[a-z]+=|javascript:|https?://", source)
    assert re.findall(r"<script[^>]*>", source) == ['<script type="module" src="page/page.js">']
