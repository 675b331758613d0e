"""transformers' Mistral in training, and its attention alone. Imported only when it is measured."""

import statistics
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from parity.bench.learners.lechat import FOREVER, AdamW, Lesson
from parity.bench.learners.torch import TorchLearner
from parity.measure import in_turn
from parity.peers.transformers import AttentionName, build, device

ExpertsName = Literal["eager", "grouped_mm"]


PROBES = 3  # timed steps of each attention before one is chosen


class Chosen(NamedTuple):
    """An attention implementation of transformers, and why it."""

    name: AttentionName
    why: str


class Peer(TorchLearner):
    """transformers' Mistral under PyTorch's own fused AdamW, eager or compiled.

    `experts` names how those of a mixture are computed; `None` is transformers' own choice.
    """

    def __init__(
        self,
        lesson: Lesson,
        adamw: AdamW,
        attention: AttentionName,
        compiled: bool,
        experts: ExpertsName | None = None,
    ) -> None:
        self.transformer = build(lesson.config, lesson.weights)
        self.transformer.set_attn_implementation(attention)
        if experts:
            self.transformer.set_experts_implementation(experts)
        super().__init__(lesson, adamw, self.transformer, self.transformer.device, compiled)
        self.note = f"AdamW at {adamw.rate:g}, {attention} attention"

    def logits(self, ids: Int[torch.Tensor, "B T"]) -> Float[torch.Tensor, "B T V"]:
        """See `TorchLearner.logits`."""
        return self.transformer(input_ids=ids).logits


def fastest_attention(lesson: Lesson) -> Chosen:
    """The attention with which an eager forward and backward pass takes the least time."""
    learner = Peer(lesson, AdamW(rate=0.0), "eager", compiled=False)

    def seconds(name: AttentionName) -> float:
        learner.transformer.set_attn_implementation(name)
        began = time.perf_counter()
        learner.advance(1, FOREVER)
        return time.perf_counter() - began

    names: tuple[AttentionName, ...] = ("eager", "sdpa")
    for name in names:
        seconds(name)
    times = in_turn({name: lambda name=name: seconds(name) for name in names}, PROBES)
    best, other = sorted(names, key=lambda name: statistics.median(times[name]))
    ratio = statistics.median(times[other]) / statistics.median(times[best])
    return Chosen(best, f"{best} attention takes a step {ratio:.2f} times as fast as {other} here")


class _Heads(torch.nn.Module):
    """What transformers' attention functions ask of the module that calls them."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def sdpa(
    q: Float[np.ndarray, "B T N H"],
    k: Float[np.ndarray, "B T K H"],
    v: Float[np.ndarray, "B T K H"],
    window: int,
    is_both: bool,
) -> Callable[[], object]:
    """Runs window attention as transformers does it in PyTorch, with a mask of T * T.

    `is_both` adds the gradients of queries, keys and values.
    """
    where = device()
    tensors = [
        torch.from_numpy(x).transpose(1, 2).contiguous().to(where).requires_grad_(is_both)
        for x in (q, k, v)
    ]
    i = torch.arange(q.shape[1], device=where)
    mask = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - window)
    heads = _Heads(q.shape[2] // k.shape[2])
    cotangent = torch.from_numpy(q).to(where)

    def run() -> object:
        out, _ = sdpa_attention_forward(heads, *tensors, attention_mask=mask[None, None])
        if is_both:
            out = torch.autograd.grad(out, tensors, cotangent)
        if where.type == "cuda":
            torch.cuda.synchronize()
        return out

    return run
