"""The reference in training: lechat_torch, eager. Imported only when it is measured."""

import torch
from jaxtyping import Float, Int

from lechat_torch.model import Mistral
from parity.bench.learners.lechat import AdamW, Lesson
from parity.bench.learners.torch import TorchLearner
from parity.convert.layouts import to_format
from parity.convert.names import rows
from parity.peers.transformers import device


class LechatTorch(TorchLearner):
    """lechat_torch under the same optimiser as transformers."""

    def __init__(self, lesson: Lesson, adamw: AdamW) -> None:
        where = device()
        with where:
            self.mistral = Mistral(lesson.config)
        weights = {
            row.torch: torch.from_numpy(
                to_format(lesson.weights[name], lesson.config, "torch", row)
            )
            for name, row in rows(lesson.config).items()
        }
        if lesson.config.tied_embeddings:
            weights["head.weight"] = weights["embed.weight"]
        self.mistral.load_state_dict(weights)
        super().__init__(lesson, adamw, self.mistral, where, compiled=False)

    def logits(self, ids: Int[torch.Tensor, "B T"]) -> Float[torch.Tensor, "B T V"]:
        """See `TorchLearner.logits`."""
        return self.mistral(ids)
