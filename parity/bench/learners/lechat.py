"""Training by lechat, behind the interface that a benchmark drives every peer by.

By its own optimiser, or by the AdamW of its peers.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer

from lechat_jax.config import MistralConfig
from lechat_jax.data.batches import Batches
from lechat_jax.data.rows import Rows
from lechat_jax.model.binding import Weights
from lechat_jax.model.scoring import score
from lechat_jax.ops.attention_backend import Backend
from lechat_jax.train.options import Dtype
from lechat_jax.train.step import (
    StepOptions,
    gradient,
    initial_weights,
    state_of,
    train_steps,
)
from lechat_jax.train.unused_ids import UnusedIds
from parity.measure import device_peak

FOREVER = np.iinfo(np.int32).max  # steps in a run whose length is not known yet


class NotCompiled(Exception):
    """A learner's compiler does not work on this machine; the message is its reason."""


class Setup(NamedTuple):
    """Training setup that all learners of a run share: the model, the batches, the weights.

    Attributes:
        config: of the model.
        batches: which windows of the stream each step reads.
        stream: the training tokens.
        seed: of the initial weights, which are the same for all.
        weights: those, by lechat's names, in memory of their own.
        unused: ids whose rows start equal, of which lechat keeps one.
        steps_per_call: at most this many are asked for at a time.
        dtype: of activations and products; the weights that are learned stay float32.
    """

    config: MistralConfig
    batches: Batches
    stream: Integer[np.ndarray, " train"]
    seed: int
    weights: dict[str, Float[np.ndarray, "..."]]
    unused: UnusedIds
    steps_per_call: int
    dtype: Dtype = "float32"

    @property
    def tokens_per_step(self) -> int:
        """Targets that one step learns from, B * T."""
        return self.batches.batch * self.batches.block

    def rows(self, first_step: int, n: int) -> Integer[np.ndarray, "n B row"]:
        """The windows of `n` steps, T + 1 tokens each."""
        return self.batches.rows(self.stream, first_step, n).tokens.astype(np.int64)


def first_weights(
    config: MistralConfig,
    seed: int,
    unused: UnusedIds,
    counts: Integer[np.ndarray, " V"] | None = None,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Initial weights as lechat draws them from a seed, in arrays that no step will overwrite."""
    weights = unused.widened(unused.narrowed(initial_weights(config, seed, counts)))
    return {name: np.array(leaf) for name, leaf in weights.items()}


class Learner(Protocol):
    """A model in training, behind one interface for all implementations.

    Attributes:
        config: of the model that it computes.
        step: steps taken.
        note: what a reader of its figures should know, or nothing.
    """

    config: MistralConfig
    step: int
    note: str

    def advance(self, n: int, total: int) -> list[float]:
        """The losses, in nats a token, of the next `n` steps of a run of `total`; waits."""
        ...

    def nats(
        self,
        inputs: Integer[np.ndarray, "B T"],
        targets: Integer[np.ndarray, "B T"],
        counted: Bool[np.ndarray, "B T"],
    ) -> float:
        """Total nats of the counted targets, a softmax over the whole vocabulary."""
        ...

    def device_bytes(self) -> int | None:
        """Most memory of an accelerator that it took; `None` on a CPU."""
        ...


class Lechat:
    """lechat as `lechat_jax.train` trains it: the same compiled steps, optimiser and rates.

    `backend` names the attention kernel, instead of the best for the device.
    """

    def __init__(self, setup: Setup, backend: Backend | None = None) -> None:
        self.setup, self.config = setup, setup.unused.narrow_config(setup.config)
        n_sharing = setup.unused.n_sharing
        self.options = StepOptions(dtype=setup.dtype, backend=backend, n_sharing=n_sharing)
        weights = {name: jnp.array(leaf) for name, leaf in setup.weights.items()}
        self.state = state_of(setup.unused.narrowed(weights), self.options)
        self.step = 0
        self.note = "its own optimiser, as in the main job" + _attention(backend)

    def advance(self, n: int, total: int) -> list[float]:
        """See `Learner.advance`."""
        self.state, losses = train_steps(
            self.config,
            self.options,
            self.state,
            {},
            self.rows(),
            jnp.int32(n),
            jnp.int32(total),
        )
        self.step += n
        return np.asarray(losses)[:n].tolist()

    def nats(
        self,
        inputs: Integer[np.ndarray, "B T"],
        targets: Integer[np.ndarray, "B T"],
        counted: Bool[np.ndarray, "B T"],
    ) -> float:
        """See `Learner.nats`."""
        inputs, targets = (self.setup.unused.row_of_id[ids] for ids in (inputs, targets))
        weights = self.current_weights()
        return float(score(self.config, self.options, weights, inputs, targets, counted))

    def rows(self) -> Rows:
        """The rows of the next call, as many as one can take."""
        setup = self.setup
        rows = setup.batches.rows(setup.stream, self.step, setup.steps_per_call)
        return setup.unused.renumbered(rows)

    def current_weights(self) -> Weights:
        """The weights after the steps so far."""
        return self.state.weights

    def device_bytes(self) -> int | None:
        """See `Learner.device_bytes`."""
        return device_peak()


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) as most train a small Mistral.

    Matrices and tables decay, norm scales do not. The rate rises for `warmup` steps and
    then falls along a line to zero at the end of the run.
    """

    rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1
    warmup: int = 10

    def share_of_rate(self, step: int | Array, total: int | Array) -> Array:
        """The fraction of the peak rate at a step, counted from 0.

        >>> [round(float(AdamW(rate=3e-3, warmup=2).share_of_rate(i, 6)), 2) for i in range(6)]
        [0.5, 0.83, 0.67, 0.5, 0.33, 0.17]
        """
        return jnp.maximum(0.0, jnp.minimum((step + 1) / self.warmup, (total - step) / total))


class LechatAdamW(Lechat):
    """lechat's model under the optimiser of its peers, so that only the model can differ."""

    def __init__(self, setup: Setup, adamw: AdamW, backend: Backend | None = None) -> None:
        super().__init__(setup, backend)
        self.adamw = adamw
        self.note = f"AdamW at {adamw.rate:g}" + _attention(backend)
        self.weights: Weights = self.state.weights
        self.moments = _optax(adamw).init(self.weights)

    def advance(self, n: int, total: int) -> list[float]:
        """See `Learner.advance`."""
        rows = self.rows().tokens
        run = jnp.array([self.step, n, total], jnp.int32)
        self.weights, self.moments, losses = _adamw_steps(
            self.config, self.options, self.adamw, self.weights, self.moments, rows, run
        )
        self.step += n
        return np.asarray(losses)[:n].tolist()

    def current_weights(self) -> Weights:
        """The weights after the steps so far."""
        return self.weights


def _attention(backend: Backend | None) -> str:
    return f", {backend} attention" if backend else ""


def _optax(adamw: AdamW) -> optax.GradientTransformation:
    return optax.adamw(
        adamw.rate,
        b1=adamw.beta1,
        b2=adamw.beta2,
        eps=adamw.eps,
        weight_decay=adamw.decay,
        mask=lambda weights: jax.tree.map(lambda leaf: leaf.ndim > 1, weights),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _adamw_steps(
    config: MistralConfig,
    options: StepOptions,
    adamw: AdamW,
    weights: Weights,
    moments: optax.OptState,
    rows: Int[Array, "calls B row"],
    run: Int[Array, " 3"],
) -> tuple[Weights, optax.OptState, Float[Array, " calls"]]:
    """Training steps by AdamW: weights and moments after them, and the loss before each.

    `run` is the number of the first step, how many to take, and how many the run has.
    """
    first, n, total = run
    optimizer = _optax(adamw)

    def step(i: Array, carry: tuple) -> tuple:
        weights, moments, losses = carry
        loss, grads = gradient(config, options, weights, {}, Rows(rows[i]))
        updates, moments = optimizer.update(grads, moments, weights)
        share = adamw.share_of_rate(first + i, total)
        weights = jax.tree.map(lambda leaf, update: leaf + share * update, weights, updates)
        return weights, moments, losses.at[i].set(loss)

    return jax.lax.fori_loop(0, n, step, (weights, moments, jnp.zeros(len(rows))))
