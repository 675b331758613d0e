"""Hugging Face's config.json of transformers 4 or 5, read and written.

What decides the arithmetic is read or refused by name, never skipped. What an absent field means
is taken from transformers' own config classes.
"""

import dataclasses
from typing import Any

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs import rope as rotary
from lechat_jax.formats.configs.common import (
    EXPERTS,
    LATENT,
    WORDS,
    Fields,
    config_of,
    latent_of,
    refuse_other,
    short,
    uniform,
)
from lechat_jax.formats.configs.rope import GROWING, ORIGINAL, SQUARED
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
    "mistral4": {
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 1024,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
# Of Mistral 4, whose experts are of another width than its first layers; and what of its many
# choices is computed here, as in all releases.
EXPERTS_4 = {
    "n_experts": "n_routed_experts",
    "n_experts_per_token": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size",
    "n_shared_experts": "n_shared_experts",
    "n_dense_layers": "first_k_dense_replace",
}
COMPUTED_4 = {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "rms_norm_eps": 1e-6,  # of transformers' norms of latents, whatever is said
}
SLIDING, FULL = "sliding_attention", "full_attention"
CLASSES = {
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
}
INSTEAD = "convert to --to mistral or --to lechat instead"
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
    words = WORDS | {"mixtral": EXPERTS, "mistral4": EXPERTS_4}.get(kind, {})
    found = {ours: fields.get(theirs) for ours, theirs in words.items()}
    if found["n_kv_heads"] is None:
        found["n_kv_heads"] = found["n_heads"]
    if kind == "mistral4":
        refuse_other(fields, COMPUTED_4, where)
        latent = latent_of(fields, where)
        found |= latent | rotary.latent_from_hugging_face(fields, latent["latent_attention"], where)
        if found["n_dense_layers"] == found["n_layers"]:
            found |= dict.fromkeys(EXPERTS_4, 0)
    else:
        found |= rotary.from_hugging_face(fields, where)
    if found["head_dim"] is None:
        found["head_dim"] = _quotient(fields["hidden_size"], fields["num_attention_heads"], where)
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
    words = WORDS | EXPERTS if kind == "mixtral" else WORDS
    layers = [FULL if window is None else SLIDING for window in config.windows]
    rope = rotary.to_hugging_face(config) | (rotary.grows(config) if kind in GROWING else {})
    fields = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in words.items()},
        **(_latent_fields(config) if kind == "mistral4" else {}),
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


def _latent_fields(config: MistralConfig) -> dict[str, Any]:
    """What transformers' Mistral 4 has besides.

    Raises:
        BadInput: it is made without shared experts, or with another epsilon.
    """
    latent = config.latent_attention
    assert latent
    if config.n_experts and not config.n_shared_experts:
        raise BadInput(
            "transformers' Mistral 4 has experts that all tokens share, and this model none; "
            f"{INSTEAD}"
        )
    if config.norm_eps != (known := COMPUTED_4["rms_norm_eps"]):
        raise BadInput(
            f"transformers' Mistral 4 norms latents with an epsilon of {known:g}, and this model "
            f"with {config.norm_eps:g}; {INSTEAD}"
        )
    # All layers of a model without experts are first ones; how many the others had is of no use.
    experts = {theirs: getattr(config, ours) for ours, theirs in EXPERTS_4.items()}
    first = {"n_dense_layers": config.n_layers, "n_experts": 1, "n_experts_per_token": 1}
    none = {EXPERTS_4[ours]: value for ours, value in first.items()} if not config.n_experts else {}
    return {
        **experts,
        **none,
        "moe_intermediate_size": config.expert_dim,
        **{name: getattr(latent, name) for name in LATENT},
        **COMPUTED_4,
        "attention_bias": False,
        "pad_token_id": None,  # whose embedding would never learn
        **({SQUARED: True} if latent.squared_yarn_scale else {}),
    }


def _kind(config: MistralConfig) -> str:
    """The `model_type` of transformers that has what this model has."""
    if config.latent_attention:
        return "mistral4"
    if config.n_shared_experts or config.n_dense_layers or config.expert_dim != config.hidden_dim:
        raise BadInput(
            "transformers has shared experts, first layers without any, or experts of another "
            f"width only in its Mistral 4, which has latent attention; {INSTEAD}"
        )
    sizes = {window for window in config.windows if window is not None}
    if len(sizes) > 1:
        raise BadInput(
            f"the layers have windows of {len(sizes)} sizes ({sorted(sizes)}) and transformers' "
            f"Ministral has one; {INSTEAD}"
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
            f"some layers, experts, or queries that grow with their position; {INSTEAD}"
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
