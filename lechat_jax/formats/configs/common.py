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
# Of latent attention, in params.json as in config.json.
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def config_of(found: dict[str, Any], where: object) -> MistralConfig:
    """The config with these fields.

    Raises:
        BadInput: there is no such model; the file is named.
    """
    try:
        return MistralConfig.from_dict(found)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def latent_of(fields: Fields, where: object) -> dict[str, Any]:
    """`latent_attention`, and the head width that follows from it, whatever a file says of that.

    Raises:
        BadInput: a width is missing or no number.
    """
    widths: dict[str, int] = {}
    for name in LATENT:
        if type(width := fields.get(name)) is not int:
            raise BadInput(
                f"{where} has {name} = {short(width)}, and latent attention needs a whole number"
            )
        widths[name] = width
    head_dim = widths["qk_nope_head_dim"] + widths["qk_rope_head_dim"]
    return {"latent_attention": widths, "head_dim": head_dim}


def refuse_other(
    fields: Fields, computed: Mapping[str, Any], where: object, within: str = ""
) -> None:
    """Raises `BadInput` for the first field that is there with another value than is computed."""
    for key, value in computed.items():
        if key in fields and fields[key] != value:
            raise BadInput(
                f"{where} has {key} = {short(fields[key])}{within}, and only {short(value)} is "
                "computed here"
            )


def uniform(windows: list[Window]) -> Any:
    """One window if all layers have the same, else the list."""
    return windows[0] if windows and windows.count(windows[0]) == len(windows) else windows


def short(value: Any) -> str:
    """A value as JSON for a message, cut when it is long."""
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
