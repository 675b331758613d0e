"""Device mesh and sharding: FSDP and tensor parallelism (tp) by a rule for each axis letter.

    fsdp   data parallelism with sharded weights: each device has its own rows of the batch,
           and a slice of every weight, gathered where it is used (ZeRO, arXiv:1910.02054)
    tp     tensor parallelism: each device has its own heads, hidden units and vocabulary
           (Megatron, arXiv:1909.08053), or its own experts (GShard, arXiv:2006.16668)

Rows are independent but for the sum of their losses. So along fsdp each device runs the
single-device program on its rows (`shard_map`), with explicit all-gathers and reductions; along
tp XLA partitions.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import (
    LORA_SCALE,
    is_part,
    kernel_of,
    letters,
    letters_of_part,
    part_of,
)
from lechat_jax.devices.platform import platform
from lechat_jax.errors import BadInput

ROWS, HEADS = "fsdp", "tp"
RULES = {"B": ROWS, "L": ROWS, "D": ROWS, "N": HEADS, "K": HEADS, "F": HEADS, "V": HEADS}
RULES |= {"E": HEADS, "J": HEADS}

Tree = TypeVar("Tree")
# From a mesh and arrays, or their descriptions, to the sharding of each.
Placing = Callable[[Mesh, Any], Any]


def spec(
    axes: str,
    shape: tuple[int, ...] = (),
    mesh: Mesh | AbstractMesh | None = None,
    along: tuple[str, ...] = (ROWS, HEADS),
) -> P:
    """The PartitionSpec of axis letters; the first letter with a rule for a mesh axis gets it.

    With a shape and a mesh, only a letter whose size the mesh axis divides gets it: a stack of
    six blocks on four devices is split as its kernels are, since L is not. Trailing axes that
    split nothing are left out, as in the shardings that JAX returns, so that a function is not
    compiled again for its own output. Only the mesh axes `along` are used.

    >>> spec("NHD"), spec("BTD"), spec("LFD")
    (P('tp', None, 'fsdp'), P('fsdp',), P('fsdp', 'tp'))
    """
    taken: list[str | None] = []
    for i, letter in enumerate(axes):
        axis = RULES.get(letter)
        axis = axis if axis in along else None
        size = mesh.shape[axis] if mesh and axis else 0
        fits = mesh is None or (size > 1 and shape[i] % size == 0)
        taken.append(axis if fits and axis not in taken else None)
    while taken and taken[-1] is None:
        taken.pop()
    return P(*taken)


def make_mesh(asked: str) -> Mesh:
    """The mesh described by a string such as `fsdp=4,tp=2`; a missing axis has one device.

    Raises:
        BadInput: it is not a mesh, or there are not as many devices.
    """
    sizes, devices = sizes_of(asked), jax.devices()
    n = math.prod(sizes.values())
    if n > len(devices) or (n < len(devices) and jax.process_count() > 1):
        raise BadInput(
            f"--mesh {asked} has {n} devices and there are {len(devices)}; "
            "choose sizes whose product is that number"
        )
    return mesh_of(sizes[ROWS], sizes[HEADS], devices[:n])


def sizes_of(asked: str) -> dict[str, int]:
    """Parses a mesh such as `fsdp=4,tp=2`: the number of devices along each axis.

    >>> sizes_of("tp=2")
    {'fsdp': 1, 'tp': 2}

    Raises:
        BadInput: it is not a mesh.
    """
    sizes = {ROWS: 1, HEADS: 1}
    for part in asked.split(","):
        name, _, size = part.partition("=")
        if name not in sizes or not re.fullmatch("[1-9][0-9]*", size):
            raise BadInput(f"--mesh is, for example, fsdp=4,tp=2, and not {asked!r}")
        sizes[name] = int(size)
    return sizes


def mesh_of(fsdp: int, tp: int, devices: list[Any]) -> Mesh:
    """The mesh of these devices, grouped by process."""
    auto = (AxisType.Auto, AxisType.Auto)
    return Mesh(np.array(devices).reshape(fsdp, tp), (ROWS, HEADS), axis_types=auto)


def usual_mesh() -> Mesh | None:
    """The default mesh: all devices along `fsdp`; `None` for one device, or a CPU alone."""
    devices = jax.devices()
    if len(devices) == 1 or (platform() == "cpu" and jax.process_count() == 1):
        return None
    return mesh_of(len(devices), 1, devices)


def check_divides(mesh: Mesh, config: MistralConfig, batch: int | None = None) -> None:
    """Checks that the mesh divides the batch and the model's dimensions evenly.

    Without a batch, as in generation, weights are not split over `fsdp`.

    Raises:
        BadInput: it does not; the dimension is named.
    """
    sizes = {
        "rows of a batch (B, --batch)": (ROWS, batch or mesh.shape[ROWS]),
        "model width (D)": (ROWS, config.dim if batch else mesh.shape[ROWS]),
        "query heads (N)": (HEADS, config.n_heads),
        "key-value heads (K)": (HEADS, config.n_kv_heads),
        "feed-forward width (F)": (HEADS, config.hidden_dim),
        "token ids (V)": (HEADS, config.vocab_size),
    }
    if config.n_experts:  # these are what is split then, and F is not
        if not config.n_dense_layers:
            del sizes["feed-forward width (F)"]
        sizes["experts (E)"] = (HEADS, config.n_experts)
        sizes["width of the shared experts (J)"] = (HEADS, *config.shape("J"))
    for what, (axis, size) in sizes.items():
        if size % mesh.shape[axis]:
            raise BadInput(
                f"{axis}={mesh.shape[axis]} of the mesh does not divide the {size} {what}; "
                f"choose --mesh with a divisor of {size} for {axis}"
            )


def shardings(mesh: Mesh, tree: PyTree) -> Any:
    """The NamedSharding of each leaf: weights by name, and the optimiser state of each."""

    def of(path: tuple, leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        axes = letters(names[-1]) if names else ""
        axes = axes if len(axes) == len(leaf.shape) else ""  # a count of Adam's has no axes
        return NamedSharding(mesh, spec(axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def heads_only(mesh: Mesh, weights: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """The NamedSharding of each weight in generation: split over `tp`, and the same along `fsdp`.

    So that no step gathers a weight. What the mesh does not divide is on all devices.
    """

    def of(name: str, leaf: Any) -> NamedSharding:
        kernel = weights.get(kernel_of(name))
        by_groups = kernel is not None and kernel.dtype == jnp.uint4
        axes = letters_of_part(name, len(leaf.shape), by_groups)
        return NamedSharding(mesh, spec(axes, leaf.shape, mesh, along=(HEADS,)))

    return {name: of(name, leaf) for name, leaf in weights.items()}


def on_heads(mesh: Mesh | None, weights: dict[str, Array]) -> dict[str, Array]:
    """Moves each weight to its place in generation, see `heads_only`; of one device nothing."""
    return weights if mesh is None else jax.device_put(weights, heads_only(mesh, weights))


def by_rows(mesh: Mesh | AbstractMesh, tree: PyTree) -> Any:
    """The NamedSharding of leaves that have rows first: over `fsdp`, and a ring's heads over `tp`.

    Scalars, and rows that the mesh does not divide, are on all devices.
    """

    def of(leaf: Any) -> NamedSharding:
        axes = "BKSH" if len(leaf.shape) == len("BKSH") else "B....."[: len(leaf.shape)]
        return NamedSharding(mesh, spec(axes, leaf.shape, mesh))

    return jax.tree.map(of, tree)


def described(mesh: Mesh | None, tree: Tree, places: Placing = shardings) -> Tree:
    """`jax.ShapeDtypeStruct`s of the leaves, with their shardings if there is a mesh."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places(mesh, tree),
    )


def pinned(mesh: Mesh | None, tree: Tree) -> Tree:
    """Constrains each leaf to its sharding inside jit (`with_sharding_constraint`)."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def settled(mesh: Mesh | None, tree: Tree) -> Tree:
    """Moves each leaf to its sharding; all processes must pass the same values."""
    return tree if mesh is None else jax.device_put(tree, shardings(mesh, tree))


def create_sharded(
    mesh: Mesh | None,
    make: Callable[..., Tree],
    *args: Any,
    places: Placing = shardings,
) -> Tree:
    """The result of `make`, created sharded: no device ever holds more than its part."""
    if mesh is None:
        return make(*args)
    where = places(mesh, jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=where)(*args)


def bytes_on_a_device(tree: PyTree) -> int:
    """Bytes of the leaves, or of what they describe, on one device."""

    def of(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = place.shard_shape(leaf.shape) if place else leaf.shape
        return math.ceil(math.prod(shape) * jax.dtypes.itemsize_bits(leaf.dtype) / 8)

    return sum(map(of, jax.tree.leaves(tree)))


def own_rows(mesh: Mesh | None, batch: int) -> slice:
    """The slice of a batch's rows that belong to this process's devices."""
    if mesh is None:
        return slice(None)
    place = NamedSharding(mesh, P(ROWS))
    places = place.addressable_devices_indices_map((batch,)).values()
    bounds = [index[0].indices(batch)[:2] for index in places if index]
    return slice(min(first for first, _ in bounds), max(last for _, last in bounds))


def placed(mesh: Mesh | None, axes: str, array: np.ndarray, batch: int | None = None) -> Any:
    """Places rows on their devices; each process passes all of them, or its own of `batch` rows."""
    if mesh is None:
        return array
    shape = tuple(
        batch if letter == "B" and batch else size
        for letter, size in zip(axes, array.shape, strict=True)
    )
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec(axes)), array, shape)


def sum_over_rows(
    mesh: Mesh,
    work: Callable[..., Array],
    dtype: DTypeLike,
    weights: Mapping[str, Array],
    *rows: PyTree,
) -> Array:
    """FSDP: sums `work(weights, *rows)` over the devices along `fsdp`, each with its own rows.

    The weights are all-gathered along that axis in `dtype`, so half as much is sent for
    bfloat16; their gradients are reduced in the dtype of the weights. Between the forward and
    the backward pass they stay gathered. Gathering them again by a policy of `jax.checkpoint`
    was tried: it kept every step of the loops inside `work` instead, 8 GB for the head of a 7B.
    """
    parts = {name: _manual(mesh, name, leaf) for name, leaf in weights.items()}

    def on_a_device(weights: Mapping[str, Array], *rows: PyTree) -> Array:
        whole = {
            name: _gathered(leaf, tuple(parts[name]).index(ROWS), dtype)
            if ROWS in parts[name]
            else leaf
            for name, leaf in weights.items()
        }
        return jax.lax.psum(work(whole, *rows), ROWS)

    return jax.shard_map(
        on_a_device,
        mesh=mesh,
        in_specs=(parts, *(P(ROWS) for _ in rows)),
        out_specs=P(),
        axis_names={ROWS},
        check_vma=False,
    )(dict(weights), *rows)


def over_heads(
    attention: Callable[..., Array], q: Array, k: Array, v: Array, documents: Array | None
) -> Array:
    """Tensor parallelism over heads: each device along `tp` computes attention of its own heads.

    XLA cannot partition a custom kernel, not even along an axis of one device, hence
    `shard_map`. Queries and keys are [B, T, heads, H], and K is a multiple of `tp`.
    """
    if HEADS not in jax.sharding.get_abstract_mesh().axis_names:
        return attention(q, k, v, documents)
    heads = P(None, None, HEADS)
    return jax.shard_map(
        attention,
        in_specs=(heads, heads, heads, P()),
        out_specs=heads,
        axis_names={HEADS},
        check_vma=False,
    )(q, k, v, documents)


def on_its_rows(
    work: Callable[..., Tree], rows: Tree, row: Array, weights: PyTree, *more: Array
) -> Tree:
    """`work(rows, row, mine, weights, *more)`, done where that row is, on arrays with rows first.

    Along `fsdp` each device has its own rows, and is told the place of the row among them and
    whether it is `mine`; else it must change nothing. XLA would gather all rows to take one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    n_rows = len(jax.tree.leaves(rows)[0])
    ways = dict(mesh.shape).get(ROWS, 1)
    if ways == 1 or n_rows % ways:
        return work(rows, row, jnp.bool_(True), weights, *more)

    def on_a_device(rows: Tree, row: Array, weights: PyTree, *more: Array) -> Tree:
        n_own = n_rows // ways
        place = row - jax.lax.axis_index(ROWS) * n_own
        mine = (place >= 0) & (place < n_own)
        return work(rows, jnp.clip(place, 0, n_own - 1), mine, weights, *more)

    return jax.shard_map(
        on_a_device,
        in_specs=(P(ROWS), P(), *(P() for _ in (weights, *more))),
        out_specs=P(ROWS),
        axis_names={ROWS},
        check_vma=False,
    )(rows, row, weights, *more)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which functions are traced for this mesh, and know of it; `None` is none."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def kept_by_rows(tree: Tree) -> Tree:
    """Constrains arrays with rows first to their places, see `by_rows`, where there is a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, by_rows(mesh, tree))


def kept_everywhere(tree: Tree) -> Tree:
    """Constrains arrays to be whole on all devices, where there is a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def over_experts(
    work: Callable[..., Array],
    kernels: PyTree,
    x: Array,
    experts: Array,
    shares: Array,
) -> Array:
    """Expert parallelism: each device along `tp` computes its own experts' part of `work`.

    Kernels have axis E first, and `work` counts experts from its first kernel: an id out of
    range is an expert of another device. Tokens are replicated along `tp`, so the results are
    summed (all-reduce).
    """
    mesh = jax.sharding.get_abstract_mesh()
    n = dict(mesh.shape).get(HEADS, 1)
    if n == 1:
        return work(kernels, x, experts, shares)

    def on_a_device(kernels: PyTree, x: Array, experts: Array, shares: Array) -> Array:
        n_own = len(jax.tree.leaves(kernels)[0])
        first = jax.lax.axis_index(HEADS) * n_own
        own = jnp.where((experts >= first) & (experts < first + n_own), experts - first, n_own)
        return jax.lax.psum(work(kernels, x, own, shares), HEADS)

    return jax.shard_map(
        on_a_device,
        in_specs=(P(HEADS), P(), P(), P()),
        out_specs=P(),
        axis_names={HEADS},
        check_vma=False,
    )(kernels, x, experts, shares)


def _manual(mesh: Mesh, name: str, leaf: Array) -> P:
    """The `fsdp` part of a weight's PartitionSpec; XLA handles `tp`.

    The mesh divides the axes of a model, see `check_divides`, but a packed int4 axis has half the
    size: where the mesh does not divide that, the axis is replicated.
    """
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    whole = spec(letters(name)) if is_float else spec(letters(name), leaf.shape, mesh)
    return P(*(axis if axis == ROWS else None for axis in whole))


def _gathered(leaf: Array, axis: int, dtype: DTypeLike) -> Array:
    """All-gathers a weight along `axis`; its gradient is reduce-scattered."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):  # a frozen int8 kernel, of which there is none
        return jax.lax.all_gather(leaf, ROWS, axis=axis, tiled=True)

    @jax.custom_vjp
    def gather(leaf: Array) -> Array:
        return jax.lax.all_gather(leaf.astype(dtype), ROWS, axis=axis, tiled=True)

    def backward(_: None, gradient: Array) -> tuple[Array]:
        wide = gradient.astype(leaf.dtype)
        return (jax.lax.psum_scatter(wide, ROWS, scatter_dimension=axis, tiled=True),)

    gather.defvjp(lambda leaf: (gather(leaf), None), backward)
    return gather(leaf)


def keeps_its_type(name: str, leaf: Array) -> bool:
    """Whether a weight is never cast to the compute dtype: integers, scales of int8, int4 and LoRA.

    Those scales are float32: rounding them would falsify everything that they multiply.
    """
    is_number = jnp.issubdtype(leaf.dtype, jnp.floating)
    return not is_number or is_part(name) or part_of(name) == LORA_SCALE


@functools.partial(jax.jit, static_argnums=(0, 1))
def _replicated(mesh: Mesh, dtype: DTypeLike, leaf: Array) -> Array:
    return jax.lax.with_sharding_constraint(leaf.astype(dtype), NamedSharding(mesh, P()))


def on_one_device(mesh: Mesh, weights: Mapping[str, Array], dtype: DTypeLike) -> dict[str, Array]:
    """Gathers all weights on the first device of this process, in `dtype`.

    Each weight is for a moment on all devices. Every process must call it.
    """
    types = {n: leaf.dtype if keeps_its_type(n, leaf) else dtype for n, leaf in weights.items()}
    return {
        name: jnp.asarray(_replicated(mesh, jnp.dtype(types[name]), leaf).addressable_data(0))
        for name, leaf in weights.items()
    }
