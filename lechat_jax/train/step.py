"""Training step: forward, backward and optimizer update, several in one compiled call."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import EMBEDDING, HEAD, is_tower, is_vision
from lechat_jax.data.rows import Rows
from lechat_jax.devices.mesh import create_sharded, described, pinned
from lechat_jax.devices.platform import platform
from lechat_jax.model.binding import Weights, weights_of
from lechat_jax.model.mistral import Mistral
from lechat_jax.model.scoring import Forward, total_nats
from lechat_jax.ops.remat import KEPT_ON_A_CPU
from lechat_jax.train.optimizer import MUON, Optimizer, RateSchedule, Rule, warmup_then_cooldown
from lechat_jax.train.unused_ids import UnusedIds

UNSEEN = 0.1  # occurrences of an id that does not occur

Shapes = Mapping[str, jax.ShapeDtypeStruct]


class TrainState(NamedTuple):
    """Training state: all that a step changes. Without dropout there is no random key in it."""

    weights: Weights
    optimizer: optax.OptState
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(Forward):
    """Static arguments of the compiled training step.

    Weights and optimiser stay float32 whatever the dtype. `router_aux_loss` is of each of the
    parts of a batch.

    Attributes:
        learning_rate: multiple of the peak rates of the rule.
        rule: the optimiser.
        accumulate: parts that a batch is worked through in, one after the other.
        frozen_tower: whether the vision tower stays as it is; its projector learns.
    """

    learning_rate: float = 1.0
    rule: Rule = MUON
    accumulate: int = 1
    frozen_tower: bool = False


def initial_weights(
    config: MistralConfig, seed: int, counts: Integer[np.ndarray, " V"] | None = None
) -> Weights:
    """Initial weights, whose first guess is how frequent each id is in a text.

    A new model, drawn from `seed`, but for its head, which holds what a run would first learn in
    some dozen steps, the frequencies, and no random choice that would have to be unlearned. Every
    embedding has a one in each lane, which is a bias to all layers, and the head reads the
    logarithms from it. Without `counts` all ids are equally likely. Tied embeddings stay as they
    are drawn.
    """
    weights = weights_of(Mistral(config, rngs=nnx.Rngs(seed)))
    if config.tied_embeddings:
        return weights
    counts = np.zeros(config.vocab_size) if counts is None else counts
    frequency = np.log(counts + UNSEEN)
    # The final norm divides the sum of a unit normal and a one in each lane by sqrt(2).
    bias = (frequency - frequency.mean()) * 2**0.5 / config.dim
    embed, head = weights[EMBEDDING], weights[HEAD]
    bias = jnp.asarray(bias, head.dtype)[:, None]
    return weights | {EMBEDDING: embed + 1, HEAD: jnp.broadcast_to(bias, head.shape)}


def init_state(
    config: MistralConfig,
    options: StepOptions,
    seed: int,
    unused: UnusedIds | None = None,
    counts: Integer[np.ndarray, " V"] | None = None,
) -> TrainState:
    """Initial training state with the `initial_weights`, in which `unused` ids have one row."""

    def draw() -> Weights:
        weights = initial_weights(config, seed, counts)
        return unused.narrowed(weights) if unused else weights

    return state_of(create_sharded(options.mesh, draw), options)


def state_of(weights: Weights, options: StepOptions) -> TrainState:
    """Initial training state with these weights."""
    optimizer = Optimizer(options.learning_rate, options.rule)

    def start(weights: Weights) -> tuple[optax.OptState, Array]:
        return optimizer.init(weights), jnp.zeros((), jnp.int32)

    return TrainState(weights, *create_sharded(options.mesh, start, weights))


def described_state(
    options: StepOptions, learning: Shapes, frozen: Shapes
) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """State and frozen weights as `jax.ShapeDtypeStruct`s, with their shardings on a mesh."""
    alone = dataclasses.replace(options, mesh=None)
    begun = jax.eval_shape(lambda weights: state_of(weights, alone), dict(learning))
    return described(options.mesh, (begun, dict(frozen)))


def described_call(
    config: MistralConfig, options: StepOptions, learning: Shapes, frozen: Shapes, rows: Rows
) -> tuple[Any, ...]:
    """All arguments of `train_steps` as `jax.ShapeDtypeStruct`s, to lower it before they exist."""
    state, frozen = described_state(options, learning, frozen)
    length = jax.eval_shape(lambda: RateSchedule(jnp.int32(0), jnp.int32(0), jnp.float32(0)))
    return config, options, state, frozen, rows, length.end, length


def train_steps(
    config: MistralConfig,
    options: StepOptions,
    state: TrainState,
    frozen: Weights,
    rows: Rows,
    n_steps: Int[ArrayLike, ""],
    length: RateSchedule | Int[ArrayLike, ""],
) -> tuple[TrainState, Float[Array, " calls"]]:
    """Trains on the first `n_steps` batches of `rows`: the next state, and the loss of each step.

    Losses are means over the counted targets of a batch, in nats a token; those of steps not
    taken are zero. One executable serves any number of steps up to the batches of `rows`.

    Args:
        config: of the model.
        options: of the step.
        state: the weights that learn among it; it is used up.
        frozen: the other weights of the model, if there are any.
        rows: a batch for each step, [calls, B, T + 1].
        n_steps: steps to take.
        length: of the run in steps, on which the learning rate depends, or its schedule.
    """
    steps = jitted_steps(options)
    return steps(config, options, state, frozen, rows, n_steps, length)


def jitted_steps(options: StepOptions) -> Any:
    """Jit-compiled `train_steps`, with the scheduler under which remat saves memory on a CPU."""
    is_undone = options.remat != "none" and platform() == "cpu"
    return _KEEPING if is_undone else _STEPS


def _steps(
    config: MistralConfig,
    options: StepOptions,
    state: TrainState,
    frozen: Weights,
    rows: Rows,
    n_steps: Array,
    length: RateSchedule | Array,
) -> tuple[TrainState, Array]:
    optimizer = Optimizer(options.learning_rate, options.rule)

    def step(i: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        state, losses = carry
        batch = jax.tree.map(lambda leaf: leaf[i], rows)
        loss, grads = gradient(config, options, state.weights, frozen, batch)
        updates, inner = optimizer.update(grads, state.optimizer, state.weights)
        has_images = rows.images is not None
        updates = {
            name: jnp.zeros_like(update) if _is_still(name, options, has_images) else update
            for name, update in updates.items()
        }
        factor = warmup_then_cooldown(state.step, length)
        weights = jax.tree.map(lambda leaf, update: leaf + factor * update, state.weights, updates)
        state = TrainState(*pinned(options.mesh, (weights, inner)), state.step + 1)
        return state, losses.at[i].set(loss)

    losses = jnp.zeros(rows.tokens.shape[0], jnp.promote_types(options.dtype, jnp.float32))
    return jax.lax.fori_loop(0, n_steps, step, (state, losses))


_compiled = functools.partial(jax.jit, _steps, static_argnums=(0, 1), donate_argnums=(2,))
_STEPS, _KEEPING = _compiled(), _compiled(compiler_options=KEPT_ON_A_CPU)


def gradient(
    config: MistralConfig, options: StepOptions, weights: Weights, frozen: Weights, batch: Rows
) -> tuple[Float[Array, ""], Weights]:
    """Loss of a batch and its gradient in the trainable weights.

    In several parts if `options.accumulate` says so, of which only one has its activations in
    memory. Each target has its share of the whole batch, so that the parts' losses and
    gradients need only be added: a part in which less is counted weighs less.
    """

    def loss_of(weights: Weights, part: Rows, share: Array) -> Float[Array, ""]:
        inputs, targets = part.tokens[:, :-1], part.tokens[:, 1:]
        documents = None if part.documents is None else part.documents[:, :-1]
        images = part.images and part.images._replace(slots=part.images.slots[..., :-1])
        all_weights = frozen | _stopped(weights, options, images is not None)
        rows = inputs, targets, share, documents, images
        return total_nats(config, forward, all_weights, *rows)

    slope = jax.value_and_grad(loss_of)
    n, share = options.accumulate, shares(batch)
    forward = dataclasses.replace(options, router_aux_loss=options.router_aux_loss / n)
    if n == 1:
        return slope(weights, batch, share)

    def add(i: Array, total: tuple[Array, Weights]) -> tuple[Array, Weights]:
        # Every n-th row, so that of rows that lie on several devices each has some.
        part, part_share = jax.tree.map(
            lambda leaf: leaf.reshape(-1, n, *leaf.shape[1:])[:, i], (batch, share)
        )
        return jax.tree.map(jnp.add, total, slope(weights, part, part_share))

    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(slope, weights, batch, share))
    return jax.lax.fori_loop(0, n, add, pinned(options.mesh, nothing))


def _is_still(name: str, options: StepOptions, has_images: bool) -> bool:
    """Whether a weight stays as it is: of the tower if it is frozen, or if there are no images."""
    is_frozen = is_tower(name) and options.frozen_tower
    return is_frozen or (is_vision(name) and not has_images)


def _stopped(weights: Weights, options: StepOptions, has_images: bool) -> Weights:
    """The weights, of which those that stay as they are have no gradient to be computed."""
    return {
        name: jax.lax.stop_gradient(leaf) if _is_still(name, options, has_images) else leaf
        for name, leaf in weights.items()
    }


def shares(batch: Rows) -> Float[Array, "B T"]:
    """Loss mask as weights of the targets: equal for all that count, and one in sum."""
    B, T = batch.tokens.shape[0], batch.tokens.shape[1] - 1
    if batch.counted is None and batch.documents is None:
        return jnp.full((B, T), 1 / (B * T))
    counted = jnp.ones((B, T), bool) if batch.counted is None else batch.counted[:, 1:]
    if batch.documents is not None:
        counted &= batch.documents[:, 1:] == batch.documents[:, :-1]
    share = counted.astype(jnp.float32)
    return share / jnp.maximum(share.sum(), 1)


@jax.jit
def all_finite(weights: Weights) -> Bool[Array, ""]:
    """Whether every weight is finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in weights.values()]))
