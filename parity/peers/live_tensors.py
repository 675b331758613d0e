"""State dict as transformers 5 has it while it computes, which is not that of its files.

In its files each of Mixtral's experts has its own three tensors, which transformers joins when it
reads them and parts again when it writes; Mistral 4's are joined there, too. Gates and ups are one
tensor, the gate's rows first. Of a model that sees, the names begin otherwise.
"""

import torch

from lechat_jax.config import MistralConfig
from lechat_jax.formats.fused_experts import expert_keys, fused

Tensors = dict[str, torch.Tensor]

# How names begin, in files and in the model.
SEEING = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def live_name(config: MistralConfig, name: str) -> str:
    """The name in the model of a tensor of its files."""
    for old, new in SEEING.items() if config.vision else ():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def fuse(config: MistralConfig, state: Tensors) -> Tensors:
    """A state dict for transformers' model, of one with the names of its files."""
    state = {live_name(config, name): tensor for name, tensor in state.items()}
    if config.latent_attention:
        return {
            key: state[key] if of == [key] else _joined([state[name] for name in of], config)
            for key, of in fused(state, config.n_experts).items()
        }
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
    if config.latent_attention:
        for key in list(state):
            if of := expert_keys(key, config.n_experts):
                tensor = state.pop(key)
                parts = tensor.reshape(len(of), -1, tensor.shape[-1])
                state |= dict(zip(of, parts, strict=True))
        return state
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


def _joined(kernels: list[torch.Tensor], config: MistralConfig) -> torch.Tensor:
    rows = torch.cat(kernels)
    return rows.reshape(config.n_experts, -1, rows.shape[-1])


def _prefixes(i: int) -> tuple[str, str]:
    return f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
