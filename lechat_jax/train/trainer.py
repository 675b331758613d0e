"""The training loop: steps are sent to the device, and their losses received and logged."""

import math
import time
from collections import deque
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from lechat_jax.cli.signals import Stop
from lechat_jax.data.rows import Rows
from lechat_jax.devices.compile_ahead import Compilation
from lechat_jax.devices.mesh import described, own_rows, placed, spec
from lechat_jax.devices.platform import platform
from lechat_jax.devices.processes import anywhere
from lechat_jax.train.events import Events
from lechat_jax.train.flops import Speed
from lechat_jax.train.step import train_steps
from lechat_jax.train.training_run import Diverged, TrainingRun

TIMED_CALLS = 3  # measured before minutes become steps
RECENT_CALLS = 6  # that tell how long a step takes now
ROWS_OF_A_CALL = "-BT"  # their axes: steps, rows, tokens


def steps_of_a_call(batch: Rows) -> int:
    """Steps that one call of the device can take; one if it is sent the pixels of images."""
    if batch.images is not None:
        return 1
    return 4 if platform() == "cpu" else 32


def described_rows_of_a_call(batch: Rows, mesh: Mesh | None) -> Rows:
    """`Trainer.rows_to_send` as `jax.ShapeDtypeStruct`s, from those of one batch, [B, T + 1]."""
    n = steps_of_a_call(batch)
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype), batch)

    def places(mesh: Mesh, rows: Rows) -> Rows:
        return jax.tree.map(lambda _: NamedSharding(mesh, spec(ROWS_OF_A_CALL)), rows)

    return described(mesh, rows, places)


class Trainer:
    """Training loop with asynchronous dispatch: several steps in one call of the device.

    Attributes:
        training: the run.
        compilation: of the step, begun while the training was set up.
        events: what is done between the steps.
        speed: of the last call.
        calls: steps in one call of the device.
        ahead: calls that are sent before the losses of one are read; processes agree between them.
        sent: steps that the device has been asked for.
        upcoming: the rows of the steps after those.

    Args:
        training: the run.
        compilation: of the step.
        batch: `jax.ShapeDtypeStruct`s of the rows of a step.
    """

    upcoming: Rows

    def __init__(self, training: TrainingRun, compilation: Compilation, batch: Rows) -> None:
        self.training, self.job, self.compilation = training, training.job, compilation
        self.events = Events(training)
        self.reader = self.job.dataset.reader
        dtype, mesh = training.step_options.dtype, self.job.mesh
        self.speed = Speed(training.config, self.reader.block, dtype, mesh)
        self.own_rows = own_rows(mesh, self.reader.batch)
        self.calls = steps_of_a_call(batch)
        self.ahead = 0 if platform() == "cpu" or jax.process_count() > 1 else 1
        self.sent = 0
        self._timed: list[tuple[int, float]] = []  # steps and seconds of each call

    def train(self, stop: Stop) -> None:
        """Trains to the end of the run, until a signal, or until the output has no reader.

        Raises:
            Diverged: the loss is NaN or infinite.
        """
        training = self.training
        self.wait_for_the_step()
        calls: deque[tuple[int, Array]] = deque()  # their steps, and losses once they are there
        began, self.sent = time.perf_counter(), training.step
        training.schedule.start_the_clock()
        self.upcoming = self.rows_to_send()
        while True:
            while not anywhere(self.is_unwanted(stop)) and self.may_send(waiting=len(calls)):
                began = began if calls else time.perf_counter()
                calls.append(self.send())
            if not calls:
                break
            n, losses = calls.popleft()
            losses = np.asarray(losses)[:n]
            seconds, began = time.perf_counter() - began, time.perf_counter()
            self.speed.rate = n * self.reader.batch * self.reader.block / seconds
            self.record(losses)
            self.plan(n, seconds)
            self.show(float(losses[-1]))
            if len(self._timed) == 1:
                self.speed.look_at_the_device()  # now that all memory is taken, and it rests
            if not calls and training.step != training.total:
                self.events.do_those_due()
        training.save()

    def wait_for_the_step(self) -> None:
        """Waits until the step is compiled, and says how long that took."""
        self.job.display.wait("compiling")
        self.compilation.wait()
        self.job.display.say(
            f"start: tracing and compiling the step took {self.compilation.seconds:.1f} s, "
            f"{self.compilation.waited:.1f} s of which had to be waited for"
        )

    def is_unwanted(self, stop: Stop) -> bool:
        """Whether to save and stop: on a signal, or since stdout is closed."""
        return bool(stop.received) or self.job.display.has_no_reader

    def may_send(self, waiting: int) -> bool:
        """Whether to dispatch more steps before the losses of so many calls are read.

        Not if something else is to be done first, with the weights as they then are.
        """
        if self.sent == self.training.total:
            return False
        return waiting <= (0 if self.training.schedule.is_alone(self.sent) else self.ahead)

    def send(self) -> tuple[int, Float[Array, " calls"]]:
        """Dispatches the next steps: how many, and their losses, not yet computed.

        While the device works, the rows after them are made.
        """
        training = self.training
        n = min(self.calls, training.schedule.steps_after(self.sent))
        training.state, losses = train_steps(
            training.config,
            training.step_options,
            training.state,
            training.frozen,
            self.upcoming,
            np.int32(n),
            training.schedule.rate_at(self.sent),
        )
        self.sent += n
        self.upcoming = self.rows_to_send()
        return n, losses

    def rows_to_send(self) -> Rows:
        """Rows of the next steps to dispatch."""
        rows = self.job.dataset.rows(self.sent, self.calls, self.own_rows)
        rows = self.job.unused.renumbered(rows)
        mesh, batch = self.job.mesh, self.reader.batch

        def place(leaf: np.ndarray) -> Any:
            return placed(mesh, ROWS_OF_A_CALL + "." * (leaf.ndim - 3), leaf, batch)

        return jax.tree.map(place, rows)

    def record(self, losses: np.ndarray) -> None:
        """Logs the losses of steps that are done.

        Raises:
            Diverged: one of them is not finite; those before it are logged.
        """
        training, rows = self.training, []
        for loss in losses:
            if not math.isfinite(loss):
                self.job.run.log(rows)
                raise Diverged(
                    f"the loss is {loss} at step {training.step + 1}; {training.advice()}"
                )
            training.step += 1
            rows.append(training.row() | {"train/loss": float(loss)})
        if not self._timed:
            rows[0]["train/compile_s"] = round(self.compilation.seconds, 3)
            rows[0]["train/compile_wait_s"] = round(self.compilation.waited, 3)
        rows[-1]["train/tokens_per_sec"] = self.speed.rate
        if mfu := self.speed.mfu(bool(training.frozen)):
            rows[-1]["train/mfu"] = mfu
        self.job.run.log(rows)

    def plan(self, n: int, seconds: float) -> None:
        """Sets or revises the run's length by the duration of its calls."""
        self._timed.append((n, seconds))
        timed = self._timed[1:]  # the first one touches all memory for the first time
        is_known = (
            len(self._timed) > TIMED_CALLS or self.training.step >= self.training.schedule.most
        )
        if self.training.total is None and is_known:
            paces = [seconds / n for n, seconds in timed or self._timed]
            self.training.plan(float(np.median(paces)))
        elif timed:
            n, seconds = map(sum, zip(*timed[-RECENT_CALLS:], strict=True))
            self.training.revise(self.sent, seconds / n)

    def show(self, loss: float) -> None:
        """Updates the progress bar."""
        step, total, left = self.training.step, self.training.total, None
        if total:
            left = (total - step) * self.reader.batch * self.reader.block / self.speed.rate
        mfu = self.speed.mfu(bool(self.training.frozen))
        self.job.display.advance(step, loss, self.speed.rate, left, mfu)
