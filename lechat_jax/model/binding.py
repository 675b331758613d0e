"""The weights of a model by name, and a model around such weights without a copy."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_part
from lechat_jax.model.layers import Embedding, Linear
from lechat_jax.model.lora import Adapter, adapted
from lechat_jax.model.mistral import Mistral
from lechat_jax.model.moe import Stack

# The weights of a model by the name under which every format of lechat stores them.
Weights = dict[str, Array]

# Where a module has the parts of a quantised kernel: under the names of those, but for the dot.
ATTRIBUTES = ("kernel_scale", "kernel_zero", "kernel_order")


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
            for part in ATTRIBUTES if isinstance(module, Linear | Embedding | Stack) else ():
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
