"""The Mistral 7B decoder (arXiv:2310.06825, section 2): reads like the paper's figure.

Kernels have their output axes first and contract the last, as in PyTorch, so converting a
checkpoint renames and reshapes but never transposes. Arithmetic follows the dtype of the
weights: cast them to bfloat16 or float64 and the model computes in it; norms, rotations,
scores and softmax are at least float32.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_part
from lechat_jax.data.rows import positions_in
from lechat_jax.model.attention import Backend, attend_cached, training_attention
from lechat_jax.model.cache import Cache, Ring, distinct_windows, places
from lechat_jax.model.lora import Adapter, adapted
from lechat_jax.model.mask import window_mask
from lechat_jax.model.moe import Load, Mixture, Stack
from lechat_jax.model.rope import Turns, rotate, turns
from lechat_jax.ops.matmul import from_bits, project
from lechat_jax.ops.matmul_int4 import project_pairs
from lechat_jax.ops.remat import Remat, recomputing

# The weights of a model by the name under which every format of lechat stores them.
Weights = dict[str, Array]

# Where a module has the parts of a quantised kernel: under the names of those, but for the dot.
ATTRIBUTES = ("kernel_scale", "kernel_zero", "kernel_order")

# What a layer remembers of the tokens before: its keys and values, or nothing.
Memory = TypeVar("Memory", Ring, None)

# From rotated queries, keys and values, and the memory, to what each query gathers and the
# memory after it.
Mixer = Callable[[Array, Array, Array, Memory], tuple[Array, Memory]]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang & Sennrich 2019, arXiv:1910.07467).

    Normalised in at least float32 and rounded before the product with the scale, in the
    order of both PyTorch references. That product is exact in float32, so rounding it is
    what bfloat16 would have made of it; but the gradient of the scale, a sum over all
    positions, is then summed in float32, where XLA would take bfloat16 (measured: wrong by
    1.3 % after 4,096 positions instead of 0.2 %).
    """

    def __init__(self, dim: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The same shape and dtype, with a root mean square of `scale`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        rounded = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        scale = self.scale[...].astype(wide.dtype)
        return (rounded.astype(wide.dtype) * scale).astype(x.dtype)


class Linear(nnx.Module):
    """A linear map without bias, whose kernel has the axes it writes and then those it reads.

    All positions and all axes are flattened to one matrix product. The gradient of a
    product with batch axes writes transposed copies of its operands on a CPU, which costs
    a feed-forward layer 1.6 times its time.
    """

    def __init__(
        self, writes: tuple[int, ...], reads: tuple[int, ...], std: float, *, rngs: nnx.Rngs
    ) -> None:
        self.writes, self.reads = writes, reads
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*writes, *reads)))
        self.kernel_scale: nnx.Param | None = None
        self.kernel_zero: nnx.Param | None = None
        self.kernel_order: nnx.Param | None = None
        self.lora: Adapter | None = None

    def __call__(self, x: Array) -> Array:
        """`x` [..., *reads] mapped to [..., *writes]."""
        positions = x.shape[: x.ndim - len(self.reads)]
        flat = x.reshape(-1, math.prod(self.reads))
        y = self._product(flat)
        if self.lora is not None:
            y = y + self.lora(flat)
        return y.reshape(*positions, *self.writes)

    def _product(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """The kernel's own product, in whichever form it is: floats, int8 or int4."""
        F = math.prod(self.writes)
        matrix = self.kernel[...].reshape(F, -1)
        if self.kernel_scale is None:
            return project(x, matrix)
        scale = self.kernel_scale[...]
        if self.kernel_zero is None:
            return project(x, matrix, scale.reshape(F))
        zero = self.kernel_zero[...].reshape(F, -1)
        if self.kernel_order is not None:
            x = x[:, self.kernel_order[...]]
        return project_pairs(x, matrix, scale.reshape(F, -1), zero)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs) -> None:
        D, N, K, H = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        out_std = (N * H * 2 * config.n_layers) ** -0.5
        self.q = Linear((N, H), (D,), D**-0.5, rngs=rngs)
        self.k = Linear((K, H), (D,), D**-0.5, rngs=rngs)
        self.v = Linear((K, H), (D,), D**-0.5, rngs=rngs)
        self.o = Linear((D,), (N, H), out_std, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], turn: Turns, mix: Mixer[Memory], memory: Memory
    ) -> tuple[Float[Array, "B T D"], Memory]:
        """What each position gathers from those that `mix` lets it see."""
        q, k, v = rotate(self.q(x), turn.q), rotate(self.k(x), turn.k), self.v(x)
        mixed, memory = mix(q, k, v, memory)
        return self.o(mixed), memory


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202): down(silu(gate x) * up x).

    The activation is at least float32 and rounded once, as PyTorch's is. In bfloat16 its
    derivative, the sum of two products, would be rounded at every step.
    """

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs) -> None:
        D, F = config.dim, config.hidden_dim
        self.gate = Linear((F,), (D,), D**-0.5, rngs=rngs)
        self.up = Linear((F,), (D,), D**-0.5, rngs=rngs)
        self.down = Linear((D,), (F,), (F * 2 * config.n_layers) ** -0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        """Each position on its own; there are no experts to be chosen."""
        gate = self.gate(x)
        wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
        return self.down(jax.nn.silu(wide).astype(gate.dtype) * self.up(x)), None


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each normalised before and added after."""

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = (Mixture if config.n_experts else MLP)(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], turn: Turns, mix: Mixer[Memory], memory: Memory
    ) -> tuple[Float[Array, "B T D"], Memory, Load | None]:
        """The residual stream after this layer, the memory with its keys and values, and a load.

        That is how its experts were chosen, if it has any.
        """
        mixed, memory = self.attn(self.attn_norm(x), turn, mix, memory)
        x = x + mixed
        made, load = self.mlp(self.mlp_norm(x))
        return x + made, memory, load


class Table(nnx.Module):
    """One vector of width D for each token id: the embedding, and the head.

    Attributes:
        dtype: of the rows of an int8 table, which have none of their own.
    """

    dtype: str = "float32"

    def __init__(self, config: MistralConfig, std: float, *, rngs: nnx.Rngs) -> None:
        self.writes = (config.vocab_size,)
        shape = (config.vocab_size, config.dim)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.kernel_scale: nnx.Param | None = None

    def rows(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vectors of these ids."""
        if self.kernel_scale is not None:
            scale = self.kernel_scale[...][tokens][..., None]
            return (self.kernel[...][tokens] * scale).astype(self.dtype)
        return from_bits(_looked_up(self.kernel[...], tokens))

    def matrix(self) -> Float[Array, "V D"]:
        """All vectors; those of an int8 table are made, and are whole in memory."""
        if self.kernel_scale is None:
            return self.kernel[...]
        return (self.kernel[...] * self.kernel_scale[...][:, None]).astype(self.dtype)

    def scores(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The product with every vector, at least float32."""
        kernel = self.kernel[...]
        scale = None if self.kernel_scale is None else self.kernel_scale[...]
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        flat = hidden.reshape(-1, kernel.shape[1])
        return project(flat, kernel, scale, wide).reshape(*hidden.shape[:-1], kernel.shape[0])


@jax.custom_vjp
def _looked_up(kernel: Shaped[Array, "V D"], tokens: Int[Array, "B T"]) -> Shaped[Array, "B T D"]:
    """`kernel[tokens]`, whose gradient is added up in at least float32 and rounded once.

    A token may come thousands of times in a batch, and a sum in bfloat16 stops to grow when it
    has some hundred terms.
    """
    return kernel[tokens]


def _slope_of_table(kept: tuple[Array, Array], dy: Float[Array, "B T D"]) -> tuple[Array, None]:
    kernel, tokens = kept
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    total = jnp.zeros(kernel.shape, wide).at[tokens].add(dy.astype(wide))
    return total.astype(kernel.dtype), None


_looked_up.defvjp(
    lambda kernel, tokens: (kernel[tokens], (kernel, tokens)),
    _slope_of_table,
)


class Mistral(nnx.Module):
    """A decoder of `config.n_layers` blocks between an embedding and a head.

    Freshly made, its weights are float32: normal, with the deviation that keeps the
    residual stream at the scale of the embedding, and norms of one.

    >>> from lechat_jax.config import preset
    >>> model = nnx.eval_shape(lambda: Mistral(preset("lechat-15m"), rngs=nnx.Rngs(0)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    15165888
    """

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Table(config, 1.0, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        std = config.dim**-0.5
        self.head = self.embed if config.tied_embeddings else Table(config, std, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        backend: Backend | None = None,
        first_position: int = 0,
    ) -> Float[Array, "B T V"]:
        """Logits of the token that follows each position of whole sequences."""
        return self.logits(self.hidden(tokens, backend, first_position))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        backend: Backend | None = None,
        first_position: int = 0,
        documents: Int[Array, "B T"] | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B T D"]:
        """What the head reads at each position of whole sequences.

        `backend` names the attention kernel; `None` takes the best for the platform. The
        sequences start at `first_position`, and nothing before it is seen. With `documents`,
        a number for each token, a sequence is several documents, none of which sees another:
        what is read of each is what would be read of it alone. `remat` says what of a layer
        a backward pass finds, and what it makes again.
        """
        return self.routed(tokens, backend, first_position, documents, remat)[0]

    def routed(
        self,
        tokens: Int[Array, "B T"],
        backend: Backend | None = None,
        first_position: int = 0,
        documents: Int[Array, "B T"] | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B T D"], Load | None]:
        """`hidden`, and how the experts of all layers were chosen, if there are any."""
        x = self.embed.rows(tokens)
        place = jnp.arange(tokens.shape[1])[None] if documents is None else positions_in(documents)
        turn = turns(first_position + place, self.config, x.dtype)
        total = None
        for block, window in zip(self.blocks, self.config.windows, strict=True):
            mix = functools.partial(_mix_whole, window=window, backend=backend, documents=documents)
            layer = functools.partial(_applied, turn=turn, mix=mix)
            x, load = recomputing(layer, remat)(block, x)
            total = load if total is None else jax.tree.map(jnp.add, total, load)
        return self.norm(x), total

    def extend(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """What the head reads at each new position, and the cache with them in it.

        A position of `EMPTY` is padding, which nothing will see. T must fit the chunk that
        the cache was made for, and a row's T positions must be one after the other.
        """
        x = self.embed.rows(tokens)
        turn = turns(positions, self.config, x.dtype)
        cache = cache.claim(self.config, positions)
        masks = [
            window_mask(positions, ring.position, window)
            for ring, window in zip(cache.rings, distinct_windows(self.config), strict=True)
        ]
        for block, place in zip(self.blocks, places(self.config), strict=True):
            ring, mask = cache.layer(place), masks[place.ring]
            x, ring = _extended(*nnx.split(block), x, turn, positions, ring, mask)
            cache = cache.with_layer(place, ring)
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The head's score of every token id, at least float32."""
        return self.head.scores(hidden)


def _applied(
    block: Callable[..., tuple[Array, None, Load | None]], x: Array, turn: Turns, mix: Mixer[None]
) -> tuple[Array, Load | None]:
    """A layer on whole sequences, which has no memory, and whatever stands for it."""
    x, _, load = block(x, turn, mix, None)
    return x, load


def _mix_whole(
    q: Array,
    k: Array,
    v: Array,
    memory: None,
    *,
    window: int | None,
    backend: Backend | None,
    documents: Array | None,
) -> tuple[Array, None]:
    return training_attention(q, k, v, window, backend, documents), memory


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers
def _extended(
    graph: nnx.GraphDef[Block],
    state: PyTree,
    x: Float[Array, "B T D"],
    turn: Turns,
    positions: Int[Array, "B T"],
    ring: Ring,
    mask: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B T D"], Ring]:
    """A layer on new positions, for which its ring is claimed."""
    mix = functools.partial(_mix_cached, positions=positions, mask=mask)
    x, ring, _ = nnx.merge(graph, state)(x, turn, mix, ring)
    return x, ring


def _mix_cached(
    q: Array, k: Array, v: Array, ring: Ring, *, positions: Array, mask: Array
) -> tuple[Array, Ring]:
    ring = ring.write(0, positions, k, v)
    return attend_cached(q, *ring.read(0), mask), ring


def weights_of(model: Mistral) -> Weights:
    """The weights by name, sharing memory with the model.

    >>> from lechat_jax.config import preset
    >>> list(weights_of(Mistral(preset("lechat-15m"), rngs=nnx.Rngs(0))))[:3]
    ['blocks.0.attn.k.kernel', 'blocks.0.attn.o.kernel', 'blocks.0.attn.q.kernel']
    """
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def bind(config: MistralConfig, weights: Weights) -> Mistral:
    """A model of that shape around these weights, which may be traced: no copy is made.

    The hot functions take the plain dict, since passing a module to a jitted function
    costs milliseconds of Python a call, and bind it inside. A kernel is quantised if its parts
    are there too, under its name and behind it, and a map has an adapter if that is there.
    """
    parts = frozenset(filter(is_part, weights))
    dtype = str(weights["norm.scale"].dtype)
    graph, names = _skeleton(config, parts, adapted(weights), dtype)
    flat = [(path, nnx.Param(weights[name])) for name, path in names.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def shapes_of(config: MistralConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights that a freshly made model would have, by name, none of which is made.

    >>> from lechat_jax.config import preset
    >>> shapes_of(preset("lechat-15m"))["norm.scale"]
    ShapeDtypeStruct(shape=(192,), dtype=float32)
    """
    return dict(_shapes_of(config, jax.config.values["jax_enable_x64"]))


@functools.lru_cache(maxsize=8)
def _shapes_of(config: MistralConfig, in_float64: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """`in_float64` is what JAX is told just now: what is freshly made has another type in it."""
    return jax.eval_shape(lambda: weights_of(Mistral(config, rngs=_OneKey())))


@functools.lru_cache(maxsize=8)
def _skeleton(
    config: MistralConfig, parts: frozenset[str], with_adapter: frozenset[str], dtype: str
) -> tuple[nnx.GraphDef, dict[str, tuple]]:
    def build() -> Mistral:
        model = Mistral(config, rngs=_OneKey())
        model.embed.dtype = dtype
        for path, module in nnx.iter_modules(model):
            for part in ATTRIBUTES if isinstance(module, Linear | Table | Stack) else ():
                if _name((*path, part)) in parts:  # of whichever shape
                    setattr(module, part, nnx.data(nnx.Param(jnp.ones(()))))
            if isinstance(module, Linear) and _name(path) in with_adapter:
                module.lora = nnx.data(Adapter(module.writes, module.reads, rank=1))
        return model

    graph, state = nnx.split(nnx.eval_shape(build))
    return graph, {_name(path): path for path, _ in nnx.to_flat_state(state)}


class _OneKey(nnx.Rngs):
    """Where nothing is drawn: counting draws takes three quarters of the time."""

    def __init__(self) -> None:
        self.key = nnx.data(jax.random.key(0))

    def params(self) -> Array:
        """The same key for every weight."""
        return self.key


def _name(path: tuple) -> str:
    return ".".join(map(str, path)).replace("kernel_", "kernel.")
