"""Loads weights for computing: chooses the dtype, checks memory, compiles during the read."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.config.layout import is_adapter, is_part
from lechat_jax.devices.memory import available_bytes, check_fits
from lechat_jax.devices.mesh import Placing, bytes_on_a_device, described, heads_only
from lechat_jax.devices.platform import platform
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import Weights
from lechat_jax.ops.device_forms import for_device
from lechat_jax.quantize.scheme import Format

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def load_to_compute(
    trained: SavedModel,
    dtype: DTypeLike | None,
    quantize: Format | None,
    meanwhile: Callable[[Shapes], None],
    beside: Callable[[Shapes], int] = lambda _: 0,
    remedy: str = "",
    mesh: Mesh | None = None,
    places: Placing = heads_only,
) -> Weights:
    """Loads a model's weights onto the default device, in one compute dtype.

    Damaged checkpoints that are skipped are named on stderr.

    Args:
        trained: the saved model.
        dtype: compute dtype; by default as stored, but float32 on a CPU where that fits.
        quantize: as for `SavedModel.load`.
        meanwhile: called with the shapes of the weights and run while they are read, as for
            compilation, since reading leaves a core idle.
        beside: gives the bytes that are needed in addition, as for a KV cache.
        remedy: advice in the error message if these do not fit.
        mesh: devices to place the weights on: each reads its slices.
        places: how they are split over it; as for generation by default.

    Raises:
        BadInput: the weights do not fit into memory, are stored in several dtypes and `dtype` is
            not given, or as `SavedModel.load`.
    """
    dtype = _to_compute_in(trained, dtype, quantize, mesh, places)
    shapes = described(mesh, shapes_to_compute(trained, dtype, quantize), places)
    types = sorted({str(leaf.dtype) for name, leaf in shapes.items() if _is_base(name, shapes)})
    if len(types) > 1:
        raise BadInput(
            f"the weights in {trained.folder} are of several types, {' and '.join(types)}; "
            "choose the one to compute in (--dtype)"
        )
    if cache := beside(shapes):
        needed = cache + _bytes(shapes)
        what = f"the weights and a cache of {cache / 1e9:.2f} GB take"
        check_fits(what, needed, free_bytes(jnp.zeros(())), remedy)
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(meanwhile, shapes)
        loaded = trained.load(dtype, quantize, mesh, places)
        done.result()
    for sentence in loaded.refused:
        print(f"warning: {sentence}", file=sys.stderr)
    weights = for_device(loaded.weights)
    return weights if mesh is None else jax.device_put(weights, places(mesh, weights))


def free_bytes(beside: Array) -> int | None:
    """Free memory in bytes of the device of this array; `None` if unknown."""
    device = next(iter(beside.devices()))
    if device.platform == "cpu":
        return available_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _bytes(shapes: Shapes) -> int:
    """Bytes of the memory of a device; the simulated ones of a CPU have one memory."""
    if platform() == "cpu":
        return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
    return bytes_on_a_device(shapes)


def _to_compute_in(
    trained: SavedModel,
    dtype: DTypeLike | None,
    quantize: Format | None,
    mesh: Mesh | None,
    places: Placing,
) -> DTypeLike | None:
    """The dtype to load in, in which the weights fit; `None` is as stored.

    Raises:
        BadInput: the weights do not fit, so that the system would kill the process.
    """
    free = free_bytes(jnp.zeros(()))
    prefers_float32 = dtype is None and platform() == "cpu"
    choice = jnp.float32 if prefers_float32 else dtype
    needed = trained.weights_bytes(choice, quantize)
    if mesh is not None and platform() != "cpu":
        needed = _bytes(described(mesh, shapes_to_compute(trained, choice, quantize), places))
    if free is None or needed <= free:
        return choice
    if prefers_float32 and trained.weights_bytes(None, quantize) <= free:
        print(
            f"the weights would take {needed / 1e9:.2f} GB in float32 and {free / 1e9:.2f} GB are "
            "free, so they stay in the type that is stored",
            file=sys.stderr,
        )
        return None
    in_type = f" in {np.dtype(choice)}" if choice and not quantize else ""
    remedy = "free some memory" if quantize else "choose --quantize int8 or free some memory"
    if mesh is None and jax.device_count() > 1 and platform() != "cpu":
        remedy = f"split them over devices (--mesh tp={jax.device_count()}), or {remedy}"
    raise BadInput(
        f"the weights of {trained.folder} take {needed / 1e9:.2f} GB{in_type} and "
        f"{free / 1e9:.2f} GB are free; {remedy}"
    )


def shapes_to_compute(
    trained: SavedModel, dtype: DTypeLike | None, quantize: Format | None
) -> Shapes:
    """Shapes and dtypes of the weights as they will be loaded."""
    return for_device({**_shapes(trained, dtype, quantize)})


def _shapes(trained: SavedModel, dtype: DTypeLike | None, quantize: Format | None) -> Shapes:
    if trained.adapters is not None:
        how = trained.form(quantize)
        base = _shapes(trained.base, dtype, how.format if how else None)
        return {**trained.adapters.described(trained.config), **base}
    how = trained.form(quantize)
    shapes = weight_shapes(trained.config, how)
    stored = trained.stored.store.tensors if trained.stored and dtype is None else {}

    def described(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if how and how.is_fixed(name):
            return leaf
        kept = stored[name].dtype if name in stored else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept if dtype is None else dtype)

    return {name: described(name, leaf) for name, leaf in shapes.items()}


def _is_base(name: str, shapes: Shapes) -> bool:
    """Whether a weight has the compute dtype; adapters are always float32."""
    is_integer = jnp.issubdtype(shapes[name].dtype, jnp.integer)
    return not (is_integer or is_part(name) or is_adapter(name))
