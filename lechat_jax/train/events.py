"""Validation, checkpoints and samples between the steps of a run, and after its last one."""

import time

from lechat_jax.checkpoint.run import HELD_OUT
from lechat_jax.cli.display import clock
from lechat_jax.cli.signals import Stop
from lechat_jax.devices.processes import anywhere
from lechat_jax.eval.score import Validator
from lechat_jax.train.samples import Samples
from lechat_jax.train.schedule import elapsed
from lechat_jax.train.training_run import TrainingRun


class Events:
    """Events of a run: validation, checkpoints and samples of its current weights."""

    def __init__(self, training: TrainingRun) -> None:
        self.training, self.job = training, training.job
        held_out = self.job.dataset.held_out()
        held_out = held_out._replace(rows=self.job.unused.renumbered(held_out.rows))
        self.validator = Validator(training.config, training.step_options, held_out)
        self.samples = Samples(self.job)

    def do_those_due(self) -> None:
        """Runs the events that are due after this step, but for those of the last one.

        Saves before it samples: what takes memory that nobody foretold may be killed.
        """
        schedule = self.training.schedule
        for what, do in (
            ("eval", self.validate),
            ("checkpoint", self.training.save),
            ("sample", self.sample),
        ):
            if schedule.due(what, self.training.step):
                began = time.perf_counter()
                do()
                schedule.took(what, time.perf_counter() - began)

    def sample(self) -> None:
        """Samples from the current weights."""
        self.samples.take(self.training.step, self.training.with_all_ids(self.training.weights))

    def validate(self) -> None:
        """Validates on a fixed part of the held-out rows, and estimates the time of all of them."""
        score = self.validator.interim(self.training.weights)
        if seconds := self.validator.seconds_for_all:
            share = min(1.0, self.job.options.eval_tokens / self.validator.n_tokens)
            self.training.schedule.took("ending", share * seconds)
        self.job.run.log([self.training.row() | score.metrics()])
        self.job.display.say(
            f"step {self.training.step} · {clock(elapsed(self.job.began))} · validation loss "
            f"{score.loss:.3f} · {score.bits_per_byte:.3f} bits per byte "
            f"(on {score.tokens:,} tokens)"
        )

    def validate_all(self, stop: Stop) -> str:
        """Validates on the held-out rows, as many as there is time for, and logs the score.

        A signal ends it too, and what was scored so far counts.
        """
        options, run, began = self.job.options, self.job.run, time.perf_counter()
        usual = self.training.schedule.minutes / 2
        minutes = usual if options.eval_minutes is None else options.eval_minutes

        def late() -> bool:
            return time.perf_counter() - began > 60 * minutes

        def show(done: int, of: int) -> None:
            left = clock((of - done) * (time.perf_counter() - began) / done)
            self.job.display.work("validating, row", done, of, f" · {left} left")

        final = self.validator.full(
            self.training.weights,
            show,
            options.eval_tokens,
            lambda: anywhere(bool(stop.received) or late()),
        )
        rate, of = final.tokens / (time.perf_counter() - began), self.validator.n_tokens
        known = (row for row in run.metrics() if row["step"] == self.training.step)
        if not any(row.get(HELD_OUT) and row["val/tokens"] >= final.tokens for row in known):
            run.log([self.training.row() | final.metrics() | {HELD_OUT: of}])
        part = f"all {of:,} held-out tokens"
        if final.tokens < of:
            bound = "--eval-tokens" if final.tokens >= options.eval_tokens else "--eval-minutes"
            why = stop.received or bound
            part = f"{final.tokens:,} of {of:,} held-out tokens, evenly spread ({why})"
        return (
            f"{final.bits_per_byte:.4f} bits per byte on {part} "
            f"({final.n_bytes:,} bytes, scored at {rate:,.0f} tokens/s)"
        )
