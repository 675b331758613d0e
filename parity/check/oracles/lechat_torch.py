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
        return self.model(tokens, first_position, self._features(tokens))

    def stations(self) -> dict[str, nn.Module]:
        """See `Watched.stations`."""
        text = ("blocks.{i}", "attn", "attn_norm", "norm")
        return self._modules(*text, "vision.norm", "vision.blocks.{i}", "projector")

    def _features(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Features of the images, if the tokens have any."""
        return self.model.see(self.pictures) if self.has_images(tokens) else None

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """See `Oracle.cached`."""
        B, T = tokens.shape
        ids = self._tensor(tokens)
        found = []
        cache = empty_cache(self.config, B, chunk, T, torch_dtype(self.dtype), self.device)
        with torch.no_grad():
            x = self.model.embedded(ids, self._features(ids))
            for start, end in pieces(T, prompt, chunk):
                positions = torch.arange(start, end, device=self.device).expand(B, -1)
                part = ids[:, start:end], positions, cache, x[:, start:end]
                logits, cache = self.model.extend(*part)
                found.append(to_numpy(logits))
        return np.concatenate(found, axis=1)

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """See `Oracle.greedy`."""
        with torch.no_grad():
            features = self._features(self._tensor(np.concatenate(prompts)))
        made = generate(self.model, prompts, n, chunk=chunk, context=context, features=features)
        return [Text(list(sample.ids), list(sample.logprobs)) for sample in made]
