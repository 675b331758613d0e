"""The two hot functions of training: several steps in one call, and scoring held-out text."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt

from lechat_jax.attention import Backend
from lechat_jax.config import MistralConfig
from lechat_jax.loss import cross_entropy
from lechat_jax.model import Mistral, Weights, bind, weights_of
from lechat_jax.optimizer import Optimizer, warmup_then_cooldown


class TrainState(NamedTuple):
    """All that a step changes. There is no dropout, so no random key is among it."""

    weights: Weights
    optimizer: optax.OptState
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a compiled step is specialised to.

    Attributes:
        block: tokens T in a training row.
        dtype: of activations and matrix products; weights and optimiser stay float32.
        learning_rate: multiple of the measured peak rates.
        chunk: tokens whose logits are in memory at a time; `None` takes 256 on a CPU, whose
            cache holds them, and 8192 elsewhere.
        backend: attention kernel; `None` takes the best for the platform.
    """

    block: int
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    learning_rate: float = 1.0
    chunk: int | None = None
    backend: Backend | None = None


def init_state(config: MistralConfig, options: StepOptions, seed: int) -> TrainState:
    """Weights drawn from `seed`, and an optimiser that has seen nothing."""
    return state_of(weights_of(Mistral(config, rngs=nnx.Rngs(seed))), options)


def state_of(weights: Weights, options: StepOptions) -> TrainState:
    """These weights, and an optimiser that has seen nothing."""
    optimizer = Optimizer(options.learning_rate)
    return TrainState(weights, optimizer.init(weights), jnp.zeros((), jnp.int32))


def total_nats(
    config: MistralConfig,
    options: StepOptions,
    weights: Weights,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    share: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Sum over all positions of share * -log p(target), computed in `options.dtype`."""
    cast = {name: leaf.astype(options.dtype) for name, leaf in weights.items()}
    model = bind(config, cast)
    hidden = model.hidden(inputs, options.backend).reshape(-1, config.dim)
    head = model.head.kernel[...]
    chunk = options.chunk or (256 if jax.default_backend() == "cpu" else 8192)
    return cross_entropy(hidden, head, targets.reshape(-1), share.reshape(-1), chunk)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))
def train_steps(
    config: MistralConfig,
    options: StepOptions,
    state: TrainState,
    stream: UInt[Array, " train"],
    starts: Int[Array, "calls B"],
    n_steps: Int[Array, ""],
    total_steps: Int[Array, ""],
) -> tuple[TrainState, Float[Array, " calls"]]:
    """The state after the first `n_steps` rows of `starts`, and the loss of each step.

    The token stream lies on the device, and each row of `starts` says where the rows of
    one batch begin in it. Losses are means in nats a token; those of steps not taken are
    zero. One executable serves any number of steps up to the rows of `starts`.
    """
    optimizer = Optimizer(options.learning_rate)

    def step(i: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        state, losses = carry
        rows = stream[starts[i][:, None] + jnp.arange(options.block + 1)].astype(jnp.int32)
        share = jnp.full((rows.shape[0], options.block), 1 / (rows.shape[0] * options.block))
        loss, grads = jax.value_and_grad(total_nats, argnums=2)(
            config, options, state.weights, rows[:, :-1], rows[:, 1:], share
        )
        updates, inner = optimizer.update(grads, state.optimizer, state.weights)
        factor = warmup_then_cooldown(state.step, total_steps)
        weights = jax.tree.map(lambda leaf, update: leaf + factor * update, state.weights, updates)
        state = TrainState(weights, inner, state.step + 1)
        return state, losses.at[i].set(loss)

    losses = jnp.zeros(starts.shape[0], jnp.promote_types(options.dtype, jnp.float32))
    return jax.lax.fori_loop(0, n_steps, step, (state, losses))


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    config: MistralConfig,
    options: StepOptions,
    weights: Weights,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Total nats of the counted targets, each given what precedes it in its row."""
    return total_nats(config, options, weights, inputs, targets, counted.astype(jnp.float32))
