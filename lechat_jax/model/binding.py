"""State dict of a model: its weights by name, and a model around such weights without a copy."""

import functools

import jax
from flax import nnx
from jaxtyping import Array, PyTree

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import LORA_A, LORA_B, LORA_SCALE, ORDER, SCALE, ZERO, module_of
from lechat_jax.model.lora import Adapted
from lechat_jax.model.mistral import Mistral
from lechat_jax.ops.kernel_forms import Ordered, PackedInt4, ScaledInt8

# The weights of a model by the name under which every format of lechat stores them.
Weights = dict[str, Array]

# Each form holds a kernel, or its numbers, and then parts, which are called so behind the name of
# the map.
FORMS: dict[type[tuple], tuple[str, ...]] = {
    PackedInt4: (f".kernel{SCALE}", f".kernel{ZERO}"),
    ScaledInt8: (f".kernel{SCALE}",),
    Ordered: (f".kernel{ORDER}",),
    Adapted: (LORA_A, LORA_B, LORA_SCALE),
}


def weights_of(model: Mistral) -> Weights:
    """State dict: a model's weights by name, sharing its memory.

    >>> from lechat_jax.config import preset
    >>> list(weights_of(Mistral(preset("lechat-15m"), rngs=nnx.Rngs(0))))[:3]
    ['blocks.0.attn.k.kernel', 'blocks.0.attn.o.kernel', 'blocks.0.attn.q.kernel']
    """
    weights: Weights = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        weights |= _parts(_name(path), leaf.get_value())
    return weights


def bind(config: MistralConfig, weights: Weights) -> Mistral:
    """Builds a model around these weights, which may be tracers: nothing is copied.

    The hot functions take the plain dict, since passing a module to a jitted function
    costs milliseconds of Python a call, and bind it inside. In which form a kernel is, and
    whether it has an adapter, is told by the parts that are there beside it.

    Raises:
        ValueError: there are some parts of a form and not the others.
    """
    graph, leaves = _skeleton(config, jax.config.values["jax_enable_x64"])
    flat = [(path, nnx.Param(_formed(name, weights))) for name, (path, _) in leaves.items()]
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    model.embed.dtype = str(weights["norm.scale"].dtype)
    return model


def shapes_of(config: MistralConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a new model's weights, by name; nothing is allocated.

    >>> from lechat_jax.config import preset
    >>> shapes_of(preset("lechat-15m"))["norm.scale"]
    ShapeDtypeStruct(shape=(192,), dtype=float32)
    """
    _, leaves = _skeleton(config, jax.config.values["jax_enable_x64"])
    return {name: leaf for name, (_, leaf) in leaves.items()}


@functools.lru_cache(maxsize=8)
def _skeleton(
    config: MistralConfig, in_float64: bool
) -> tuple[nnx.GraphDef[Mistral], dict[str, tuple[tuple, jax.ShapeDtypeStruct]]]:
    """Graph of the modules, and path and shape of each weight, by name.

    `in_float64` is what JAX is told just now: what is freshly made has another type in it.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Mistral(config, rngs=_OneKey())))
    flat = nnx.to_flat_state(state)
    return graph, {_name(path): (path, leaf.get_value()) for path, leaf in flat}


def _formed(name: str, weights: Weights) -> PyTree:
    """Weight of that name as one object: dense, quantised or adapted, by the parts there are."""
    weight, owner = weights[name], module_of(name)
    found = {part for parts in FORMS.values() for part in parts if owner + part in weights}
    for form, parts in FORMS.items():
        if found.issuperset(parts):
            weight = form(weight, *(weights[owner + part] for part in parts))
            found.difference_update(parts)
    if found:
        raise ValueError(f"{owner} lacks what belongs to {', '.join(sorted(found))}")
    return weight


def _parts(name: str, weight: PyTree) -> Weights:
    """Arrays of such an object, by name: the inverse of `_formed`."""
    parts: Weights = {}
    while isinstance(weight, tuple):
        suffixes = FORMS[type(weight)]
        weight, *others = weight
        parts |= {module_of(name) + s: x for s, x in zip(suffixes, others, strict=True)}
    return {name: weight} | parts


class _OneKey(nnx.Rngs):
    """Random keys for shapes alone: drawing none saves three quarters of the time."""

    def __init__(self) -> None:
        self.key = nnx.data(jax.random.key(0))

    def params(self) -> Array:
        """The same key for every weight."""
        return self.key


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
