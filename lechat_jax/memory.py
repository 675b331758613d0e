"""What a training step keeps in the memory of each device, before anything is allocated.

Parameters, the optimiser's state and gradients follow from shapes and places. What is in
memory beside them is XLA's affair, so XLA is asked: it compiles the step for as many devices as
the mesh has, from descriptions of its arguments, and says how much room it would need. Layers
are all alike, so a deep model's need follows from those of two shallow ones.
"""

import contextlib
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.rows import Rows
from lechat_jax.sharding import HEADS, ROWS, described, mesh_of, sizes_of
from lechat_jax.step import StepOptions, init_state, jitted_steps

USUAL = (8, 16, 24, 40, 48, 80, 96, 141, 192)  # GB of the devices that one can have
SHALLOW = (2, 4)  # layers of the models that a deeper one is inferred from


class Memory(NamedTuple):
    """Bytes on each device.

    Attributes:
        parameters: in float32.
        optimizer: what it remembers of them.
        gradients: in float32, while a step makes and uses them.
        activations: all else that is in memory at the worst moment: what the backward pass
            needs of the forward one, weights gathered and cast, the work of the optimiser.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def needed(config: MistralConfig, options: StepOptions, batch: int) -> Memory:
    """The memory of a step, of a deep model as shallow ones have it."""
    if config.n_layers <= SHALLOW[1]:
        return compiled(config, options, batch)
    low, high = (_windows_of(config, depth) for depth in SHALLOW)
    few, more = (compiled(shallow, options, batch) for shallow in (low, high))
    layers = (config.n_layers - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
    return Memory(*(round(a + (b - a) * layers) for a, b in zip(few, more, strict=True)))


def compiled(config: MistralConfig, options: StepOptions, batch: int) -> Memory:
    """The memory of a step as XLA has planned it."""
    alone = dataclasses.replace(options, mesh=None)
    state = described(options.mesh, jax.eval_shape(lambda: init_state(config, alone, seed=0)))
    tokens = jax.ShapeDtypeStruct((1, batch, options.block + 1), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    step = jitted_steps(options).lower(config, options, state, {}, Rows(tokens), number, number)
    analysis = step.compile().memory_analysis()
    temporary = analysis.temp_size_in_bytes if analysis else 0
    parameters = _bytes(state.weights)
    return Memory(parameters, _bytes(state.optimizer), parameters, max(0, temporary - parameters))


def simulated_mesh(asked: str) -> Mesh:
    """The mesh of so many CPU devices, of which there is nothing but the number.

    To be asked for before anything else of JAX, since later their number is fixed.

    Raises:
        BadInput: `asked` describes no mesh, or JAX has its devices already.
    """
    sizes = sizes_of(asked)
    n = math.prod(sizes.values())
    with contextlib.suppress(RuntimeError):  # what there are may be enough
        jax.config.update("jax_num_cpu_devices", n)
    devices = jax.devices("cpu")
    if len(devices) < n:
        raise BadInput(f"--mesh {asked} has {n} devices and only {len(devices)} can be simulated")
    return mesh_of(sizes[ROWS], sizes[HEADS], devices[:n])


def told(memory: Memory) -> str:
    """The memory in words, and the smallest usual device that has room for it."""
    rows = [f"  {name:12}{size / 1e9:9.2f} GB" for name, size in memory._asdict().items()]
    room = next((size for size in USUAL if memory.total <= 0.95 * size * 1e9), None)
    fits = f"a device of {room} GB has room for it" if room else f"no device of {USUAL[-1]} GB has"
    return "\n".join([*rows, f"  {'in all':12}{memory.total / 1e9:9.2f} GB: {fits}"])


def _bytes(tree: PyTree) -> int:
    """Of the leaves, on one device."""

    def of(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def _windows_of(config: MistralConfig, depth: int) -> MistralConfig:
    """The same model with fewer layers."""
    windows = config.sliding_window
    kept = windows[:depth] if isinstance(windows, tuple) else windows
    return dataclasses.replace(config, n_layers=depth, sliding_window=kept)
