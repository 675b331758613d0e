"""Greedy decoding by lechat, behind the interface that a benchmark drives every contestant by.

All are given the same weights, which are random: how fast they are streamed does not depend
on what they say.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import SCALE, is_norm, n_reads
from lechat_jax.devices.host_memory import host_empty
from lechat_jax.generate.continuation import Continuation, Sample
from lechat_jax.generate.continuous_batch import rounds
from lechat_jax.generate.decode import MOST
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.loaded_model import MOST_DRAFT, LoadedModel
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import Weights, bind
from parity.measure import device_peak

Impl = Literal["lechat_jax", "lechat_torch", "transformers", "llama.cpp"]
DtypeName = Literal["float32", "bfloat16", "int8", "int4"]
QUANTIZED: tuple[DtypeName, ...] = ("int8", "int4")  # of lechat and llama.cpp alone
IMPLS: tuple[Impl, ...] = ("lechat_jax", "lechat_torch", "transformers")

GREEDY = Sampling(temperature=0.0)
# A round is handed out whole, so what comes may be that much more than what is asked for.
SPARE = MOST * (1 + MOST_DRAFT)
Prompts = Sequence[Sequence[int]]


class Decoder(Protocol):
    """A model that decodes greedily and without end, behind one interface for all implementations.

    Attributes:
        note: what a reader of its figures should know, or nothing.
    """

    note: str

    @property
    def ids(self) -> list[list[int]]:
        """The tokens produced since the start, by row."""
        ...

    def start(self, prompts: Prompts, room: int, skip: int = 0) -> None:
        """Forgets all, reads these prompts and produces the first token of each; waits.

        Args:
            prompts: of one length.
            room: most tokens of a row that are going to be asked for.
            skip: tokens at the beginning of each prompt that are not read. The others are, at
                the positions where they belong.
        """
        ...

    def advance(self, n: int) -> int:
        """Decodes at least `n` tokens a row, and gives how many; waits for the device."""
        ...

    def device_bytes(self) -> int | None:
        """Most memory of an accelerator that it took; `None` on a CPU."""
        ...


class Lechat:
    """lechat as `lechat_jax.generate` drives it, in the rounds of `Generator.stream`.

    With a `draft`, prompt lookup decoding proposes so many tokens a step.
    """

    def __init__(self, config: MistralConfig, weights: Weights, draft: int = 0) -> None:
        self.note = ""
        self.ids: list[list[int]] = []
        self._model, self._draft = bind(config, weights), draft
        self._rounds: Iterator[list[Sample]] = iter(())

    @classmethod
    def load(cls, folder: Path, dtype: str, batch: int) -> "Lechat":
        """The model of a folder of weights, for so many rows."""
        loaded = Generator.from_checkpoint(folder, dtype=dtype, batch=batch)
        return cls(loaded.config, loaded.weights)

    def start(self, prompts: Prompts, room: int, skip: int = 0) -> None:
        """See `Decoder.start`."""
        self.ids, self._rounds = [[] for _ in prompts], iter(())  # the last cache is given back
        limit = room + SPARE
        model = LoadedModel(self._model, context=len(prompts[0]) + limit)
        batch = model.continuous_batch(len(prompts), self._draft)
        for row, prompt in enumerate(prompts):
            batch.admit(row, prompt, limit, GREEDY, start=skip)
        batch.read_all()
        rows = [Continuation(prompt, limit, None, (), None) for prompt in prompts]
        self._rounds = rounds(batch, rows)
        self.advance(1)

    def advance(self, n: int) -> int:
        """See `Decoder.advance`; a round is handed out whole."""
        before = len(self.ids[0])
        while len(self.ids[0]) < before + n:
            for ids, piece in zip(self.ids, next(self._rounds), strict=True):
                ids += piece.ids
        return len(self.ids[0]) - before

    def device_bytes(self) -> int | None:
        """See `Decoder.device_bytes`."""
        return device_peak()


def random_weights(config: MistralConfig, dtype: DTypeLike, seed: int) -> Weights:
    """Random weights by name, drawn on the device that computes, one tensor at a time.

    Normal, with a deviation that keeps the size of what passes through; the norms' are one.
    They are drawn in float32, so in another type they are the same numbers, rounded. On a CPU
    they lie where `load_weights` would put them.
    """
    key = jax.random.key(seed)
    weights: Weights = {}
    for number, (name, leaf) in enumerate(weight_shapes(config).items()):
        if is_norm(name):
            weights[name] = jnp.ones(leaf.shape, dtype)
            continue
        reads = math.prod(leaf.shape[-n_reads(name) :])
        drawn = _normal(jax.random.fold_in(key, number), leaf.shape, jnp.dtype(dtype), reads**-0.5)
        if jax.default_backend() == "cpu":
            place = host_empty(drawn.shape, drawn.dtype)
            np.copyto(place, drawn)
            drawn = jax.device_put(place)
        weights[name] = drawn
    return jax.block_until_ready(weights)


def repeating(weights: Weights, phrase: Sequence[int]) -> Weights:
    """Weights of the same cost with which a model repeats a phrase, of ids that differ, for ever.

    The embedding of each id of the phrase points to the head's row of the next one, ten times as
    long as usual, so what the layers add does not change the choice.
    """
    ids, following = jnp.asarray(phrase), jnp.asarray([*phrase[1:], phrase[0]])
    scale = f"embed.kernel{SCALE}"
    if scale in weights:  # an int8 table: of each row the numbers, and ten times the size
        rows = weights["head.kernel"][following]
        sizes = 10 * weights[f"head.kernel{SCALE}"][following] * rows.shape[1] ** 0.5
        changed = {scale: weights[scale].at[ids].set(sizes)}
    else:
        rows, changed = weights["head.kernel"][following], {}
        rows = 10 * rows / jnp.sqrt(jnp.mean(jnp.square(rows), axis=1, keepdims=True))
    table = weights["embed.kernel"]
    return weights | changed | {"embed.kernel": table.at[ids].set(rows.astype(table.dtype))}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike, std: float) -> Array:
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def random_prompts(config: MistralConfig, batch: int, context: int, seed: int) -> list[list[int]]:
    """Random prompts of `context` tokens each, as ids."""
    ids = jax.random.randint(jax.random.key(seed + 1), (batch, context), 0, config.vocab_size)
    return ids.tolist()
