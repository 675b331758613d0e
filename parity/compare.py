"""How far apart two results are, and how far they may be.

In float64 there is no rounding to hide in: two implementations of the same function agree
to 1e-11 of the size of the result. In float32 and bfloat16 both are wrong, and the question
is whether one is more wrong than it must be: its error against the float64 truth may be a
small multiple of the error that PyTorch's own rounding makes, on the same input, at the same
stage, in the same run.
"""

import math

import numpy as np
from jaxtyping import Float

from parity.oracles import Dtype

# What lechat_jax and lechat_torch may differ by in float64. Measured on the check's own model:
# 1e-15 to 2e-15 forward, 2e-15 backward; after 50 steps of Adam, which divides by the size of
# each gradient however small, 3e-13.
EXACT = 1e-11

# How much larger an error may be than PyTorch's own. Measured on four random models and a
# trained one: at most 1.2 in a forward pass, and 1.5 for the gradient of a norm, whose few
# numbers average less.
SLACK = 1.5
SLACK_OF_GRADIENTS = 2.0

# The same at the size of a released model, whose matrix products add up 4,096 to 14,336
# numbers, XLA in another order than PyTorch's library. Measured on Mistral-7B's shapes: 1.5.
SLACK_OF_LONG_SUMS = 2.5

# How many deviations the worst of some dozen tokens may be off by. Measured: 2.
FEW = 4.0

# What PyTorch itself may be wrong by, or the yardstick would measure nothing. Measured: at
# most 1.3e-6 and 1.3e-2 forward, 2.7e-6 and 3.2e-2 backward, the most on the trained model.
CEILING: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 5e-2}

# Norms are rounded once, and both round the same number: the few that lie on an edge may fall
# to either side. Measured: 0; with the scale multiplied before rounding, 1.6e-3.
SAME_ROUNDING = 3e-4


def relative(found: Float[np.ndarray, "..."], truth: Float[np.ndarray, "..."]) -> float:
    """Root mean square of the difference over that of the truth; NaN if anything is no number.

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


def first_position(
    found: Float[np.ndarray, "B T ..."], truth: Float[np.ndarray, "B T ..."], budget: float
) -> int | None:
    """The first T at which the error, over the size of the whole truth, exceeds the budget."""
    if found.shape != truth.shape or not (size := _rms(truth)):
        return None
    axes = tuple(axis for axis in range(truth.ndim) if axis != 1)
    error = np.sqrt(np.mean((found - truth) ** 2, axis=axes))
    beyond = np.flatnonzero(~(error <= budget * size))
    return int(beyond[0]) if beyond.size else None


def _rms(x: Float[np.ndarray, "..."]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
