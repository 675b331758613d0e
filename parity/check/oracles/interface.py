"""Oracle: one interface to three implementations of the same model.

Each is asked for what it makes of the same tokens under the same weights, in one dtype,
and answers in NumPy: the two of ours, lechat_jax and lechat_torch, and transformers' own
Mistral. What passes between the layers is seen from outside, by hooks around the modules
that every forward pass calls, so no implementation knows that it is being watched.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

Implementation = Literal["jax", "torch", "transformers"]
Dtype = Literal["float64", "float32", "bfloat16"]

# A model as it is stored: its weights by lechat's names and in lechat's shapes.
Arrays = Mapping[str, Float[np.ndarray, "..."]]

# Images as all implementations are given them: normalised pixels, channels first, of whole patches.
Pictures = Sequence[Float[np.ndarray, "3 _height _width"]]

# What a forward pass went through, by stage: `embed`, `attn.0`, `mlp.0`, ..., `norm`,
# `logits`; beside them `norm.0`, the first layer's norm, and `stream`, what `norm` reads. Of
# images before that, each the rows of all patches, image after image, row by row: `patches`,
# `vision.0`, ..., and `projector`, of their tokens.
OF_VISION = ("patches", "vision", "projector")
Stages = dict[str, Float[np.ndarray, "B T ..."]]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW of a trajectory: every weight decays, at a constant rate."""

    eps: float
    rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    decay: float = 0.1


class Gradients(NamedTuple):
    """Loss in nats per token and its gradients, by lechat's names and shapes."""

    loss: float
    by_weight: dict[str, Float[np.ndarray, "..."]]


class Trajectory(NamedTuple):
    """Loss before each step in nats per token, and the weights after the last."""

    losses: Float[np.ndarray, "steps"]
    weights: dict[str, Float[np.ndarray, "..."]]


class Text(NamedTuple):
    """Generated tokens and their log-probabilities."""

    ids: list[int]
    logprobs: list[float]


class Oracle(Protocol):
    """One implementation with one model's weights in one dtype."""

    @property
    def name(self) -> Implementation:
        """Name of the implementation."""
        ...

    @property
    def dtype(self) -> Dtype:
        """Compute dtype."""
        ...

    def load(self, weights: Arrays) -> None:
        """Replaces the weights by others of the same shapes, without compiling again."""
        ...

    def drop(self) -> None:
        """Frees the weights; `load` brings others."""
        ...

    def show(self, pictures: Pictures, patches: Float[np.ndarray, "rows d"] | None = None) -> None:
        """From now on every text with image tokens in it has these images there, in this order.

        With `patches`, these rows stand in place of what the tower's first layer reads of them, in
        the order of `Stages`; of one text at a time.
        """
        ...

    def forward(self, tokens: Int[np.ndarray, "B T"], first_position: int = 0) -> Stages:
        """Activations of all stages in one pass over whole sequences."""
        ...

    def gradients(self, rows: Int[np.ndarray, "B row"]) -> Gradients:
        """Loss and gradients of next-token prediction on a batch."""
        ...

    def train(self, steps: Int[np.ndarray, "steps B row"], adamw: AdamW) -> Trajectory:
        """Trains one step on each batch of rows."""
        ...

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """Logits of a text read through the cache: `prompt` tokens in chunks, then one by one."""
        ...

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """Greedy decoding of n tokens after each prompt, in one padded batch.

        Prompts are read in chunks; `context` is what a layer without a window can hold.
        """
        ...


def pieces(T: int, prompt: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Start and end of each part of a text: the prompt's chunks, then single tokens.

    >>> list(pieces(T=9, prompt=7, chunk=3))
    [(0, 3), (3, 6), (6, 7), (7, 8), (8, 9)]
    """
    for start in range(0, prompt, chunk):
        yield start, min(start + chunk, prompt)
    for start in range(prompt, T):
        yield start, start + 1
