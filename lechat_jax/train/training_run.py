"""State of a training run: initialised, checkpointed, restored, logged and scheduled.

A run that resumes takes the same steps as one that was never stopped, bit for bit on a
CPU: the weights and the optimiser come from the checkpoint, and everything else (which
text, at which rate) follows from the number of the step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Integer

from lechat_jax.checkpoint.peft import write_adapter
from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig
from lechat_jax.data.dataset import Dataset
from lechat_jax.devices.mesh import create_sharded, described, placed, settled
from lechat_jax.devices.platform import platform
from lechat_jax.devices.processes import from_first, is_first
from lechat_jax.errors import BadInput
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import Weights
from lechat_jax.shell import quoted
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.optimizer import usual_rule
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.schedule import Schedule, elapsed
from lechat_jax.train.step import StepOptions, TrainState, all_finite, init_state, state_of
from lechat_jax.train.unused_ids import UnusedIds

WORTH_SAYING = 0.05  # of the steps


class Diverged(Exception):
    """The loss or a weight is NaN or infinite; the message says where and what to try."""


class Job(NamedTuple):
    """Context of a training run, shared by its loop, events and samples.

    Attributes:
        run: the folder that it fills.
        config: of the model.
        options: as resolved.
        dataset: the dataset.
        counts: occurrences of each id in its training text.
        unused: ids that share a row, since its training text has none of them.
        tokenizer: of the model.
        display: shows its progress.
        began: the time of its start, in seconds of the epoch, from which its minutes count.
        mesh: the devices, if there are several.
    """

    run: Run
    config: MistralConfig
    options: TrainConfig
    dataset: Dataset
    counts: Integer[np.ndarray, " V"]
    unused: UnusedIds
    tokenizer: Tokenizer
    display: Display
    began: float
    mesh: Mesh | None = None


def step_options(options: TrainConfig, mesh: Mesh | None, n_sharing: int = 1) -> StepOptions:
    """Static arguments of a run's compiled steps; `n_sharing` ids have the last row."""
    return StepOptions(
        dtype=options.shape(platform()).dtype,
        learning_rate=options.learning_rate,
        remat=options.remat,
        accumulate=options.accumulate,
        router_aux_loss=options.router_aux_loss,
        rule=usual_rule(options.usual_optimizer, options.start, options.weight_decay)._replace(
            beta1=options.usual_beta1,
            muon_steps=options.muon_steps,
            muon_momentum=options.muon_momentum,
        ),
        mesh=mesh,
        n_sharing=n_sharing,
        frozen_tower=options.vision_tower != "trained",
    )


class TrainingRun:
    """A training run between two steps: weights, optimizer state, step number and schedule.

    Attributes:
        config: of the model that the steps compute, with one row for the unused ids.
        state: weights that learn, and optimiser; there after `begin` or `restore`.
        step: optimiser steps taken.
        frozen: weights of the base model, where adapters learn beside them.
        adapters: those that learn, and whether a projector does, if not all weights do.
        schedule: how long the run is, and when it does something else.
    """

    state: TrainState

    def __init__(self, job: Job) -> None:
        self.job = job
        self.config = job.unused.narrow_config(job.config)
        self.step_options = step_options(job.options, job.mesh, job.unused.n_sharing)
        self.checkpoints = Checkpoints(job.run.checkpoints, job.options.keep)
        self.frozen: Weights = {}
        self.adapters: Adapters | None = None
        self.step = 0
        epoch = job.dataset.reader.windows / job.dataset.reader.batch
        plans = job.run.config.get("plan", ())
        self.schedule = Schedule(job.options, epoch, plans, job.began)

    @property
    def total(self) -> int | None:
        """Steps of the run; `None` while their number is still to be measured."""
        return self.schedule.total

    @property
    def seen(self) -> int:
        """Tokens trained on."""
        return self.step * self.job.dataset.reader.batch * self.job.dataset.reader.block

    @property
    def weights(self) -> Weights:
        """Weights of `config`, trainable and frozen."""
        return self.frozen | self.state.weights

    def with_all_ids(self, weights: Weights) -> Weights:
        """Weights of the whole model, with a row for each id."""
        return self._with_tables(self.job.unused.widened, weights)

    def _with_tables(self, change: Callable[[Weights], Weights], weights: Weights) -> Weights:
        """Weights with other tables, on their devices; as they are where no row is shared."""
        if self.job.unused.n_sharing == 1:
            return weights
        return create_sharded(self.job.mesh, change, weights)

    def freeze(self, weights: Weights, adapters: Adapters) -> None:
        """Sets the frozen base weights; only the adapters are trained, and maybe the projector."""
        learning = adapters.shapes(self.job.config)
        frozen = {name: leaf for name, leaf in weights.items() if name not in learning}
        self.frozen = settled(self.job.mesh, frozen | adapters.scales(self.job.config))
        self.adapters = adapters

    def begin(self, weights: Weights | None = None) -> None:
        """Initialises step 0 with random weights, or with those given, which it consumes.

        Those given are saved at once: from then on nobody needs the folder they came from.
        """
        if weights is None:
            self.state = self._drawn()
        else:
            self.state = state_of(settled(self.job.mesh, weights), self.step_options)
            self.save()

    def restore(self) -> None:
        """Restores the last good checkpoint, or starts anew if there is none yet.

        Raises:
            BadInput: none is good, or there is none and the run did not start at random.
        """
        run, display, mesh = self.job.run, self.job.display, self.job.mesh
        if from_first(self.checkpoints.steps):
            # Shapes alone: drawing weights to throw them away takes seconds, and a second model.
            shapes = described(mesh, jax.eval_shape(lambda: self._items(self._drawn())))
            restored = self.checkpoints.restore(shapes)
            for sentence in restored.refused:
                display.say(f"warning: {sentence}", style="yellow")
            self.state = TrainState(
                self._with_tables(self.job.unused.narrowed, restored.items["model"]),
                restored.items["optimizer"],
                placed(mesh, "", np.array(restored.step, np.int32)),
            )
            self.step = restored.step
            display.say(
                f"resuming at step {self.step} of {self.total or 'a number to be measured'}"
            )
        elif self.job.options.init_from:
            again = quoted(["--init-from", str(self.job.options.init_from)])
            raise BadInput(
                f"{run.folder} was stopped before the weights it starts from were saved; "
                f"delete it and start again with {again}"
            )
        else:
            display.say("no checkpoint was saved yet: starting again at step 0")
            self.begin()
        run.rewind(self.step)

    def _drawn(self) -> TrainState:
        job = self.job
        if self.adapters:
            shapes = self.adapters.shapes(job.config).items()
            return state_of({name: jnp.zeros(shape) for name, shape in shapes}, self.step_options)
        return init_state(job.config, self.step_options, job.options.seed, job.unused, job.counts)

    def save(self) -> None:
        """Saves a checkpoint of this step.

        Raises:
            Diverged: a weight is not finite, so that the last checkpoint stays the last.
        """
        if not all_finite(self.state.weights):
            raise Diverged(f"weights are not finite after step {self.step}; {self.advice()}")
        self.checkpoints.save(self.step, self._items(self.state), {"tokens": self.seen})
        self.job.run.publish()
        self.schedule.start_the_clock()

    def keep_adapter(self) -> Path | None:
        """Exports what learned in PEFT's format; its folder, or `None` without adapters."""
        if self.adapters is None or not is_first():
            return None
        folder = self.job.run.folder / "adapter"
        write_adapter(folder, self.job.config, self.adapters, self.state.weights)
        return folder

    def advice(self) -> str:
        """Advice after a divergence: the last good checkpoint, and which flags to change."""
        steps = self.checkpoints.steps()
        last = "no checkpoint was saved before"
        if steps:
            folder = self.job.run.checkpoints / str(steps[-1])
            last = f"the last good checkpoint is step {steps[-1]} in {folder}"
        rate = self.job.options.learning_rate / 2
        return f"{last}; try a new run with --learning-rate {rate:g}"

    def row(self) -> dict[str, Any]:
        """Metrics that every logged line has."""
        seconds = round(elapsed(self.job.began), 3)
        return {"step": self.step, "time_s": seconds, "tokens": self.seen}

    def plan(self, seconds_per_step: float) -> None:
        """Determines the number of steps from the minutes, once, and stores it with the run.

        The steps so far are saved first, so that no resumed run takes them again otherwise.
        """
        why = self.schedule.settle(self.step, seconds_per_step)
        self.save()
        self.store_plans()
        self.job.display.say(f"{self.total} steps of {seconds_per_step * 1e3:,.0f} ms: {why}")

    def revise(self, sent: int, seconds_per_step: float) -> None:
        """Revises the steps not `sent` yet if the minutes would be missed, and stores the plan."""
        before = self.total
        if self.schedule.revise(self.step, sent, seconds_per_step):
            self.store_plans()
            if before and self.total and abs(self.total - before) > WORTH_SAYING * before:
                self.job.display.say(
                    f"{self.total} steps now, of {seconds_per_step * 1e3:,.0f} ms, to keep to "
                    f"{self.schedule.minutes:g} minutes"
                )

    def store_plans(self) -> None:
        """Stores the plans in the run's config.json, so that it resumes bit for bit."""
        self.job.display.total = self.total
        config = self.job.run.config
        config["train"] |= {"steps": self.total, "minutes": self.schedule.minutes}
        config["plan"] = [plan._asdict() for plan in self.schedule.plans]
        self.job.run.config = config

    def extend(self, steps: int | None, minutes: float | None) -> None:
        """Continues a finished run from the restored step, with a schedule of its own."""
        self.schedule.extend(self.step, steps, minutes)
        self.store_plans()
        more = f"{steps} steps" if steps else f"{self.schedule.minutes:g} minutes"
        self.job.display.say(f"training on from step {self.step} for {more}")

    def check_unfinished(self) -> None:
        """Raises `BadInput` for a finished run; one killed before its last samples is not."""
        run = self.job.run
        scored = any(row["step"] == self.step and "val/bpb" in row for row in run.metrics())
        if self.step == self.total and scored:
            raise BadInput(
                f"{run.folder} is finished, it has taken all its {self.total} steps; train it "
                "further with --minutes 10 or --steps 100 beside --resume, or other text with "
                f"--init-from {run.folder}"
            )

    def _items(self, state: TrainState) -> dict[str, Any]:
        """Contents of a checkpoint; data order and learning rate follow from its step number."""
        return {"model": self.with_all_ids(state.weights), "optimizer": state.optimizer}
