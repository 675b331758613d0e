"""The Mistral 7B decoder (arXiv:2310.06825, section 2): reads like the paper's figure.

Kernels have their output axes first and contract the last, as in PyTorch, so converting a
checkpoint renames and reshapes but never transposes. Arithmetic follows the dtype of the
weights: cast them to bfloat16 or float64 and the model computes in it; norms, rotations,
scores and softmax are at least float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from lechat_jax.config import MistralConfig, Window
from lechat_jax.data.rows import Images, RowImages, positions_in
from lechat_jax.model.attention import (
    LatentQueries,
    Mixer,
    attend_cached,
    attend_latents,
    training_attention,
)
from lechat_jax.model.block import Block
from lechat_jax.model.cache import Cache, Ring, distinct_windows, places
from lechat_jax.model.layers import Embedding, RMSNorm
from lechat_jax.model.mask import window_mask
from lechat_jax.model.moe import Load
from lechat_jax.model.rope import Rotations, rotations
from lechat_jax.model.vision import Projector, VisionTower
from lechat_jax.ops.attention_backend import Backend
from lechat_jax.ops.remat import Remat, in_one_body, recomputing


class Mistral(nnx.Module):
    """Mistral decoder: `config.n_layers` blocks between an embedding and a head.

    Freshly made, its weights are float32: normal, with the deviation that keeps the
    residual stream at the scale of the embedding, and norms of one.

    >>> from lechat_jax.config import preset
    >>> model = nnx.eval_shape(lambda: Mistral(preset("lechat-15m"), rngs=nnx.Rngs(0)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    15165888
    """

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config, 1.0, rngs=rngs)
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(config.n_layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        std = config.dim**-0.5
        self.head = self.embed if config.tied_embeddings else Embedding(config, std, rngs=rngs)
        if config.vision:
            self.vision = VisionTower(config.vision, rngs=rngs)
            self.projector = Projector(config.vision, config.dim, config.norm_eps, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        backend: Backend | None = None,
        first_position: int = 0,
    ) -> Float[Array, "B T V"]:
        """Next-token logits at each position of whole sequences."""
        return self.logits(self.hidden(tokens, backend, first_position))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        backend: Backend | None = None,
        first_position: int = 0,
        documents: Int[Array, "B T"] | None = None,
        remat: Remat = "none",
        is_causal: bool = True,
        features: Float[Array, "B T D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of whole sequences, which the head reads.

        `backend` names the attention kernel; `None` takes the best for the platform. The
        sequences start at `first_position`, and nothing before it is seen. With `documents`,
        a number for each token, a sequence is several documents, none of which sees another:
        what is read of each is what would be read of it alone. `remat` says what of a layer
        a backward pass finds, and what it makes again. Without `is_causal` each position sees
        those after it too, as embeddings have it. `features` are those of images, see `embedded`.
        """
        where = backend, first_position, documents, remat, is_causal
        return self.routed(tokens, *where, features)[0]

    def routed(
        self,
        tokens: Int[Array, "B T"],
        backend: Backend | None = None,
        first_position: int = 0,
        documents: Int[Array, "B T"] | None = None,
        remat: Remat = "none",
        is_causal: bool = True,
        features: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Load | None]:
        """`hidden`, and the summed load of the experts of all layers, if there are any."""
        x = self.embedded(tokens, features)
        place = jnp.arange(tokens.shape[1])[None] if documents is None else positions_in(documents)
        rotary = rotations(first_position + place, self.config, x.dtype)

        def layer(window: Window) -> Callable[[Block, Array], tuple[Array, Load | None]]:
            how = {"window": window, "backend": backend, "documents": documents}
            mix = functools.partial(_mix_whole, **how, is_causal=is_causal)
            return recomputing(functools.partial(_applied, rotary=rotary, mix=mix), remat)

        windows = self.config.windows
        graphs, states = zip(*map(nnx.split, self.blocks), strict=True)
        if len(set(windows)) == 1 and in_one_body(states):
            apply, stack = layer(windows[0]), jax.tree.map(lambda *of: jnp.stack(of), *states)
            x, loads = jax.lax.scan(lambda x, own: apply(nnx.merge(graphs[0], own), x), x, stack)
            return self.norm(x), jax.tree.map(lambda load: load.sum(axis=0), loads)
        total = None
        for block, window in zip(self.blocks, windows, strict=True):
            x, load = layer(window)(block, x)
            total = load if total is None else jax.tree.map(jnp.add, total, load)
        return self.norm(x), total

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
        features: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final hidden states of new positions, and the cache with them in it.

        A position of `EMPTY` is padding, which nothing will see. T must fit the chunk that
        the cache was made for, and a row's T positions must be one after the other. `features`
        are those of images, see `embedded`.
        """
        x = self.embedded(tokens, features)
        rotary = rotations(positions, self.config, x.dtype)
        cache = cache.claim(self.config, positions)
        seen = [
            (window_mask(positions, ring.position, window), ring.used(positions))
            for ring, window in zip(cache.rings, distinct_windows(self.config), strict=True)
        ]
        for block, place in zip(self.blocks, places(self.config), strict=True):
            ring, (mask, used) = cache.layer(place), seen[place.ring]
            x, ring = _extended(*nnx.split(block), x, rotary, positions, ring, mask, used)
            cache = cache.with_layer(place, ring)
        return self.norm(x), cache

    def see(self, images: Images) -> Float[Array, "B M D"]:
        """Image features: for each token of each image what stands for its embedding."""
        return self.projector(self.vision(images))

    def see_rows(self, rows: RowImages) -> Float[Array, "B T D"]:
        """Image features of each position of rows, as `embedded` takes them."""
        B, D = rows.slots.shape[0], self.config.dim
        each = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows.images)
        seen = self.see(each).reshape(B, -1, D)
        return jnp.take_along_axis(seen, rows.slots[..., None], axis=1, mode="clip")

    def embedded(
        self, tokens: Int[Array, "B T"], features: Float[Array, "B T D"] | None
    ) -> Float[Array, "B T D"]:
        """Embeddings of tokens; at the positions of image tokens their `features` instead."""
        x = self.embed.rows(tokens)
        if features is None or self.config.vision is None:
            return x
        is_image = tokens == self.config.vision.image_token_id
        return jnp.where(is_image[..., None], features.astype(x.dtype), x)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of final hidden states, at least float32."""
        return self.head.scores(hidden)


def _applied(
    block: Callable[..., tuple[Array, None, Load | None]],
    x: Array,
    rotary: Rotations,
    mix: Mixer[None],
) -> tuple[Array, Load | None]:
    """Block on whole sequences, without a cache."""
    x, _, load = block(x, rotary, mix, None)
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
    is_causal: bool,
) -> tuple[Array, None]:
    return training_attention(q, k, v, window, backend, documents, is_causal), memory


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers
def _extended(
    graph: nnx.GraphDef[Block],
    state: PyTree,
    x: Float[Array, "B T D"],
    rotary: Rotations,
    positions: Int[Array, "B T"],
    ring: Ring,
    mask: Bool[Array, "B T S"],
    used: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Ring]:
    """Block on new positions, whose slots are assigned already."""
    mix = functools.partial(_mix_cached, positions=positions, mask=mask, used=used)
    x, ring, _ = nnx.merge(graph, state)(x, rotary, mix, ring)
    return x, ring


def _mix_cached(
    q: Array | LatentQueries,
    k: Array,
    v: Array,
    ring: Ring,
    *,
    positions: Array,
    mask: Array,
    used: Array,
) -> tuple[Array, Ring]:
    ring = ring.write(0, positions, k, v)
    if isinstance(q, LatentQueries):
        return attend_latents(q, *ring.read(0), mask, used), ring
    return attend_cached(q, *ring.read(0), mask, used), ring
