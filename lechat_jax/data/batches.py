"""Batches of a token stream, shuffled: a pure function of (seed, step)."""

import functools

import numpy as np
from jaxtyping import Integer

from lechat_jax.data.rows import Rows
from lechat_jax.errors import BadInput


class Batches:
    """Batches of windows of a token stream: a stateless, pure function of (seed, step).

    A window is `block` inputs and `block` targets shifted by one: `block + 1` tokens, of which
    the last is the next window's first input, so each token is an input and a target once. An
    epoch has its own phase (start of the first window) and shuffles its `windows`; batches may
    span two epochs. There is no state, so a resumed run continues where it stopped.

    Raises:
        BadInput: the stream is shorter than a window, or an argument is out of range.
    """

    def __init__(self, n_tokens: int, block: int, batch: int, seed: int) -> None:
        if block < 1 or batch < 1 or seed < 0:
            raise BadInput(
                f"block ({block}) and batch ({batch}) must be at least 1, seed ({seed}) at least 0"
            )
        if n_tokens < block + 1:
            raise BadInput(
                f"the training text has {n_tokens} tokens, but a block of {block} needs "
                f"{block + 1}; give a longer text or a shorter block"
            )
        self.block, self.batch, self.seed = block, batch, seed
        # One window fewer than fit leaves room for more than `block` phases. The number is
        # the same in every epoch, so that row -> epoch is a division.
        self.windows = max(1, n_tokens // block - 1)
        self._phases = n_tokens - self.windows * block

    def starts(self, step: int) -> Integer[np.ndarray, " B"]:
        """Start of each row of a step's batch in the stream."""
        return self.starts_range(step, 1)[0]

    def starts_range(self, first_step: int, n_steps: int) -> Integer[np.ndarray, "n_steps B"]:
        """`starts` of consecutive steps."""
        first, last = first_step * self.batch, (first_step + n_steps) * self.batch
        starts = np.empty(last - first, np.int64)
        row = first
        while row < last:
            epoch, offset = divmod(row, self.windows)
            taken = min(self.windows - offset, last - row)
            order = _epoch(self.seed, epoch, self.windows, self._phases, self.block)
            starts[row - first : row - first + taken] = order[offset : offset + taken]
            row += taken
        return starts.reshape(n_steps, self.batch)

    def rows(
        self,
        stream: Integer[np.ndarray, " stream"],
        first_step: int,
        n_steps: int,
        part: slice = slice(None),
    ) -> Rows:
        """The batches of consecutive steps, [n_steps, B, block + 1], or a part of their rows.

        With several processes each reads only its part, and no iterator has a position to save.
        """
        starts = self.starts_range(first_step, n_steps)[:, part]
        return Rows(stream[starts[..., None] + np.arange(self.block + 1)].astype(np.int32))


@functools.lru_cache(maxsize=2)  # a step needs one epoch, or the two at a border
def _epoch(
    seed: int, epoch: int, windows: int, phases: int, block: int
) -> Integer[np.ndarray, " windows"]:
    """Starts of one epoch's windows, shuffled."""
    rng = np.random.default_rng([seed, epoch])
    return rng.integers(phases) + block * rng.permutation(windows)
