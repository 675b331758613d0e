"""Other places for the metrics of a run, beside its metrics.jsonl; each is an extra."""

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lechat_jax.errors import BadInput

NOT_MEASURED = {"step", "time_s", "tokens"}


class Mirror(Protocol):
    """Whatever wants to hear of metrics."""

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """More lines of metrics, as `Run.log` is given them."""
        ...


class TensorBoard:
    """TensorBoard events in a folder.

    Raises:
        BadInput: the extra is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise BadInput(
                "--tensorboard needs tensorboardX: pip install 'lechat-jax[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Mirror.log`."""
        for row in rows:
            for key in row.keys() - NOT_MEASURED:
                self._writer.add_scalar(key, row[key], row["step"])
        self._writer.flush()


class WeightsAndBiases:
    """A run on Weights & Biases, or in `folder` alone if WANDB_MODE is offline.

    A run that is resumed goes on under the same id, which its folder decides.

    Raises:
        BadInput: the extra is not installed.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
            start = wandb.init
        except (ImportError, AttributeError):  # a folder called wandb has no function
            raise BadInput("--wandb needs wandb: pip install 'lechat-jax[wandb]'") from None
        where = str(folder.absolute())
        self._run = start(
            project=project,
            name=folder.name,
            id=hashlib.sha256(where.encode()).hexdigest()[:16],
            resume="allow",
            dir=where,
            config=dict(config),
        )

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Mirror.log`."""
        for row in rows:
            measured = {key: value for key, value in row.items() if key != "step"}
            self._run.log(measured, step=row["step"])
