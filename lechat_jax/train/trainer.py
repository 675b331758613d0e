"""Training as a function of its options and its step: stopped or killed, it goes on.

A run that resumes takes the same steps as one that was never stopped, bit for bit on a
CPU: the weights and the optimiser come from the checkpoint, and everything else (which
text, at which rate) follows from the number of the step.
"""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lechat_jax.checkpoint.peft import write_adapter
from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.cli.display import Display, clock
from lechat_jax.cli.signals import Stop
from lechat_jax.config import MistralConfig
from lechat_jax.data.dataset import Lessons
from lechat_jax.data.rows import Rows
from lechat_jax.devices.mesh import described, own_rows, placed, settled
from lechat_jax.devices.processes import anywhere, from_first, is_first
from lechat_jax.errors import BadInput
from lechat_jax.eval.score import Validator
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import Weights
from lechat_jax.shell import quoted
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.optimizer import usual_rule
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.samples import Samples
from lechat_jax.train.schedule import Timetable, elapsed
from lechat_jax.train.speed import Speed
from lechat_jax.train.step import (
    StepOptions,
    TrainState,
    all_finite,
    init_state,
    state_of,
    train_steps,
)

TIMED_CALLS = 3  # measured before minutes become steps
RECENT_CALLS = 6  # that tell how long a step takes now
WORTH_SAYING = 0.05  # of the steps


class Diverged(Exception):
    """The loss is no number any more; the message says where and what to try."""


class Call(NamedTuple):
    """Steps that the device has been asked for: how many, and their losses once they are there."""

    n: int
    losses: Float[Array, " calls"]


def _items(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds; the step is its number, and data and rates follow from it."""
    return {"model": state.weights, "optimizer": state.optimizer}


def step_options(options: TrainConfig, mesh: Mesh | None) -> StepOptions:
    """What the steps of a run are specialised to."""
    shape = options.shape(jax.default_backend())
    return StepOptions(
        block=shape.block,
        dtype=shape.dtype,
        learning_rate=options.learning_rate,
        remat=options.remat,
        accumulate=options.accumulate,
        router_aux_loss=options.router_aux_loss,
        rule=usual_rule(options.usual_optimizer, options.start, options.weight_decay),
        mesh=mesh,
    )


class Trainer:
    """One run in progress: its options, its text, its state, and the folder it fills.

    Its state is there after `begin` or `restore`.
    """

    state: TrainState

    def __init__(
        self,
        run: Run,
        config: MistralConfig,
        options: TrainConfig,
        lessons: Lessons,
        tokenizer: Tokenizer,
        display: Display,
        mesh: Mesh | None = None,
    ) -> None:
        self.run, self.config, self.options = run, config, options
        self.lessons, self.tokenizer = lessons, tokenizer
        self.reader, self.display = lessons.reader, display
        self.checkpoints = Checkpoints(run.checkpoints, options.keep)
        on_cpu = jax.default_backend() == "cpu"
        self.step_options = step_options(options, mesh)
        self.own_rows = own_rows(mesh, self.reader.batch)
        self.calls = 4 if on_cpu else 32  # steps in one call of the device
        # Calls that are sent before the losses of one are read; processes agree between them.
        self.ahead = 0 if on_cpu or jax.process_count() > 1 else 1
        self.validator = Validator(config, self.step_options, lessons.held_out())
        self.frozen: Weights = {}
        self.adapters: Adapters | None = None
        dtype = self.step_options.dtype
        self.samples = Samples(run, config, options, lessons, tokenizer, display, mesh, dtype)
        self.step = 0
        epoch, plans = self.reader.windows / self.reader.batch, run.config.get("plan", ())
        self.timetable = Timetable(options, epoch, plans)
        self.sent = 0  # steps that the device has been asked for
        self.speed = Speed(config, self.reader.block, dtype, mesh)

    @property
    def total(self) -> int | None:
        """Steps of the run; `None` while their number is still to be measured."""
        return self.timetable.total

    @property
    def seen(self) -> int:
        """Tokens trained on."""
        return self.step * self.reader.batch * self.reader.block

    @property
    def weights(self) -> Weights:
        """Of the whole model: those that learn, and those beside which they do."""
        return self.frozen | self.state.weights

    def stay(self, weights: Weights, adapters: Adapters) -> None:
        """These weights stay as they are, and the adapters beside them learn."""
        self.frozen = settled(self.step_options.mesh, weights | adapters.scales(self.config))
        self.adapters = adapters

    def begin(self, weights: Weights | None = None) -> None:
        """At step 0, with weights drawn from the seed, or with those given, which it consumes.

        Those given are saved at once: from then on nobody needs the folder they came from.
        """
        if weights is None:
            self.state = self._drawn()
        else:
            self.state = state_of(settled(self.step_options.mesh, weights), self.step_options)
            self.save()

    def restore(self) -> None:
        """Continues from the last good checkpoint, or from the start if there is none yet.

        Raises:
            BadInput: none is good, or there is none and the run did not start at random.
        """
        mesh = self.step_options.mesh
        if from_first(self.checkpoints.steps):
            # Shapes alone: drawing weights to throw them away takes seconds, and a second model.
            shapes = described(mesh, _items(jax.eval_shape(self._drawn)))
            restored = self.checkpoints.restore(shapes)
            for sentence in restored.refused:
                self.display.say(f"warning: {sentence}", style="yellow")
            self.state = TrainState(
                restored.items["model"],
                restored.items["optimizer"],
                placed(mesh, "", np.array(restored.step, np.int32)),
            )
            self.step = restored.step
            self.display.say(
                f"resuming at step {self.step} of {self.total or 'a number to be measured'}"
            )
        elif self.options.init_from:
            again = quoted(["--init-from", str(self.options.init_from)])
            raise BadInput(
                f"{self.run.folder} was stopped before the weights it starts from were saved; "
                f"delete it and start again with {again}"
            )
        else:
            self.display.say("no checkpoint was saved yet: starting again at step 0")
            self.begin()
        self.run.rewind(self.step)

    def _drawn(self) -> TrainState:
        if self.adapters:
            drawn = self.adapters.draw(self.config, self.options.seed)
            return state_of(drawn, self.step_options)
        return init_state(self.config, self.step_options, self.options.seed)

    def save(self) -> None:
        """A checkpoint of this step.

        Raises:
            Diverged: a weight is no finite number, so that the last checkpoint stays the last.
        """
        if not all_finite(self.state.weights):
            raise Diverged(f"weights are not finite after step {self.step}; {self.advice()}")
        self.checkpoints.save(self.step, _items(self.state), {"tokens": self.seen})
        self.timetable.start_the_clock()

    def keep_adapter(self) -> Path | None:
        """The folder of the adapters in PEFT's format, written anew; `None` without any."""
        if self.adapters is None or not is_first():
            return None
        folder = self.run.folder / "adapter"
        write_adapter(folder, self.config, self.adapters, self.state.weights)
        return folder

    def advice(self) -> str:
        """What is left after a divergence, and what to do."""
        steps = self.checkpoints.steps()
        last = "no checkpoint was saved before"
        if steps:
            folder = self.run.checkpoints / str(steps[-1])
            last = f"the last good checkpoint is step {steps[-1]} in {folder}"
        return f"{last}; try a new run with --learning-rate {self.options.learning_rate / 2:g}"

    def train(self, stop: Stop) -> None:
        """Steps until the run's length is reached, a signal asks to stop or no reader is left.

        Raises:
            Diverged: the loss is NaN or infinite.
        """
        self.display.wait("compiling")
        timed: list[float] = []
        lately: deque[tuple[int, float]] = deque(maxlen=RECENT_CALLS)
        calls: deque[Call] = deque()
        began, self.sent = time.perf_counter(), self.step
        self.timetable.start_the_clock()
        self.upcoming = self.rows_to_send()
        while True:
            while not anywhere(self.is_unwanted(stop)) and self.may_send(waiting=len(calls)):
                began = began if calls else time.perf_counter()
                calls.append(self.send())
            if not calls:
                break
            call = calls.popleft()
            losses = np.asarray(call.losses)[: call.n]
            seconds, began = time.perf_counter() - began, time.perf_counter()
            self.speed.rate = call.n * self.reader.batch * self.reader.block / seconds
            self.record(losses)
            timed.append(seconds / call.n)
            lately.extend([(call.n, seconds)] if len(timed) > 1 else [])  # the first one compiles
            is_known = len(timed) > TIMED_CALLS or self.step >= self.timetable.most
            if self.total is None and is_known:
                self.plan(float(np.median(timed[1:] or timed)))
            elif lately:
                self.revise(sum(s for _, s in lately) / sum(n for n, _ in lately))
            self.show(float(losses[-1]))
            if len(timed) == 1:
                self.speed.look_at_the_device()  # now that it has compiled, and rests
            if not calls and self.step != self.total:
                self.events()
        self.save()

    def is_unwanted(self, stop: Stop) -> bool:
        """Whether it is to be saved and left: by a signal, or since nobody reads what it says."""
        return bool(stop.asked) or self.display.has_no_reader

    def may_send(self, waiting: int) -> bool:
        """Whether more steps may begin before the losses of so many calls are read.

        Not if something else is to be done first, with the weights as they then are.
        """
        if self.sent == self.total:
            return False
        return waiting <= (0 if self.timetable.is_alone(self.sent) else self.ahead)

    def send(self) -> Call:
        """The next steps begin; while the device works, the rows after them are made."""
        n = min(self.calls, self.timetable.steps_after(self.sent))
        self.state, losses = train_steps(
            self.config,
            self.step_options,
            self.state,
            self.frozen,
            self.upcoming,
            np.int32(n),
            self.timetable.schedule(self.sent),
        )
        self.sent += n
        self.upcoming = self.rows_to_send()
        return Call(n, losses)

    def rows_to_send(self) -> Rows:
        """Those of the steps that the device has not been asked for yet."""
        rows = self.lessons.rows(self.sent, self.calls, self.own_rows)
        mesh, batch = self.step_options.mesh, self.reader.batch
        return jax.tree.map(lambda leaf: placed(mesh, "-BT", leaf, batch), rows)

    def record(self, losses: np.ndarray) -> None:
        """Counts these steps and logs them.

        Raises:
            Diverged: one of them is not finite; those before it are logged.
        """
        rows = []
        for loss in losses:
            if not math.isfinite(loss):
                self.run.log(rows)
                raise Diverged(f"the loss is {loss} at step {self.step + 1}; {self.advice()}")
            self.step += 1
            rows.append(self.row() | {"train/loss": float(loss)})
        rows[-1]["train/tokens_per_sec"] = self.speed.rate
        if mfu := self.speed.mfu(bool(self.frozen)):
            rows[-1]["train/mfu"] = mfu
        self.run.log(rows)

    def row(self) -> dict[str, Any]:
        """The keys that every line of metrics has."""
        return {"step": self.step, "time_s": round(elapsed(), 3), "tokens": self.seen}

    def plan(self, seconds_per_step: float) -> None:
        """Turns the minutes into a number of steps, once, and stores it with the run.

        The steps so far are saved first, so that no resumed run takes them again otherwise.
        """
        why = self.timetable.settle(self.step, seconds_per_step)
        self.save()
        self.store_plans()
        self.display.say(f"{self.total} steps of {seconds_per_step * 1e3:,.0f} ms: {why}")

    def revise(self, seconds_per_step: float) -> None:
        """Plans the steps to come anew if the minutes would be missed, and stores it first."""
        before = self.total
        if self.timetable.revise(self.step, self.sent, seconds_per_step):
            self.store_plans()
            if before and self.total and abs(self.total - before) > WORTH_SAYING * before:
                self.display.say(
                    f"{self.total} steps now, of {seconds_per_step * 1e3:,.0f} ms, to keep to "
                    f"{self.timetable.minutes:g} minutes"
                )

    def store_plans(self) -> None:
        """What is planned is part of the run, so that it resumes as it would have gone on."""
        self.display.total = self.total
        config = self.run.config
        config["train"] |= {"steps": self.total, "minutes": self.timetable.minutes}
        config["plan"] = [plan._asdict() for plan in self.timetable.plans]
        self.run.config = config

    def extend(self, steps: int | None, minutes: float | None) -> None:
        """Trains further from the step that was restored, at rates that rise and fall again."""
        self.timetable.extend(self.step, steps, minutes)
        self.store_plans()
        more = f"{steps} steps" if steps else f"{self.timetable.minutes:g} minutes"
        self.display.say(f"training on from step {self.step} for {more}")

    def check_unfinished(self) -> None:
        """Raises `BadInput` if all is done; a run that was killed in its last part is not."""
        scored = any(row["step"] == self.step and "val/bpb" in row for row in self.run.metrics())
        if self.step == self.total and scored:
            raise BadInput(
                f"{self.run.folder} is finished, it has taken all its {self.total} steps; train it "
                "further with --minutes 10 or --steps 100 beside --resume, or other text with "
                f"--init-from {self.run.folder}"
            )

    def show(self, loss: float) -> None:
        """Moves the progress bar."""
        left = None
        if self.total:
            per_step = self.reader.batch * self.reader.block / self.speed.rate
            left = (self.total - self.step) * per_step
        mfu = self.speed.mfu(bool(self.frozen))
        self.display.advance(self.step, loss, self.speed.rate, left, mfu)

    def events(self) -> None:
        """Validates, saves and samples if it is time; after the last step that comes later.

        Saves before it samples: what takes memory that nobody foretold may be killed.
        """
        for what, do in (
            ("eval", self.validate),
            ("checkpoint", self.save),
            ("sample", self.sample),
        ):
            if self.timetable.due(what, self.step):
                began = time.perf_counter()
                do()
                self.timetable.took(what, time.perf_counter() - began)

    def validate(self) -> None:
        """Scores a part of what was held out, and learns how long all of it will take."""
        score = self.validator.interim(self.weights)
        if seconds := self.validator.seconds_for_all:
            share = min(1.0, self.options.eval_tokens / self.validator.n_tokens)
            self.timetable.took("ending", share * seconds)
        self.run.log([self.row() | score.metrics()])
        self.display.say(
            f"step {self.step} · {clock(elapsed())} · validation loss {score.loss:.3f} · "
            f"{score.bits_per_byte:.3f} bits per byte (on {score.tokens:,} tokens)"
        )

    def sample(self) -> None:
        """Samples the model as it is."""
        self.samples.take(self.step, self.weights)
