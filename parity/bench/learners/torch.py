"""A model of PyTorch's in training: one interface for whoever's code it is."""

from abc import abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import nn

from parity.bench.learners.lechat import AdamW, Lesson, NotCompiled


class TorchLearner:
    """A model under PyTorch's own fused AdamW, eager or compiled; see `Learner`.

    In bfloat16 it computes as most do, by autocast: the weights stay float32 and are rounded
    for each product, and norms and softmax are float32.
    """

    def __init__(
        self,
        lesson: Lesson,
        adamw: AdamW,
        model: nn.Module,
        device: torch.device,
        compiled: bool,
    ) -> None:
        self.lesson, self.adamw = lesson, adamw
        self.model, self.device = model, device
        kinds = {True: adamw.decay, False: 0.0}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in model.parameters() if (p.ndim > 1) == decays],
                    "weight_decay": decay,
                }
                for decays, decay in kinds.items()
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

    @abstractmethod
    def logits(self, ids: Int[torch.Tensor, "B T"]) -> Float[torch.Tensor, "B T V"]:
        """Of the token that follows each position of whole sequences."""

    def advance(self, n: int, total: int) -> list[float]:
        """See `Learner.advance`.

        Raises:
            NotCompiled: `torch.compile` does not work here.
        """
        losses = []
        for batch in torch.from_numpy(self.lesson.rows(self.step, n)).to(self.device):
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
        half = self.lesson.dtype == "bfloat16"
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
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise NotCompiled(reason[0]) from error
        return loss.detach()
