"""Which architecture of llama.cpp computes a model's function, and what it says of positions.

llama.cpp's `llama` has no window whatever its fields say. `granite_swa` has one for some layers,
and attention sinks, which weigh nothing at minus infinity. `mistral3` has YaRN and queries that
grow. The fields of each: llama.cpp, src/models; the format: ggml, docs/gguf.md.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from lechat_jax.config import Llama4Scaling, MistralConfig, Yarn
from lechat_jax.errors import BadInput

LLAMA, WINDOWED, STRETCHED = "llama", "granite_swa", "mistral3"
ARCHITECTURES = (LLAMA, WINDOWED, STRETCHED)
FLOATS = {  # types of tensors that are not quantised
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
NO_SINK = -1e30  # a logit whose exponential is 0
SINKS = "attn_sinks.weight"  # of each layer of `granite_swa`, one for each query head


def library() -> ModuleType:
    """The package `gguf`, of llama.cpp's authors.

    Raises:
        BadInput: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise BadInput("gguf is not installed: pip install 'lechat-jax[gguf]'") from error


def architecture(config: MistralConfig) -> str:
    """The architecture of llama.cpp that computes such a model's function.

    Raises:
        BadInput: there is none.
    """
    if config.latent_attention or config.n_shared_experts or config.n_dense_layers:
        raise BadInput(
            "a model with latent attention or shared experts, as Mistral Small 4 and Large 3 have "
            "them, is not written as GGUF here; convert to --to hf, from which llama.cpp's own "
            "script makes one"
        )
    if config.expert_dim != config.hidden_dim:
        raise BadInput(
            "llama.cpp's experts are as wide as its feed_forward_length says, hidden_dim"
        )
    windows = sorted({window for window in config.windows if window is not None})
    is_stretched = config.yarn is not None or config.llama_4_scaling is not None
    if len(windows) > 1:
        raise BadInput(
            "llama.cpp has one window for all layers that have any, and the layers of this model "
            f"have {', '.join(map(str, windows))}"
        )
    if windows and is_stretched:
        raise BadInput(
            "llama.cpp has no architecture with both a sliding window and YaRN or growing queries"
        )
    return WINDOWED if windows else STRETCHED if is_stretched else LLAMA


def add_positions(gguf: Any, writer: Any, config: MistralConfig) -> None:
    """Writes the fields of YaRN and of growing queries, if the model has them."""
    if yarn := config.yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta)
        writer.add_rope_scaling_yarn_beta_slow(yarn.alpha)
        writer.add_rope_scaling_yarn_log_mul(0.0 if yarn.apply_scale else 1.0)
    if growth := config.llama_4_scaling:
        writer.add_attn_temperature_scale(growth.beta)
        writer.add_attn_temperature_length(growth.original_max_position_embeddings)


def read_positions(field: Callable[..., Any], where: object) -> dict[str, Any]:
    """Reads them: fields of a config.

    Args:
        field: gives a field of the architecture by name, or the default.
        where: the file, for messages.

    Raises:
        BadInput: the rotary frequencies are scaled in another way.
    """
    found: dict[str, Any] = {}
    kind, length = (
        field("rope.scaling.type", "none"),
        field("rope.scaling.original_context_length", 0),
    )
    if kind not in ("none", "yarn"):
        raise BadInput(f"{where} scales its rotary frequencies by {kind!r}; only yarn is supported")
    if kind == "yarn":
        found["yarn"] = Yarn(
            factor=field("rope.scaling.factor"),
            original_max_position_embeddings=length,
            beta=field("rope.scaling.yarn_beta_fast", 32.0),
            alpha=field("rope.scaling.yarn_beta_slow", 1.0),
            apply_scale=not field("rope.scaling.yarn_log_multiplier", 0.0),
        )
    if growth := field("attention.temperature_scale", 0.0):
        steps = field("attention.temperature_length", 0) or length
        found["llama_4_scaling"] = Llama4Scaling(growth, steps)
    return found
