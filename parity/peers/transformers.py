"""Hugging Face's transformers with lechat's weights. Imported only when it is compared."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import torch
import transformers
from jaxtyping import Float

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from parity.convert.configs.hugging_face import to_hugging_face
from parity.convert.layouts import taken_apart, to_format
from parity.convert.names import rows
from parity.measure import cores
from parity.peers import fused_experts

AttentionName = Literal["eager", "sdpa"]


def to_transformers(
    config: MistralConfig, weights: Mapping[str, Float[np.ndarray, "..."]]
) -> dict[str, Float[torch.Tensor, "..."]]:
    """The weights under transformers' names and in its shapes; but experts nothing is copied."""
    table, found = rows(config), taken_apart(config, weights)
    state = {
        row.hf: torch.from_numpy(to_format(found[part], config, "hf", row))
        for part, row in table.items()
    }
    return fused_experts.fuse(config, state)


def build(config: MistralConfig, weights: Mapping[str, Float[np.ndarray, "..."]] | None) -> Any:
    """Transformers' model of that shape with these weights, in float32; `None` leaves its own.

    Of the class that transformers itself takes for such a config: Mistral, Ministral where
    some layers have a window, Ministral 3 where positions are stretched, Mixtral with experts.

    Raises:
        BadInput: transformers has no such model.
    """
    fields = to_hugging_face(config, "float32", positions=None, bos_id=1, eos_id=2)
    words: Any = transformers.AutoConfig.for_model(**fields)
    words.use_cache = False
    with device():
        model = transformers.AutoModelForCausalLM.from_config(words)
    if weights is None:
        return model
    tensors = to_transformers(config, weights)
    if config.tied_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def device() -> torch.device:
    """Where PyTorch computes: on the kind of device that JAX uses, with all cores.

    Raises:
        BadInput: JAX uses a GPU that this PyTorch cannot, or a TPU.
    """
    torch.set_num_threads(cores())
    platform = jax.default_backend()
    if platform == "gpu" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, as XLA does by default
        return torch.device("cuda")
    if platform != "cpu":
        raise BadInput(
            f"JAX computes on a {platform} but this PyTorch ({torch.__version__}) cannot; "
            "compare on the CPU with JAX_PLATFORMS=cpu, or install PyTorch for the device"
        )
    return torch.device("cpu")
