"""lechat_torch as an oracle."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from lechat_jax.config import MistralConfig
from lechat_jax.formats import names
from lechat_torch.cache import empty_cache
from lechat_torch.generate import generate
from lechat_torch.model import Mistral
from parity.check.oracles.interface import Arrays, Dtype, Implementation, Text, pieces
from parity.check.oracles.pytorch import Watched, to_numpy, torch_dtype
from parity.peers import lechat_torch


class TorchOracle(Watched[Mistral]):
    """lechat_torch; see `Oracle`."""

    name: Implementation = "torch"
    layout: names.Format = "torch"

    def __init__(
        self, config: MistralConfig, weights: Arrays, dtype: Dtype, share: bool = False
    ) -> None:
        super().__init__(config, dtype, share)
        self.model = lechat_torch.empty(config)
        self.load(weights)

    def logits(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """See `Watched.logits`."""
        return self.model(tokens, first_position)

    def stations(self) -> dict[str, nn.Module]:
        """See `Watched.stations`."""
        return self._modules("blocks.{i}", "attn", "attn_norm", "norm")

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """See `Oracle.cached`."""
        B, T = tokens.shape
        ids = self._tensor(tokens)
        found = []
        cache = empty_cache(self.config, B, chunk, T, torch_dtype(self.dtype), self.device)
        with torch.no_grad():
            for start, end in pieces(T, prompt, chunk):
                positions = torch.arange(start, end, device=self.device).expand(B, -1)
                logits, cache = self.model.extend(ids[:, start:end], positions, cache)
                found.append(to_numpy(logits))
        return np.concatenate(found, axis=1)

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """See `Oracle.greedy`."""
        made = generate(self.model, prompts, n, chunk=chunk, context=context)
        return [Text(list(sample.ids), list(sample.logprobs)) for sample in made]
