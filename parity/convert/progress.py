"""How far a copy of many bytes is: a bar in a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lechat_jax.cli.display import clock

PLAIN_SECONDS = 5.0  # between two lines where there is no terminal


class Meter:
    """Bytes done of a total, with their rate and the time left. Use it as a context."""

    def __init__(self, total: int, console: Console) -> None:
        self.total, self.console = total, console
        self.done = 0
        self._began = self._last = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, status="")

    def __enter__(self) -> "Meter":
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
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def add(self, n: int) -> None:
        """So many more bytes are done."""
        self.done += n
        if self.console.is_terminal:
            self._bar.update(self._task, completed=self.done, status=self._status())
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.console.print(self._status(), markup=False)

    def _status(self) -> str:
        rate = self.done / max(self.seconds, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        return (
            f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB · "
            f"{rate / 1e9:.2f} GB/s · {clock(max(0.0, left))} left"
        )
