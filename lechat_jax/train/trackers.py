"""Experiment trackers: metrics in TensorBoard or Weights & Biases too, a profile of some steps."""

import hashlib
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lechat_jax.checkpoint.run import Run
from lechat_jax.errors import BadInput

WARM_UP = 2  # calls before a profile, which compile or touch their memory for the first time
NOT_MEASURED = {"step", "time_s", "tokens"}


def track_in_tensorboard(run: Run) -> None:
    """Logs the run's metrics to TensorBoard too, in its folder `tensorboard`.

    Raises:
        BadInput: the extra is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise BadInput(
            "--tensorboard needs tensorboardX: pip install 'lechat-jax[tensorboard]'"
        ) from None
    writer = SummaryWriter(str(run.folder / "tensorboard"))

    def log(rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            for key in row.keys() - NOT_MEASURED:
                writer.add_scalar(key, row[key], row["step"])
        writer.flush()

    run.trackers.append(log)


def track_in_wandb(run: Run, project: str) -> None:
    """Logs the run's metrics to Weights & Biases too, or to its folder (WANDB_MODE=offline).

    A run that is resumed goes on under the same id, which its folder decides.

    Raises:
        BadInput: the extra is not installed.
    """
    try:
        start = importlib.import_module("wandb").init
    except (ImportError, AttributeError):  # a folder called wandb has no function
        raise BadInput("--wandb needs wandb: pip install 'lechat-jax[wandb]'") from None
    where = str(run.folder.absolute())
    theirs = start(
        project=project,
        name=run.folder.name,
        id=hashlib.sha256(where.encode()).hexdigest()[:16],
        resume="allow",
        dir=where,
        config=dict(run.config),
    )

    def log(rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            theirs.log(
                {key: value for key, value in row.items() if key != "step"}, step=row["step"]
            )

    run.trackers.append(log)


def profile_steps(run: Run, n: int) -> None:
    """Traces `n` steps with JAX's profiler, in the run's folder `profile`, for XProf and Perfetto.

    They are those after the first two calls of the device, or as many as the run still has; where
    it ends or is stopped before, the trace ends then.
    """
    calls, end, is_over = 0, math.inf, False

    def stop() -> None:
        nonlocal is_over
        if calls >= WARM_UP and not is_over:
            jax.profiler.stop_trace()
        is_over = True

    def trace(rows: Sequence[Mapping[str, Any]]) -> None:
        nonlocal calls, end, is_over
        if is_over or not rows or "train/loss" not in rows[-1]:
            return
        calls, step = calls + 1, rows[-1]["step"]
        if calls == WARM_UP:
            jax.profiler.start_trace(str(run.folder / "profile"), create_perfetto_trace=True)
            end = step + n
        elif calls > WARM_UP and step >= min(end, run.config["train"].get("steps") or math.inf):
            stop()

    run.trackers.append(trace)
    run.closing.callback(stop)
