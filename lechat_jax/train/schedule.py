"""Schedule of a run: its length, its learning rate, and when it validates, samples and saves.

All of it is a function of the step and of a list of plans, which is stored with the run. Where
minutes were asked for, a plan is measured after a few steps, and another one follows whenever the
machine turns out faster or slower, so that the time is kept. A run that resumes takes the plans
as they are stored, each from the step on from which it was in force, and makes no others: so it
is the same run, bit for bit.
"""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import psutil

from lechat_jax.devices.processes import anywhere, from_first
from lechat_jax.train.optimizer import COOLDOWN, RateSchedule
from lechat_jax.train.options import TrainConfig

TRAINING_SHARE = 0.85  # of the minutes; the rest validates, saves, samples, and is slack
TOLERANCE = 0.01  # of the minutes; a plan that would miss them by more is made anew
CHECKPOINT_SECONDS = 60.0
CLOSING_SECONDS = 3.0  # the curve, and the end of the interpreter
EVENTS = {"eval": 10, "sample": 4, "checkpoint": 0}  # how often in a run, unless asked otherwise


def process_start() -> float:
    """When this process started, interpreter and imports included, in seconds of the epoch."""
    return psutil.Process().create_time()


def elapsed(began: float) -> float:
    """Seconds since `began`, in seconds of the epoch."""
    return time.time() - began


class Plan(NamedTuple):
    """Length and learning-rate schedule of a run, as planned from one step on.

    Attributes:
        since: that step.
        first: where the rate began to rise: 0, or where a run was trained further.
        steps: the last step of the run; `None` while it is still to be measured.
        cooldown: steps in which the rate would fall from its peak to zero.
    """

    since: int
    first: int
    steps: int | None
    cooldown: float

    @classmethod
    def initial(cls, first: int, steps: int | None) -> "Plan":
        """The plan of a run, or of its continuation, from `first` to `steps`."""
        return cls(first, first, steps, _float32(COOLDOWN, float((steps or first) - first)))


class Schedule:
    """When a run validates, samples and saves, at which rate it learns, and when it ends.

    Attributes:
        plans: one after the other, by the step from which on they are in force.
        minutes: to train for, from `began` on, if steps are not given.
        began: when the run started, in seconds of the epoch.
        pace: seconds of a step, lately; 0 before any was timed.
    """

    def __init__(
        self,
        options: TrainConfig,
        steps_per_epoch: float,
        stored: Iterable[Mapping[str, Any]] = (),
        began: float = 0.0,
    ) -> None:
        self.options, self.steps_per_epoch, self.began = options, steps_per_epoch, began
        self.plans = [Plan(**plan) for plan in stored] or [Plan.initial(0, options.steps)]
        self.minutes = options.usual_minutes
        self.pace = 0.0
        self._cost: dict[str, float] = {}  # in steps, since a slower machine is slower at all
        self._has_deadline = False
        self.start_the_clock()

    @property
    def total(self) -> int | None:
        """Steps of the run; `None` while their number is still to be measured."""
        return self.plans[-1].steps

    @property
    def most(self) -> int:
        """Steps of a run whose length is measured, at most."""
        return self.plans[-1].first + max(1, int(self.options.max_epochs * self.steps_per_epoch))

    def start_the_clock(self) -> None:
        """Restarts the interval after which a checkpoint is due by the clock."""
        self._saved = time.monotonic()

    def extend(self, step: int, steps: int | None, minutes: float | None) -> None:
        """Continues a run for so many steps or minutes, with a new learning-rate schedule."""
        self.plans = [plan for plan in self.plans if plan.since < step]
        self.plans.append(Plan.initial(step, steps and step + steps))
        self.minutes = minutes or self.minutes

    def took(self, what: str, seconds: float) -> None:
        """Records the duration of an event, or of the last validation, in steps at their pace."""
        if self.pace:
            self._cost[what] = seconds / self.pace

    def at(self, step: int) -> Plan:
        """The plan in force at a step."""
        return next(plan for plan in reversed(self.plans) if plan.since <= step or not plan.since)

    def rate_at(self, step: int) -> RateSchedule:
        """The learning-rate schedule in force at a step."""
        first, end, cooldown = self._curve(step)
        return RateSchedule(np.int32(first), np.int32(end), np.float32(cooldown))

    def _curve(self, step: int) -> tuple[int, int, float]:
        plan = self.at(step)
        if plan.steps is not None:
            return plan.first, plan.steps, plan.cooldown
        return plan.first, self.most, Plan.initial(plan.first, self.most).cooldown

    def every(self, what: str, step: int) -> int | None:
        """Interval between two events of a kind in steps, once the length of the run is known.

        It does not change with what the clock makes of the length. Checkpoints that nobody asked
        for go by the clock.
        """
        asked, parts = getattr(self.options, f"{what}_every"), EVENTS[what]
        first = self.at(step).first
        known = [plan.steps - first for plan in self.plans if plan.first == first and plan.steps]
        return asked or (max(1, -(-known[0] // parts)) if known and parts else None)

    def due(self, what: str, step: int) -> bool:
        """Whether an event of that kind is due after the step."""
        if every := self.every(what, step):
            return step % every == 0
        late = time.monotonic() - self._saved > CHECKPOINT_SECONDS
        return what == "checkpoint" and anywhere(late)

    def is_alone(self, step: int) -> bool:
        """Whether the next step must wait: an event is due, or the run's length is unknown."""
        return self.total is None or any(self.due(what, step) for what in EVENTS)

    def steps_after(self, step: int) -> int:
        """Number of steps until the next event, the next plan or the end."""
        ends = [step + n - step % n for what in EVENTS if (n := self.every(what, step))]
        changes = [plan.since for plan in self.plans if plan.since > step]
        return min([self.total or self.most, *ends, *changes]) - step

    def settle(self, step: int, seconds_per_step: float) -> str:
        """Determines the number of steps that fit the minutes, and says what limits it.

        The same on all processes. Steps before were taken at a rate that does not depend on it.
        """
        self._has_deadline, self.pace = True, seconds_per_step
        fits = from_first(lambda: self._fitting(step))
        self._plan(step, max(step, min(fits, self.most)))
        if self.most < fits:
            return f"{self.options.max_epochs:g} passes over the text (--max-epochs)"
        return f"{self.minutes:g} minutes"

    def revise(self, step: int, sent: int, seconds_per_step: float) -> bool:
        """Revises the number of steps to keep the time; whether it changed what is not `sent` yet.

        Never those of a run whose length was known when this process began.
        """
        total, self.pace = self.total, seconds_per_step
        if not self._has_deadline or total is None or sent >= total:
            return False
        fits = from_first(lambda: self._fitting(step))
        fits = max(sent, min(fits, self.most))
        missed = abs(fits - total) * seconds_per_step
        if not from_first(lambda: missed > TOLERANCE * 60 * self.minutes):
            return False
        self._plan(sent, fits)
        return True

    def _fitting(self, step: int) -> int:
        """The last step that leaves time for what follows training."""
        left = 60 * self.minutes - elapsed(self.began)
        if self.total is None or "eval" not in self._cost:
            return step + int(max(0.0, TRAINING_SHARE * left) / self.pace)
        events = self._cost.keys() & EVENTS.keys()
        rest = sum(self._cost[what] * self._times(what, step, left) for what in events) * self.pace
        # A last validation that is longer than what is set aside for it has to be cut short.
        share = (1 - TRAINING_SHARE) * 60 * self.minutes
        rest += min(share, self._cost.get("ending", math.inf) * self.pace) + CLOSING_SECONDS
        return step + int(max(0.0, left - rest) / self.pace)

    def _times(self, what: str, step: int, left: float) -> float:
        """Number of events of a kind still to come, the last sample and checkpoint included."""
        last = what != "eval"
        if every := self.every(what, step):
            return float(((self.total or step) - 1) // every - step // every + last)
        return max(0.0, left / CHECKPOINT_SECONDS) + last

    def _plan(self, since: int, total: int) -> None:
        """Appends a plan: from `since` on the rate falls from where it is to zero at `total`."""
        first, end, cooldown = self._curve(since)
        rate = min(1.0, (end - since) / cooldown)
        left = float(total - since)
        length = min(COOLDOWN * (total - first), left) if rate == 1.0 else left
        plan = Plan(since, first, total, max(1.0, _float32(1 / max(rate, 1e-6), length)))
        self.plans = [p for p in self.plans if p.since < since or p.steps is None] + [plan]


def _float32(a: float, b: float) -> float:
    """The product in float32, as a device computes it."""
    return float(np.float32(a) * np.float32(b))
