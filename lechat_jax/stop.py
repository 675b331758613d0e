"""Ctrl-C and SIGTERM as a wish, granted when the work in hand is done."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """Within it, the first SIGINT or SIGTERM is only noted; a second one has its old effect.

    `asked` names the signal that came, or is empty. Enter it on the main thread.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
