"""lechat_torch, lechat's PyTorch reference, on lechat's weights. Imported only for a peer."""

import torch

from lechat_jax.config import MistralConfig
from lechat_torch.model import Mistral
from parity.peers.pytorch import Weights, device, load_state, state_dict


def empty(config: MistralConfig) -> Mistral:
    """A model without weights, on PyTorch's meta device: none are drawn only to be replaced."""
    with torch.device("meta"):
        return Mistral(config)


def build(config: MistralConfig, weights: Weights, share: bool = False) -> Mistral:
    """A model with these weights, in their dtype, on `device()`; see `state_dict`."""
    model = empty(config)
    load_state(model, config, "torch", state_dict(config, "torch", weights, share))
    return model.to(device())
