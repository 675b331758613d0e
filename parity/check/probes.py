"""Probes of a check: its inputs, what an implementation computes of them, and the error of each."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from lechat_jax.config import MistralConfig, VisionConfig, Window
from lechat_jax.config.layout import layer_of
from lechat_jax.tokenizer.images import image_of
from parity.check.oracles.interface import (
    AdamW,
    Arrays,
    Gradients,
    Oracle,
    Pictures,
    Stages,
    Text,
    Trajectory,
)
from parity.check.tolerances import GREEDY, first_position, relative
from parity.check.verdict import Stage

STEPS = 4  # of the optimiser, in a trajectory: a wrong rule shows in the first few


class Model(NamedTuple):
    """A model: its config, and its weights by lechat's names and shapes."""

    config: MistralConfig
    weights: Arrays


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of a check: random ids, long enough that every rule of theirs acts.

    Attributes:
        tokens: whole sequences, longer than two windows and a chunk.
        steps: batches of rows for the optimiser.
        prompt: tokens of a sequence that are read in chunks; the rest comes one by one.
        chunk: tokens read at once; it does not divide `prompt`.
        prompts: of several lengths, to be continued in one batch.
        new: tokens to generate after each prompt.
        pictures: images that are in each text, if the model sees: of noise, and not square.
    """

    tokens: Int[np.ndarray, "B T"]
    steps: Int[np.ndarray, "steps B row"]
    prompt: int
    chunk: int
    prompts: tuple[tuple[int, ...], ...]
    new: int
    pictures: Pictures = ()

    @classmethod
    def of(cls, config: MistralConfig, seed: int = 0) -> "Inputs":
        """The inputs for a model of that shape, whose windows must be short: see `shortened`."""
        growth = config.llama_4_scaling
        lengths = [*config.windows, growth and growth.original_max_position_embeddings]
        W = max((length for length in lengths if length), default=8)
        chunk = max(2, W - 2)
        T = 2 * W + 3 * chunk + 4
        prompt = 2 * W + chunk + 1
        prompt += prompt % chunk == 0
        draw = np.random.default_rng(seed).integers
        V = config.vocab_size
        text = cls(
            tokens=draw(V, size=(2, T)),
            steps=draw(V, size=(STEPS, 2, 2 * W + 2)),
            prompt=prompt,
            chunk=chunk,
            prompts=tuple(tuple(draw(V, size=n).tolist()) for n in (W + 2, 1, 2 * W + 3)),
            new=3 * W,
        )
        return text.with_images(config.vision, seed) if config.vision else text

    def with_images(self, vision: VisionConfig, seed: int) -> "Inputs":
        """The same texts behind two images, see `noise`."""
        pictures = noise(vision, seed)
        ids = image_ids(pictures, vision)

        def behind(rows: np.ndarray) -> np.ndarray:
            text = np.where(rows == vision.image_token_id, 0, rows)
            images = np.broadcast_to(ids, (*rows.shape[:-1], len(ids)))
            return np.concatenate([images, text], axis=-1)

        return dataclasses.replace(
            self,
            tokens=behind(self.tokens),
            steps=behind(self.steps),
            prompt=self.prompt + self.chunk * -(-len(ids) // self.chunk),
            prompts=tuple(tuple(behind(np.array(p)).tolist()) for p in self.prompts),
            pictures=pictures,
        )

    @property
    def full_chunks(self) -> list[list[int]]:
        """Prompts of whole chunks and one more token, so that nothing is padded."""
        parts = self.steps.reshape(-1, self.steps.shape[-1])[: len(self.prompts)]
        n_chunks = (parts.shape[1] - 1) // self.chunk if self.pictures else 1
        return parts[:, : n_chunks * self.chunk + 1].tolist()

    @property
    def context(self) -> int:
        """Length of the longest text in tokens, prompt included."""
        return max(map(len, (*self.prompts, *self.full_chunks))) + self.new


def noise(vision: VisionConfig, seed: int) -> tuple[Float[np.ndarray, "3 _height _width"], ...]:
    """Two images, one wider than high and one higher than wide.

    So nothing that confuses rows with columns goes unseen, and they are of noise, so that no two
    patches are alike.
    """
    draw = np.random.default_rng(seed)
    side = vision.patch_size * vision.spatial_merge_size
    sizes = ((2 * side, 3 * side), (3 * side, side))
    return tuple(draw.standard_normal((3, *size)).astype(np.float32) for size in sizes)


def image_ids(pictures: Pictures, vision: VisionConfig) -> Int[np.ndarray, "T"]:
    """The ids of images in a text, a token before each."""
    return np.array([id_ for one in pictures for id_ in (0, *image_of(one, vision).ids)])


def shortened(
    config: MistralConfig, window: int, beside: MistralConfig | None = None
) -> MistralConfig:
    """The model with shorter windows, so that a short text reaches past them.

    Nor are the steps longer in which queries grow. A length that is not the one of the model
    `beside` it is not made the same: it stays one longer or shorter.
    """
    beside = beside or config

    def short(own: Window, other: Window) -> Window:
        if own is None or other is None or own == other or min(own, other) < window:
            return own and min(own, window)
        return window + (1 if own > other else -1)

    pairs = zip(config.windows, beside.windows, strict=True)
    windows = tuple(short(own, other) for own, other in pairs)
    is_one = not isinstance(config.sliding_window, tuple)
    steps, others = (
        growth and growth.original_max_position_embeddings
        for growth in (config.llama_4_scaling, beside.llama_4_scaling)
    )
    growth = config.llama_4_scaling
    if growth and (step := short(steps, others or steps)):
        growth = dataclasses.replace(growth, original_max_position_embeddings=step)
    return dataclasses.replace(
        config, sliding_window=windows[0] if is_one else windows, llama_4_scaling=growth
    )


class Answers:
    """Answers of one oracle to the inputs of a check, each computed when first asked for."""

    def __init__(self, oracle: Oracle, inputs: Inputs) -> None:
        self.oracle, self.inputs = oracle, inputs
        if inputs.pictures:
            oracle.show(inputs.pictures)

    @functools.cached_property
    def stages(self) -> Stages:
        """Activations and logits of one pass over whole sequences."""
        return self.oracle.forward(self.inputs.tokens)

    @functools.cached_property
    def gradients(self) -> Gradients:
        """Loss and gradients on the first batch of the trajectory."""
        return self.oracle.gradients(self.inputs.steps[0])

    @functools.cached_property
    def trajectory(self) -> Trajectory:
        """Losses and weights of some steps of AdamW.

        Its epsilon is the root mean square of the gradients. The usual 1e-8 would make steps of
        full size of gradients that are rounding alone, in which no two right programs agree.
        """
        gradients = self.gradients.by_weight.values()
        squares = sum(float(np.square(leaf).sum()) for leaf in gradients)
        eps = math.sqrt(squares / sum(leaf.size for leaf in gradients))
        return self.oracle.train(self.inputs.steps, AdamW(eps=eps))

    @functools.cached_property
    def cached(self) -> Float[np.ndarray, "B T V"]:
        """Logits of the same sequences, read through the KV cache."""
        return self.oracle.cached(self.inputs.tokens, self.inputs.prompt, self.inputs.chunk)

    @functools.cached_property
    def unpadded(self) -> list[Text]:
        """Greedy continuations of prompts of one length."""
        return self._greedy(self.inputs.full_chunks)

    @functools.cached_property
    def padded(self) -> list[Text]:
        """Greedy continuations of prompts of several lengths, in one batch."""
        return self._greedy(self.inputs.prompts)

    def _greedy(self, prompts: Sequence[Sequence[int]]) -> list[Text]:
        inputs = self.inputs
        return self.oracle.greedy(prompts, inputs.new, inputs.chunk, inputs.context)

    def logits_of(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Text]
    ) -> Float[np.ndarray, "tokens V"]:
        """Logits at each new token, by one pass over each whole text."""
        whole = [[*prompt, *text.ids] for prompt, text in zip(prompts, texts, strict=True)]
        T = max(map(len, whole))
        logits = self.oracle.forward(np.array([ids + [0] * (T - len(ids)) for ids in whole]))
        kept = [
            logits["logits"][b, len(prompt) - 1 : len(prompt) - 1 + len(text.ids)]
            for b, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]
        return np.concatenate(kept)


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one probe, before it is compared with its budget.

    Attributes:
        label: stage and layer, such as `attn.2` or `loss`.
        rel: relative error.
        actual: what the implementation computed, if it has positions.
        truth: what it was compared with.
        note: for the reader.
        rounding: what rounding its own numbers once does to `rel`, in units of that rounding,
            where nothing averages: a loss, the log-probabilities of single tokens; weights are
            rounded at each step of an optimiser.
    """

    label: str
    rel: float
    actual: Float[np.ndarray, "B T ..."] | None = None
    truth: Float[np.ndarray, "B T ..."] | None = None
    note: str = ""
    rounding: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """Key by which implementations are compared."""
        return self.label, self.note

    @property
    def yardstick(self) -> tuple[str, str]:
        """Key of the errors that its budget is taken from, usually its own.

        A single number may be right by luck: a loss may be off by what logits are, and a token
        that the model wrote by what those are that it was given.
        """
        if self.note == GREEDY:
            return "decode", ""
        return ("logits", "") if self.label == "loss" else self.key

    def stage(self, name: str, dtype: str, truth: str, budget: float) -> Stage:
        """Stage with its budget: `name` in `dtype` against `truth`."""
        stage, _, layer = self.label.partition(".")
        position = None
        if self.actual is not None and self.truth is not None and not self.rel <= budget:
            position = first_position(self.actual, self.truth, budget)
        return Stage(
            stage,
            int(layer) if layer else None,
            dtype,
            (name, truth),
            self.rel,
            budget,
            position,
            self.note,
        )


Probe = Callable[[Answers, Answers], Iterator[Result]]


def forward(found: Answers, truth: Answers) -> Iterator[Result]:
    """Compares the stages of one pass, from the embedding to the logits."""
    n_of = collections.Counter(label.partition(".")[0] for label in truth.stages)
    tower = [f"vision.{i}" for i in range(n_of["vision"])]
    tower = ["patches", *tower, "projector"] if tower else []
    blocks = [f"{stage}.{i}" for i in range(n_of["attn"]) for stage in ("attn", "mlp")]
    for label in (*tower, "embed", *blocks, "norm", "logits"):
        a, b = found.stages[label], truth.stages[label]
        yield Result(label, relative(a, b), a, b)


def loss(found: Answers, truth: Answers) -> Iterator[Result]:
    """Compares the loss of a batch."""
    a, b = (np.array([x.gradients.loss]) for x in (found, truth))
    yield Result("loss", relative(a, b), rounding=1.0)


def gradients(found: Answers, truth: Answers) -> Iterator[Result]:
    """Compares the gradient of every weight, those outside the blocks last."""
    wanted = truth.gradients.by_weight
    by_layer = sorted(wanted, key=lambda name: (layer_of(name) is None, layer_of(name) or 0))
    for name in by_layer:
        label = "grad" if (i := layer_of(name)) is None else f"grad.{i}"
        yield Result(label, relative(found.gradients.by_weight[name], wanted[name]), note=name)


def trajectory(found: Answers, truth: Answers) -> Iterator[Result]:
    """Compares the losses of the trajectory and its final weights."""
    a, b = found.trajectory, truth.trajectory
    yield Result("trajectory", relative(a.losses, b.losses), note="losses", rounding=1.0)
    after = [np.concatenate([x.weights[name].ravel() for name in b.weights]) for x in (a, b)]
    yield Result("trajectory", relative(*after), note="weights", rounding=len(b.losses))


def prefill(found: Answers, truth: Answers) -> Iterator[Result]:
    """Compares chunked prefill through the cache with one pass."""
    a, b = (x[:, : found.inputs.prompt] for x in (found.cached, truth.stages["logits"]))
    yield Result("prefill", relative(a, b), a, b)


def decode(found: Answers, truth: Answers) -> Iterator[Result]:
    """Compares decoding past the window with one pass: given tokens, then greedy ones."""
    a, b = (x[:, found.inputs.prompt :] for x in (found.cached, truth.stages["logits"]))
    yield Result("decode", relative(a, b), a, b)
    yield _text("decode", found.inputs.full_chunks, found.unpadded, truth)


def padding(found: Answers, truth: Answers) -> Iterator[Result]:
    """Compares a padded batch of prompts with one pass over each alone."""
    yield _text("padding", found.inputs.prompts, found.padded, truth)


# In the order of execution.
PROBES: tuple[Probe, ...] = (forward, loss, gradients, trajectory, prefill, decode, padding)


def _text(
    label: str, prompts: Sequence[Sequence[int]], texts: Sequence[Text], truth: Answers
) -> Result:
    """Compares a greedy text with one pass: its choices, and their log-probabilities.

    Both are measured by the size of the logits, as these are. A token that is not the likeliest
    counts by what it lacks: two that are closer than rounding may change places.
    """
    logits = truth.logits_of(prompts, texts)
    ids = np.concatenate([text.ids for text in texts])
    given = np.concatenate([text.logprobs for text in texts])
    total = np.asarray(logsumexp(logits, axis=-1))
    chosen = logits[np.arange(len(ids)), ids]
    lacking = np.max(logits.max(axis=-1) - chosen)
    error = _rms(given - (chosen - total))
    size = _rms(logits)
    # A log-probability is the difference of two numbers that are rounded, the second a sum over
    # the vocabulary, in vectors of 16, which is rounded at each addition.
    largest = np.maximum(np.abs(chosen), np.abs(total)) + (logits.shape[1] / 16) ** 0.5
    return Result(
        label,
        float(np.maximum(lacking, error)) / size,
        note=GREEDY,
        rounding=_rms(largest) / size,
    )


def _rms(x: Float[np.ndarray, "..."]) -> float:
    return float(np.sqrt(np.mean(x**2)))
