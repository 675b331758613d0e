"""Scoring: the cross-entropy of rows under a model, for training and evaluation alike."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lechat_jax.config import MistralConfig
from lechat_jax.data.rows import RowImages
from lechat_jax.devices.mesh import ROWS, keeps_its_type, sum_over_rows
from lechat_jax.model.binding import Weights, bind
from lechat_jax.model.mistral import Mistral
from lechat_jax.model.moe import Load, imbalance
from lechat_jax.ops.attention_backend import Backend
from lechat_jax.ops.cross_entropy import cross_entropy, target_scores, usual_chunk
from lechat_jax.ops.remat import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Static options of the loss: dtype, attention, remat, mesh.

    Attributes:
        dtype: of activations and matrix products; weights stay as they are stored.
        chunk: tokens whose logits are in memory at a time; `None` takes 8192, and on a CPU 256,
            which its cache holds, or 1024 of a wide model, whose products are worth more.
        backend: attention kernel; `None` takes the best for the platform.
        mesh: of the devices that share the work, see `devices.mesh`; `None` is one device.
        remat: what a layer keeps for its backward pass.
        router_aux_loss: multiple of the `imbalance` of the experts, in whose slope it is and not
            in the loss, which is of the text alone.
        n_sharing: token ids that the last row of the head stands for.
    """

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    chunk: int | None = None
    backend: Backend | None = None
    mesh: Mesh | None = None
    remat: Remat = "none"
    router_aux_loss: float = 0.0
    n_sharing: int = 1


def total_nats(
    config: MistralConfig,
    options: Forward,
    weights: Weights,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    share: Float[Array, "B T"],
    documents: Int[Array, "B T"] | None = None,
    images: RowImages | None = None,
) -> Float[Array, ""]:
    """Weighted cross-entropy: the sum over all positions of share * -log p(target), in nats.

    `documents` are those of the inputs, where a row holds several, and `images` theirs. Kernels
    that are quantised stay so.
    """
    work = functools.partial(_nats, config, options)
    rows = (inputs, targets, share, documents, images)
    if options.mesh is None:
        return work(weights, *rows)
    return sum_over_rows(options.mesh, work, options.dtype, weights, *rows)


def _nats(
    config: MistralConfig,
    options: Forward,
    weights: Weights,
    inputs: Array,
    targets: Array,
    share: Array,
    documents: Array | None,
    images: RowImages | None,
) -> Array:
    """`total_nats` of the rows of one device."""
    model = _bound(config, options, weights)
    features = None if images is None else model.see_rows(images)
    hidden, load = model.routed(
        inputs, options.backend, documents=documents, remat=options.remat, features=features
    )
    head = model.head.matrix()
    hidden = hidden.reshape(-1, config.dim)
    chunk = options.chunk or usual_chunk(config.dim)
    nats: Array = cross_entropy(
        hidden, head, targets.reshape(-1), share.reshape(-1), chunk, options.n_sharing
    )
    if load is None or not options.router_aux_loss:
        return nats
    penalty = options.router_aux_loss * _share_of_imbalance(options, load)
    return nats + penalty - jax.lax.stop_gradient(penalty)


def _share_of_imbalance(options: Forward, load: Load) -> Float[Array, ""]:
    """Load-balancing loss of one device's rows, of the load of all rows."""
    n_devices = 1
    if options.mesh is not None:
        n_devices = options.mesh.shape[ROWS]
        load = jax.tree.map(functools.partial(jax.lax.psum, axis_name=ROWS), load)
    return imbalance(load) / n_devices


def _bound(config: MistralConfig, options: Forward, weights: Weights) -> Mistral:
    """The model with its weights in the dtype of the options, but for those that are quantised."""

    def cast(name: str, leaf: Array) -> Array:
        return leaf if keeps_its_type(name, leaf) else leaf.astype(options.dtype)

    return bind(config, {name: cast(name, leaf) for name, leaf in weights.items()})


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    config: MistralConfig,
    options: Forward,
    weights: Weights,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    documents: Int[Array, "B T"] | None = None,
    images: RowImages | None = None,
) -> Float[Array, ""]:
    """Total nats of the counted targets, each conditioned on its document before it."""
    share = counted.astype(jnp.float32)
    return total_nats(config, options, weights, inputs, targets, share, documents, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def token_scores(
    config: MistralConfig,
    options: Forward,
    weights: Weights,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-probability of each target in nats, and whether greedy decoding would take it.

    Each row is a text of its own, whose end may be padding: nothing before it sees that.
    """
    model = _bound(config, options, weights)
    hidden = model.hidden(inputs, options.backend).reshape(-1, config.dim)
    chunk = options.chunk or usual_chunk(config.dim)
    scores = target_scores(hidden, model.head.matrix(), targets.reshape(-1), chunk)
    log_probs, is_greedy = (leaf.reshape(inputs.shape) for leaf in scores)
    return log_probs, is_greedy
