"""Layer-by-layer check of a vision tower of any size, with one layer in memory.

As `layer_by_layer`, of which it is the beginning: two images of noise go through patches, layers
and projector, each a small model of its own, which is given what lechat_torch made of the layer
before in place of its patches.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import in_layer, is_tower, is_vision, stacked, vision_layer_of
from lechat_jax.formats import names
from lechat_jax.formats.source import Source
from parity.check.layer_by_layer import LEAST, Part, Say, Streamed, float32
from parity.check.probes import Model, image_ids, noise
from parity.check.verdict import Stage


class StreamedTower(Streamed):
    """Comparison of the towers of two checkpoints, or of one with itself, layer by layer."""

    def __init__(self, ours: Source, theirs: Source, seed: int) -> None:
        vision = theirs.config.vision
        assert vision is not None
        self.pictures = noise(vision, seed)
        self._ids = image_ids(self.pictures, vision)
        super().__init__(ours, theirs, self._ids, (0,), window=1)
        self.n_layers = vision.n_layers
        self.sampled = {0, self.n_layers // 2, self.n_layers - 1}

    @property
    def ids(self) -> Int[np.ndarray, "texts T"]:
        """The tokens of the two images."""
        return self._ids[None]

    def run(self, say: Say) -> Iterator[Stage]:
        """Yields every comparison as it is made; `say` is called with the number of layers done."""
        part = self._part(lambda source: self.small(source, None), {"patches": "patches"})
        found = self._answers(self.shown(part), is_sampled=True)
        yield from self._judge(part, found)
        stream = found[0]["torch"]["patches"][0].astype(np.float32)
        for i in range(self.n_layers):
            say("vision layer", i, self.n_layers)
            part = self._part(
                lambda source, i=i: self.small(source, i), {"vision.0": f"vision.{i}"}
            )
            found = self._answers(self.shown(part, stream), is_sampled=i in self.sampled)
            yield from self._judge(self.shown(part, stream), found)
            stream = found[0]["torch"]["vision.0"][0].astype(np.float32)
            for source in (self.ours, self.theirs):
                source.release()
        part = self._part(self.projector, {"projector": "projector"})
        found = self._answers(self.shown(part, stream), is_sampled=True)
        yield from self._judge(self.shown(part, stream), found)
        say("vision layer", self.n_layers, self.n_layers)

    def shown(self, part: Part, stream: Float[np.ndarray, "rows d"] | None = None) -> Part:
        """The part with the images, and what its first layer reads of them."""
        return part._replace(pictures=self.pictures, patches=stream)

    def small(self, source: Source, layer: int | None) -> Model:
        """Model of the patches, behind which a layer adds nothing, or of one layer."""
        config = self._config(source.config, dim=2)
        weights = self._zeros(config)
        for name in weights:
            if not is_vision(name):
                continue
            is_layers = vision_layer_of(name) == 0
            if is_layers and layer is not None:
                weights[name] = float32(source.read(in_layer(stacked(name), layer)))
            elif name in ("vision.patch.kernel", "vision.norm.scale") and layer is None:
                weights[name] = float32(source.read(name))
        return Model(config, weights)

    def projector(self, source: Source) -> Model:
        """Model of the projector, behind a layer that adds nothing."""
        config = self._config(source.config, dim=source.config.dim)
        weights = self._zeros(config)
        of_projector = (name for name in weights if is_vision(name) and not is_tower(name))
        read = {name: float32(source.read(name)) for name in of_projector}
        return Model(config, weights | read)

    def _config(self, config: MistralConfig, dim: int) -> MistralConfig:
        """The least model with this tower, one layer deep."""
        assert config.vision is not None
        one = dataclasses.replace(config.vision, n_layers=1)
        V = 1 + max(one.token_ids)
        return dataclasses.replace(config, **LEAST, dim=dim, vocab_size=V, vision=one)

    def _zeros(self, config: MistralConfig) -> dict[str, np.ndarray]:
        shapes = names.shapes(config, "lechat")
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
