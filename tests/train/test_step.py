"""A training step: the mean loss, its gradient, the schedule, and as many in a call as asked."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lechat_jax.config import MistralConfig
from lechat_jax.data.rows import Rows
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import Weights, bind, weights_of
from lechat_jax.model.mistral import Mistral
from lechat_jax.model.scoring import score, total_nats
from lechat_jax.ops.remat import Remat, recomputing
from lechat_jax.train.optimizer import Optimizer
from lechat_jax.train.step import (
    StepOptions,
    TrainState,
    all_finite,
    gradient,
    init_state,
    shares,
    state_of,
    train_steps,
)
from tests.support.jaxprs import equations

B, CALLS = 3, 4
OPTIONS = StepOptions(chunk=20)  # 20 does not divide the 48 tokens of a batch
STREAM = np.random.default_rng(0).integers(97, size=200, dtype=np.uint16)
STARTS = np.random.default_rng(1).integers(200 - 17, size=(CALLS, B), dtype=np.int32)


def rows_of(stream: np.ndarray = STREAM, starts: np.ndarray = STARTS) -> Rows:
    """The 17 tokens from each start on."""
    return Rows(stream[starts[..., None] + np.arange(17)].astype(np.int32))


FIRST_BATCH = jnp.asarray(rows_of().tokens[0])


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=2)  # fewer layers compile sooner


@functools.cache
def first_state(config: MistralConfig) -> TrainState:
    """Of a new model, whose head is not zero."""
    return state_of(weights_of(Mistral(config, rngs=nnx.Rngs(0))), OPTIONS)


def fresh(config: MistralConfig, step: int = 0) -> TrainState:
    """A copy of the first state, since training consumes what it is given."""
    return jax.tree.map(jnp.array, first_state(config))._replace(step=jnp.int32(step))


def train(
    config: MistralConfig,
    state: TrainState,
    n: int,
    rows: Rows | None = None,
    total: int = 100,
) -> tuple[TrainState, np.ndarray]:
    state, losses = train_steps(
        config,
        OPTIONS,
        state,
        {},
        rows or rows_of(),
        jnp.int32(n),
        jnp.int32(total),
    )
    return state, np.asarray(losses)


def same_bits(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(same)


@functools.cache
def first_batch_nats(config: MistralConfig) -> np.ndarray:
    """-log p of each token of the first batch, from the model's logits."""
    logits = jax.jit(lambda weights, inputs: bind(config, weights)(inputs))
    z = np.asarray(logits(first_state(config).weights, FIRST_BATCH[:, :-1]), np.float64)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, np.asarray(FIRST_BATCH)[:, 1:, None], axis=2)[..., 0]


# --- what is computed ---


def test_the_loss_is_the_mean_over_all_tokens_of_the_batch(small: MistralConfig) -> None:
    _, losses = train(small, fresh(small), 1)
    assert losses[0] == pytest.approx(first_batch_nats(small).mean(), rel=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_gradient_is_the_slope_of_the_loss(small: MistralConfig) -> None:
    """In the direction of a random change of each kind of weight, in float64."""
    options = dataclasses.replace(OPTIONS, dtype="float64")
    share = jnp.full((B, 16), 1 / 48)

    def loss(weights: Weights) -> jax.Array:
        return total_nats(small, options, weights, FIRST_BATCH[:, :-1], FIRST_BATCH[:, 1:], share)

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    rng = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), jnp.float64)
        for name, leaf in first_state(small).weights.items()  # norms of one hide faults
    }
    _, gradient = value_and_grad(weights)
    kinds = [name for name in weights if not name.startswith("blocks.0")]
    assert len(kinds) == 12
    for name in kinds:
        change = jnp.asarray(rng.normal(size=weights[name].shape))
        up, down = (
            float(value_and_grad(weights | {name: weights[name] + by * change})[0])
            for by in (1e-5, -1e-5)
        )
        slope = float((gradient[name] * change).sum())
        assert gradient[name].dtype == jnp.float64
        assert (up - down) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-9), name


def test_only_the_counted_targets_are_learned(small: MistralConfig) -> None:
    rows = rows_of()
    counted = np.random.default_rng(2).random(rows.tokens.shape) < 0.5
    counted[..., -1] = False
    state, losses = train(small, fresh(small), 1, rows._replace(counted=counted))
    nats = first_batch_nats(small)[counted[0, :, 1:]]
    assert losses[0] == pytest.approx(nats.mean(), rel=1e-6)
    counted[..., 0] ^= True  # the first token of a row is nobody's target
    rows.tokens[..., -1] = 5  # and the last is nothing else
    again, _ = train(small, fresh(small), 1, rows._replace(counted=counted))
    assert same_bits(state, again)


def test_frozen_weights_take_part_and_stay(small: MistralConfig) -> None:
    """Those that learn get the gradient that they would get if all learned."""
    weights = fresh(small).weights
    learning = {name: leaf for name, leaf in weights.items() if "attn.q" in name or "norm" in name}
    frozen = {name: leaf for name, leaf in weights.items() if name not in learning}
    part, losses = train_steps(
        small, OPTIONS, state_of(learning, OPTIONS), frozen, rows_of(), np.int32(1), np.int32(100)
    )
    whole, all_losses = train(small, fresh(small), 1)
    assert losses[0] == pytest.approx(all_losses[0], rel=1e-6)
    assert part.weights.keys() == learning.keys()
    for name, leaf in part.weights.items():
        np.testing.assert_allclose(leaf, whole.weights[name], rtol=0, atol=1e-6)
    assert same_bits(frozen, {name: first_state(small).weights[name] for name in frozen})


def test_a_tiny_text_is_learned_by_heart(small: MistralConfig) -> None:
    rows = rows_of(np.tile(np.arange(25, dtype=np.uint16), 8))
    state, first, last = fresh(small), 0.0, 0.0
    for _ in range(10):
        state, losses = train(small, state, CALLS, rows, total=1000)
        first, last = first or losses[0], losses[-1]
    assert int(state.step) == 40
    assert first > 4
    assert last < 0.1


def test_the_seed_decides_the_weights(small: MistralConfig) -> None:
    first, same, other = (init_state(small, OPTIONS, seed) for seed in (0, 0, 1))
    assert same_bits(first, same)
    assert not same_bits(first.weights["embed.kernel"], other.weights["embed.kernel"])


def test_without_counts_all_ids_are_equally_likely_at_first(small: MistralConfig) -> None:
    _, losses = train(small, init_state(small, OPTIONS, seed=0), 1)
    assert float(losses[0]) == pytest.approx(np.log(small.vocab_size), abs=1e-5)


def test_an_embedding_that_is_the_head_too_stays_as_it_is_drawn(small: MistralConfig) -> None:
    config = dataclasses.replace(small, tied_embeddings=True)
    counts = np.arange(config.vocab_size)
    drawn = weights_of(Mistral(config, rngs=nnx.Rngs(0)))
    assert same_bits(init_state(config, OPTIONS, 0, counts=counts).weights, drawn)


def test_weights_that_are_given_are_those_that_are_trained(small: MistralConfig) -> None:
    first = first_state(small)
    assert same_bits(state_of(first.weights, OPTIONS), first)
    other = init_state(small, OPTIONS, seed=1).weights
    assert same_bits(state_of(other, OPTIONS).weights, other)


def test_the_first_guess_is_how_frequent_each_id_is(small: MistralConfig) -> None:
    """So the first loss is nearly what these frequencies give, and much less than without them."""
    config = dataclasses.replace(small, dim=192)
    counts = np.append(1000 // np.arange(1, 21), np.zeros(77, int))
    share = counts[:20] / counts.sum()
    ids = np.random.default_rng(0).choice(len(share), size=(CALLS, 64, 17), p=share)
    rows = Rows(ids.astype(np.int32))
    _, losses = train(config, init_state(config, OPTIONS, 0, counts=counts), 1, rows)
    guessed = -np.log(share[ids[0, :, 1:]]).mean()
    assert abs(losses[0] - guessed) < 0.02
    assert np.log(config.vocab_size) - guessed > 1


# --- several steps in a call ---


def test_steps_in_one_call_are_the_steps_of_one_call_each_bit_for_bit(small: MistralConfig) -> None:
    together, losses = train(small, fresh(small), CALLS)
    state, one_by_one = fresh(small), []
    for row in STARTS:
        starts = np.zeros_like(STARTS)
        starts[0] = row
        state, loss = train(small, state, 1, rows_of(starts=starts))
        one_by_one.append(loss[0])
    assert same_bits(losses, np.array(one_by_one))
    assert same_bits(together, state)
    assert int(state.step) == CALLS


@pytest.mark.parametrize("n", range(CALLS + 1))
def test_steps_not_taken_change_nothing_and_have_no_loss(small: MistralConfig, n: int) -> None:
    _, all_losses = train(small, fresh(small), CALLS)
    state, losses = train(small, fresh(small), n)
    assert int(state.step) == n
    assert losses.tolist() == all_losses[:n].tolist() + [0.0] * (CALLS - n)
    if n == 0:
        assert same_bits(state, fresh(small))


def test_one_program_serves_any_number_of_steps(
    small: MistralConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def compiled(work: Callable[[], object]) -> list[str]:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            work()
        return [message for message in caplog.messages if "Compiling jit(" in message]

    def novelty(x: jax.Array) -> jax.Array:
        return x + 1

    train(small, fresh(small), 1)
    states = [fresh(small) for _ in range(CALLS)]
    assert "novelty" in compiled(lambda: jax.jit(novelty)(jnp.int32(1)))[0]
    for n, state in enumerate(states):
        assert compiled(lambda n=n, state=state: train(small, state, n, total=7 * n + 1)) == []


def test_the_old_state_is_given_up_so_that_there_is_one_in_memory(small: MistralConfig) -> None:
    old = fresh(small)
    train(small, old, 1)
    assert all(leaf.is_deleted() for leaf in old.weights.values())


# --- the schedule ---


def moved(config: MistralConfig, step: int, total: int) -> np.ndarray:
    before = np.asarray(fresh(config).weights["head.kernel"])
    state, _ = train(config, fresh(config, step), 1, total=total)
    return np.asarray(state.weights["head.kernel"]) - before


def test_the_rate_follows_the_step_of_the_state(small: MistralConfig) -> None:
    whole = moved(small, step=20, total=100)
    for step, total, factor in ((0, 100, 0.1), (70, 100, 0.5), (20, 21, 1 / 12.6)):
        np.testing.assert_allclose(moved(small, step, total), factor * whole, atol=1e-6)
    assert np.abs(whole).max() > 1e-3
    assert not moved(small, step=100, total=100).any()


# --- precision ---


def product_types(program: Callable[..., Any], *args: Any) -> set[str]:
    """The types of the operands of all matrix products."""
    jaxpr = jax.make_jaxpr(program)(*args)
    products = [eq for eq in equations(jaxpr) if eq.primitive.name == "dot_general"]
    return {var.aval.dtype.name for eq in products for var in eq.invars}


def test_half_precision_multiplies_in_half_and_keeps_its_state_in_single(
    small: MistralConfig,
) -> None:
    half = dataclasses.replace(OPTIONS, dtype="bfloat16")
    share = jnp.full((B, 16), 1 / 48)

    def loss(options: StepOptions, weights: Weights) -> jax.Array:
        return total_nats(small, options, weights, FIRST_BATCH[:, :-1], FIRST_BATCH[:, 1:], share)

    weights = fresh(small).weights
    value, gradient = jax.eval_shape(jax.value_and_grad(functools.partial(loss, half)), weights)
    assert value.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in gradient.values()} == {"float32"}
    assert product_types(functools.partial(loss, OPTIONS), weights) == {"float32"}
    assert product_types(functools.partial(loss, half), weights) == {"bfloat16"}
    state = fresh(small)
    after, losses = jax.eval_shape(
        functools.partial(train_steps, small, half),
        state,
        {},
        rows_of(),
        jnp.int32(1),
        jnp.int32(100),
    )
    assert losses.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert {leaf.dtype.name for leaf in after.weights.values()} == {"float32"}


def test_steps_are_gradient_rule_and_schedule_one_after_the_other(small: MistralConfig) -> None:
    """Written out: what the rule remembers of one step it has in the next."""
    state, losses = train(small, fresh(small), 3, total=12)
    optimizer = Optimizer(OPTIONS.learning_rate, OPTIONS.rule)
    slope = jax.jit(functools.partial(gradient, small, OPTIONS))
    weights, inner = fresh(small).weights, fresh(small).optimizer
    for step, tokens in enumerate(rows_of().tokens[:3]):
        loss, grads = slope(weights, {}, Rows(jnp.asarray(tokens)))
        assert losses[step] == pytest.approx(float(loss), rel=1e-5)
        moves, inner = jax.jit(optimizer.update)(grads, inner, weights)
        factor = min((step + 1) / 10, (12 - step) / (0.6 * 12))
        weights = {name: leaf + factor * moves[name] for name, leaf in weights.items()}
    for name, leaf in weights.items():
        moved = np.abs(leaf - first_state(small).weights[name]).max()
        np.testing.assert_allclose(state.weights[name], leaf, rtol=0, atol=2e-3 * moved)
    for found, expected in zip(
        jax.tree.leaves(state.optimizer), jax.tree.leaves(inner), strict=True
    ):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * scale)


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_slope(small: MistralConfig) -> None:
    rows = Rows(FIRST_BATCH, jnp.zeros(FIRST_BATCH.shape, bool))
    loss, grads = jax.jit(functools.partial(gradient, small, OPTIONS))(
        first_state(small).weights, {}, rows
    )
    assert float(loss) == 0
    assert not any(leaf.any() for leaf in grads.values())
    assert not shares(rows).any(), "and not 0 / 0, which XLA may take for nought"


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_number_that_is_none_is_noticed_in_any_weight(bad: float) -> None:
    weights = {"a.kernel": jnp.ones((3, 4)), "norm.scale": jnp.zeros(3)}
    assert bool(all_finite(weights))
    for name, leaf in weights.items():
        assert not bool(all_finite(weights | {name: leaf.at[-1].set(bad)}))


# --- scoring ---


def test_only_what_is_counted_is_scored(small: MistralConfig) -> None:
    weights, inputs, targets = fresh(small).weights, FIRST_BATCH[:, :-1], FIRST_BATCH[:, 1:]
    counted = np.random.default_rng(0).uniform(size=(B, 16)) > 0.5
    got = score(small, OPTIONS, weights, inputs, targets, jnp.asarray(counted))
    assert float(got) == pytest.approx(first_batch_nats(small)[counted].sum(), rel=1e-6)
    assert float(score(small, OPTIONS, weights, inputs, targets, jnp.zeros((B, 16), bool))) == 0


# --- less memory ---


def slope(config: MistralConfig, options: StepOptions, batch: Rows) -> tuple[Any, int]:
    """The loss and the gradient of a batch in float64, and the bytes they take beside."""
    weights = {k: jnp.asarray(v, jnp.float64) for k, v in first_state(config).weights.items()}
    options = dataclasses.replace(options, dtype="float64")
    work = jax.jit(functools.partial(gradient, config, options)).lower(weights, {}, batch).compile()
    memory = work.memory_analysis()
    assert memory is not None
    return work(weights, {}, batch), memory.temp_size_in_bytes


def assert_same_slope(a: Any, b: Any) -> None:
    (loss, grads), (other_loss, other_grads) = a, b
    assert float(loss) == pytest.approx(float(other_loss), rel=1e-14)
    for name, leaf in grads.items():
        np.testing.assert_allclose(other_grads[name], leaf, rtol=1e-11, atol=1e-15)


MANY = rows_of(starts=np.arange(60, dtype=np.int32).reshape(1, 60)).tokens[0]


@pytest.mark.usefixtures("x64")
def test_a_batch_in_parts_gives_the_loss_and_the_gradient_of_the_whole(
    small: MistralConfig,
) -> None:
    """Where the parts have not the same number of targets to learn, and with less memory."""
    counted = np.random.default_rng(0).random(MANY.shape) < np.linspace(0, 1, 60)[:, None]
    whole, most = slope(small, OPTIONS, Rows(MANY, counted))
    parts, less = slope(small, dataclasses.replace(OPTIONS, accumulate=6), Rows(MANY, counted))
    assert_same_slope(whole, parts)
    assert less < most / 2


def kept_bytes(config: MistralConfig, options: StepOptions, rows: np.ndarray) -> int:
    """What stays from the forward pass for the backward pass, the weights included."""

    def backward(weights: Weights) -> Any:
        share = jnp.ones((len(rows), 16))
        inputs, targets = jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])
        return jax.vjp(
            lambda weights: total_nats(config, options, weights, inputs, targets, share), weights
        )[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, first_state(config).weights))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


@pytest.mark.usefixtures("x64")
def test_what_is_made_again_is_the_same(small: MistralConfig) -> None:
    kinds = {kind: dataclasses.replace(OPTIONS, remat=kind) for kind in get_args(Remat)}
    expected, _ = slope(small, kinds["none"], Rows(MANY[:8]))
    for kind in ("dots", "full"):
        assert_same_slope(expected, slope(small, kinds[kind], Rows(MANY[:8]))[0])


def test_what_is_made_again_is_not_kept(small: MistralConfig) -> None:
    more = dataclasses.replace(small, n_layers=3)
    per_token = {}  # of one layer
    for kind in get_args(Remat):
        options = dataclasses.replace(OPTIONS, remat=kind)
        one, two, deep_one, deep_two = (
            kept_bytes(config, options, MANY[:rows]) for config in (small, more) for rows in (8, 16)
        )
        per_token[kind] = (deep_two - deep_one - (two - one)) / (8 * 16 * 4)
    products = 48 + 16 + 16 + 40 + 56 + 56  # q k v o gate up
    assert (per_token["full"], per_token["dots"]) == (40, 40 + products)
    assert per_token["none"] > 3 * per_token["dots"]


def test_an_unknown_remat_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadInput, match="unknown remat 'some'; choose one of none, dots, full"):
        recomputing(lambda x: x, "some")
