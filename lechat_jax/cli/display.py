"""Progress displays: a live bar in a terminal, plain lines elsewhere."""

import errno
import os
import shutil
import sys
import time
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
LEAST_BAR = 6  # columns that the bar keeps in a narrow terminal
PLAIN_SECONDS = 10.0  # between two lines where there is no terminal
PATIENCE = 1.0  # seconds without a word, while a prompt is read


class Visible:
    r"""Text as a terminal can show it, piece by piece, without what would drive the terminal.

    Line ends of Windows and of old Macs are line ends, also where one piece ends within one;
    any other control character is U+FFFD.

    >>> visible = Visible()
    >>> [visible.show(piece) for piece in ("one\r", "\ntwo\rthree\n")]
    ['one\n', 'two\nthree\n']
    """

    def __init__(self) -> None:
        self._after_return = False

    def show(self, text: str) -> str:
        """The next piece."""
        if not text:
            return ""
        rest = text[1:] if self._after_return and text[0] == "\n" else text
        self._after_return = text[-1] == "\r"
        return rest.replace("\r\n", "\n").replace("\r", "\n").translate(CONTROLS)


class Reading:
    """How far a prompt is read, its rate and the time left, for whoever waits a second for it.

    On stderr: in a terminal a line that is replaced and goes, elsewhere one every ten seconds.
    """

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """So many tokens of a prompt are read; 0 begins a prompt."""
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
    """A stream whose end does not end the work: what cannot be written any more is dropped.

    A terminal that was closed gives EIO, a reader that has gone EPIPE, a full disk ENOSPC, all
    of them in the middle of a step, or in the thread that draws the bar.

    Attributes:
        has_no_reader: it was a pipe, and nobody is at its other end any more.
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
        """Whether a person may be there."""
        return self._stream.isatty()

    def write(self, text: str) -> int:
        """Writes it, or tries to."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Hands on what was written, or tries to."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno in (errno.EIO, errno.EPIPE):  # for good, so that what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        self.has_no_reader |= error.errno == errno.EPIPE


class Display:
    """Progress of one run, with its loss, its rate and the time left.

    Use it as a context. `total` steps may be unknown at first; `say` prints a line of
    its own, above the bar where there is one. What is not `audible` prints nothing. It does not
    fail if stdout does.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def has_no_reader(self) -> bool:
        """Whether stdout was a pipe to a program that has ended, as `head` does."""
        return self._out.has_no_reader

    def say(self, text: str = "", style: str | None = None) -> None:
        """Prints text as it is, even what looks like markup, but without control characters.

        A young model writes any byte, and some bytes would drive the terminal.
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
        """Shows where training is; without a terminal, a line every ten seconds or so.

        What matters most comes first, since a narrow terminal has no room for the rest.
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
        """Shows, in a terminal, that something goes on whose end is not known."""
        self._bar.remove_task(self._task)  # since no update makes a known total unknown again
        self._task = self._bar.add_task(what, total=None, status="")

    def work(self, what: str, done: int, total: int, more: str = "") -> None:
        """Shows how far a part beside training is, such as the final evaluation."""
        status = f"{done}/{total}{more}"
        if self.console.is_terminal:
            self._move(what, done, total, status)
        elif done == total or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.say(f"{what} {status}")

    def _move(self, what: str, done: int, total: int | None, status: str) -> None:
        """Moves the bar; of the status what fits beside it, from the front, in whole parts."""
        room = self.console.width - len(what) - LEAST_BAR - 2
        parts = status.split(" · ")
        while len(parts) > 1 and len(" · ".join(parts)) > room:
            parts.pop()
        status = " · ".join(parts)
        self._bar.update(self._task, completed=done, total=total, description=what, status=status)


class Meter(Display):
    """Bytes done of a total, with their rate and the time left. Use it as a context."""

    def __init__(self, total: int, console: Console) -> None:
        super().__init__(total, console)
        self._bytes, self.done = total, 0
        self._began = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def add(self, n: int) -> None:
        """So many more bytes are done."""
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


def clock(seconds: float) -> str:
    """A duration as minutes and seconds.

    >>> clock(75.4), clock(3671.0)
    ('1:15', '1:01:11')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
