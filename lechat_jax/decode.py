"""The two hot functions of generation: prompts into the cache, and tokens out of the model.

Both are compiled once for a model and a number of rows, whatever the lengths: prompts go
in a chunk at a time, and one call of `decode` makes as many tokens as it is told to.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from lechat_jax.cache import EMPTY, Cache
from lechat_jax.config import MistralConfig
from lechat_jax.model import Weights, bind
from lechat_jax.sampling import Controls, sample, token_keys

MOST = 64  # tokens a row that one call of `decode` can return: the width of its buffers


class DecodeState(NamedTuple):
    """What changes from token to token, carried through the loop and from call to call.

    Attributes:
        cache: keys and values of all tokens before `token`.
        token: the newest of each row, which the model has not read yet; at first the last
            of the prompt.
        position: of `token`, counted from the row's own first token.
        left: tokens that each row may still produce; at 0 the row is done.
    """

    cache: Cache
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    left: Int[Array, "B"]


class Request(NamedTuple):
    """What stays the same from token to token.

    Attributes:
        controls: temperature and filters of each row.
        streams: the random stream of each row.
        ends: whether a token ends its row, such as EOS.
    """

    controls: Controls
    streams: UInt[Array, "B 2"]
    ends: Bool[Array, "V"]


class Produced(NamedTuple):
    """The tokens of one call, those of a row from column 0 on; behind `length` there are none.

    Attributes:
        ids: the tokens, the one that ended a row included.
        logprobs: nats that the model itself gave each, at temperature 1 and unfiltered.
        length: how many in each row.
    """

    ids: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    length: Int[Array, "B"]


def left_padded(
    prompts: Sequence[Sequence[int]], chunk: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Tokens and positions of all but the last token of each prompt, in whole chunks."""
    longest = max(len(prompt) for prompt in prompts) - 1
    T = -(-longest // chunk) * chunk
    tokens = np.zeros((len(prompts), T), np.int32)
    positions = np.full_like(tokens, EMPTY)
    for row, prompt in enumerate(prompts):
        n = len(prompt) - 1
        tokens[row, T - n :] = prompt[:-1]
        positions[row, T - n :] = np.arange(n)
    return tokens, positions


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def prefill(
    config: MistralConfig,
    weights: Weights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Cache:
    """The cache with one more chunk of the prompts in it; `EMPTY` positions are padding.

    No logits are made: the last token of a prompt is left to `decode`, which is then the
    only place where anything is sampled. The cache passed in is used up.
    """
    return bind(config, weights).extend(tokens, positions, cache)[1]


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def decode(
    config: MistralConfig,
    weights: Weights,
    state: DecodeState,
    request: Request,
    n: Int[Array, ""],
) -> tuple[DecodeState, Produced]:
    """Up to `n` more tokens of each row, and the state after them; n is at most `MOST`.

    Ends early when all rows are done. A row that is done keeps its place in the batch, and
    what is computed there is not used. The state passed in is used up; its cache is
    updated in place, so memory does not depend on how long this goes on.
    """
    model = bind(config, weights)

    def unfinished(carry: tuple[Array, DecodeState, Produced]) -> Bool[Array, ""]:
        i, state, _ = carry
        return (
            (i < n)  # as many as this call was asked for
            & jnp.any(state.left > 0)  # and some row wants more
        )

    def step(
        carry: tuple[Array, DecodeState, Produced],
    ) -> tuple[Array, DecodeState, Produced]:
        i, state, out = carry
        hidden, cache = model.extend(state.token[:, None], state.position[:, None], state.cache)
        keys = token_keys(request.streams, state.position + 1)
        ids, logprobs = sample(model.logits(hidden[:, 0]), keys, request.controls)
        live = state.left > 0
        out = Produced(
            out.ids.at[:, i].set(jnp.where(live, ids, 0)),
            out.logprobs.at[:, i].set(jnp.where(live, logprobs, 0)),
            out.length + live,
        )
        state = DecodeState(
            cache=cache,
            token=jnp.where(live, ids, state.token),
            position=state.position + live,
            left=jnp.where(live & ~request.ends[ids], state.left - 1, 0),
        )
        return i + 1, state, out

    B = state.token.shape[0]
    wide = jnp.promote_types(state.cache.rings[0].k.dtype, jnp.float32)
    nothing = Produced(
        jnp.zeros((B, MOST), jnp.int32), jnp.zeros((B, MOST), wide), jnp.zeros(B, jnp.int32)
    )
    i = jnp.zeros((), jnp.int32)
    _, state, produced = jax.lax.while_loop(unfinished, step, (i, state, nothing))
    return state, produced
