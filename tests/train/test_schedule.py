"""Minutes are kept though the machine changes its pace, and each step is as it was planned."""

import dataclasses
import types
from collections.abc import Callable

import numpy as np
import pytest

from lechat_jax.train import schedule
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.schedule import Schedule

CALL = 4  # steps
Pace = Callable[[float], float]  # seconds of a step, by the time


@dataclasses.dataclass
class Machine:
    """A time that passes only by work."""

    pace: Pace
    now: float = 8.0  # of imports and the text

    def works(self, steps: float) -> float:
        """Seconds that so much work takes, as much as so many steps, which pass."""
        seconds = steps * self.pace(self.now)
        self.now += seconds
        return seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(lambda now: 0.5)
    monkeypatch.setattr(schedule, "elapsed", lambda began: machine.now)
    monkeypatch.setattr(schedule, "time", types.SimpleNamespace(monotonic=lambda: machine.now))
    return machine


def rate(table: Schedule, step: int) -> float:
    first, end, cooldown = (float(np.asarray(number)) for number in table.rate_at(step))
    return max(0.0, min((step - first + 1) / 10, (end - step) / cooldown, 1.0))


def train(table: Schedule, machine: Machine, step: int = 0) -> dict[int, float]:
    """The rates of all steps; afterwards the time is that of the end, all that comes then included.

    Validation, a sample and a checkpoint are worth 3, 2 and 1 steps, and the last validation 40.
    """
    rates, calls = {}, []
    work = {"eval": 3, "sample": 2, "checkpoint": 1}
    machine.works(10)  # to compile
    while step != table.total:
        n = min(CALL, table.steps_after(step))
        rates |= {i: rate(table, i) for i in range(step, step + n)}
        calls = [*calls, machine.works(n) / n][-6:]
        step += n
        if table.total is None and len(calls) > 3:
            table.settle(step, float(np.median(calls)))
        elif table.total is not None:
            table.revise(step, step, float(np.mean(calls)))
        if step == table.total:
            break
        for what, steps in work.items():
            if table.due(what, step):
                table.took(what, machine.works(steps))
                table.took("ending", 40 * machine.pace(machine.now))
                if what == "checkpoint":
                    table.start_the_clock()
    machine.works(40 + work["sample"] + work["checkpoint"])
    return rates


PACES: dict[str, Pace] = {
    "steady": lambda now: 0.5,
    "a hog comes after two minutes": lambda now: 0.5 if now < 120 else 1.1,
    "a hog goes after two minutes": lambda now: 1.1 if now < 120 else 0.5,
    "slower and slower": lambda now: 0.3 + now / 400,
    "a hog comes near the end": lambda now: 0.5 if now < 240 else 0.8,
    "now and then": lambda now: 0.5 if now % 60 < 40 else 1.0,
}


@pytest.mark.parametrize("pace", PACES.values(), ids=PACES.keys())
def test_minutes_are_kept_within_5_percent(pace: Pace, machine: Machine) -> None:
    machine.pace = pace
    table = Schedule(TrainConfig(minutes=5.0), steps_per_epoch=1e6)
    rates = train(table, machine)
    assert machine.now == pytest.approx(300, rel=0.05)
    # And the rate rises, stays and falls to nothing, without a jump.
    assert list(rates) == list(range(len(rates)))
    assert rates[9] == 1
    assert rates[table.total - 1 if table.total else 0] < 0.1
    assert max(abs(rates[i + 1] - rates[i]) for i in range(9, len(rates) - 1)) < 0.05


@pytest.mark.parametrize("at", [20, 100, 200, 300])
def test_a_run_that_resumes_takes_each_step_as_it_was_planned(at: int, machine: Machine) -> None:
    """On another machine, however slow, and from whichever checkpoint."""
    options = TrainConfig(minutes=5.0)
    machine.pace = PACES["a hog comes after two minutes"]
    table = Schedule(options, 1e6)
    rates = train(table, machine)
    assert len(table.plans) > 2, "it was planned anew on the way"
    stored = [plan._asdict() for plan in table.plans]
    machine.pace = lambda now: 7.0
    again = Schedule(dataclasses.replace(options, steps=table.total), 1e6, stored)
    assert train(again, machine, at) == {step: rates[step] for step in range(at, len(rates))}
    assert [plan._asdict() for plan in again.plans] == stored


def test_steps_that_were_asked_for_are_taken_whatever_they_take(machine: Machine) -> None:
    machine.pace = lambda now: now
    table = Schedule(TrainConfig(steps=60), 1e6)
    assert len(train(table, machine)) == 60
    assert len(table.plans) == 1


def test_passes_over_the_text_end_a_run_before_its_minutes(machine: Machine) -> None:
    table = Schedule(TrainConfig(minutes=5.0, max_epochs=3.0), steps_per_epoch=20.0)
    assert len(train(table, machine)) == 60


def test_a_finished_run_rises_stays_and_falls_again(machine: Machine) -> None:
    table = Schedule(TrainConfig(steps=100), 1e6)
    first = train(table, machine)
    table.extend(100, steps=200, minutes=None)
    second = train(table, machine, 100)
    whole = train(Schedule(TrainConfig(steps=200), 1e6), machine)
    assert list(second) == list(range(100, 300))
    assert list(second.values()) == list(whole.values())
    again = Schedule(TrainConfig(), 1e6, [plan._asdict() for plan in table.plans])
    assert train(again, machine, 40) == {s: r for s, r in (first | second).items() if s >= 40}
    assert [again.every("eval", step) for step in (50, 150)] == [10, 20]


def test_a_finished_run_is_trained_for_more_minutes(machine: Machine) -> None:
    table = Schedule(TrainConfig(steps=100), 1e6)
    train(table, machine)
    machine.now = 8.0  # of another process
    table.extend(100, steps=None, minutes=2.0)
    rates = train(table, machine, 100)
    assert machine.now == pytest.approx(120, rel=0.05)
    assert list(rates) == list(range(100, 100 + len(rates)))
    assert [rates[100], rates[109]] == pytest.approx([0.1, 1])
