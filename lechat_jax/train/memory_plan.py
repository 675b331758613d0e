"""Memory plan: device memory of a training step, before anything is allocated.

Parameters, the optimiser's state and gradients follow from shapes and places. What is in
memory beside them is XLA's affair, so XLA is asked: it compiles the step for as many devices as
the mesh has, from descriptions of its arguments, and says how much room it would need. Layers
are all alike, so a deep model's need follows from those of two shallow ones.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import layer_of
from lechat_jax.data.rows import described_rows
from lechat_jax.devices.memory import check_fits
from lechat_jax.devices.mesh import HEADS, ROWS, bytes_on_a_device, mesh_of, sizes_of
from lechat_jax.errors import BadInput
from lechat_jax.train.step import (
    Shapes,
    StepOptions,
    described_call,
    described_state,
    jitted_steps,
)
from lechat_jax.train.unused_ids import UnusedIds

USUAL = (8, 16, 24, 40, 48, 80, 96, 141, 192)  # GB of the devices that one can have
SHALLOW = (2, 4)  # layers of the models that a deeper one is inferred from
REMEDY = (
    "take fewer rows (--batch), work through them in parts (--accumulate), or keep less of each "
    "layer (--remat full)"
)
NO_STATE = (
    "train a smaller model, adapters beside weights that stay (--lora-rank), or on more devices "
    "(--mesh)"
)


class Parts(NamedTuple):
    """Trainable and frozen weights of a model, by name.

    Attributes:
        learning: those that learn.
        frozen: those beside which they do.
    """

    learning: Shapes
    frozen: Shapes

    def of_layers(self, depth: int) -> "Parts":
        """The weights of the first layers alone."""
        return Parts(*({n: x for n, x in part.items() if _is_within(n, depth)} for part in self))

    def with_shared_row(self, unused: UnusedIds) -> "Parts":
        """The weights with narrow tables, in which unused ids share a row."""
        return Parts(jax.eval_shape(unused.narrowed, self.learning), self.frozen)


class Memory(NamedTuple):
    """Memory of a training step in bytes per device.

    Attributes:
        parameters: those that learn, in float32, and those beside which they do, as they are.
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
        """Total in bytes per device."""
        return sum(self)


def check_memory(
    config: MistralConfig,
    options: StepOptions,
    B: int,
    T: int,
    free: int | None,
    parts: Parts | None = None,
    asking: Callable[[], None] = lambda: None,
) -> None:
    """Raises `BadInput` for a step of B rows of T tokens that would not fit into `free` bytes.

    XLA is asked only where it is not plain anyway, since it compiles for that; `asking` is told.
    """
    if free is None:
        return
    state = _state(options, parts or Parts(weight_shapes(config), {}))
    kept = state.parameters + state.optimizer + state.gradients
    check_fits(
        "the weights, their gradients and what the optimiser remembers take", kept, free, NO_STATE
    )
    least, most = (kept + extra for extra in _activations(config, options, B, T, state))
    check_fits("a training step takes at least", least, free, REMEDY)
    if most > free:
        asking()
        total = needed(config, options, B, T, parts).total
        check_fits("a training step takes", total, free, REMEDY)


def checkpoint_bytes(options: StepOptions, parts: Parts, unused: UnusedIds | None = None) -> int:
    """Disk space of a checkpoint in bytes, whatever the sharding.

    It has whole tables; what the optimiser remembers is of those that are trained.
    """
    alone = dataclasses.replace(options, mesh=None)
    trained = parts.with_shared_row(unused) if unused else parts
    optimizer = _state(alone, trained._replace(frozen={})).optimizer
    return bytes_on_a_device(parts.learning) + optimizer


def needed(
    config: MistralConfig, options: StepOptions, B: int, T: int, parts: Parts | None = None
) -> Memory:
    """Memory of a step; for deep models extrapolated from shallow ones."""
    parts = parts or Parts(weight_shapes(config), {})
    depths = [config.n_dense_layers + depth for depth in SHALLOW]
    if config.n_layers <= depths[1]:
        return compiled(config, options, B, T, parts)
    few, more = (
        compiled(of_layers(config, depth), options, B, T, parts.of_layers(depth))
        for depth in depths
    )
    layers = (config.n_layers - depths[0]) / (depths[1] - depths[0])
    return Memory(*(round(a + (b - a) * layers) for a, b in zip(few, more, strict=True)))


def compiled(
    config: MistralConfig, options: StepOptions, B: int, T: int, parts: Parts | None = None
) -> Memory:
    """Memory of a compiled step by XLA's own analysis."""
    parts = parts or Parts(weight_shapes(config), {})
    rows = described_rows((1, B, T + 1), is_packed=False)
    step = jitted_steps(options).lower(*described_call(config, options, *parts, rows))
    analysis = step.compile().memory_analysis()
    temporary = analysis.temp_size_in_bytes if analysis else 0
    memory = _state(options, parts)
    return memory._replace(activations=max(0, temporary - memory.gradients))


def _state(options: StepOptions, parts: Parts) -> Memory:
    """Memory of a step but for its activations: weights, optimizer state and gradients."""
    state, frozen = described_state(options, *parts)
    learning = bytes_on_a_device(state.weights)
    return Memory(
        learning + bytes_on_a_device(frozen), bytes_on_a_device(state.optimizer), learning, 0
    )


def _activations(
    config: MistralConfig, options: StepOptions, B: int, T: int, state: Memory
) -> tuple[int, int]:
    """Lower and upper bound of the activations in bytes."""
    ways = options.mesh.size if options.mesh else 1
    tokens = B * T / options.accumulate / ways
    D, F, N, K, H, U, X, J = config.shape("DFNKHUXJ")
    F = config.n_experts_per_token * X + J if config.n_experts else F
    heads = N * H + K * (H + U)
    seen = sum(min(T, 2 * (window or T)) for window in config.windows)
    width = config.n_layers * (8 * D + 4 * heads + 6 * F) + 6 * N * seen
    kept = config.n_layers * (D if options.remat == "full" else D + F)
    itemsize = 2 if options.dtype == "bfloat16" else 4
    logits = 4 * 4 * min(tokens, 8192) * config.vocab_size
    # Twice the work of a layer beside what all keep: its backward pass, and room for doubt.
    most = 4 * 2 * tokens * (1 + 2 / config.n_layers) * width + logits + 4 * state.gradients
    return int(itemsize * tokens * kept), int(most)


def simulated_mesh(asked: str) -> Mesh:
    """Mesh of simulated CPU devices.

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


def summary(memory: Memory) -> str:
    """Table of the memory, and the smallest usual device that has room for it."""
    rows = [f"  {name:12}{size / 1e9:9.2f} GB" for name, size in memory._asdict().items()]
    room = next((size for size in USUAL if memory.total <= 0.95 * size * 1e9), None)
    fits = f"a device of {room} GB has room for it" if room else f"no device of {USUAL[-1]} GB has"
    return "\n".join([*rows, f"  {'in all':12}{memory.total / 1e9:9.2f} GB: {fits}"])


def _is_within(name: str, depth: int) -> bool:
    """Whether a weight is of one of the first layers, or of none."""
    layer = layer_of(name)
    return layer is None or layer < depth


def of_layers(config: MistralConfig, depth: int) -> MistralConfig:
    """The model with only its first layers, of which the last has experts if any has."""
    windows = config.sliding_window
    kept = windows[:depth] if isinstance(windows, tuple) else windows
    n_dense = min(config.n_dense_layers, depth - 1)
    return dataclasses.replace(config, n_layers=depth, sliding_window=kept, n_dense_layers=n_dense)
