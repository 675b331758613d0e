"""Validation curves over training time, learners in turn, each with a clock of its own."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lechat_jax.data.held_out import HeldOut
from lechat_jax.errors import BadInput
from lechat_jax.eval.score import Score
from lechat_jax.train.flops import flops_per_token
from parity.bench.learners.lechat import FOREVER, Learner, Setup
from parity.measure import PeakMemory, wait_until_idle
from parity.report import Row, TableText

PEER = "parity.bench.learners.torch"  # imported only when it is measured

RECENT = 8  # calls whose median tells how long the next ones will take


class Point(NamedTuple):
    """A point of a validation curve: training time in seconds, tokens learned, bits per byte."""

    impl: str
    seconds: float
    tokens: int
    bpb: float


@dataclasses.dataclass
class Runner:
    """A learner and its clock.

    Attributes:
        impl: whose code it is.
        make: builds the learner, which the clock counts too.
        setup: what it learns.
        seconds: spent learning, with building and compiling.
        times: seconds a step in each call but the first, which compiles.
        losses: of the steps so far, in nats a token.
        peak_bytes: most memory that building and the first call took, if known.
        learner: what `make` built, once it has been called.
    """

    impl: str
    make: Callable[[], Learner]
    setup: Setup
    seconds: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    learner: Learner | None = None

    def call(self, n: int, total: int) -> float:
        """Takes the next `n` steps of a run of `total`, and gives the seconds that they took.

        Raises:
            BadInput: the loss is not finite any more.
        """
        if self.learner is None:
            with PeakMemory() as memory:
                began = time.perf_counter()
                self.learner = self.make()
                losses = self.learner.advance(n, total)
                seconds = time.perf_counter() - began
            self.peak_bytes = self.learner.device_bytes() or memory.bytes
        else:
            began = time.perf_counter()
            losses = self.learner.advance(n, total)
            seconds = time.perf_counter() - began
            self.times.append(seconds / n)
        self.seconds += seconds
        self.losses += losses
        if not all(map(math.isfinite, losses)):
            raise BadInput(
                f"the loss of {self.impl} is not finite after step {len(self.losses)}; "
                "choose a lower learning rate"
            )
        return seconds

    def run(self, until: float, limit: float) -> None:
        """Learns until its clock shows `until` seconds, of a run of `limit` seconds.

        The run's length in steps, on which the learning rate depends, is what fits at the
        recent speed, told anew at each call: so the rate is zero when the time is over,
        however the machine drifts.
        """
        while self.seconds < until:
            n, total = self.setup.steps_per_call, FOREVER
            if self.times:
                per_step = statistics.median(self.times[-RECENT:])
                left = max(1, round((limit - self.seconds) / per_step))
                n, total = min(n, left), len(self.losses) + left
            self.call(n, total)

    @property
    def tokens(self) -> int:
        """Tokens learned from so far."""
        return len(self.losses) * self.setup.tokens_per_step

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, the median over its calls without the first, which compiles."""
        return self.setup.tokens_per_step / statistics.median(self.times)

    def row(self, work: str, peak: float | None, **details: Any) -> Row:
        """The row of a report with its speed, memory and losses; see `mfu` for the `peak`."""
        return Row(
            work=work,
            impl=self.impl,
            dtype=self.setup.dtype,
            batch=self.setup.batches.batch,
            context=self.setup.batches.block,
            tokens_per_s=self.tokens_per_s if self.times else None,
            peak_bytes=self.peak_bytes,
            losses=self.losses,
            note=self.learner.note if self.learner else "",
            details={"mfu": self.mfu(peak), **details},
        )

    def mfu(self, peak: float | None) -> float | None:
        """Model FLOPs utilisation (MFU), the share of a device's `peak` FLOP/s, if it is known."""
        if not self.times or not peak or not self.learner:
            return None
        needed = flops_per_token(self.learner.config, self.setup.batches.block)
        return self.tokens_per_s * needed / peak


def bits_per_byte(learner: Learner, held_out: HeldOut) -> float:
    """Validation score on the subset, a row at a time: one has tokens enough to keep a CPU busy."""
    chosen = held_out.subset
    tokens = np.asarray(held_out.rows.tokens)[chosen]
    counted = np.asarray(held_out.rows.counted)[chosen, 1:]
    pairs = zip(tokens, counted, strict=True)
    nats = sum(learner.nats(row[None, :-1], row[None, 1:], which[None]) for row, which in pairs)
    return Score(nats, int(counted.sum()), held_out.bytes_of(chosen)).bits_per_byte


def race(
    runners: list[Runner],
    held_out: HeldOut,
    seconds: float,
    slice_seconds: float,
    eval_seconds: float,
    on_point: Callable[[Point], None],
) -> tuple[list[Point], int]:
    """Trains each runner for so many seconds of its own, in slices taken in turn.

    Whoever is furthest behind goes next, also when one took long to compile. Before a slice
    it waits until the last one's threads sleep. Validation is on nobody's clock. Gives one
    curve after the other, and before how many slices the process did not come to rest.
    """
    points: list[Point] = []
    marks = {runner.impl: min(eval_seconds, seconds) for runner in runners}
    restless = 0

    def score_if_due(runner: Runner) -> None:
        if runner.seconds < marks[runner.impl] or runner.learner is None:
            return
        bpb = bits_per_byte(runner.learner, held_out)
        points.append(Point(runner.impl, runner.seconds, runner.tokens, bpb))
        on_point(points[-1])
        marks[runner.impl] = min(seconds, (runner.seconds // eval_seconds + 1) * eval_seconds)

    for runner in runners:  # one that is compiled may be past its first mark
        score_if_due(runner)
    while (runner := min(runners, key=lambda runner: runner.seconds)).seconds < seconds:
        restless += not wait_until_idle()
        runner.run(min(runner.seconds + slice_seconds, marks[runner.impl]), seconds)
        score_if_due(runner)
    order = [runner.impl for runner in runners]
    return sorted(points, key=lambda point: order.index(point.impl)), restless


def side_by_side_table(points: list[Point], eval_seconds: float) -> TableText:
    """Table of the validation curves: bits per byte by seconds of each one's own training.

    >>> curve = [Point("A", 5.1, 10, 3.0), Point("B", 5.2, 9, 3.1), Point("A", 6.0, 12, 2.9)]
    >>> list(side_by_side_table(curve, eval_seconds=5.0).lines)
    [['5', '3.0000', ''], ['end', '2.9000', '3.1000']]
    """
    last = {point.impl: point for point in points}
    scored: dict[float, dict[str, float]] = {}
    for point in points:
        is_last = point is last[point.impl]
        passed = math.inf if is_last else point.seconds // eval_seconds * eval_seconds
        scored.setdefault(passed, {})[point.impl] = point.bpb
    lines = []
    for seconds in sorted(scored):
        bpb = [f"{scored[seconds][impl]:.4f}" if impl in scored[seconds] else "" for impl in last]
        lines.append(["end" if math.isinf(seconds) else f"{seconds:g}", *bpb])
    return TableText(["seconds", *last], lines)
