"""Tolerances of the check: error budgets that are taken from the model at hand, and their slack.

What rounding makes of a result depends on the model: a deep or badly conditioned one, or one
with a few large channels, amplifies it a thousand times. So no limit is a constant. A result is
compared with two yardsticks, each measured on the same weights and inputs, at the same stage:

- in float64, how far the reference itself moves when each of its weights is rounded once more
  (the backward error that any correct program may have) and its vocabulary is in another order;
- in float32 and bfloat16, how wrong the other implementations are, against the float64 truth.

Both may be large where the model is, and neither is large because of one program's mistake.
"""

import math

import numpy as np
from jaxtyping import Float

from parity.check.oracles.interface import Dtype

# Half the distance from one to the next larger number: the relative error of one rounding.
UNIT: dict[Dtype, float] = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}

# In float64, how many times as far apart two programs may be as the reference moves when its
# weights are rounded once more, and its vocabulary is in another order. Measured on models of all
# kinds: at most 2. All planted faults
# are further away.
EXACT = 10.0

# In other types, how many times as wrong an implementation may be as the worst of the others is.
# Measured: at most 1.3 in a pass over whole sequences, 0.9 of lechat_jax.
SLACK = 1.5

# Likewise gradients. Most are within 1.5, too; where the softmax of a model is nearly saturated, or
# some channels are a hundred times the others, few numbers make up a gradient. Measured: 3.
SLACK_OF_GRADIENTS = 4.0

# The same layer by layer at the size of a released model, whose matrix products add up 4,096 to
# 14,336 numbers, XLA in another order than PyTorch's library. Measured on Mistral-7B's shapes: 1.5.
SLACK_OF_LONG_SUMS = 2.5

GREEDY = "greedy text"  # the note of what a model wrote itself

# How many deviations the worst of some dozen tokens may be off by. Measured: 2.
FEW = 4.0

# Roundings that one number, which nothing averages, may be off by: a loss, or a log-probability,
# which adds up the whole vocabulary.
ROUNDINGS = 8.0

# Norms are rounded once, and both round the same number: the few that lie on an edge may fall
# to either side, here one in 100. The planted fault, a scale
# that is multiplied before rounding, is beyond it; how many differ otherwise was not measured.
SAME_ROUNDING = 0.01


def relative(found: Float[np.ndarray, "..."], truth: Float[np.ndarray, "..."]) -> float:
    """Relative RMS error; NaN if anything is not finite.

    >>> relative(np.array([3.0, 4.0]), np.array([3.0, 5.0])) == (1 / 34) ** 0.5
    True
    """
    if found.shape != truth.shape:
        return math.nan
    size = _rms(truth)
    error = _rms(found - truth)
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def flips(found: Float[np.ndarray, "..."], other: Float[np.ndarray, "..."]) -> float:
    """Fraction of numbers that differ; NaN if anything is not finite.

    >>> flips(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.5, 4.0]))
    0.25
    """
    if found.shape != other.shape or not np.isfinite(found - other).all():
        return math.nan
    return float(np.mean(found != other))


def slack(label: str, note: str = "") -> float:
    """Slack of a stage in float32 and bfloat16: its error over the worst of the others'."""
    if note == GREEDY:  # the worst of some tokens, in texts that need not be the same
        return FEW * SLACK
    return SLACK_OF_GRADIENTS if label.startswith("grad") else SLACK


def first_position(
    found: Float[np.ndarray, "B T ..."], truth: Float[np.ndarray, "B T ..."], budget: float
) -> int | None:
    """First position whose error, relative to the whole truth, exceeds the budget."""
    if found.shape != truth.shape or not (size := _rms(truth)):
        return None
    axes = tuple(axis for axis in range(truth.ndim) if axis != 1)
    error = np.sqrt(np.mean((found - truth) ** 2, axis=axes))
    beyond = np.flatnonzero(~(error <= budget * size))
    return int(beyond[0]) if beyond.size else None


def _rms(x: Float[np.ndarray, "..."]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
