"""The chat page of `lechat serve` in a browser, talking to a server that says what a test wrote.

After each test nothing may have gone wrong unseen: no error in the console, which is where what
the Content-Security-Policy forbids is told, and no request to anyone but the server.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright")

from playwright.sync_api import Browser, Page, expect

from lechat_jax.serve.engine import Engine
from tests.serve.browsing import answers, ask, assistant, button, is_done, opened, questions, user
from tests.serve.conftest import live
from tests.serve.fake_server import HOLD, FakeServer, event

pytestmark = pytest.mark.browser

TAG = "<img src=x onerror=alert(1)>"
FOCUSED = "() => document.activeElement.id || document.activeElement.textContent"
WIDTH = "() => document.documentElement.scrollWidth"


@pytest.fixture(name="server")
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.stop()


# ---- The server itself.


def test_the_server_answers_its_own_page(
    browser: Browser, engine: Engine, faults: list[str]
) -> None:
    with live(engine) as server, opened(browser, server.url, faults) as page:
        expect(page.locator("header")).to_contain_text("tiny")
        button(page, "Settings").click()
        page.get_by_label("Maximum length").fill("12")
        page.keyboard.press("Escape")
        for question in ("Hello", "And now?"):
            ask(page, question)
            is_done(page)
            expect(page.get_by_role("status").first).to_contain_text("12 tokens")
        assert [text for text in answers(page).all_inner_texts() if not text] == []


# ---- An answer.


def test_the_model_is_named(page: Page) -> None:
    expect(page.locator("header")).to_contain_text("mistral-tiny")


def test_tokens_appear_before_the_answer_has_ended(page: Page, server: FakeServer) -> None:
    server.will_answer("Bon", HOLD, "jour", " !")
    ask(page, "Hello")
    expect(answers(page)).to_have_text("Bon")
    expect(button(page, "Stop")).to_be_visible()
    server.go_on.set()
    expect(answers(page)).to_have_text("Bonjour !")
    expect(questions(page)).to_have_text("Hello")
    is_done(page)


def test_tokens_are_appended_and_nothing_is_drawn_anew(page: Page, server: FakeServer) -> None:
    server.will_answer("Bon", HOLD, "jour")
    ask(page, "Hello")
    expect(answers(page)).to_have_text("Bon")
    nodes = "() => [...document.querySelectorAll('article p')].map((p) => p.firstChild)"
    before = page.evaluate_handle(nodes)
    server.go_on.set()
    expect(answers(page)).to_have_text("Bonjour")
    is_done(page)
    same = f"(before) => ({nodes})().every((node, i) => node === before[i])"
    assert page.evaluate(same, before)


def test_events_may_be_cut_anywhere(page: Page, server: FakeServer) -> None:
    def delta(text: str) -> bytes:
        return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])

    raw = delta("né").replace(b"\\u00e9", "é".encode())
    cut = raw.index("é".encode()) + 1  # between the two bytes of a letter
    crlf = delta("e").replace(b"\n\n", b"\r\n\r\n")
    pieces = (raw[:3], raw[3:cut], raw[cut:], b": pi", b"ng\n\n", crlf[:-3], crlf[-3:])
    server.will_answer(*pieces, pause=0.03)
    ask(page, "Hello")
    expect(answers(page)).to_have_text("née")
    is_done(page)


def test_html_is_text_wherever_it_comes_from(page: Page, server: FakeServer) -> None:
    server.will_answer(TAG, f"\n<script>{'x'}</script>")
    server.will_fail(400, TAG)
    ask(page, TAG)
    expect(answers(page)).to_have_text(f"{TAG}\n<script>x</script>")
    expect(questions(page)).to_have_text(TAG)
    is_done(page)
    button(page, "Regenerate").click()
    expect(page.get_by_role("alert")).to_have_text(TAG)
    page.reload()
    expect(answers(page)).to_have_text(f"{TAG}\n<script>x</script>")
    assert page.locator("img").count() == 0


def test_line_breaks_and_spaces_are_kept(page: Page, server: FakeServer) -> None:
    server.will_answer("def f():\n", "    return 1\n\n", "f()")
    ask(page, "Code")
    is_done(page)
    assert answers(page).inner_text() == "def f():\n    return 1\n\nf()"


def test_the_speed_is_that_of_the_tokens_after_the_first(page: Page, server: FakeServer) -> None:
    page.clock.install(time=0)
    page.reload()
    page.clock.pause_at(1000)
    server.will_answer("a", HOLD, *"bcdef")
    ask(page, "Letters")
    expect(answers(page)).to_have_text("a")
    page.clock.run_for(2000)
    server.go_on.set()
    expect(page.get_by_text("2.5 tokens/s · 6 tokens")).to_be_visible()


def test_an_answer_that_was_cut_off_says_so(page: Page, server: FakeServer) -> None:
    server.will_answer("Once upon", finish="length")
    ask(page, "A story")
    expect(page.get_by_text("1 token · cut off at its maximum length")).to_be_visible()


def test_the_view_follows_an_answer_but_not_away_from_a_reader(
    page: Page, server: FakeServer
) -> None:
    scrolled = "() => Math.round(scrollY + innerHeight - document.documentElement.scrollHeight)"
    server.will_answer("line\n" * 100, HOLD, "more\n" * 100)
    ask(page, "Much")
    expect(answers(page)).to_contain_text("line")
    assert page.evaluate(scrolled) >= -1
    page.evaluate("() => scrollTo(0, 0)")
    server.go_on.set()
    expect(answers(page)).to_contain_text("more")
    is_done(page)
    assert page.evaluate("() => scrollY") == 0


# ---- Stopping, regenerating, starting anew.


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_ends_the_request_and_keeps_what_had_come(
    page: Page, server: FakeServer, how: str
) -> None:
    server.will_answer("Bon", HOLD, "jour")
    ask(page, "Hello")
    expect(answers(page)).to_have_text("Bon")
    if how == "button":
        button(page, "Stop").click()
    else:
        page.keyboard.press("Escape")
    is_done(page)
    assert server.left.wait(15)
    expect(answers(page)).to_have_text("Bon")
    expect(page.get_by_text("Stopped")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_empty()


def test_stopped_before_the_first_token_a_question_can_be_asked_again(
    page: Page, server: FakeServer
) -> None:
    server.will_answer(HOLD)
    server.will_answer("Bonjour")
    ask(page, "Hello")
    button(page, "Stop").click()
    server.left.wait(15)
    button(page, "Try again").click()
    expect(answers(page)).to_have_text("Bonjour")
    is_done(page)
    assert [body["messages"] for body in server.bodies] == [[user("Hello")]] * 2


def test_a_question_without_an_answer_is_sent_with_the_next(page: Page, server: FakeServer) -> None:
    """Chat templates want questions and answers to alternate."""
    server.will_fail(429, "busy")
    server.will_answer("Bonjour")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text("busy")
    ask(page, "In French")
    expect(answers(page)).to_have_text("Bonjour")
    assert server.bodies[1]["messages"] == [user("Hello\n\nIn French")]


def test_a_conversation_is_sent_whole(page: Page, server: FakeServer) -> None:
    for text in ("One", "Two"):
        server.will_answer(text)
        ask(page, f"{text}?")
        is_done(page)
    assert server.bodies[1]["messages"] == [user("One?"), assistant("One"), user("Two?")]


def test_regenerating_replaces_the_last_answer(page: Page, server: FakeServer) -> None:
    for text in ("One", "Two"):
        server.will_answer(text)
        ask(page, f"{text}?")
        is_done(page)
    server.will_answer(HOLD, "Deux")
    button(page, "Regenerate").click()
    expect(answers(page)).to_have_text(["One", "Two"])  # until the new one begins
    server.go_on.set()
    expect(answers(page)).to_have_text(["One", "Deux"])
    is_done(page)
    assert server.bodies[2] == server.bodies[1]


def test_an_answer_outlives_a_failure_to_regenerate_it(page: Page, server: FakeServer) -> None:
    server.will_answer("One")
    server.will_fail(500, "out of memory")
    ask(page, "Hello")
    is_done(page)
    button(page, "Regenerate").click()
    expect(page.get_by_role("alert")).to_have_text("out of memory")
    expect(answers(page)).to_have_text("One")


def test_a_new_conversation_is_empty_and_the_last_can_be_brought_back(
    page: Page, server: FakeServer
) -> None:
    server.will_answer("One", HOLD)
    ask(page, "Hello")
    expect(answers(page)).to_have_text("One")
    button(page, "New conversation").click()
    assert server.left.wait(15)  # the answer is not waited for
    expect(page.locator("article")).to_have_count(0)
    button(page, "Bring back the last conversation").click()
    expect(answers(page)).to_have_text("One")
    button(page, "New conversation").click()
    server.will_answer("Two")
    ask(page, "Again")
    expect(answers(page)).to_have_text("Two")
    assert server.bodies[1]["messages"] == [user("Again")]


# ---- Settings, and what a reload keeps.


def set_all(page: Page, system: str, temperature: str, length: str) -> None:
    button(page, "Settings").click()
    page.get_by_label("System prompt").fill(system)
    page.get_by_label("Temperature").fill(temperature)
    page.get_by_label("Maximum length").fill(length)
    page.keyboard.press("Escape")


def test_settings_are_in_the_request(page: Page, server: FakeServer) -> None:
    server.will_answer("Bonjour")
    set_all(page, "Speak French.", "0.25", "32")
    ask(page, "Hello")
    is_done(page)
    assert server.bodies == [
        {
            "model": "mistral-tiny",
            "messages": [{"role": "system", "content": "Speak French."}, user("Hello")],
            "temperature": 0.25,
            "max_tokens": 32,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_an_empty_setting_is_left_to_the_server(page: Page, server: FakeServer) -> None:
    server.will_answer("Bonjour")
    set_all(page, " ", "", "")
    ask(page, "Hello")
    is_done(page)
    assert server.bodies[0].keys() == {"model", "messages", "stream", "stream_options"}
    assert server.bodies[0]["messages"] == [user("Hello")]


def test_a_reload_keeps_the_conversation_and_the_settings(page: Page, server: FakeServer) -> None:
    server.will_answer("One")
    server.will_answer("Two")
    set_all(page, "Be brief.", "0", "8")
    ask(page, "One?")
    is_done(page)
    page.reload()
    expect(questions(page)).to_have_text("One?")
    expect(answers(page)).to_have_text("One")
    ask(page, "Two?")
    is_done(page)
    system = {"role": "system", "content": "Be brief."}
    assert server.bodies[1] == {
        **server.bodies[0],
        "messages": [system, user("One?"), assistant("One"), user("Two?")],
    }


def test_a_reload_in_mid_answer_keeps_what_had_come(page: Page, server: FakeServer) -> None:
    server.will_answer("Bon", "jour", HOLD)
    ask(page, "Hello")
    expect(answers(page)).to_have_text("Bonjour")
    page.reload()
    assert server.left.wait(15)
    expect(answers(page)).to_have_text("Bonjour")
    expect(page.get_by_text("Broken off")).to_be_visible()
    expect(button(page, "Regenerate")).to_be_visible()


def test_an_idle_tab_does_not_undo_what_another_kept(page: Page, server: FakeServer) -> None:
    with page.context.new_page() as idle:
        idle.goto(server.address)
        server.will_answer("One")
        ask(page, "Hello")
        is_done(page)
        idle.reload()
        expect(answers(idle)).to_have_text("One")


def test_a_browser_that_keeps_nothing_still_talks(page: Page, server: FakeServer) -> None:
    for storage in ("localStorage", "sessionStorage"):
        refuse = "get() { throw new DOMException('no'); }"
        page.add_init_script(f"Object.defineProperty(window, '{storage}', {{ {refuse} }})")
    page.reload()
    server.will_answer("Bonjour")
    ask(page, "Hello")
    expect(answers(page)).to_have_text("Bonjour")
    expect(page.get_by_role("alert")).to_contain_text("a reload will lose it")


# ---- What can go wrong.


def test_an_error_is_told_and_the_question_can_be_sent_again(
    page: Page, server: FakeServer
) -> None:
    server.will_fail(429, "8 requests are under way; try again in a moment")
    server.will_answer("Bonjour")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text(
        "8 requests are under way; try again in a moment"
    )
    button(page, "Try again").click()
    expect(answers(page)).to_have_text("Bonjour")
    expect(page.get_by_role("alert")).to_be_empty()


def test_an_error_that_is_not_the_servers_own_is_told_by_its_status(
    page: Page, server: FakeServer
) -> None:
    server.will_fail_with_html(502)
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text("The server answered with status 502.")


def test_a_server_that_is_gone_is_told_and_may_come_back(page: Page, server: FakeServer) -> None:
    expect(page.get_by_text("mistral-tiny")).to_be_visible()
    server.stop()
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    server.model = "another"
    server.start()
    server.will_answer("Bonjour")
    button(page, "Try again").click()
    expect(answers(page)).to_have_text("Bonjour")
    expect(page.locator("header")).to_contain_text("another")
    assert server.bodies[0]["model"] == "another"


OUT_OF_MEMORY = event(error={"message": "out of memory", "type": "server_error"})


@pytest.mark.parametrize(
    ("last", "message"),
    [(OUT_OF_MEMORY, "out of memory"), (b"", "The connection broke off before the answer")],
)
def test_an_answer_that_breaks_off_is_kept_and_told(
    page: Page, server: FakeServer, last: bytes, message: str
) -> None:
    server.will_answer("Bon", last, ends=False)
    server.will_answer("Bonjour")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect(answers(page)).to_have_text("Bon")
    expect(page.get_by_text("Broken off")).to_be_visible()
    button(page, "Regenerate").click()
    expect(answers(page)).to_have_text("Bonjour")


def test_an_answer_of_no_tokens_is_told(page: Page, server: FakeServer) -> None:
    server.will_answer()
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text("The answer was empty.")
    expect(answers(page)).to_have_count(0)


def test_a_key_is_asked_for_and_kept_for_this_tab_only(page: Page, server: FakeServer) -> None:
    server.key = "s3cret"
    server.will_answer("Bonjour")
    ask(page, "Hello")
    for key in ("wrong", "s3cret"):
        expect(page.get_by_role("alert")).to_have_text("This server needs its key.")
        expect(page.get_by_label("Key", exact=True)).to_be_focused()
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Bonjour")
    expect(page.get_by_label("Key", exact=True)).to_be_hidden()
    page.reload()
    expect(page.get_by_text("mistral-tiny")).to_be_visible()
    assert "s3cret" not in page.evaluate("() => JSON.stringify(localStorage)")
    assert page.get_by_label("Key", exact=True).input_value() == ""


# ---- The keyboard, the screen, the reader of a screen.


def test_enter_sends_and_shift_enter_starts_a_line(page: Page, server: FakeServer) -> None:
    server.will_answer("Bonjour")
    page.keyboard.type("One")  # the field has the focus already
    height = page.get_by_label("Message").evaluate("(field) => field.offsetHeight")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    assert page.get_by_label("Message").evaluate("(field) => field.offsetHeight") > height
    page.keyboard.press("Enter")
    expect(questions(page)).to_have_text("One\nTwo")
    is_done(page)
    assert server.bodies[0]["messages"] == [user("One\nTwo")]
    assert page.get_by_label("Message").input_value() == ""


def test_enter_that_picks_a_word_of_an_input_method_does_not_send(
    page: Page, server: FakeServer
) -> None:
    message = page.get_by_label("Message")
    message.fill("にほん")
    message.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    message.press("Shift")  # whatever was sent before is there by now
    expect(questions(page)).to_have_count(0)


def test_nothing_but_spaces_is_not_sent(page: Page, server: FakeServer) -> None:
    ask(page, "  \n ")
    button(page, "Send").click()
    expect(questions(page)).to_have_count(0)


def test_enter_while_an_answer_comes_keeps_what_is_typed(page: Page, server: FakeServer) -> None:
    server.will_answer("Bon", HOLD)
    ask(page, "Hello")
    expect(answers(page)).to_have_text("Bon")
    ask(page, "And then?")
    expect(questions(page)).to_have_count(1)
    expect(page.get_by_label("Message")).to_have_value("And then?")
    page.keyboard.press("Escape")


def test_escape_closes_the_settings_before_it_stops_an_answer(
    page: Page, server: FakeServer
) -> None:
    server.will_answer("Bon", HOLD)
    ask(page, "Hello")
    button(page, "Settings").click()
    page.keyboard.press("Escape")
    expect(page.get_by_label("System prompt")).to_be_hidden()
    expect(button(page, "Stop")).to_be_visible()
    page.keyboard.press("Escape")
    is_done(page)


def test_tab_reaches_everything_and_shows_where_it_is(page: Page, server: FakeServer) -> None:
    server.will_answer("Bonjour")
    ask(page, "Hello")
    is_done(page)
    button(page, "Settings").focus()
    page.keyboard.press("Enter")
    reached = []
    page.locator("#new").focus()
    for _ in range(9):
        reached.append(page.evaluate(FOCUSED))
        ring = "() => getComputedStyle(document.activeElement).outlineStyle"
        frame = "() => getComputedStyle(document.activeElement.parentElement).boxShadow"
        assert page.evaluate(ring) == "solid" or "0px 0px 0px 1px" in page.evaluate(frame)
        page.keyboard.press("Tab")
    around = ["new", "Settings", "system", "temperature", "length", "theme"]
    assert reached == [*around, "again", "prompt", "action"]


def test_a_conversation_needs_no_mouse(page: Page, server: FakeServer) -> None:
    server.will_answer("One")
    server.will_answer("Two", HOLD)
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("One")
    is_done(page)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # Regenerate
    expect(answers(page)).to_have_text("Two")
    expect(button(page, "Stop")).to_be_focused()
    page.keyboard.press("Enter")
    is_done(page)
    expect(button(page, "Send")).to_be_focused()


def test_a_screen_reader_gets_an_answer_once_and_whole(page: Page, server: FakeServer) -> None:
    page.evaluate(
        """() => {
            window.spoken = [];
            const live = document.querySelector("[aria-live=polite]");
            const watch = () => live.textContent && spoken.push(live.textContent);
            new MutationObserver(watch).observe(live, { childList: true });
        }"""
    )
    server.will_answer("Bon", "jour", " !", pause=0.05)
    ask(page, "Hello")
    is_done(page)
    assert page.evaluate("() => spoken") == ["Bonjour !"]
    expect(page.locator("[aria-live=polite]")).to_be_empty()  # no second copy for a search to find


def expect_dark(page: Page, dark: bool) -> None:
    """Waits until the page is dark, or light: the media feature reaches it a moment later."""
    page.wait_for_function(
        """dark => {
          const color = getComputedStyle(document.body).backgroundColor
          const [red, green, blue] = color.match(/\\d+/g).map(Number)
          return (red + green + blue < 3 * 128) === dark
        }""",
        arg=dark,
    )


def test_it_is_as_dark_as_the_system_until_somebody_chooses(page: Page) -> None:
    toggle = page.get_by_role("button", name="Dark mode")
    expect_dark(page, False)
    page.emulate_media(color_scheme="dark")
    expect_dark(page, True)
    expect(toggle).to_have_attribute("aria-pressed", "true")
    toggle.click()
    expect_dark(page, False)
    expect(toggle).to_have_attribute("aria-pressed", "false")
    page.reload()
    expect_dark(page, False)


def contrast(page: Page, selector: str) -> float:
    """How much the text of an element stands out from the page, as WCAG 2 defines it."""
    element = page.locator(selector).first
    colors = "(e) => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    color, background = element.evaluate(colors)
    if background == "rgba(0, 0, 0, 0)":
        background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    light, dark = sorted((luminance(color), luminance(background)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page: Page, server: FakeServer, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    server.will_answer("Bonjour")
    server.will_fail(500, "out of memory")
    ask(page, "Hello")
    is_done(page)
    button(page, "Regenerate").click()
    expect(page.get_by_role("alert")).to_be_visible()
    for selector in ("body", "#model", ".user p", "#problem", "#again", "#action", "#hint"):
        assert contrast(page, selector) >= 4.5, selector


def nothing_open(page: Page, server: FakeServer) -> None:
    pass


def settings_open(page: Page, server: FakeServer) -> None:
    button(page, "Settings").click()
    box = page.locator("#settings").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def key_wanted(page: Page, server: FakeServer) -> None:
    server.key = "s3cret"
    button(page, "Regenerate").click()
    expect(page.get_by_label("Key", exact=True)).to_be_visible()


@pytest.mark.parametrize("state", [nothing_open, settings_open, key_wanted])
def test_a_narrow_screen_is_not_scrolled_sideways(
    page: Page, server: FakeServer, state: Callable[[Page, FakeServer], None]
) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    server.will_answer("w" * 300)
    ask(page, "q" * 300)
    is_done(page)
    state(page, server)
    assert page.evaluate(WIDTH) == 360
    action = button(page, "Send").bounding_box()
    assert action is not None
    assert action["x"] + action["width"] <= 360
    assert action["y"] + action["height"] <= 640


# ---- The watch itself.


def test_what_the_policy_forbids_would_be_noticed(page: Page, faults: list[str]) -> None:
    inject = "() => { document.querySelector('main').innerHTML = '<img src=x onerror=alert(1)>'; }"
    with page.expect_event("console"):
        page.evaluate(inject)
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in fault for fault in faults)
    faults.clear()
