"""Training in PyTorch: lechat_torch and transformers' Mistral. Imported only for a peer."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import nn

from parity.bench.learners.lechat import FOREVER, AdamW, NotCompiled, Setup
from parity.bench.work import first_line
from parity.measure import interleaved
from parity.peers import lechat_torch as lechat_torch_peer
from parity.peers import transformers as transformers_peer
from parity.peers.pytorch import device
from parity.peers.transformers import AttentionName

ExpertsName = Literal["eager", "grouped_mm"]
Logits = Callable[[Int[torch.Tensor, "B T"]], Float[torch.Tensor, "B T V"]]

PROBES = 3  # timed steps of each attention before one is chosen


class TorchLearner:
    """A PyTorch model in training, under PyTorch's own fused AdamW; see `Learner`.

    In bfloat16 it computes as most do, by autocast: the weights stay float32 and are rounded
    for each product, and norms and softmax are float32.
    """

    def __init__(
        self, setup: Setup, adamw: AdamW, model: nn.Module, logits: Logits, compiled: bool = False
    ) -> None:
        self.setup, self.adamw, self.config = setup, adamw, setup.config
        self.model, self.logits, self.device = model, logits, device()
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in model.parameters() if (p.ndim > 1) == decays],
                    "weight_decay": decay,
                }
                for decays, decay in ((True, adamw.decay), (False, 0.0))
            ],
            lr=adamw.rate,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            fused=True,
        )
        self.compiled = compiled
        # The loss is compiled with the model, so that it can fuse with the head.
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.step = 0
        self.note = f"AdamW at {adamw.rate:g}"

    def advance(self, n: int, total: int) -> list[float]:
        """See `Learner.advance`.

        Raises:
            NotCompiled: `torch.compile` does not work here.
        """
        losses = []
        for batch in torch.from_numpy(self.setup.rows(self.step, n)).to(self.device):
            losses.append(self._backward(batch))
            for group in self.optimizer.param_groups:
                group["lr"] = self.adamw.rate * float(self.adamw.share_of_rate(self.step, total))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return torch.stack(losses).tolist()

    def nats(
        self,
        inputs: Integer[np.ndarray, "B T"],
        targets: Integer[np.ndarray, "B T"],
        counted: Bool[np.ndarray, "B T"],
    ) -> float:
        """See `Learner.nats`; never compiled, since its shape is not the training's."""
        ids, wanted = (
            torch.from_numpy(x.astype(np.int64)).to(self.device) for x in (inputs, targets)
        )
        with torch.no_grad():
            logits = self.logits(ids)
            nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return float(nats[torch.from_numpy(counted.ravel()).to(self.device)].sum())

    def device_bytes(self) -> int | None:
        """See `Learner.device_bytes`."""
        return None if self.device.type == "cpu" else torch.cuda.max_memory_allocated(self.device)

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        half = self.setup.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            logits = self.logits(rows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    def _backward(self, rows: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, its gradients being left in the parameters."""
        try:
            loss = self.loss(rows)
            loss.backward()
        except Exception as error:  # a missing compiler, a bug in it: it fails in many ways
            if not self.compiled or self.step:
                raise
            raise NotCompiled(first_line(error)) from error
        return loss.detach()


def lechat_torch(setup: Setup, adamw: AdamW) -> TorchLearner:
    """Lechat's PyTorch reference in training, eager."""
    model = lechat_torch_peer.build(setup.config, setup.weights)
    return TorchLearner(setup, adamw, model, model)


def transformers(
    setup: Setup,
    adamw: AdamW,
    attention: AttentionName,
    compiled: bool = False,
    experts: ExpertsName | None = None,
) -> TorchLearner:
    """Transformers' Mistral in training, eager or compiled.

    `experts` names how those of a mixture are computed; `None` is transformers' own choice.
    """
    model: Any = transformers_peer.build(setup.config, setup.weights)
    model.set_attn_implementation(attention)
    if experts:
        model.set_experts_implementation(experts)
    learner = TorchLearner(setup, adamw, model, lambda x: model(input_ids=x).logits, compiled)
    learner.note += f", {attention} attention"
    return learner


class Chosen(NamedTuple):
    """An attention implementation of transformers, and why it."""

    name: AttentionName
    why: str


def fastest_attention(setup: Setup) -> Chosen:
    """The attention with which an eager forward and backward pass takes the least time."""
    learner = transformers(setup, AdamW(rate=0.0), "eager")
    model: Any = learner.model

    def seconds(name: AttentionName) -> float:
        model.set_attn_implementation(name)
        began = time.perf_counter()
        learner.advance(1, FOREVER)
        return time.perf_counter() - began

    names: tuple[AttentionName, ...] = ("eager", "sdpa")
    for name in names:
        seconds(name)
    times = interleaved({name: lambda name=name: seconds(name) for name in names}, PROBES)
    best, other = sorted(names, key=lambda name: statistics.median(times[name]))
    ratio = statistics.median(times[other]) / statistics.median(times[best])
    return Chosen(best, f"{best} attention takes a step {ratio:.2f} times as fast as {other} here")
