"""One interface to three implementations of the same model, so that they can be compared.

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

# What a forward pass went through, by stage: `embed`, `attn.0`, `mlp.0`, ..., `norm`,
# `logits`; beside them `norm.0`, the first layer's norm, and `stream`, what `norm` reads.
Stages = dict[str, Float[np.ndarray, "B T ..."]]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The optimiser of a trajectory: every weight decays, and the rate stays the same."""

    eps: float
    rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    decay: float = 0.1


class Gradients(NamedTuple):
    """Mean nats a token, and its gradient by each weight, named and shaped as in lechat."""

    loss: float
    by_weight: dict[str, Float[np.ndarray, "..."]]


class Trajectory(NamedTuple):
    """The loss before each step, in nats a token, and the weights after the last."""

    losses: Float[np.ndarray, "steps"]
    weights: dict[str, Float[np.ndarray, "..."]]


class Text(NamedTuple):
    """New tokens, and the nats that the model itself gave each of them."""

    ids: list[int]
    logprobs: list[float]


class Oracle(Protocol):
    """One implementation with one model's weights in one dtype."""

    @property
    def name(self) -> Implementation:
        """Whose code runs."""
        ...

    @property
    def dtype(self) -> Dtype:
        """What it computes in."""
        ...

    def load(self, weights: Arrays) -> None:
        """Takes other weights of the same shapes; nothing is compiled again."""
        ...

    def drop(self) -> None:
        """Lets go of its weights; `load` brings others."""
        ...

    def forward(self, tokens: Int[np.ndarray, "B T"], first_position: int = 0) -> Stages:
        """All stages of one pass over whole sequences."""
        ...

    def gradients(self, rows: Int[np.ndarray, "B row"]) -> Gradients:
        """Of the mean loss of predicting each token of a row from those before it."""
        ...

    def train(self, steps: Int[np.ndarray, "steps B row"], adamw: AdamW) -> Trajectory:
        """One optimiser step for each batch of rows."""
        ...

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """Logits of a text read through the cache: `prompt` tokens in chunks, then one by one."""
        ...

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """The n likeliest tokens after each prompt, all prompts in one padded batch.

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
