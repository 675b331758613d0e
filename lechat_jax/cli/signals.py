"""Graceful shutdown: SIGINT, SIGTERM and SIGHUP are noted, and the work at hand is finished."""

import signal
from types import FrameType
from typing import Any

# A terminal that is closed, or an ssh that is lost: SIGHUP, which Windows has no word for and
# calls SIGBREAK. It comes several times, from the shell and from the system.
LOST = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name))
WISHES = (signal.SIGINT, signal.SIGTERM, *LOST)


class Stop:
    """Context manager in which the first SIGINT, SIGTERM or SIGHUP is only noted, for a clean stop.

    A second SIGINT or SIGTERM acts as usual; a second SIGHUP is still only noted, since nobody is
    there to be impatient. Ignored signals stay ignored, as under `nohup`.

    `received` names the signal that came, or is empty. Enter it on the main thread.
    """

    def __init__(self) -> None:
        self.received = ""
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        for number in WISHES:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        for wish, old in self._old.items():
            if wish not in LOST:
                signal.signal(wish, old)
