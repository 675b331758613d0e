"""Progress displays: a live bar in a terminal, plain lines elsewhere."""

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
LEAST_BAR = 6  # columns that the bar keeps in a narrow terminal
PLAIN_SECONDS = 10.0  # between two lines where there is no terminal
PATIENCE = 1.0  # seconds without a word, while a prompt is read


class Visible:
    r"""Sanitises streamed text for a terminal: no control characters, LF line ends.

    CR LF and CR become LF, also where a piece ends between the two; any other control character
    but tab becomes U+FFFD.

    >>> visible = Visible()
    >>> [visible.show(piece) for piece in ("one\r", "\ntwo\rthree\n")]
    ['one\n', 'two\nthree\n']
    """

    def __init__(self) -> None:
        self._after_return = False

    def show(self, text: str) -> str:
        """Sanitises the next piece."""
        if not text:
            return ""
        rest = text[1:] if self._after_return and text[0] == "\n" else text
        self._after_return = text[-1] == "\r"
        return rest.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROLS)


class PrefillProgress:
    """Prefill progress: tokens of the prompt read, tokens/s and time left, after the first second.

    On stderr: in a terminal one line that is overwritten, elsewhere a line every ten seconds.
    """

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Reports that `done` of `total` prompt tokens are read; 0 begins a prompt."""
        now = time.monotonic()
        if done == 0:
            self._began, self._last, self._shown = now, -PLAIN_SECONDS, False
        at_terminal = sys.stderr.isatty()
        width = shutil.get_terminal_size().columns - 1
        if done == total and self._shown and at_terminal:
            print("\r" + " " * width, end="\r", file=sys.stderr, flush=True)
        seconds = now - self._began
        is_due = at_terminal or now - self._last >= PLAIN_SECONDS
        if done == 0 or done == total or seconds < PATIENCE or not is_due:
            return
        rate = done / seconds
        left = clock((total - done) / rate)
        line = f"reading {done:,} of {total:,} tokens · {rate:,.0f} tokens/s · {left} left"
        self._shown, self._last = True, now
        if at_terminal:
            print("\r" + line[:width].ljust(width), end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


class Lasting:
    """An output stream that survives EPIPE, EIO and ENOSPC: what cannot be written is dropped.

    A closed terminal gives EIO, a reader that ended EPIPE, a full disk ENOSPC: in the middle of
    a step, or in the thread that draws the progress bar.

    Attributes:
        has_no_reader: whether it was a pipe whose reader has ended (EPIPE).
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.has_no_reader = False

    @property
    def encoding(self) -> str:
        """Of the stream."""
        return self._stream.encoding or "utf-8"

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def write(self, text: str) -> int:
        """Writes the text, or drops it if the stream is gone."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, or drops what is left if it is gone."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno in (errno.EIO, errno.EPIPE):  # for good, so that what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        self.has_no_reader |= error.errno == errno.EPIPE


class Display:
    """Progress bar of a training run: step, loss, tokens/s, MFU and time left.

    A context manager. `total` steps may be unknown at first; `say` prints a line above the bar.
    With `audible` False nothing is printed. It goes on if stdout fails.
    """

    def __init__(
        self, total: int | None, console: Console | None = None, audible: bool = True
    ) -> None:
        self._out = Lasting(sys.stdout)
        self.console = console or Console(
            file=cast("IO[str]", self._out), highlight=False, soft_wrap=True, quiet=not audible
        )
        self.total = total
        self._last = -PLAIN_SECONDS
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, status="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    @property
    def has_no_reader(self) -> bool:
        """Whether stdout was a pipe whose reader has ended (EPIPE), as `head` does."""
        return self._out.has_no_reader

    def say(self, text: str = "", style: str | None = None) -> None:
        """Prints text literally, without rich's markup and without control characters.

        An untrained model writes any byte, and some bytes would drive the terminal.
        """
        self.console.print(Visible().show(text), style=style, markup=False, emoji=False)

    def advance(
        self,
        step: int,
        loss: float,
        tokens_per_s: float,
        seconds_left: float | None,
        mfu: float | None = None,
    ) -> None:
        """Shows the progress of training; without a terminal, a line every ten seconds.

        The most important part comes first, since a narrow terminal cuts the rest.
        """
        parts = [] if seconds_left is None else [f"{clock(seconds_left)} left"]
        parts += [f"loss {loss:.3f}", f"{tokens_per_s:,.0f} tokens/s"]
        parts += [] if mfu is None else [f"MFU {100 * mfu:.0f} %"]
        status = " · ".join(parts)
        of = "" if self.total is None else f"/{self.total}"
        if self.console.is_terminal:
            self._move(f"step {step}{of}", step, self.total, status)
        elif time.monotonic() - self._last >= PLAIN_SECONDS or step == self.total:
            self._last = time.monotonic()
            self.say(f"step {step}{of} · {status}")

    def wait(self, what: str) -> None:
        """Shows, in a terminal, a task of unknown length."""
        self._bar.remove_task(self._task)  # since no update makes a known total unknown again
        self._task = self._bar.add_task(what, total=None, status="")

    def work(self, what: str, done: int, total: int, more: str = "") -> None:
        """Shows the progress of a task beside training, such as the final evaluation."""
        status = f"{done}/{total}{more}"
        if self.console.is_terminal:
            self._move(what, done, total, status)
        elif done == total or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.say(f"{what} {status}")

    def counter(self, what: str, each: int = 1, unit: str = "") -> Callable[[int, int], None]:
        """A function that shows the progress of a task beside training, with rate and time left.

        The rate counts `each` of the unit for one that is done.
        """
        began = time.monotonic()

        def show(done: int, total: int) -> None:
            rate = max(done, 1) / max(time.monotonic() - began, 1e-9)
            left = clock((total - done) / rate)
            self.work(what, done, total, f" · {left} left · {each * rate:,.0f}{unit}/s")

        return show

    def _move(self, what: str, done: int, total: int | None, status: str) -> None:
        """Updates the bar, with as many leading parts of the status as fit beside it."""
        room = self.console.width - len(what) - LEAST_BAR - 2
        parts = status.split(" · ")
        while len(parts) > 1 and len(" · ".join(parts)) > room:
            parts.pop()
        status = " · ".join(parts)
        self._bar.update(self._task, completed=done, total=total, description=what, status=status)


class Meter(Display):
    """Progress bar in bytes, with rate and time left; a context manager."""

    def __init__(self, total: int, console: Console) -> None:
        super().__init__(total, console)
        self._bytes, self.done = total, 0
        self._began = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def add(self, n: int) -> None:
        """Adds bytes that are done."""
        self.done += n
        rate = max(self.done, 1) / max(self.seconds, 1e-9)
        status = (
            f"{self.done / 1e9:.2f} of {self._bytes / 1e9:.2f} GB · {rate / 1e9:.2f} GB/s · "
            f"{clock(max(0.0, (self._bytes - self.done) / rate))} left"
        )
        if self.console.is_terminal:
            self._move("", self.done, self._bytes, status)
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.say(status)


def note(text: str) -> None:
    """Prints a message to stderr."""
    print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Formats a duration in seconds as minutes and seconds, or hours.

    >>> clock(75.4), clock(3671.0)
    ('1:15', '1:01:11')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
