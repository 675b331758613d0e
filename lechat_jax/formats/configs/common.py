"""Shared by the readers of configs: field names, checked construction, values in messages."""

import json
from collections.abc import Mapping
from typing import Any

from lechat_jax.config import MistralConfig, Window
from lechat_jax.errors import BadInput

Fields = Mapping[str, Any]

# Hugging Face's words for the fields that are the same under another name.
WORDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
# Also of a model with experts, in which they are fields of `moe` in params.json.
EXPERTS = {"n_experts": "num_local_experts", "n_experts_per_token": "num_experts_per_tok"}


def config_of(found: dict[str, Any], where: object) -> MistralConfig:
    """The config with these fields.

    Raises:
        BadInput: there is no such model; the file is named.
    """
    try:
        return MistralConfig.from_dict(found)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def uniform(windows: list[Window]) -> Any:
    """One window if all layers have the same, else the list."""
    return windows[0] if windows and windows.count(windows[0]) == len(windows) else windows


def short(value: Any) -> str:
    """A value as JSON for a message, cut when it is long."""
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
