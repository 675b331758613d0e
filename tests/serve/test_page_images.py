"""Images on the chat page: attached, sent, shown and kept, if the model sees."""

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright")

from PIL import Image as Pillow
from playwright.sync_api import Browser, FilePayload, Locator, Page, expect

from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.serve.engine import Engine
from tests.serve.browsing import answers, ask, assistant, button, is_done, opened, questions, user
from tests.serve.conftest import live
from tests.serve.fake_server import FakeServer
from tests.support.images import data_url, noise, png

pytestmark = pytest.mark.browser

A, B, C = (png(noise(60, 40, seed)) for seed in range(3))
# An event with files as the browser would send it; returns whether nobody took it.
DISPATCH = """(target, [kind, files, texts]) => {
    const data = new DataTransfer();
    for (const [name, type, content] of files) {
        const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], name, { type }));
    }
    for (const [type, text] of texts) data.setData(type, text);
    const options = { bubbles: true, cancelable: true };
    return target.dispatchEvent(
        kind === "paste"
            ? new ClipboardEvent(kind, { clipboardData: data, ...options })
            : new DragEvent(kind, { dataTransfer: data, ...options }));
}"""
COPY = """async (content) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const blob = new Blob([bytes], { type: "image/png" });
    await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
}"""


@pytest.fixture(name="server")
def seeing_server() -> Iterator[FakeServer]:
    server = FakeServer()
    server.sees = True
    yield server
    server.stop()


def file(data: bytes, name: str = "cat.png", kind: str = "image/png") -> FilePayload:
    return {"name": name, "mimeType": kind, "buffer": data}


def pick(page: Page, *files: bytes | FilePayload) -> None:
    with page.expect_file_chooser() as chooser:
        button(page, "Attach images").click()
    chooser.value.set_files([file(one) if isinstance(one, bytes) else one for one in files])


def dispatch(target: Locator, kind: str, *files: FilePayload, **texts: str) -> bool:
    sent = [
        [one["name"], one["mimeType"], base64.b64encode(one["buffer"]).decode()] for one in files
    ]
    named = [[f"text/{kind}", text] for kind, text in texts.items()]
    return target.evaluate(DISPATCH, [kind, sent, named])


def attached(page: Page) -> Locator:
    return page.get_by_role("list", name="Attached images").get_by_role("img")


def shown(page: Page) -> Locator:
    return page.locator("article.user").get_by_role("img")


def sources(images: Locator) -> list[str]:
    return images.evaluate_all("(images) => images.map((image) => image.src)")


def seen(content: str, *urls: str) -> dict[str, Any]:
    """A user's message with images."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "role": "user",
        "content": [*parts, *([{"type": "text", "text": content}] * bool(content))],
    }


def opened_url(url: str) -> tuple[str, Pillow.Image]:
    """The kind of a data URL, and its image."""
    found = re.fullmatch("data:(.*);base64,(.*)", url)
    assert found
    return found[1], Pillow.open(io.BytesIO(base64.b64decode(found[2])))


def test_the_server_answers_an_image_of_its_own_page(
    browser: Browser, seeing_model: LoadedModel, faults: list[str]
) -> None:
    with (
        Engine(seeing_model, 1) as engine,
        live(engine) as server,
        opened(browser, server.url, faults) as page,
    ):
        button(page, "Settings").click()
        page.get_by_label("Maximum length").fill("12")
        page.keyboard.press("Escape")
        pick(page, A)
        expect(attached(page)).to_have_count(1)
        ask(page, "What is it?")
        expect(page.get_by_role("status").first).to_contain_text("12 tokens")


def test_images_that_were_picked_are_sent_before_the_text(page: Page, server: FakeServer) -> None:
    server.will_answer("Two cats")
    pick(page, A)
    pick(page, B, A)  # the same may be picked again
    expect(attached(page)).to_have_count(3)
    expect(page.get_by_label("Message")).to_be_focused()
    urls = [data_url(data) for data in (A, B, A)]
    assert sources(attached(page)) == urls
    assert page.locator("#files").input_value() == ""  # or the same could not
    ask(page, "What are they?")
    is_done(page)
    assert server.bodies[0]["messages"] == [seen("What are they?", *urls)]
    assert sources(shown(page)) == urls
    expect(attached(page)).to_have_count(0)
    expect(questions(page)).to_have_text("What are they?")


def test_an_image_is_pasted(page: Page, server: FakeServer) -> None:
    server.will_answer("A cat")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(COPY, base64.b64encode(A).decode())
    page.get_by_label("Message").press("Control+v")
    expect(attached(page)).to_have_count(1)
    ask(page, "What is it?")
    is_done(page)
    image, text = server.bodies[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    kind, found = opened_url(image["image_url"]["url"])  # which the clipboard has encoded anew
    assert (kind, found.tobytes()) == ("image/png", noise(60, 40, 0).tobytes())


def test_a_table_is_pasted_as_text_and_not_as_the_picture_of_it(page: Page) -> None:
    message = page.get_by_label("Message")
    assert dispatch(message, "paste", file(A), plain="1\t2", html="<table>")
    assert dispatch(message, "paste", plain="Hello")
    assert not dispatch(message, "paste", file(A), plain="cat.png")  # as files are copied
    expect(attached(page)).to_have_count(1)


@pytest.mark.parametrize("where", ["#prompt", "main", "header"])
def test_images_are_dropped(page: Page, server: FakeServer, where: str) -> None:
    """Anywhere, since a browser would otherwise go to the file and leave the page."""
    target, composer = page.locator(where), page.locator("#composer")
    assert not dispatch(target, "dragover", file(A))
    expect(composer).to_have_class("over")
    assert dispatch(target, "dragleave", file(A))
    expect(composer).to_have_class("")
    assert not dispatch(target, "dragover", file(A))
    assert not dispatch(target, "drop", file(A), file(B))
    expect(composer).to_have_class("")
    expect(attached(page)).to_have_count(2)
    assert dispatch(target, "dragover", plain="text")  # of which the box takes care itself
    assert dispatch(target, "drop", plain="text")
    server.will_answer("Two cats")
    page.keyboard.press("Enter")
    is_done(page)
    assert server.bodies[0]["messages"] == [seen("", data_url(A), data_url(B))]


def test_an_image_can_be_removed(page: Page, server: FakeServer) -> None:
    server.will_answer("Two cats")
    pick(page, A, B, C)
    button(page, "Remove image 2").click()
    expect(attached(page)).to_have_count(2)
    expect(page.get_by_label("Message")).to_be_focused()
    ask(page, "What are they?")
    is_done(page)
    assert server.bodies[0]["messages"] == [seen("What are they?", data_url(A), data_url(C))]


def test_all_can_be_removed_and_then_nothing_is_sent(page: Page) -> None:
    pick(page, A)
    button(page, "Remove image 1").click()
    expect(attached(page)).to_have_count(0)
    expect(page.locator("#attached")).to_be_hidden()
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(0)


def test_a_message_may_be_an_image_alone(page: Page, server: FakeServer) -> None:
    server.will_answer("A cat")
    pick(page, A)
    expect(attached(page)).to_have_count(1)
    button(page, "Send").click()
    expect(answers(page)).to_have_text("A cat")
    assert server.bodies[0]["messages"] == [seen("", data_url(A))]
    expect(questions(page)).to_be_hidden()


def test_an_image_that_is_still_read_goes_with_the_message(page: Page, server: FakeServer) -> None:
    server.will_answer("Noise")
    page.get_by_label("Message").fill("What is it?")
    page.evaluate(  # in one task, so that nothing can have been read
        f"""([name, type, content]) => {{
            ({DISPATCH})(document.body, ["drop", [[name, type, content]], []]);
            document.getElementById("action").click();
        }}""",
        ["a.png", "image/png", base64.b64encode(A).decode()],
    )
    expect(answers(page)).to_have_text("Noise")
    assert server.bodies[0]["messages"] == [seen("What is it?", data_url(A))]


def test_a_reload_keeps_images_and_the_next_question_has_them(
    page: Page, server: FakeServer
) -> None:
    server.will_answer("A cat")
    server.will_answer("Grey")
    pick(page, A)
    expect(attached(page)).to_have_count(1)
    ask(page, "What is it?")
    is_done(page)
    page.reload()
    assert sources(shown(page)) == [data_url(A)]
    ask(page, "And its color?")
    is_done(page)
    history = [seen("What is it?", data_url(A)), assistant("A cat"), user("And its color?")]
    assert server.bodies[1]["messages"] == history


def test_a_question_without_an_answer_is_sent_with_the_next(page: Page, server: FakeServer) -> None:
    server.will_fail(429, "busy")
    server.will_answer("Two cats")
    pick(page, A)
    expect(attached(page)).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("busy")
    pick(page, B)
    expect(attached(page)).to_have_count(1)
    ask(page, "What are they?")
    is_done(page)
    assert server.bodies[1]["messages"] == [seen("What are they?", data_url(A), data_url(B))]


def test_images_that_the_browser_has_no_room_for_are_sent_and_that_is_told(
    page: Page, server: FakeServer
) -> None:
    server.will_answer("Noise")
    pick(page, *(png(noise(1200, 900, seed)) for seed in range(2)))
    expect(attached(page)).to_have_count(2)
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Noise")
    expect(page.get_by_role("alert")).to_contain_text("a reload will lose it")
    assert len(server.bodies[0]["messages"][0]["content"]) == 2


def encoded(image: Pillow.Image, kind: str) -> FilePayload:
    data = io.BytesIO()
    image.save(data, kind)
    return file(data.getvalue(), f"cat.{kind}", f"image/{kind.lower()}")


LARGE = Pillow.new("RGB", (3080, 1000), "red")
CLEAR = Pillow.new("RGBA", (1000, 3080), (255, 0, 0, 128))


@pytest.mark.parametrize(
    ("picked", "kind", "size"),
    [
        (encoded(LARGE, "JPEG"), "image/jpeg", (1540, 500)),
        (encoded(LARGE, "PNG"), "image/jpeg", (1540, 500)),
        (encoded(CLEAR, "PNG"), "image/png", (500, 1540)),
        (encoded(LARGE.resize((3000, 1)), "PNG"), "image/jpeg", (1540, 1)),
        (encoded(noise(60, 40), "BMP"), "image/jpeg", (60, 40)),
        (encoded(noise(60, 40), "WEBP"), "image/webp", (60, 40)),
    ],
)
def test_large_images_are_scaled_down_and_rare_formats_are_drawn_anew(
    page: Page, picked: FilePayload, kind: str, size: tuple[int, int]
) -> None:
    pick(page, picked)
    expect(attached(page)).to_have_count(1)
    (url,) = sources(attached(page))
    found, image = opened_url(url)
    assert (found, image.size) == (kind, size)
    if kind == "image/png":
        assert image.getpixel((9, 9)) == (255, 0, 0, 128)
    if kind == "image/webp":
        assert url == data_url(picked["buffer"], kind)


def test_what_is_no_image_is_told_and_the_others_are_attached(page: Page) -> None:
    pick(page, file(b"Hello", "notes.txt", "text/plain"), A)
    expect(page.get_by_role("alert")).to_have_text(
        "notes.txt is no image that this browser can read."
    )
    expect(attached(page)).to_have_count(1)
    pick(page, B)
    expect(attached(page)).to_have_count(2)
    expect(page.get_by_role("alert")).to_be_empty()


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_model_that_does_not_see_is_shown_nothing(
    page: Page, server: FakeServer, kind: str
) -> None:
    server.sees = False
    page.reload()
    expect(page.locator("header")).to_contain_text("mistral-tiny")
    expect(button(page, "Attach images")).to_be_hidden()
    assert not dispatch(page.get_by_label("Message"), kind, file(A))
    expect(page.get_by_role("alert")).to_have_text(
        "This model cannot see images, so none is attached."
    )
    expect(attached(page)).to_have_count(0)


def test_images_need_no_mouse_and_have_names(page: Page) -> None:
    pick(page, A, B)
    expect(attached(page)).to_have_count(2)
    named = "(images) => images.map((image) => image.alt)"
    assert attached(page).evaluate_all(named) == ["Image 1", "Image 2"]
    for name in ("Attach images", "Remove image 2", "Remove image 1"):
        page.keyboard.press("Shift+Tab")
        expect(button(page, name)).to_be_focused()
    page.keyboard.press("Enter")
    expect(attached(page)).to_have_count(1)


def test_a_screen_reader_is_told_how_many_there_are(page: Page) -> None:
    page.clock.install(time=0)
    page.reload()
    pick(page, A)
    expect(page.locator("[aria-live=polite]")).to_have_text("1 image attached")
    pick(page, B)
    expect(page.locator("[aria-live=polite]")).to_have_text("2 images attached")


def test_a_narrow_screen_is_not_scrolled_sideways(page: Page, server: FakeServer) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    server.will_answer("Noise")
    images = [png(noise(*size)) for size in ((300, 30), (30, 300), *[(60, 40)] * 6)]
    for _ in range(2):
        pick(page, *images)
        expect(attached(page)).to_have_count(8)
        if not server.bodies:
            page.keyboard.press("Enter")
            is_done(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    box = button(page, "Send").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 360
    assert box["y"] + box["height"] <= 640
    boxes = [image.bounding_box() for image in shown(page).all()]
    assert all(box and box["x"] >= 0 and box["x"] + box["width"] <= 360 for box in boxes)


def test_a_conversation_is_opened_at_its_end_however_high_its_images_are(
    page: Page, server: FakeServer
) -> None:
    server.will_answer("Noise")
    pick(page, *[A] * 12)
    expect(attached(page)).to_have_count(12)
    page.keyboard.press("Enter")
    is_done(page)
    with page.context.new_page() as again:
        again.goto(server.address)
        expect(shown(again)).to_have_count(12)
        assert again.evaluate("() => scrollY") > 100
        at_end = "() => scrollY + innerHeight >= document.documentElement.scrollHeight - 1"
        again.wait_for_function(at_end, timeout=5_000)
