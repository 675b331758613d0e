"""Plain lines, not too many, without a terminal; a live bar with one; texts as they are."""

import errno
import io
import os
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from lechat_jax.cli import display
from lechat_jax.cli.display import Display, clock


class Clock:
    """A time that passes only when it is set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display, "time", types.SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, highlight=False, soft_wrap=True)


@pytest.fixture
def terminal() -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=100, highlight=False, soft_wrap=True
    )


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- while a prompt is read ---


def read(time: Clock, seconds: list[float], done: list[int]) -> None:
    reading = display.PrefillProgress()
    for time.now, n in zip(seconds, done, strict=True):
        reading(n, 32_000)


def test_a_long_prompt_is_told_of_every_ten_seconds(
    time: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds, done = [5.0, 5.5, 7.0, 8.0, 17.0, 20.0], [0, 500, 2000, 3000, 12_000, 32_000]
    read(time, seconds, done)
    assert capsys.readouterr().err == (
        "reading 2,000 of 32,000 tokens \u00b7 1,000 tokens/s \u00b7 0:30 left\n"
        "reading 12,000 of 32,000 tokens \u00b7 1,000 tokens/s \u00b7 0:20 left\n"
    )


def test_at_a_terminal_it_is_one_line_that_goes(
    time: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "31")
    read(time, [0.0, 0.9, 2.0, 3.0, 4.0], [0, 900, 2000, 3000, 32_000])
    assert screen.getvalue().split("\r") == [
        *("", "reading 2,000 of 32,000 tokens", "reading 3,000 of 32,000 tokens", " " * 30, ""),
    ]


def test_a_short_prompt_is_not_worth_a_word(
    time: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    read(time, [0.0, 0.9, 1.1], [0, 16_000, 32_000])
    assert capsys.readouterr() == ("", "")


# --- without a terminal ---


def test_progress_is_a_plain_line(plain: Console, time: Clock) -> None:
    with Display(100, plain) as display:
        display.advance(step=3, loss=2.3456, tokens_per_s=1234.4, seconds_left=75.4)
    assert shown(plain) == "step 3/100 · 1:15 left · loss 2.346 · 1,234 tokens/s\n"


def test_the_use_of_the_device_is_shown_if_it_is_known(plain: Console, time: Clock) -> None:
    with Display(100, plain) as display:
        display.advance(3, 2.0, 10.0, None, mfu=0.617)
    assert shown(plain) == "step 3/100 · loss 2.000 · 10 tokens/s · MFU 62 %\n"


def test_a_total_not_known_yet_is_left_out(plain: Console, time: Clock) -> None:
    with Display(None, plain) as display:
        display.advance(3, 2.0, 10.0, None)
        display.total = 100
        time.now = 10
        display.advance(4, 1.0, 10.0, None)
    assert shown(plain) == (
        "step 3 · loss 2.000 · 10 tokens/s\nstep 4/100 · loss 1.000 · 10 tokens/s\n"
    )


def test_there_is_a_line_every_ten_seconds_and_one_at_the_end(plain: Console, time: Clock) -> None:
    with Display(99, plain) as display:
        for step in range(1, 100):
            time.now = step / 4  # seconds
            display.advance(step, 2.0, 10.0, None)
    steps = [line.split()[1] for line in shown(plain).splitlines()]
    assert steps == ["1/99", "41/99", "81/99", "99/99"]


def test_so_it_is_for_work_beside_training(plain: Console, time: Clock) -> None:
    with Display(100, plain) as display:
        for done in range(1, 100):
            time.now = done / 4
            display.work("validating, row", done, 99)
    assert shown(plain).splitlines() == [f"validating, row {done}/99" for done in (1, 41, 81, 99)]


def test_nothing_but_text_is_written(plain: Console, time: Clock) -> None:
    with Display(100, plain) as display:
        display.say("hello", style="red")
        display.advance(1, 2.0, 10.0, None)
        display.say("a long line " * 30)
    assert "\x1b" not in shown(plain)
    assert shown(plain).count("\n") == 3  # not wrapped at a width that no one has


# --- with one ---


def test_a_terminal_has_a_live_bar(terminal: Console) -> None:
    with Display(100, terminal) as display:
        display.advance(step=50, loss=2.3456, tokens_per_s=1234.4, seconds_left=75.4)
        display.say("above the bar")
    text = shown(terminal)
    assert "\x1b[?25l" in text  # the cursor is hidden
    assert "━━━━" in text
    assert "step 50/100" in text
    assert "1:15 left · loss 2.346 · 1,234 tokens/s" in text
    assert "above the bar\n" in text
    assert text.endswith("\x1b[2K")  # and the bar is gone again, the cursor back
    assert "\x1b[?25h" in text


@pytest.mark.parametrize(
    ("width", "status"),
    [
        (100, "1:15 left · loss 2.346 · 1,234 tokens/s · MFU 62 %"),
        (70, "1:15 left · loss 2.346 · 1,234 tokens/s"),
        (50, "1:15 left · loss 2.346"),
        (30, "1:15 left"),
    ],
)
def test_a_narrow_terminal_has_the_step_and_the_time_left(width: int, status: str) -> None:
    narrow = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with Display(1000, narrow) as display:
        display.advance(575, 2.3456, 1234.4, 75.4, mfu=0.617)
    line = shown(narrow).split("\x1b[2K")[1].splitlines()[0]
    assert line.startswith("step 575/1000 ━")
    assert line.endswith(f" {status}")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_ends_as_on_any_system(plain: Console, end: str) -> None:
    Display(None, plain).say(f"one{end}two{end}")
    assert shown(plain) == "one\ntwo\n\n"


def test_the_bar_shows_other_work_too(terminal: Console) -> None:
    with Display(None, terminal) as display:
        display.work("validating, row", 3, 9)
    assert "validating, row" in shown(terminal)
    assert "3/9" in shown(terminal)


def test_the_bar_is_taken_down_when_the_work_fails(terminal: Console) -> None:
    with pytest.raises(RuntimeError, match="no"), Display(9, terminal):
        raise RuntimeError("no")
    assert "\x1b[?25h" in shown(terminal)


# --- with nobody there any more ---


@pytest.mark.parametrize(
    ("number", "is_pipe"), [(errno.EIO, False), (errno.ENOSPC, False), (errno.EPIPE, True)]
)
def test_what_cannot_be_shown_ends_nothing(
    number: int, is_pipe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed terminal, a full disk, and a pipe to a program that has ended."""
    path = tmp_path / "out.txt"

    class Failing(io.StringIO):
        def fileno(self) -> int:
            return there.fileno()

        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    with path.open("w") as there:
        monkeypatch.setattr(sys, "stdout", Failing())
        with Display(9) as display:
            assert not display.has_no_reader
            for step in (1, 2):
                display.say("hello")
                display.advance(step, 2.0, 10.0, None)
            assert display.has_no_reader == is_pipe
        there.write("more")  # of what is gone for good, nothing is written in vain at the end
    assert path.read_text() == ("more" if number == errno.ENOSPC else "")


# --- texts ---


@pytest.mark.parametrize(
    "text",
    [
        "[bold]not bold[/bold] [/] [link=https://example.org]",
        "a list: [1, 2, 3]",
        "he said :smile: and :warning:",
        "back\\slash \\[x]",
        "caf\u00e9 \U0001f600",
    ],
)
@pytest.mark.parametrize("kind", ["plain", "terminal"])
def test_a_text_is_printed_as_it_is(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    console = request.getfixturevalue(kind)
    Display(None, console).say(text)
    assert shown(console) == text + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.6, "1:00:00"), (86_400.0, "24:00:00")],
)
def test_a_duration_is_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
