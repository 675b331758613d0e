"""Oracle whose vocabulary is in another order: the same function, whose sums over ids go otherwise.

Any correct program may add up the vocabulary in any order. Where many ids have equal rows, as those
that a training text lacks, each addition rounds the same way, so that the order decides about a
hundred roundings, which rounding single weights does not show.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import EMBEDDING, HEAD
from parity.check.oracles.interface import (
    AdamW,
    Arrays,
    Dtype,
    Gradients,
    Implementation,
    Stages,
    Text,
    Trajectory,
)
from parity.check.oracles.lechat_torch import TorchOracle


class Reordered:
    """lechat_torch with the rows of its tables in another order; see `Oracle`.

    It is asked and answers in the ids of the model.
    """

    def __init__(self, config: MistralConfig, weights: Arrays, dtype: Dtype) -> None:
        self._place = np.random.default_rng(1).permutation(config.vocab_size)  # of each id
        self._id = np.argsort(self._place)
        self._inner = TorchOracle(config, self._tables(weights, self._id), dtype)

    @property
    def name(self) -> Implementation:
        """Name of the implementation."""
        return self._inner.name

    @property
    def dtype(self) -> Dtype:
        """Compute dtype."""
        return self._inner.dtype

    def load(self, weights: Arrays) -> None:
        """See `Oracle.load`."""
        self._inner.load(self._tables(weights, self._id))

    def drop(self) -> None:
        """See `Oracle.drop`."""
        self._inner.drop()

    def forward(self, tokens: Int[np.ndarray, "B T"], first_position: int = 0) -> Stages:
        """See `Oracle.forward`."""
        stages = self._inner.forward(self._place[tokens], first_position)
        return stages | {"logits": stages["logits"][..., self._place]}

    def gradients(self, rows: Int[np.ndarray, "B row"]) -> Gradients:
        """See `Oracle.gradients`."""
        found = self._inner.gradients(self._place[rows])
        return found._replace(by_weight=self._tables(found.by_weight, self._place))

    def train(self, steps: Int[np.ndarray, "steps B row"], adamw: AdamW) -> Trajectory:
        """See `Oracle.train`."""
        found = self._inner.train(self._place[steps], adamw)
        return found._replace(weights=self._tables(found.weights, self._place))

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """See `Oracle.cached`."""
        return self._inner.cached(self._place[tokens], prompt, chunk)[..., self._place]

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """See `Oracle.greedy`."""
        asked = [self._place[list(prompt)].tolist() for prompt in prompts]
        texts = self._inner.greedy(asked, n, chunk, context)
        return [text._replace(ids=self._id[text.ids].tolist()) for text in texts]

    @staticmethod
    def _tables(weights: Arrays, rows: Int[np.ndarray, "V"]) -> dict[str, np.ndarray]:
        """Weights whose tables have these rows."""
        return {n: leaf[rows] if n in (EMBEDDING, HEAD) else leaf for n, leaf in weights.items()}
