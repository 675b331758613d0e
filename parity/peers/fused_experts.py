"""The experts as transformers 5 has them while it computes: one tensor for all of a layer.

In its files each expert has its own three, which transformers joins when it reads them and
parts again when it writes. Gates and ups are one tensor, the gate's rows first.
"""

import torch

from lechat_jax.config import MistralConfig

Tensors = dict[str, torch.Tensor]


def fuse(config: MistralConfig, state: Tensors) -> Tensors:
    """A state dict for transformers' model, of one with the names of its files."""
    state = dict(state)
    for i in range(config.n_layers if config.n_experts else 0):
        files, model = _prefixes(i)
        state[f"{model}.gate.weight"] = state.pop(f"{files}.gate.weight")
        of = [f"{files}.experts.{e}" for e in range(config.n_experts)]
        gate, down, up = ([state.pop(f"{one}.w{n}.weight") for one in of] for n in (1, 2, 3))
        both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        state[f"{model}.experts.gate_up_proj"] = torch.stack(both)
        state[f"{model}.experts.down_proj"] = torch.stack(down)
    return state


def split(config: MistralConfig, state: Tensors) -> Tensors:
    """The inverse of `fuse`; the tensors are views."""
    state = dict(state)
    for i in range(config.n_layers if config.n_experts else 0):
        files, model = _prefixes(i)
        state[f"{files}.gate.weight"] = state.pop(f"{model}.gate.weight")
        both = state.pop(f"{model}.experts.gate_up_proj")
        down = state.pop(f"{model}.experts.down_proj")
        for e in range(config.n_experts):
            gate, up = both[e].chunk(2)
            for n, tensor in ((1, gate), (2, down[e]), (3, up)):
                state[f"{files}.experts.{e}.w{n}.weight"] = tensor
    return state


def _prefixes(i: int) -> tuple[str, str]:
    return f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
