"""lechat_jax as an oracle: the same functions that train and generate."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from lechat_jax.config import MistralConfig
from lechat_jax.data.rows import Images, RowImages
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.vision import as_images, padded_length
from lechat_jax.model import cache, scoring
from lechat_jax.model.binding import Weights, bind
from lechat_jax.model.layers import RMSNorm
from lechat_jax.model.mistral import Mistral
from lechat_jax.tokenizer.images import Image, image_of
from parity.check.oracles.interface import (
    OF_VISION,
    AdamW,
    Arrays,
    Dtype,
    Gradients,
    Implementation,
    Pictures,
    Stages,
    Text,
    Trajectory,
    pieces,
)


class JaxOracle:
    """lechat_jax; see `Oracle`.

    Its passes are compiled for it alone, so that a function which was replaced for a while is
    not remembered; what they call may be, which is why `planting` has JAX forget everything.
    """

    name: Implementation = "jax"

    def __init__(self, config: MistralConfig, weights: Arrays, dtype: Dtype) -> None:
        self.config = config
        self.dtype: Dtype = dtype
        self.images: Images | None = None
        self.patches: Float[Array, "B P d"] | None = None
        self._stages = jax.jit(self._trace, static_argnums=2)
        self._extend = jax.jit(self._read)
        self._loss_and_grad = jax.jit(jax.value_and_grad(self._loss))
        self.load(weights)

    def load(self, weights: Arrays) -> None:
        """See `Oracle.load`."""
        self.drop()  # before the new ones come
        with self._arithmetic():
            for name, leaf in weights.items():
                self.weights[name] = jnp.array(leaf, self.dtype)

    def drop(self) -> None:
        """See `Oracle.drop`."""
        self.weights: Weights = {}

    def show(self, pictures: Pictures, patches: Float[np.ndarray, "rows d"] | None = None) -> None:
        """See `Oracle.show`."""
        assert self.config.vision is not None
        self.pictures = [image_of(picture, self.config.vision) for picture in pictures]
        with self._arithmetic():
            longest = max(len(picture.patches) for picture in self.pictures)
            self.images = as_images(self.pictures, padded_length(longest, 1))
            self.patches = None if patches is None else self._fed(patches)

    def _fed(self, patches: Float[np.ndarray, "rows d"]) -> Float[Array, "B P d"]:
        """Rows of the patches in the order in which lechat has them, image by image."""
        assert self.images is not None
        fed = np.zeros((*self.images.places.shape[:2], patches.shape[1]), self.dtype)
        start = 0
        for row, image in zip(fed, self.pictures, strict=True):
            n = len(image.places)
            row[_row_by_row(image)] = patches[start : start + n]
            start += n
        return jnp.asarray(fed)

    def _placed(self, tokens: Int[Array, "B T"]) -> RowImages | None:
        """The images of each row, which are the same, at the places of their tokens."""
        tower = self.config.vision
        if tower is None or self.images is None:
            return None
        M = self.images.places.shape[1] // tower.n_merged
        slots = [i * M + np.arange(image.n_tokens) for i, image in enumerate(self.pictures)]
        images = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(tokens), *x.shape)), self.images)
        places = jnp.cumsum(tokens == tower.image_token_id, axis=1) - 1
        return RowImages(images, jnp.asarray(np.concatenate(slots))[places])

    def _features(self, model: Mistral, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"] | None:
        placed = self._placed(tokens)
        return None if placed is None else model.see_rows(placed)

    def forward(self, tokens: Int[np.ndarray, "B T"], first_position: int = 0) -> Stages:
        """See `Oracle.forward`."""
        with self._arithmetic():
            ids = jnp.asarray(tokens, jnp.int32)
            found = self._stages(self.weights, ids, first_position, self.patches)
        return {name: _numpy(leaf) for name, leaf in found.items()}

    def gradients(self, rows: Int[np.ndarray, "B row"]) -> Gradients:
        """See `Oracle.gradients`."""
        with self._arithmetic():
            loss, grads = self._loss_and_grad(self.weights, jnp.asarray(rows, jnp.int32))
        return Gradients(float(loss), {name: _numpy(leaf) for name, leaf in grads.items()})

    def train(self, steps: Int[np.ndarray, "steps B row"], adamw: AdamW) -> Trajectory:
        """See `Oracle.train`; the optimiser is optax's."""
        optimizer = optax.adamw(
            adamw.rate,
            b1=adamw.beta1,
            b2=adamw.beta2,
            eps=adamw.eps,
            weight_decay=adamw.decay,
        )

        @jax.jit
        def updated(weights: Weights, moments: optax.OptState, grads: Weights) -> tuple:
            updates, moments = optimizer.update(grads, moments, weights)
            return optax.apply_updates(weights, updates), moments

        losses = []
        with self._arithmetic():
            weights, moments = self.weights, optimizer.init(self.weights)
            for rows in steps:
                loss, grads = self._loss_and_grad(weights, jnp.asarray(rows, jnp.int32))
                weights, moments = updated(weights, moments, grads)
                losses.append(float(loss))
        return Trajectory(np.array(losses), {name: _numpy(leaf) for name, leaf in weights.items()})

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """See `Oracle.cached`."""
        B, T = tokens.shape
        found = []
        with self._arithmetic():
            state = cache.empty_cache(self.config, B, chunk, T, self.dtype)
            features = self._features(bind(self.config, self.weights), jnp.asarray(tokens))
            for start, end in pieces(T, prompt, chunk):
                positions = np.broadcast_to(np.arange(start, end), (B, end - start))
                part = jnp.asarray(tokens[:, start:end], jnp.int32)
                seen = None if features is None else features[:, start:end]
                logits, state = self._extend(
                    self.weights, part, jnp.asarray(positions, jnp.int32), state, seen
                )
                found.append(_numpy(logits))
        return np.concatenate(found, axis=1)

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """See `Oracle.greedy`; the loop is the one that users run."""
        with self._arithmetic():
            made = Generator(bind(self.config, self.weights), chunk=chunk, context=context)
            images = [self.pictures] * len(prompts) if self.images else ()
            samples = made.generate(prompts, n, Sampling(temperature=0), eos_ids=(), images=images)
        return [Text(sample.ids, sample.logprobs) for sample in samples]

    def _trace(
        self,
        weights: Weights,
        tokens: Int[Array, "B T"],
        first_position: int,
        patches: Float[Array, "B P d"] | None,
    ) -> dict:
        seen: dict[str, Array] = {}
        model = bind(self.config, weights)
        if patches is not None:
            model.vision.norm = _Given(patches)
        _watch(model, seen)
        features = self._features(model, tokens)
        hidden = model.hidden(tokens, first_position=first_position, features=features)
        seen |= {"norm": hidden, "logits": model.logits(hidden)}
        return {name: self._in_rows(name, leaf) for name, leaf in seen.items()}

    def _in_rows(self, name: str, found: Array) -> Array:
        """What a station of the tower made of each patch, image after image, row by row."""
        if name.partition(".")[0] not in OF_VISION:
            return found
        rows = []
        for row, image in zip(found, self.pictures, strict=False):  # those of the first text
            order = np.arange(image.n_tokens) if name == "projector" else _row_by_row(image)
            rows.append(row[order])
        return jnp.concatenate(rows)[None]

    def _loss(self, weights: Weights, rows: Int[Array, "B row"]) -> Float[Array, ""]:
        """Mean nats a token, the logits of a third of the tokens at a time."""
        B, T = rows.shape[0], rows.shape[1] - 1
        forward = scoring.Forward(dtype=self.dtype, chunk=-(-B * T // 3))
        share = jnp.full((B, T), 1 / (B * T))
        inputs, targets = rows[:, :-1], rows[:, 1:]
        images = self._placed(inputs)
        return scoring.total_nats(
            self.config, forward, weights, inputs, targets, share, images=images
        )

    def _read(
        self,
        weights: Weights,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: cache.Cache,
        features: Float[Array, "B T D"] | None,
    ) -> tuple[Float[Array, "B T V"], cache.Cache]:
        model = bind(self.config, weights)
        hidden, state = model.extend(tokens, positions, state, features)
        return model.logits(hidden), state

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Sixty-four bits where they are asked for, and no TensorFloat-32 in a matrix product."""
        with jax.enable_x64(self.dtype == "float64"), jax.default_matmul_precision("highest"):
            yield


def _row_by_row(image: Image) -> Int[np.ndarray, "P"]:
    """The order of an image's patches in which they are row by row."""
    return np.lexsort(image.places.T[::-1])


class _Given(RMSNorm):
    """A norm whose output is given, whatever is read."""

    def __init__(self, made: Array) -> None:
        super().__init__(made.shape[-1], 0.0)
        self.scale = nnx.Param(made[0, 0])
        self.made = nnx.Param(made)

    def __call__(self, x: Array) -> Array:
        """What was given."""
        return self.made[...]


class _Tap(nnx.Module):
    """A module that shows each of its inputs and outputs to somebody."""

    def __init__(self, inner: nnx.Module, show: Callable[[Array, Array], None]) -> None:
        self.inner, self.show = inner, show

    def __call__(self, x: Array, *rest: object, **named: object) -> object:
        """What the module makes of it."""
        assert callable(self.inner)
        made = self.inner(x, *rest, **named)
        self.show(x, made[0] if isinstance(made, tuple) else made)
        return made


def _watch(model: Mistral, seen: dict[str, Array]) -> None:
    """From now on, each pass of the model leaves its stages in `seen`."""

    def put(module: nnx.Module, *, read: str = "", made: str = "") -> Any:
        def show(x: Array, y: Array) -> None:
            seen.update({name: leaf for name, leaf in ((read, x), (made, y)) if name})

        return _Tap(module, show)

    for i, block in enumerate(model.blocks):
        block.attn, block.mlp = put(block.attn, made=f"attn.{i}"), put(block.mlp, made=f"mlp.{i}")
    first = model.blocks[0]
    first.attn_norm = put(first.attn_norm, made="norm.0")
    model.blocks[0] = put(first, read="embed")
    model.norm = put(model.norm, read="stream")
    if model.config.vision:
        tower = model.vision
        for i, block in enumerate(tower.blocks):
            tower.blocks[i] = put(block, read="" if i else "patches", made=f"vision.{i}")
        model.projector = put(model.projector, made="projector")


def _numpy(leaf: Array) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)
