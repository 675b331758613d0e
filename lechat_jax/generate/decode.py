"""Jitted functions of generation: chunked prefill, and the decode loop with prompt lookup.

Both are compiled once for a model and a number of rows, for any lengths: prefill takes a chunk of
one row at a time, and a call of `decode` makes a given number of steps.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt

from lechat_jax.config import MistralConfig
from lechat_jax.devices.host_memory import give_back_memory
from lechat_jax.devices.mesh import (
    by_rows,
    described,
    heads_only,
    kept_by_rows,
    kept_everywhere,
    on_its_rows,
    on_mesh,
)
from lechat_jax.devices.platform import platform
from lechat_jax.generate.logits_processors import (
    MOST_TOP,
    LogitsProcessing,
    Processors,
    Top,
    process,
    top_of,
)
from lechat_jax.generate.prefill import CacheSize, Described, cache_size
from lechat_jax.generate.prompt_lookup import SEEN, lately, look_up, record
from lechat_jax.generate.sampling import Controls, Sampling, sample, token_keys, token_logprobs
from lechat_jax.model.binding import Weights, bind
from lechat_jax.model.cache import EMPTY, Cache, empty_cache
from lechat_jax.ops.matmul import as_bits

Tree = TypeVar("Tree")
IDLE = Sampling(temperature=0)  # what a free row costs least with
MOST = 64  # steps that one call of `decode` can take: its buffers have room for their tokens


class DecodeState(NamedTuple):
    """Decode state, carried through the decode loop and between its calls.

    Attributes:
        cache: KV cache of all tokens before `token`.
        token: newest token of each row, not yet in the cache; at first the prompt's last.
        position: position of `token` in its row, from 0; `EMPTY` for a row that is free or still
            in prefill: nothing is written into its ring.
        left: tokens that each row may still produce; at 0 the row is done.
        seen: newest tokens, `token` included, for prompt lookup (`look_up`); S is 0 without it.
        counts: how often each row has produced each id; only with logits processors.
    """

    cache: Cache
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    left: Int[Array, "B"]
    seen: Int[Array, "B S"]
    counts: Int[Array, "B V"] | None = None


class Request(NamedTuple):
    """What is constant for a row while it decodes: sampling, random stream, EOS ids, processors.

    Attributes:
        controls: temperature and filters of each row.
        streams: random stream of each row.
        ends: True for the ids that end a row, such as EOS.
        processors: logits processors; `None` compiles none.
    """

    controls: Controls
    streams: UInt[Array, "B 2"]
    ends: Bool[Array, "B V"]
    processors: Processors | None = None


class Produced(NamedTuple):
    """Tokens that one call of `decode` produced; a row's are in columns 0 .. length - 1.

    Attributes:
        ids: token ids, EOS included.
        logprobs: log-probability of each under the model in nats, at temperature 1 and unfiltered.
        length: number of tokens of each row.
        left: tokens that each row may still produce.
        steps: number of forward passes.
        top: the likeliest tokens at each; only with logits processors, if a row wants them.
    """

    ids: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    length: Int[Array, "B"]
    left: Int[Array, "B"]
    steps: Int[Array, ""]
    top: Top | None = None


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
    features: Float[Array, "1 T D"] | None = None,
) -> Cache:
    """Chunked prefill: extends the KV cache by a chunk of one row's prompt; `EMPTY` is padding.

    One row at a time, so that no row is padded to the length of the others or depends on them. No
    logits are computed: a prompt's last token is left to `decode`, the only place that samples. The
    cache passed in is donated. `features` are those of images, see `Mistral.embedded`.
    """

    def extend(
        cache: Cache,
        row: Array,
        mine: Array,
        weights: Weights,
        tokens: Array,
        positions: Array,
        *features: Array,
    ) -> Cache:
        alone = row_of(cache, row)
        positions = jnp.where(mine, positions, EMPTY)
        alone = bind(config, weights).extend(tokens, positions, alone, *features)[1]
        return _put(cache, row, alone)

    seen = () if features is None else (features,)
    return kept_by_rows(on_its_rows(extend, cache, row, weights, tokens, positions, *seen))


class PromptScores(NamedTuple):
    """Log-probs in nats of a chunk's next tokens, which the prompt gives, and the likeliest ones.

    Attributes:
        logprobs: of the token after each position of the chunk.
        top: the likeliest tokens there.
    """

    logprobs: Float[Array, "T"]
    top: Top


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def prefill_scored(
    config: MistralConfig,
    weights: Weights,
    cache: Cache,
    row: Int[Array, ""],
    tokens: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
    targets: Int[Array, "T"],
    features: Float[Array, "1 T D"] | None = None,
) -> tuple[Cache, PromptScores]:
    """Chunked prefill as `prefill`, and the log-probability of the prompt's own next tokens."""
    alone = row_of(cache, row)
    model = bind(config, weights)
    hidden, alone = model.extend(tokens, positions, alone, features)
    logits = model.logits(hidden)[0]
    scores = PromptScores(token_logprobs(logits, targets), top_of(logits, jnp.bool_(True)))
    return kept_by_rows(_put(cache, row, alone)), kept_everywhere(scores)


@jax.jit
def row_of(rows: Tree, row: Int[Array, ""]) -> Tree:
    """One row of arrays of B rows, copied: a snapshot that nothing overwrites."""
    return jax.tree.map(lambda of: jax.lax.dynamic_slice_in_dim(of, row, 1), rows)


@functools.partial(jax.jit, donate_argnums=0)
def clear(cache: Cache, row: Int[Array, ""]) -> Cache:
    """Clears one row of the KV cache: keys, values and positions.

    Positions alone would not do: a masked NaN is still NaN. The cache passed in is donated.
    """

    def emptied(cache: Cache, row: Array, mine: Array, _: None) -> Cache:
        alone = jax.tree.map(lambda rows: jnp.zeros_like(rows[:1]), cache)
        rings = [ring._replace(position=ring.position + EMPTY) for ring in alone.rings]
        done = _put(cache, row, Cache(tuple(rings)))
        return jax.tree.map(lambda new, old: jnp.where(mine, new, old), done, cache)

    return kept_by_rows(on_its_rows(emptied, cache, row, None))


@functools.partial(jax.jit, donate_argnums=0)
def with_row(rows: Tree, row: Int[Array, ""], alone: Tree) -> Tree:
    """Replaces one row in arrays of B rows; the arrays passed in are donated."""
    return kept_by_rows(_put(rows, row, alone))


def _put(rows: Tree, row: Int[Array, ""], alone: Tree) -> Tree:
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
    """Decode loop: up to `n` steps of all rows, at most `MOST`; their tokens and the new state.

    Ends early when all rows are done. A row that is done stays in the batch, and its results are
    ignored. The state passed in is donated, so its KV cache is updated in place and memory is
    constant.

    A step makes one token, or with a `draft` up to draft + 1 (speculative decoding): the draft
    comes from prompt lookup, the model verifies it in one pass, and the tokens that it would have
    chosen are accepted. Each choice uses the random key of its position, so the text is the same,
    sampled ones included, up to the rounding of larger matmuls. It ends early when the acceptance
    rate is too low, for the caller to go on without a draft.
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
        chosen = _choose(model.logits(hidden), positions + 1, request, state.counts)
        most = state.left
        if request.processors:
            most = jnp.where(request.processors.is_single, jnp.minimum(most, 1), most)
        kept = _kept(chosen.ids, guess, request.ends, most)
        if draft:
            rate = lately(rate, _mean_made(kept, state.left))
        return *_advance(state._replace(cache=cache), out, chosen, kept, request.ends), rate

    nothing = _nothing(state, MOST * (1 + draft))
    start = (state, nothing, jnp.float32(1 + draft))
    state, out, _ = jax.lax.while_loop(unfinished, step, start)
    return kept_by_rows(state), kept_everywhere(out)


def break_even(draft: int, batch: int, is_drawn: bool) -> float:
    """Break-even of speculative decoding: tokens per step and row from which a draft saves time.

    An accelerator is bound by reading the weights, so a draft costs little. On a CPU a step takes
    longer with each position, more so with many rows, or when tokens are sampled from all ids.
    Measured for one row of lechat-15m and a draft of 7: 2.1 times a step without, and 5.2 with
    sampling.
    """
    cost = (0.65 if is_drawn else 0.3) * max(1.0, batch / 8) if platform() == "cpu" else 0.05
    return 1 + draft * min(1.0, cost)


class Chosen(NamedTuple):
    """Tokens that a step has chosen, with log-probs, and the likeliest ones if those are wanted."""

    ids: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    top: Top | None


def _nothing(state: DecodeState, width: int) -> Produced:
    B, top = state.token.shape[0], None
    wide = jnp.promote_types(state.cache.dtype, jnp.float32)
    if state.counts is not None:
        shape = (B, width, min(MOST_TOP, state.counts.shape[1]))
        top = Top(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, wide))
    return Produced(
        ids=jnp.zeros((B, width), jnp.int32),
        logprobs=jnp.zeros((B, width), wide),
        length=jnp.zeros(B, jnp.int32),
        left=state.left,
        steps=jnp.zeros((), jnp.int32),
        top=top,
    )


def _choose(
    logits: Float[Array, "B T V"],
    positions: Int[Array, "B T"],
    request: Request,
    counts: Int[Array, "B V"] | None,
) -> Chosen:
    """Samples a token at each of these positions independently, with its log-probability."""
    B, T, V = logits.shape
    streams, controls = jax.tree.map(
        lambda x: jnp.repeat(x, T, axis=0), (request.streams, request.controls)
    )
    keys = token_keys(streams, positions.reshape(-1))
    top, processed = None, None
    if request.processors and counts is not None:
        wanted = jnp.any(request.processors.wants_top)
        top, processed = top_of(logits, wanted), process(logits, request.processors, counts)
        processed = processed.reshape(B * T, V)
    ids, logprobs = sample(logits.reshape(B * T, V), keys, controls, processed)
    return Chosen(ids.reshape(B, T), logprobs.reshape(B, T), top)


def _kept(
    ids: Int[Array, "B T"],
    guess: Int[Array, "B draft"],
    ends: Bool[Array, "B V"],
    left: Int[Array, "B"],
) -> Bool[Array, "B T"]:
    """Verifies a draft: True for the accepted tokens of each row.

    The first is always accepted; a later one, if all drafted tokens before it were right, none of
    them ended the row, and tokens are left.
    """
    right = (guess == ids[:, :-1]) & ~jnp.take_along_axis(ends, guess, axis=1)
    reached = jnp.cumprod(jnp.pad(right, ((0, 0), (1, 0)), constant_values=True), axis=1) > 0
    return reached & (jnp.arange(ids.shape[1]) < left[:, None])


def _mean_made(kept: Bool[Array, "B T"], left: Int[Array, "B"]) -> Float[Array, ""]:
    """Mean number of accepted tokens of the rows that are not done."""
    return jnp.sum(kept, dtype=jnp.float32) / jnp.sum(left > 0, dtype=jnp.float32)


def _advance(
    state: DecodeState,
    out: Produced,
    chosen: Chosen,
    kept: Bool[Array, "B T"],
    ends: Bool[Array, "B V"],
) -> tuple[DecodeState, Produced]:
    """Appends the accepted tokens to state and output."""
    ids = chosen.ids
    rows, T = jnp.arange(ids.shape[0])[:, None], ids.shape[1]
    n = jnp.sum(kept, axis=1, dtype=jnp.int32)
    columns = jnp.where(kept, out.length[:, None] + jnp.arange(T), out.ids.shape[1])
    last = jnp.take_along_axis(ids, jnp.maximum(n - 1, 0)[:, None], axis=1)
    is_end = jnp.take_along_axis(ends, last, axis=1)[:, 0]
    positions = state.position[:, None] + jnp.arange(1, T + 1, dtype=jnp.int32)
    seen = record(state.seen, jnp.where(kept, positions, EMPTY), ids) if T > 1 else state.seen
    counts = state.counts
    moved = DecodeState(
        cache=state.cache,
        token=jnp.where(n > 0, last[:, 0], state.token),
        position=state.position + n,
        left=jnp.where((n > 0) & is_end, 0, state.left - n),
        seen=seen,
        counts=None if counts is None else counts.at[rows, ids].add(kept),
    )

    def appended(so_far: Tree, new: Tree) -> Tree:
        return jax.tree.map(lambda x, y: x.at[rows, columns].set(y, mode="drop"), so_far, new)

    out = Produced(
        appended(out.ids, ids),
        appended(out.logprobs, chosen.logprobs),
        out.length + n,
        moved.left,
        out.steps + 1,
        appended(out.top, chosen.top),
    )
    return moved, out


class Call(NamedTuple):
    """A jitted function, and descriptions of the arguments with which it is compiled."""

    function: Any
    arguments: tuple[Any, ...]


def calls_for(
    config: MistralConfig,
    weights: Described,
    batch: int,
    chunks: tuple[int, ...],
    context: int,
    draft: int = 0,
    mesh: Mesh | None = None,
) -> dict[str, Call]:
    """The calls of generation for `batch` rows, prefill and decode, by name; nothing is allocated.

    Prefill is of a short chunk, the first of `chunks`. With a draft there is `decode` with and
    without it. `weights` may be `jax.ShapeDtypeStruct`s.
    """
    size, chunk = cache_size(config, weights, batch, chunks[-1], context, draft), chunks[0]
    places = functools.partial(described, mesh)
    number, tokens = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1, chunk)))

    def in_form(positions: int) -> Described:
        return places(as_bits(weights, positions), heads_only)

    state, _ = jax.eval_shape(functools.partial(idle_rows, size))
    cache = places(state.cache, by_rows)
    found = {"prefill": Call(prefill, (config, in_form(chunk), cache, number, tokens, tokens))}
    for ahead in sorted({0, draft}):
        rows = places(jax.eval_shape(functools.partial(idle_rows, size, ahead)), by_rows)
        name = f"decode with {ahead} guesses" if ahead else "decode"
        kernels = in_form(batch * (1 + ahead))
        found[name] = Call(decode, (config, kernels, *rows, number, ahead))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # one program, where each array would be one
def idle_rows(
    size: CacheSize, ahead: int = 0, with_processors: bool = False
) -> tuple[DecodeState, Request]:
    """State and request of rows that are free; with room to look up drafts of `ahead` tokens."""
    B = size.batch
    free = jnp.full(B, EMPTY, jnp.int32)
    seen = jnp.zeros((B, SEEN if ahead else 0), jnp.int32)
    V = size.config.vocab_size
    state = DecodeState(empty_cache(*size), free + 1, free, free + 1, seen)
    request = Request(IDLE.controls(B), IDLE.streams(B), jnp.zeros((B, V), bool))
    if with_processors:
        alone = LogitsProcessing().processors(V)
        processors = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), B, axis=0), alone)
        state = state._replace(counts=jnp.zeros((B, V), jnp.int32))
        request = request._replace(processors=processors)
    return state, request


def compile_for(calls: Mapping[str, Call], mesh: Mesh | None = None) -> None:
    """Ahead-of-time compilation of prefill and decode, so that they start at once.

    It can run before weights are loaded. Compiling takes 0.1 to 0.2 GB, most of it briefly, which
    the weights would leave no room for.
    """
    with on_mesh(mesh):
        for call in calls.values():
            call.function.lower(*call.arguments).compile()
            give_back_memory()
