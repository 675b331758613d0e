"""Training: `run(TrainConfig(...))` trains from Python what `python -m lechat_jax.train` trains.

Both names are loaded when they are asked for, since they load JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lechat_jax.train.command import run
    from lechat_jax.train.options import TrainConfig

__all__ = ["TrainConfig", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from lechat_jax.train.command import run

        return run
    if name == "TrainConfig":
        from lechat_jax.train.options import TrainConfig

        return TrainConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
