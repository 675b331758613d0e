"""Experiment trackers: a run's metrics in TensorBoard or Weights & Biases too; each is an extra."""

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from lechat_jax.checkpoint.run import Run
from lechat_jax.errors import BadInput

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
