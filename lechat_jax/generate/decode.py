"""The hot functions of generation: prefill of a prompt's chunk, and the decode loop.

Both are compiled once for a model and a number of rows, whatever the lengths: prompts go
in a chunk of one row at a time, and one call of `decode` makes as many tokens as it is told to.
"""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from lechat_jax.config import MistralConfig
from lechat_jax.devices.host_memory import give_back_memory
from lechat_jax.generate.prefill import Described, cache_size
from lechat_jax.generate.prompt_lookup import SEEN, lately, look_up, record
from lechat_jax.generate.sampling import Controls, Sampling, sample, token_keys
from lechat_jax.model.binding import Weights, bind
from lechat_jax.model.cache import EMPTY, Cache, empty_cache
from lechat_jax.ops.matmul import as_bits

T = TypeVar("T")
MOST = 64  # steps that one call of `decode` can take: its buffers have room for their tokens


class DecodeState(NamedTuple):
    """What changes from token to token, carried through the loop and from call to call.

    Attributes:
        cache: keys and values of all tokens before `token`.
        token: the newest of each row, which the model has not read yet; at first the last
            of the prompt.
        position: of `token`, counted from the row's own first token; `EMPTY` for a row that is
            free, or whose prompt is still being read: nothing is written into its ring.
        left: tokens that each row may still produce; at 0 the row is done.
        seen: the newest tokens, `token` among them, as `look_up` wants them; without
            speculation there are no slots.
    """

    cache: Cache
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    left: Int[Array, "B"]
    seen: Int[Array, "B S"]


class Request(NamedTuple):
    """What stays the same from token to token.

    Attributes:
        controls: temperature and filters of each row.
        streams: the random stream of each row.
        ends: whether a token ends its row, such as EOS.
    """

    controls: Controls
    streams: UInt[Array, "B 2"]
    ends: Bool[Array, "B V"]


class Produced(NamedTuple):
    """The tokens of one call, those of a row from column 0 on; behind `length` there are none.

    Attributes:
        ids: the tokens, the one that ended a row included.
        logprobs: nats that the model itself gave each, at temperature 1 and unfiltered.
        length: how many in each row.
        steps: how often the model was run.
    """

    ids: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    length: Int[Array, "B"]
    steps: Int[Array, ""]


# Of the loop; the last is how many tokens a step has made lately.
Carry = tuple[DecodeState, Produced, Float[Array, ""]]


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def prefill(
    config: MistralConfig,
    weights: Weights,
    cache: Cache,
    row: Int[Array, ""],
    tokens: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
) -> Cache:
    """The cache with one more chunk of one row's prompt in it; `EMPTY` positions are padding.

    One row at a time, so that nobody is padded to the length of the others and what is computed
    does not depend on them. No logits are made: the last token of a prompt is left to `decode`,
    which is then the only place where anything is sampled. The cache passed in is used up.
    """
    alone = jax.tree.map(lambda rows: jax.lax.dynamic_slice_in_dim(rows, row, 1), cache)
    alone = bind(config, weights).extend(tokens, positions, alone)[1]
    return _put(cache, row, alone)


@functools.partial(jax.jit, donate_argnums=0)
def clear(cache: Cache, row: Int[Array, ""]) -> Cache:
    """The cache with nothing in one row, as if it had never been used.

    Not only its positions go: a value that is no number would be none under any mask. The cache
    passed in is used up.
    """
    alone = jax.tree.map(lambda rows: jnp.zeros_like(rows[:1]), cache)
    rings = [ring._replace(position=ring.position + EMPTY) for ring in alone.rings]
    return _put(cache, row, Cache(tuple(rings)))


@functools.partial(jax.jit, donate_argnums=0)
def with_row(rows: T, row: Int[Array, ""], alone: T) -> T:
    """Arrays of B rows with one of them replaced; what is passed in is used up."""
    return _put(rows, row, alone)


def _put(rows: T, row: Int[Array, ""], alone: T) -> T:
    def put(into: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(into, new, row, 0)

    return jax.tree.map(put, rows, alone)


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=(2,))
def decode(
    config: MistralConfig,
    weights: Weights,
    state: DecodeState,
    request: Request,
    n: Int[Array, ""],
    draft: int = 0,
) -> tuple[DecodeState, Produced]:
    """Tokens of `n` more steps for each row, and the state after them; n is at most `MOST`.

    Ends early when all rows are done. A row that is done keeps its place in the batch, and
    what is computed there is not used. The state passed in is used up; its cache is
    updated in place, so memory does not depend on how long this goes on.

    A step makes one token, or with a `draft` up to draft + 1: so many are guessed from the
    text itself, the model reads them all at once, and those are kept that it would have
    chosen. Each choice is made as it would be without guesses, by the key of its position,
    so the text is the same, drawn ones included, up to how a product of several rows rounds.
    When the guesses no longer pay for themselves it ends early, for the caller to go on without.
    """
    model = bind(config, weights)
    ahead = jnp.arange(1 + draft, dtype=jnp.int32)

    drawn, greedy = (
        break_even(draft, state.token.shape[0], is_drawn) for is_drawn in (True, False)
    )
    enough = jnp.where(jnp.any(request.controls.temperature > 0), drawn, greedy)

    def unfinished(carry: Carry) -> Bool[Array, ""]:
        state, out, rate = carry
        return (
            (out.steps < n)  # as many as this call was asked for
            & jnp.any(state.left > 0)  # and some row wants more
            & (rate >= enough)  # and guesses are right often enough
        )

    def step(carry: Carry) -> Carry:
        state, out, rate = carry
        guess = look_up(state.seen, state.position, draft) if draft else state.seen[:, :0]
        tokens = jnp.concatenate([state.token[:, None], guess], axis=1)
        is_free = state.position[:, None] == EMPTY
        positions = jnp.where(is_free, EMPTY, state.position[:, None] + ahead)
        hidden, cache = model.extend(tokens, positions, state.cache)
        ids, logprobs = _choose(model.logits(hidden), positions + 1, request)
        kept = _kept(ids, guess, request.ends, state.left)
        if draft:
            rate = lately(rate, _mean_made(kept, state.left))
        moved = _advance(state._replace(cache=cache), out, ids, logprobs, kept, request.ends)
        return *moved, rate

    nothing = _nothing(state, MOST * (1 + draft))
    start = (state, nothing, jnp.float32(1 + draft))
    return jax.lax.while_loop(unfinished, step, start)[:2]


def break_even(draft: int, batch: int, is_drawn: bool) -> float:
    """Tokens that a step must make of each row for so many guesses to be worth what it takes.

    An accelerator reads the weights, and what it computes with them beside that hardly counts. On
    a CPU a step takes longer the more positions it reads, all the more when they are many, or
    when each is drawn, from all ids. Measured for one row of lechat-15m and seven guesses: 2.1
    times a step without, and 5.2 where tokens are drawn.
    """
    if jax.default_backend() == "cpu":
        cost = (0.65 if is_drawn else 0.3) * max(1.0, batch / 8)
    else:
        cost = 0.05
    return 1 + draft * min(1.0, cost)


def _nothing(state: DecodeState, width: int) -> Produced:
    B = state.token.shape[0]
    wide = jnp.promote_types(state.cache.dtype, jnp.float32)
    return Produced(
        ids=jnp.zeros((B, width), jnp.int32),
        logprobs=jnp.zeros((B, width), wide),
        length=jnp.zeros(B, jnp.int32),
        steps=jnp.zeros((), jnp.int32),
    )


def _choose(
    logits: Float[Array, "B T V"], positions: Int[Array, "B T"], request: Request
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The token at each of these positions, and what the model gave it, each on its own."""
    B, T, V = logits.shape
    streams, controls = jax.tree.map(
        lambda x: jnp.repeat(x, T, axis=0), (request.streams, request.controls)
    )
    keys = token_keys(streams, positions.reshape(-1))
    ids, logprobs = sample(logits.reshape(B * T, V), keys, controls)
    return ids.reshape(B, T), logprobs.reshape(B, T)


def _kept(
    ids: Int[Array, "B T"],
    guess: Int[Array, "B draft"],
    ends: Bool[Array, "B V"],
    left: Int[Array, "B"],
) -> Bool[Array, "B T"]:
    """Which of the chosen tokens stand: all that were chosen after what is in the text.

    The first was; each later one was chosen after a guess, and stands if all guesses before
    it were right, none of them ended the row, and there is room.
    """
    right = (guess == ids[:, :-1]) & ~jnp.take_along_axis(ends, guess, axis=1)
    reached = jnp.cumprod(jnp.pad(right, ((0, 0), (1, 0)), constant_values=True), axis=1) > 0
    return reached & (jnp.arange(ids.shape[1]) < left[:, None])


def _mean_made(kept: Bool[Array, "B T"], left: Int[Array, "B"]) -> Float[Array, ""]:
    """Tokens that a step has made of each row that wanted any."""
    return jnp.sum(kept, dtype=jnp.float32) / jnp.sum(left > 0, dtype=jnp.float32)


def _advance(
    state: DecodeState,
    out: Produced,
    ids: Int[Array, "B T"],
    logprobs: Float[Array, "B T"],
    kept: Bool[Array, "B T"],
    ends: Bool[Array, "B V"],
) -> tuple[DecodeState, Produced]:
    """The state and the output with the kept tokens behind the others of their rows."""
    rows, T = jnp.arange(ids.shape[0])[:, None], ids.shape[1]
    n = jnp.sum(kept, axis=1, dtype=jnp.int32)
    columns = jnp.where(kept, out.length[:, None] + jnp.arange(T), out.ids.shape[1])
    out = Produced(
        out.ids.at[rows, columns].set(ids, mode="drop"),
        out.logprobs.at[rows, columns].set(logprobs, mode="drop"),
        out.length + n,
        out.steps + 1,
    )
    last = jnp.take_along_axis(ids, jnp.maximum(n - 1, 0)[:, None], axis=1)
    is_end = jnp.take_along_axis(ends, last, axis=1)[:, 0]
    positions = state.position[:, None] + jnp.arange(1, T + 1, dtype=jnp.int32)
    seen = record(state.seen, jnp.where(kept, positions, EMPTY), ids) if T > 1 else state.seen
    moved = DecodeState(
        cache=state.cache,
        token=jnp.where(n > 0, last[:, 0], state.token),
        position=state.position + n,
        left=jnp.where((n > 0) & is_end, 0, state.left - n),
        seen=seen,
    )
    return moved, out


def compile_for(
    config: MistralConfig, weights: Described, batch: int, chunk: int, context: int, draft: int
) -> None:
    """Compiles the functions for so many rows; a call like that then starts at once.

    With a draft that is `decode` with guesses and without. `weights` may be descriptions, so this
    can be done before they are there. Compiling takes 0.1 to 0.2 GB, most of it for a moment, and
    the weights will want all there is.
    """

    def arguments(ahead: int) -> tuple[DecodeState, Request]:
        cache = empty_cache(*cache_size(config, weights, batch, chunk, context, draft))
        rows = jnp.zeros(batch, jnp.int32)
        seen = jnp.zeros((batch, SEEN if ahead else 0), jnp.int32)
        plain = Sampling()
        controls, streams = plain.controls(batch), plain.streams(batch)
        request = Request(controls, streams, jnp.zeros((batch, config.vocab_size), bool))
        return DecodeState(cache, rows, rows, rows, seen), request

    state, _ = jax.eval_shape(lambda: arguments(0))
    number, tokens = (
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((1, chunk), jnp.int32),
    )
    prefill.lower(config, as_bits(weights, chunk), state.cache, number, tokens, tokens).compile()
    give_back_memory()
    for ahead in sorted({0, draft}):
        state, request = jax.eval_shape(lambda ahead=ahead: arguments(ahead))
        to_decode = as_bits(weights, batch * (1 + ahead))
        decode.lower(config, to_decode, state, request, number, ahead).compile()
        give_back_memory()
