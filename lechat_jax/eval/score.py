"""Validation score: cross-entropy in nats per token, and bits per byte."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Integer

from lechat_jax.config import MistralConfig
from lechat_jax.data.held_out import HeldOut
from lechat_jax.data.rows import Rows
from lechat_jax.devices.mesh import ROWS, placed
from lechat_jax.devices.platform import platform
from lechat_jax.model.binding import Weights
from lechat_jax.model.scoring import Forward, score


@dataclasses.dataclass(frozen=True)
class Score:
    """Cross-entropy of a text: total nats, its tokens and its UTF-8 bytes."""

    nats: float
    tokens: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, nats / ln 2 / bytes, which compares models whatever their tokenizers.

        >>> Score(nats=math.log(2) * 16, tokens=4, n_bytes=8).bits_per_byte
        2.0
        """
        return self.nats / math.log(2) / self.n_bytes

    def metrics(self) -> dict[str, Any]:
        """The score as keys of `metrics.jsonl`."""
        return {
            "val/loss": self.loss,
            "val/bpb": self.bits_per_byte,
            "val/tokens": self.tokens,
            "val/bytes": self.n_bytes,
        }


def spread(n: int) -> Integer[np.ndarray, " rows"]:
    """Van der Corput order of 0 to n - 1: every prefix is spread evenly.

    So what is scored when there is no time for all depends on how much it is and on nothing else.

    >>> spread(6).tolist()
    [0, 4, 2, 1, 5, 3]
    """
    bits = (n - 1).bit_length()
    mirrored = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return np.array([i for i in mirrored if i < n])


class Validator:
    """Validation of a model on held-out rows, by the exact cross-entropy.

    The `interim` score takes every n-th row, always the same ones; the `full` one all, or as many
    of the order `spread` as there is time for.

    Attributes:
        seconds_for_all: that the full score will take, as fast as it went last; `None` before a
            batch was scored that did not wait for the compiler.
    """

    def __init__(self, config: MistralConfig, options: Forward, held_out: HeldOut) -> None:
        self.config, self.options, self.held_out = config, options, held_out
        batch = 4 if platform() == "cpu" else 64
        ways = options.mesh.shape[ROWS] if options.mesh else 1
        self.batch = -(-batch // ways) * ways
        self._bytes: dict[tuple[int, ...], int] = {}
        self.seconds_for_all: float | None = None
        self._is_compiled = False

    @property
    def n_tokens(self) -> int:
        """Number of tokens that can be scored."""
        return int(self.held_out.counts.sum())

    def full(
        self,
        weights: Weights,
        on_rows: Callable[[int, int], None],
        most: int | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> Score:
        """Scores all rows, or a prefix of their order.

        Args:
            weights: of the model.
            on_rows: hears how many are done and how many there are to do.
            most: tokens to be scored, or a few more to fill the last row; `None` is all.
            enough: asked after each batch, ends it there. Alike in all processes.
        """
        order = spread(len(self.held_out.rows.tokens))
        before = np.cumsum(self.held_out.counts[order]) - self.held_out.counts[order]
        chosen = order if most is None else order[before < most]
        return self._score(weights, chosen, on_rows, enough)

    def interim(self, weights: Weights) -> Score:
        """Scores a fixed subset of the rows."""
        return self._score(weights, self.held_out.subset, lambda done, of: None, lambda: False)

    def _score(
        self,
        weights: Weights,
        chosen: np.ndarray,
        on_rows: Callable[[int, int], None],
        enough: Callable[[], bool],
    ) -> Score:
        nats, tokens, done = 0.0, 0, 0
        for first in range(0, len(chosen), self.batch):
            began = time.perf_counter()
            part = chosen[first : first + self.batch]
            fill = (0, self.batch - len(part))  # with rows that do not count

            def filled(x: np.ndarray, fill: tuple[int, int] = fill) -> np.ndarray:
                return np.pad(x, (fill, *[(0, 0)] * (x.ndim - 1)))

            held = self.held_out
            rows: Rows = jax.tree.map(lambda x, part=part: filled(x[part]), held.rows)
            images = jax.tree.map(filled, held.images_of(part))
            if images is not None:
                images = images._replace(slots=images.slots[:, :-1])
            counted = np.asarray(rows.counted)[:, 1:]
            nats += float(
                score(
                    self.config,
                    self.options,
                    weights,
                    self._placed(rows.tokens[:, :-1].astype(np.int32)),
                    self._placed(rows.tokens[:, 1:].astype(np.int32)),
                    self._placed(counted),
                    None if rows.documents is None else self._placed(rows.documents[:, :-1]),
                    jax.tree.map(self._placed, images),
                )
            )
            tokens, done = tokens + int(counted.sum()), first + len(part)
            if self._is_compiled:
                batches = -(-len(self.held_out.rows.tokens) // self.batch)
                self.seconds_for_all = batches * (time.perf_counter() - began)
            self._is_compiled = True
            on_rows(done, len(chosen))
            if enough():
                break
        return Score(nats, tokens, self._bytes_of(chosen[:done]))

    def _bytes_of(self, rows: np.ndarray) -> int:
        """UTF-8 bytes of these rows, kept where an interim score asks for them again."""
        if len(rows) == len(self.held_out.rows.tokens):
            return self.held_out.n_bytes
        key = tuple(rows.tolist())
        if key not in self._bytes:
            self._bytes[key] = self.held_out.bytes_of(rows)
        return self._bytes[key]

    def _placed(self, array: np.ndarray) -> Any:
        axes = "BT" if array.ndim == 2 else "B" + "." * (array.ndim - 1)
        return placed(self.options.mesh, axes, array)
