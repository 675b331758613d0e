"""Contestants in generation: each implementation in each dtype, on the same random weights.

With the options that benchmarks of decoding and of prefill have in common.
"""

import dataclasses
import importlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, cast

import jax.numpy as jnp

from lechat_jax.config import MistralConfig, preset
from lechat_jax.config.layout import SCALE, is_expert
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import Weights
from lechat_jax.quantize.scheme import quantize_weights, scheme_for
from parity.bench.decoders.lechat import (
    IMPLS,
    QUANTIZED,
    Decoder,
    DtypeName,
    Impl,
    Lechat,
    random_weights,
)
from parity.bench.decoders.llama_cpp import LlamaCpp
from parity.bench.work import Work
from parity.peers.installed import need
from parity.report import Report, Row

SEED = 0  # of weights and prompts


class Contestant(NamedTuple):
    """An implementation and the type of its weights; int8 and int4 are computed in float32."""

    impl: Impl
    dtype: DtypeName


def contestants(impls: Sequence[Impl], dtypes: Sequence[DtypeName]) -> list[Contestant]:
    """Each implementation in each dtype, but int8 and int4 for those alone that have them."""
    return [
        Contestant(impl, dtype)
        for dtype in dict.fromkeys(dtypes)
        for impl in dict.fromkeys(impls)
        if dtype not in QUANTIZED or impl in ("lechat_jax", "llama.cpp")
    ]


def contestant_of(row: Row) -> Contestant:
    """The contestant whose figures a row has."""
    return Contestant(cast(Impl, row.impl), cast(DtypeName, row.dtype))


def compare(rows: Sequence[Row], key: str) -> None:
    """Adds to each row the ratio of its speed to transformers', the median over the repetitions.

    To that of the same type, and to the fastest where transformers was not measured in it; and to
    llama.cpp's of the same type. `key` names the speeds in the details, one for each repetition.
    """
    theirs = {row.dtype: row for row in rows if row.impl == "transformers"}
    fastest = max(theirs.values(), key=lambda row: row.tokens_per_s or 0, default=None)
    others = {row.dtype: row for row in rows if row.impl == "llama.cpp"}
    for row in rows:
        peers = {
            "ratio": theirs.get(row.dtype, fastest),
            "ratio_to_llama_cpp": others.get(row.dtype),
        }
        for name, peer in peers.items():
            if peer:
                pairs = zip(row.details[key], peer.details[key], strict=True)
                row.details[name] = statistics.median(a / b for a, b in pairs)


def torch_decoders() -> ModuleType:
    """`parity.bench.decoders.torch`, which imports PyTorch and transformers."""
    return importlib.import_module("parity.bench.decoders.torch")


class Models:
    """The models of a run, by contestant; all of a dtype share one copy of the random weights.

    Attributes:
        config: of all of them.

    Args:
        packages: folder in which npm has installed llama.cpp.
    """

    def __init__(self, config: MistralConfig, packages: Path = Path()) -> None:
        self.config, self._packages = config, packages
        self._weights: dict[str, Weights] = {}
        self._decoders: dict[Contestant, Decoder] = {}

    def weights(self, dtype: DtypeName) -> Weights:
        """The weights in that type, by lechat's names."""
        if dtype not in self._weights:
            match dtype:
                case "int8" | "int4":
                    form = scheme_for(dtype, self.config)
                    assert form
                    made = quantize_weights(dict(self.weights(self.wide)), form)
                case _:
                    made = random_weights(self.config, jnp.dtype(dtype), SEED)
            self._weights[dtype] = made
        return self._weights[dtype]

    @property
    def wide(self) -> DtypeName:
        """What they are made of and computed in: bfloat16 if that is all there is, or float32."""
        return "bfloat16" if [*self._weights] == ["bfloat16"] else "float32"

    def decoder(self, who: Contestant) -> Decoder:
        """The model of that contestant.

        Raises:
            BadInput: it has no model of such a shape.
        """
        if who not in self._decoders:
            self._decoders[who] = self._made(who)
        return self._decoders[who]

    def _made(self, who: Contestant) -> Decoder:
        match who.impl:
            case "lechat_jax":
                return Lechat(self.config, self.weights(who.dtype))
            case "llama.cpp":
                # The numbers that lechat's are made of: writing the GGUF quantises them.
                given = self.wide if who.dtype in QUANTIZED else who.dtype
                weights = self.weights(given)
                return LlamaCpp.around(self.config, weights, who.dtype, self._packages)
            case _:
                make = torch_decoders().DECODERS[who.impl].around
                return make(self.config, self.weights(who.dtype))

    def bytes_a_step(self, dtype: DtypeName, batch: int, context: int) -> int:
        """Bytes of memory that a decode step must read, however it is made: a token of each row.

        All weights but the embedding table, of which a step reads a row each (unless it is the
        head too), and the keys and values that the queries see. Of experts, those that the rows
        choose, or all if these are fewer.
        """
        config, weights = self.config, self.weights(dtype)
        tables = {} if config.tied_embeddings else {"embed.kernel", f"embed.kernel{SCALE}"}
        part = chosen_part(config, batch)
        read = sum(
            round(leaf.nbytes * (part if is_expert(name) else 1))
            for name, leaf in weights.items()
            if name not in tables
        )
        seen = sum(context if window is None else min(window, context) for window in config.windows)
        heads, *widths = config.cached
        each = heads * sum(widths) * weights["norm.scale"].dtype.itemsize
        return read + batch * seen * each


def chosen_part(config: MistralConfig, tokens: int) -> float:
    """The part of a layer's experts that so many tokens choose, if no two choose the same."""
    return min(1.0, tokens * config.n_experts_per_token / max(1, config.n_experts))


def tail(config: MistralConfig, context: int) -> int:
    """Last tokens of a prompt that fill the KV caches as all of it would: a window and a chunk.

    With windows in all layers, a cache that has wrapped is full, whatever it wrapped over: the
    last window and a chunk, at the positions where they belong, leave caches of the same size
    and a next token of the same cost as the whole context. (The numbers in them differ, since
    a layer hears of older tokens through the layers below it.) A layer without a window needs
    all of the context.
    """
    windows = [window for window in config.windows if window is not None]
    if len(windows) < config.n_layers:
        return context
    return min(context, max(windows) + CHUNK)


CHUNK = 256  # the most that anybody here reads at once


@dataclasses.dataclass(frozen=True)
class Generation(Work):
    """Options that the benchmarks of decoding and of prefill have in common."""

    preset: str = "bench-284m"
    """Model to run: a name such as bench-284m or lechat-15m."""
    batch: tuple[int, ...] = (1,)
    """Prompts at once; several sizes are measured one after the other."""
    dtype: tuple[DtypeName, ...] = ("float32",)
    """Types of the weights. int8 and int4 are lechat's, and q8_0 and q4_0 llama.cpp's, alone."""
    impl: tuple[Impl, ...] = IMPLS
    """Implementations to measure; llama.cpp by node-llama-cpp of npm."""
    repetitions: int = 5
    """Times that each is measured; the median counts."""
    packages: Path = Path()
    """Folder in which npm has installed node-llama-cpp, for llama.cpp; by default this one."""
    memory: bool = False
    """Measure also the peak memory of each, in a process of its own that loads the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contestants:
            raise BadInput(
                "int8 and int4 are lechat's and llama.cpp's alone: name one of them in --impl, or "
                "another --dtype"
            )

    @property
    def contestants(self) -> list[Contestant]:
        """Who takes part; see `contestants`."""
        return contestants(self.impl, self.dtype)

    def start(self) -> tuple[Models, Report]:
        """The models, of which none is made yet, and a report without rows.

        Raises:
            BadInput: there is no such preset, or a package is missing.
        """
        models = Models(preset(self.preset).text, self.packages)
        packages = {"lechat_torch": ["torch"], "transformers": ["torch", "transformers"]}
        needed = [name for impl in self.impl for name in packages.get(impl, [])]
        need(*needed, instead="--impl lechat_jax")
        return models, self.report()
