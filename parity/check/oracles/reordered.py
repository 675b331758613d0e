"""lechat_torch with its vocabulary in another order: the same function, whose sums round otherwise.

Any correct program may add up the vocabulary in any order. Where many ids have equal rows, as those
that a training text lacks, each addition rounds the same way, so that the order decides about a
hundred roundings, which rounding single weights does not show.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import EMBEDDING, HEAD
from parity.check.oracles.interface import AdamW, Arrays, Dtype, Gradients, Stages, Text, Trajectory
from parity.check.oracles.lechat_torch import TorchOracle


class Reordered(TorchOracle):
    """lechat_torch whose tables have their rows in another order; asked and answering in ids."""

    def __init__(self, config: MistralConfig, weights: Arrays, dtype: Dtype) -> None:
        place = np.random.default_rng(1).permutation(config.vocab_size)  # of each id
        if config.vision:  # whose token is no row of the table, and is found by its id
            image_id = config.vision.image_token_id
            place[place == image_id], place[image_id] = place[image_id], image_id
        self._place = place
        self._id = np.argsort(self._place)
        super().__init__(config, weights, dtype)

    def load(self, weights: Arrays) -> None:
        """See `Oracle.load`."""
        super().load(_with_rows(weights, self._id))

    def forward(self, tokens: Int[np.ndarray, "B T"], first_position: int = 0) -> Stages:
        """See `Oracle.forward`."""
        stages = super().forward(self._place[tokens], first_position)
        return stages | {"logits": stages["logits"][..., self._place]}

    def gradients(self, rows: Int[np.ndarray, "B row"]) -> Gradients:
        """See `Oracle.gradients`."""
        found = super().gradients(self._place[rows])
        return found._replace(by_weight=_with_rows(found.by_weight, self._place))

    def train(self, steps: Int[np.ndarray, "steps B row"], adamw: AdamW) -> Trajectory:
        """See `Oracle.train`."""
        found = super().train(self._place[steps], adamw)
        return found._replace(weights=_with_rows(found.weights, self._place))

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """See `Oracle.cached`."""
        return super().cached(self._place[tokens], prompt, chunk)[..., self._place]

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """See `Oracle.greedy`."""
        asked = [self._place[list(prompt)].tolist() for prompt in prompts]
        texts = super().greedy(asked, n, chunk, context)
        return [text._replace(ids=self._id[text.ids].tolist()) for text in texts]


def _with_rows(weights: Arrays, rows: Int[np.ndarray, "V"]) -> dict[str, np.ndarray]:
    """Weights whose tables have these rows."""
    return {n: leaf[rows] if n in (EMBEDDING, HEAD) else leaf for n, leaf in weights.items()}
