"""LoRA configuration: target modules, ranks and scales, and the initial weights."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import (
    FEED_FORWARD,
    GROUPED,
    LORA_A,
    LORA_B,
    LORA_SCALE,
    MAPS,
    is_map,
    is_projector,
    module_of,
    part_of,
    stacked,
)
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import Weights


class Part(NamedTuple):
    """LoRA adapter of one linear map: rank, scale and shapes.

    Attributes:
        rank: of its product.
        scale: what the product is multiplied by.
        writes: axes of the map's output.
        reads: axes of its input.
    """

    rank: int
    scale: float
    writes: tuple[int, ...]
    reads: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """LoRA adapters of a model: target modules, rank and alpha, with exceptions by name.

    Attributes:
        rank: of each, unless `ranks` says otherwise.
        alpha: the product is multiplied by alpha / rank, unless `alphas` says otherwise.
        targets: maps by their last word, such as "q", in every layer; or one by its name, such as
            "blocks.0.attn.q".
        ranks: by the map's name.
        alphas: by the map's name.
        rslora: whether it is alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
        projector: whether the projector of a model that sees learns beside them, all of it.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = (*GROUPED, "o", *FEED_FORWARD)
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rslora: bool = False
    projector: bool = False

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.ranks.values()):
            if rank < 1:
                raise BadInput(f"the rank of an adapter must be at least 1, not {rank}")
        for alpha in (self.alpha, *self.alphas.values()):
            if not 0 < alpha < math.inf:
                raise BadInput(f"the alpha of an adapter must be a number above 0, not {alpha}")

    def parts(self, config: MistralConfig) -> dict[str, Part]:
        """Adapter of each target, by the map's name, in the order of the layers.

        Raises:
            BadInput: a target is no map of such a model.
        """
        maps = {module_of(name): row for name, row in config.weights.items() if is_map(name)}
        names = sorted(maps, key=_layer_first)
        if strangers := set(self.targets).difference(names, words := target_words(config)):
            raise BadInput(
                f"{', '.join(sorted(strangers))} cannot have an adapter; the maps that can are "
                f"{', '.join(words)}" + (", since experts have none here" * (config.n_experts > 0))
            )
        parts = {}
        for name in names:
            if name in self.targets or name.split(".")[-1] in self.targets:
                rank = self.ranks.get(name, self.rank)
                alpha = self.alphas.get(name, self.alpha)
                scale = alpha / (math.sqrt(rank) if self.rslora else rank)
                writes, reads = config.shape(maps[name].writes), config.shape(maps[name].reads)
                parts[name] = Part(rank, scale, writes, reads)
        return parts

    def shapes(self, config: MistralConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of all that learns, by name: A and B of each adapter, then the projector."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, part in self.parts(config).items():
            shapes[name + LORA_A] = (part.rank, *part.reads)
            shapes[name + LORA_B] = (*part.writes, part.rank)
        if self.projector:
            rows = config.weights.items()
            shapes |= {name: config.shape(row.letters) for name, row in rows if is_projector(name)}
        return shapes

    def described(self, config: MistralConfig) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of all that learns, and of the adapters' scales, by name."""
        parts = [
            *self.shapes(config).items(),
            *((name + LORA_SCALE, ()) for name in self.parts(config)),
        ]
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in parts}

    def draw(self, config: MistralConfig, seed: int) -> Weights:
        """Initial adapter weights: B zero, A uniform within 1 / sqrt(its inputs).

        That is how PEFT begins. A projector is not drawn, but begins as it is.
        """
        weights: Weights = {}
        key = jax.random.key(seed)
        for i, (name, shape) in enumerate(self.shapes(config).items()):
            if part_of(name) == LORA_A:
                bound = math.prod(shape[1:]) ** -0.5
                drawn = jax.random.fold_in(key, i)
                weights[name] = jax.random.uniform(drawn, shape, minval=-bound, maxval=bound)
            elif part_of(name) == LORA_B:
                weights[name] = jnp.zeros(shape)
        return weights

    def scales(self, config: MistralConfig) -> Weights:
        """The adapters' scales, which are not trained, by name."""
        parts = self.parts(config)
        return {name + LORA_SCALE: jnp.float32(part.scale) for name, part in parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `from_dict` gives the same adapters back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Adapters":
        """The adapters that `to_dict` described."""
        return cls(**{**fields, "targets": tuple(fields["targets"])})


def target_words(config: MistralConfig) -> tuple[str, ...]:
    """The words of all maps of a model that can have an adapter, in the order of their use.

    >>> from lechat_jax.config import preset
    >>> target_words(preset("mixtral-8x7b-v0.1"))
    ('q', 'k', 'v', 'o')
    """
    own = {stacked(name) for name in config.weights}
    return tuple(word for word, name in MAPS.items() if name in own)


def in_short(names: Iterable[str], config: MistralConfig) -> tuple[str, ...]:
    """Target modules in short: `q` for that map of all layers, and full names of others.

    >>> from lechat_jax.config import preset
    >>> names = [f"blocks.{i}.attn.v" for i in range(6)]
    >>> in_short([*names, "blocks.1.mlp.up"], preset("lechat-15m"))
    ('v', 'blocks.1.mlp.up')
    """
    names = set(names)
    by_word = {word: {n for n in names if n.split(".")[-1] == word} for word in MAPS}
    everywhere = [word for word in MAPS if len(by_word[word]) == config.n_layers]
    rest = names.difference(*(by_word[word] for word in everywhere))
    return (*everywhere, *sorted(rest, key=_layer_first))


def _layer_first(name: str) -> tuple[int, int]:
    _, layer, _, word = name.split(".")
    return int(layer), [*MAPS].index(word)
