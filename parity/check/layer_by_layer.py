"""Layer-by-layer check of a checkpoint of any size, with one layer in memory.

Each layer is run as a model of its own, one layer deep: what enters it is that model's
embedding table, and the ids are 0, 1, 2, ... So every implementation runs its whole forward
pass, none of them knows, and memory holds one layer. All read what lechat_torch made of the
layer before, in float32, so a layer that differs is named, and no other is.

On some layers the float64 truth is computed too, by which each implementation may be little
more wrong than the others. The least of these errors is the yardstick of the other layers; where
one is beyond it, the truth of that layer is computed as well.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from lechat_jax.config.layout import in_layer, layer_of, stacked
from lechat_jax.config.mistral import MIXTURE
from lechat_jax.formats import names
from lechat_jax.formats.source import Source
from parity.check.oracles.interface import OF_VISION, Oracle, Pictures, Stages
from parity.check.oracles.lechat_jax import JaxOracle
from parity.check.oracles.lechat_torch import TorchOracle
from parity.check.oracles.transformers import TransformersOracle
from parity.check.probes import Model, Result, shortened
from parity.check.tolerances import SLACK_OF_LONG_SUMS, relative
from parity.check.verdict import Stage
from parity.check.whole_model import lacking

Say = Callable[[str, int, int], None]
# PyTorch computes with the layer's arrays themselves: nobody trains here.
_SharedTorch = functools.partial(TorchOracle, share=True)
_SharedTransformers = functools.partial(TransformersOracle, share=True)

BOTH = 2  # two results that are each off by one rounding are apart by less than two


class Part(NamedTuple):
    """A layer, or the head, as a small model on both sides, and the stages to compare.

    Attributes:
        ours: what lechat_jax is given.
        theirs: what the PyTorch implementations are given.
        labels: the stages to compare, as the small model calls them and as the large one does.
        pictures: images in the text, if the part is of a vision tower.
        patches: what stands in place of its patches.
    """

    ours: Model
    theirs: Model
    labels: dict[str, str]
    pictures: Pictures = ()
    patches: Float[np.ndarray, "rows d"] | None = None


# One layer that is as small as it can be, for a part in which none matters.
LEAST: dict[str, Any] = {
    **dict.fromkeys(MIXTURE, 0),
    **dict.fromkeys(("n_layers", "n_heads", "n_kv_heads", "hidden_dim"), 1),
    "head_dim": 2,
    "sliding_window": None,
    "tied_embeddings": False,
    "yarn": None,
    "llama_4_scaling": None,
    "latent_attention": None,
}


class Failed(NamedTuple):
    """A failed stage: its part, its label there, and the text's first position."""

    part: Part
    inner: str
    stage: Stage
    first_position: int


class Streamed:
    """Comparison of two checkpoints, or of one with itself, layer by layer.

    Attributes:
        tokens: the ids of the text.
        first_positions: the same text is read as if it began at each of these positions.
        sampled: layers whose float64 truth is computed; the first is always one of them.
        without: why transformers has no such model; nothing, if it has.
        failed: where the first stage was not ok; `None` as long as all is well.
    """

    def __init__(
        self,
        ours: Source,
        theirs: Source,
        tokens: Int[np.ndarray, "T"],
        first_positions: Sequence[int],
        window: int,
    ) -> None:
        self.ours, self.theirs = ours, theirs
        self.tokens, self.first_positions, self.window = tokens, tuple(first_positions), window
        n = theirs.config.n_layers
        self.sampled = {0, n // 2, n - 1}
        self.without = lacking(shortened(theirs.config, window))  # why not transformers, if so
        self.failed: Failed | None = None
        self._reused: dict[tuple, Oracle] = {}
        self._errors: dict[tuple[str, int], float] = {}  # PyTorch's own, by stage and position

    @property
    def ids(self) -> Int[np.ndarray, "texts T"]:
        """Token ids by which a small model looks up each text in its embedding."""
        return np.arange(len(self.first_positions) * self.tokens.size).reshape(
            len(self.first_positions), -1
        )

    def run(self, say: Say) -> Iterator[Stage]:
        """Yields every comparison as it is made; `say` is called with the number of layers done."""
        n = self.theirs.config.n_layers
        ours, theirs = (
            float32(source.read("embed.kernel")[self.tokens]) for source in (self.ours, self.theirs)
        )
        yield Stage("embed", None, "float32", ("jax", "torch"), relative(ours, theirs), 0.0)
        stream = np.tile(theirs, (len(self.first_positions), 1))
        for i in range(n):
            say("layer", i, n)
            part = self.part_of_layer(i, stream)
            found = self._answers(part, is_sampled=i in self.sampled)
            yield from self._judge(part, found)
            stream = np.concatenate([x["torch"]["stream"][0] for x in found]).astype(np.float32)
            for source in (self.ours, self.theirs):
                source.release()
        part = self.part_of_head(stream)
        yield from self._judge(part, self._answers(part, is_sampled=True))
        say("layer", n, n)

    def part_of_layer(self, i: int, stream: Float[np.ndarray, "rows D"]) -> Part:
        """Model of layer i alone: its embedding is the residual stream, its head is trivial."""

        def alone(source: Source) -> Model:
            short = shortened(source.config, self.window, self.theirs.config)
            one = dataclasses.replace(
                short,
                n_layers=1,
                n_dense_layers=int(i < short.n_dense_layers),
                vocab_size=len(stream),
                sliding_window=short.windows[i],
                tied_embeddings=False,
            )
            weights = {
                name: float32(source.read(in_layer(stacked(name), i)))
                for name in one.weights
                if layer_of(name) == 0
            }
            ends = {"embed.kernel": stream, "head.kernel": np.zeros_like(stream)}
            return Model(one, weights | ends | {"norm.scale": np.ones(one.dim, np.float32)})

        return self._part(alone, {"attn.0": f"attn.{i}", "mlp.0": f"mlp.{i}"})

    def part_of_head(self, stream: Float[np.ndarray, "rows D"]) -> Part:
        """Model of the final norm and the head, behind a layer that adds nothing."""

        def alone(source: Source) -> Model:
            V = max(source.config.vocab_size, len(stream))
            small = dataclasses.replace(source.config, vocab_size=V, **LEAST)
            shapes = names.shapes(small, "lechat")
            weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
            head = float32(source.read(source.config.head))
            weights["head.kernel"][: source.config.vocab_size] = head
            weights["embed.kernel"][: len(stream)] = stream
            weights["norm.scale"] = float32(source.read("norm.scale"))
            return Model(small, weights)

        return self._part(alone, {"norm": "norm", "logits": "logits"})

    def _part(self, alone: Callable[[Source], Model], labels: dict[str, str]) -> Part:
        theirs = alone(self.theirs)
        return Part(theirs if self.ours is self.theirs else alone(self.ours), theirs, labels)

    def _answers(self, part: Part, is_sampled: bool) -> list[dict[str, Stages]]:
        """Stages of each text by each implementation, one of which is in memory at a time."""
        oracles: dict[str, Callable[[], Oracle]] = {
            name: lambda kind=kind, model=model: self._loaded(kind, model)
            for name, kind, model in (
                ("torch", _SharedTorch, part.theirs),
                ("jax", JaxOracle, part.ours),
                ("transformers", _SharedTransformers, part.theirs),
            )
        }
        if self.without:
            del oracles["transformers"]
        if is_sampled:
            oracles["truth"] = lambda: TorchOracle(*part.theirs, "float64")
        found: list[dict[str, Stages]] = [{} for _ in self.first_positions]
        for name, make in oracles.items():
            oracle = make()
            if part.pictures:
                oracle.show(part.pictures, part.patches)
            for texts, ids, first in zip(found, self.ids, self.first_positions, strict=True):
                texts[name] = oracle.forward(ids[None], first)
            oracle.drop()
        return found

    def _truth_of(self, part: Part, ids: Int[np.ndarray, "T"], first: int) -> Stages:
        oracle = TorchOracle(*part.theirs, "float64")
        if part.pictures:
            oracle.show(part.pictures, part.patches)
        return oracle.forward(ids[None], first)

    def _loaded(self, kind: Callable[..., Oracle], model: Model) -> Oracle:
        """Oracle of that kind with these weights; one of the same shape is reused."""
        key = (kind, model.config)
        if key not in self._reused:
            others = [other for other in self._reused if other[0] is kind]
            for other in others:
                del self._reused[other]
            self._reused[key] = kind(*model, "float32")
        else:
            self._reused[key].load(model.weights)
        return self._reused[key]

    def _judge(self, part: Part, found: list[dict[str, Stages]]) -> Iterator[Stage]:
        for texts, ids, first in zip(found, self.ids, self.first_positions, strict=True):
            for inner, label in part.labels.items():
                stages = self._compared(texts, inner, label, first)
                if "truth" not in texts and not all(stage.ok for stage in stages):
                    # This layer may round more than those that were sampled: it is now one of them.
                    texts["truth"] = self._truth_of(part, ids, first)
                    stages = self._compared(texts, inner, label, first)
                for stage in stages:
                    if not (stage.ok or self.failed):
                        self.failed = Failed(part, inner, stage, first)
                    yield stage

    def _compared(
        self, texts: dict[str, Stages], inner: str, label: str, first: int
    ) -> list[Stage]:
        """Compares one stage of one text: each implementation with the truth, if it is known.

        None may be much more wrong than the worst of the others, at positions however large,
        where the angles of all are rounded alike.
        """
        kind = (label.partition(".")[0], first)
        is_known = "truth" in texts
        names = [name for name in ("torch", "jax", "transformers") if name in texts]
        names = names if is_known else names[1:]
        right = texts["truth" if is_known else "torch"][inner]
        errors = {name: relative(texts[name][inner], right) for name in names}
        if is_known:  # the least, which is the hardest on layers whose truth is not known
            self._errors[kind] = min(self._errors.get(kind, math.inf), *errors.values())
        is_seen = kind[0] in OF_VISION
        note = "" if is_seen else f"positions {first} to {first + self.tokens.size - 1}"

        def stage(name: str) -> Stage:
            made = texts[name][inner]
            others = [error for other, error in errors.items() if other != name]
            yardstick = max(others) if is_known else BOTH * self._errors[kind]
            result = Result(label, errors[name], made, right, note)
            return result.stage(name, "float32", "torch", SLACK_OF_LONG_SUMS * yardstick)

        return [stage(name) for name in names]


def float32(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Copy as float32; PyTorch widens bfloat16 on all cores."""
    if x.dtype.name != "bfloat16":
        return x.astype(np.float32)
    bits = torch.from_numpy(np.array(x.view(np.int16)))
    return bits.view(torch.bfloat16).float().numpy()
