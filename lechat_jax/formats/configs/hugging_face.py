"""Hugging Face's config.json of transformers 4 or 5, read and written.

What decides the arithmetic is read or refused by name, never skipped. What an absent field means
is taken from transformers' own config classes.
"""

import dataclasses
from typing import Any

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs import rope as rotary
from lechat_jax.formats.configs.common import EXPERTS, WORDS, Fields, config_of, short, uniform
from lechat_jax.formats.configs.rope import ORIGINAL
from lechat_jax.formats.configs.vision import (
    SEEING,
    seeing_fields,
    text_fields,
    vision_of_hugging_face,
)

# What transformers' config classes take for what a config leaves out.
ABSENT: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    "ministral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    "ministral3": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "head_dim": 128,
    },
    "mixtral": {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
SLIDING, FULL = "sliding_attention", "full_attention"
CLASSES = {
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
}
POSITIONS = 32768  # max_position_embeddings of all 7B models


def from_hugging_face(fields: Fields, where: object, text_only: bool = False) -> MistralConfig:
    """Reads a `config.json` of transformers 4 or 5; with `text_only`, without a vision tower.

    Raises:
        BadInput: it is no Mistral, or one with parts that lechat does not have.
    """
    vision = None
    if fields.get("model_type") in SEEING:
        vision = None if text_only else vision_of_hugging_face(fields, where)
        fields = text_fields(fields, where)
    kind = fields.get("model_type")
    if kind not in CLASSES:
        raise BadInput(
            f"{where} has the model_type {kind!r}; only {', '.join([*CLASSES, *SEEING])} are read "
            "here"
        )
    _refuse_hugging_face(fields, where)
    optional = {*ABSENT[kind], "head_dim"}
    if lacking := [key for key in WORDS.values() if key not in fields and key not in optional]:
        raise BadInput(f"{where} lacks {', '.join(lacking)}")
    fields = ABSENT[kind] | dict(fields)
    words = WORDS | EXPERTS if kind == "mixtral" else WORDS
    found = {ours: fields.get(theirs) for ours, theirs in words.items()}
    if found["head_dim"] is None:
        found["head_dim"] = _quotient(fields["hidden_size"], fields["num_attention_heads"], where)
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = found["n_heads"]
    found |= rotary.from_hugging_face(fields, where)
    found["tied_embeddings"] = fields.get("tie_word_embeddings", False)
    found["sliding_window"] = _windows(fields, where)
    return dataclasses.replace(config_of(found, where), vision=vision)


def to_hugging_face(
    config: MistralConfig,
    dtype: str,
    positions: int | str | None,
    bos_id: int,
    eos_id: int | list[int],
) -> dict[str, Any]:
    """A `config.json` that transformers 5 reads as this model, and 4 if it has such a model.

    With `None` for the positions, a guess of how many the model was made for.

    Raises:
        BadInput: transformers has no word for such a model.
    """
    kind = _kind(config)
    words = WORDS | EXPERTS if config.n_experts else WORDS
    layers = [FULL if window is None else SLIDING for window in config.windows]
    rope = rotary.to_hugging_face(config) | (rotary.grows(config) if kind == "ministral3" else {})
    fields = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in words.items()},
        "sliding_window": next(filter(None, config.windows), None),
        **({"layer_types": layers} if kind == "ministral" else {}),
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": rope,  # transformers 5
        "rope_theta": config.rope_theta,  # transformers 4
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers 4
        "max_position_embeddings": positions_of(config, positions),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    return seeing_fields(config, fields) if config.vision else fields


def _kind(config: MistralConfig) -> str:
    """The `model_type` of transformers that has what this model has."""
    instead = "convert to --to mistral or --to lechat instead"
    sizes = {window for window in config.windows if window is not None}
    if len(sizes) > 1:
        raise BadInput(
            f"the layers have windows of {len(sizes)} sizes ({sorted(sizes)}) and transformers' "
            f"Ministral has one; {instead}"
        )
    kinds = {
        "ministral": None in config.windows and sizes,
        "mixtral": config.n_experts,
        "ministral3": config.llama_4_scaling,
    }
    found = [kind for kind, has in kinds.items() if has]
    if len(found) > 1:
        raise BadInput(
            f"transformers has no model that is {' and '.join(found)}, which is to have windows in "
            f"some layers, experts, or queries that grow with their position; {instead}"
        )
    return found[0] if found else "ministral3" if config.yarn else "mistral"


def _refuse_hugging_face(fields: Fields, where: object) -> None:
    """Raises `BadInput` for the first field that asks for what lechat does not have."""
    strange = ["attention_bias", "mlp_bias", ORIGINAL]
    strange += [] if fields.get("model_type") == "mixtral" else ["num_local_experts"]
    for key in strange:
        if fields.get(key):
            raise BadInput(
                f"{where} has {key} = {short(fields[key])}, which lechat does not support"
            )
    if (act := fields.get("hidden_act", "silu")) != "silu":
        raise BadInput(f"{where} has hidden_act {act!r}; only silu is supported")
    wanted = [*CLASSES.values(), *SEEING.values()]
    classes = fields.get("architectures") or wanted
    if not isinstance(classes, list) or not any(name in wanted for name in classes):
        raise BadInput(f"{where} is of {short(classes)}; only {', '.join(wanted)} are read")


def _windows(fields: Fields, where: object) -> Any:
    """The window, or each layer's where `layer_types` says so; transformers counts alike."""
    window = fields["sliding_window"]
    layers = fields.get("layer_types")
    if layers is None:
        return window
    if not isinstance(layers, list) or not all(layer in (SLIDING, FULL) for layer in layers):
        raise BadInput(f"{where} has layer_types other than {SLIDING} and {FULL}")
    if window is None and SLIDING in layers:
        raise BadInput(f"{where} has {SLIDING} among its layer_types but no sliding_window")
    return uniform([window if layer == SLIDING else None for layer in layers])


def _quotient(dim: Any, n_heads: Any, where: object) -> int:
    """The head width that an absent `head_dim` means."""
    if type(dim) is not int or type(n_heads) is not int or n_heads < 1 or dim % n_heads:
        raise BadInput(
            f"{where} has no head_dim, and hidden_size {short(dim)} is no multiple of "
            f"num_attention_heads {short(n_heads)}"
        )
    return dim // n_heads


def positions_of(config: MistralConfig, said: int | str | None) -> int:
    """Positions that a model was made for: as its files say, or else a guess."""
    if said is not None:
        return int(said)
    yarn = config.yarn
    return int(yarn.factor * yarn.original_max_position_embeddings) if yarn else POSITIONS
