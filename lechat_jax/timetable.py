"""How long a run is, and after which steps it does something else than learn."""

import time

import psutil

from lechat_jax.distributed import anywhere, from_first
from lechat_jax.options import TrainConfig

TRAINING_SHARE = 0.85  # of the minutes; the rest validates, saves, samples, and is slack
CHECKPOINT_SECONDS = 60.0
EVENTS = {"eval": 10, "sample": 4, "checkpoint": 0}  # how often in a run, unless asked otherwise


def elapsed() -> float:
    """Seconds since this process started, interpreter and imports included."""
    return time.time() - psutil.Process().create_time()


class Timetable:
    """When a run validates, samples and saves, and when it ends.

    Attributes:
        total: steps of the run; `None` while their number is still to be measured.
        most: steps of a run whose length is measured, at most.
    """

    total: int | None

    def __init__(self, options: TrainConfig, steps_per_epoch: float) -> None:
        self.options = options
        self.total = options.steps
        self.most = max(1, int(options.max_epochs * steps_per_epoch))
        self.start_the_clock()

    @property
    def end(self) -> int:
        """The last step, as far as it is known."""
        return self.total or self.most

    def start_the_clock(self) -> None:
        """Nothing is to be saved by the clock before its time has gone by from now."""
        self._saved = time.monotonic()

    def every(self, what: str) -> int | None:
        """Steps between two of the events, once the length of the run is known.

        Checkpoints that nobody asked for go by the clock.
        """
        asked, parts = getattr(self.options, f"{what}_every"), EVENTS[what]
        return asked or (max(1, -(-self.total // parts)) if self.total and parts else None)

    def due(self, what: str, step: int) -> bool:
        """Whether it is to be done after that step."""
        if every := self.every(what):
            return step % every == 0
        late = time.monotonic() - self._saved > CHECKPOINT_SECONDS
        return what == "checkpoint" and anywhere(late)

    def is_alone(self, step: int) -> bool:
        """Whether nothing may begin after that step before all is done that is due then."""
        return self.total is None or any(self.due(what, step) for what in EVENTS)

    def steps_after(self, step: int) -> int:
        """As many as there are until something is to be done."""
        ends = [step + n - step % n for n in map(self.every, EVENTS) if n]
        return min([self.end, *ends]) - step

    def settle(self, step: int, seconds_per_step: float) -> str:
        """Turns the minutes into a number of steps, and says why there are so many.

        The same on all processes. Steps before were taken at a rate that does not depend on it.
        """
        left = max(0.0, self.options.minutes * 60 - elapsed())
        fits = from_first(lambda: step + int(TRAINING_SHARE * left / seconds_per_step))
        self.total = max(step, min(fits, self.most))
        if self.most < fits:
            return f"{self.options.max_epochs:g} passes over the text (--max-epochs)"
        return f"{self.options.minutes:g} minutes"
