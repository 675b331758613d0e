"""A model's shape in the words of each format, both ways.

What decides the arithmetic is read or refused by name, never skipped. What a format defines
for an absent field is taken from that format's own program; where its programs disagree, as
on an absent `rope_theta` in `params.json`, the user is asked.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from lechat_jax.config import MistralConfig, Window
from lechat_jax.config.mistral import PARTS
from lechat_jax.errors import BadInput
from parity.convert import rope as rotary
from parity.convert.rope import ORIGINAL, short
from parity.convert.vision import SEEING, text_fields

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
MOE = {"n_experts": "num_experts", "n_experts_per_token": "num_experts_per_tok"}
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
SEEING_CLASS = "Mistral3ForConditionalGeneration"
POSITIONS = 32768  # max_position_embeddings of all 7B models

# In params.json: what says nothing about the arithmetic, or only this.
TOLERATED: dict[str, Callable[[Any], bool]] = {
    "max_seq_len": lambda value: True,
    "max_position_embeddings": lambda value: True,
    "max_batch_size": lambda value: True,
    "dtype": lambda value: True,
    "lora": lambda value: True,  # how mistral-finetune made it: its weights are merged
    "model_type": lambda value: value == "transformer",
    "activation": lambda value: value == "silu",
    "causal": lambda value: value is True,
}


def from_hugging_face(fields: Fields, where: object) -> MistralConfig:
    """The model that a `config.json` of transformers 4 or 5 describes.

    Raises:
        BadInput: it is no Mistral, or one with parts that lechat does not have.
    """
    if fields.get("model_type") == SEEING:
        fields = text_fields(fields, where)
    kind = fields.get("model_type")
    if kind not in CLASSES:
        raise BadInput(
            f"{where} has the model_type {kind!r}; only {', '.join(CLASSES)} and the text part of "
            f"{SEEING} are read here"
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
    return _config(found, where)


def to_hugging_face(
    config: MistralConfig, dtype: str, positions: int | None, bos_id: int, eos_id: int | list[int]
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
    if positions is None:
        yarn = config.yarn
        positions = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else POSITIONS
    return {
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
        "max_position_embeddings": positions,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


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


def from_params(fields: Fields, where: object, rope_theta: float | None) -> MistralConfig:
    """The model that a `params.json` of Mistral's describes.

    Args:
        fields: the JSON object.
        where: for messages.
        rope_theta: for an old file without one; Mistral's own program has taken 1e4 and 1e6
            for that at different times, so nothing is assumed.

    Raises:
        BadInput: it has parts that lechat does not have, or no `rope_theta`.
    """
    fields = _in_mistrals_words(fields, where)
    found = {name: fields[name] for name in (*WORDS, *EXPERTS) if name in fields}
    known = {*found, *PARTS, "rope_theta", "sliding_window", "_sliding_window", "tied_embeddings"}
    known |= {"vision_encoder"}  # whose weights are left out
    for key in fields.keys() - known:
        value = fields[key]
        if value not in (None, False, {}) and not TOLERATED.get(key, lambda _: False)(value):
            raise BadInput(f"{where} has {key} = {short(value)}, which lechat does not support")
    found["n_kv_heads"] = found.get("n_kv_heads", found.get("n_heads"))
    found["tied_embeddings"] = fields.get("tied_embeddings") or False
    found |= rotary.from_params(fields)
    window = fields.get("sliding_window", fields.get("_sliding_window"))
    found["sliding_window"] = _pattern(window, fields.get("n_layers"), where)
    theta = fields.get("rope_theta")
    if theta is None and rope_theta is None:
        raise BadInput(
            f"{where} does not say rope_theta, on which releases differ; pass "
            "--rope-theta 10000 for Mistral-7B v0.1, --rope-theta 1000000 for v0.2 and later"
        )
    if None not in (theta, rope_theta) and theta != rope_theta:
        raise BadInput(f"{where} has rope_theta {short(theta)}; leave out --rope-theta")
    found["rope_theta"] = rope_theta if theta is None else theta
    return _config(found, where)


def contradiction(config: MistralConfig, params: Fields, where: object) -> str:
    """What a `params.json` beside a `config.json` says otherwise of windows, in a sentence.

    Ministral-8B's do: transformers gives every layer the window, Mistral three of four.
    """
    said = params.get("sliding_window", params.get("_sliding_window"))
    windows = _pattern(said, params.get("n_layers"), where)
    if _config(config.to_dict() | {"sliding_window": windows}, where).windows == config.windows:
        return ""
    shown = config.sliding_window if type(config.sliding_window) is int else "another window"
    return (
        f"config.json is read, and {where} beside it says sliding_window {short(said)} instead of "
        f"{shown}: longer texts will differ from Mistral's own program; to follow that, take "
        "config.json away"
    )


def to_params(config: MistralConfig) -> dict[str, Any]:
    """A `params.json` for Mistral's own program; what a model has not goes unsaid."""
    fields = config.to_dict()
    if fields["sliding_window"] is None:
        del fields["sliding_window"]
    if not fields["tied_embeddings"]:
        del fields["tied_embeddings"]
    moe = {theirs: fields.pop(ours) for ours, theirs in MOE.items() if ours in fields}
    return fields | ({"moe": moe} if moe else {})


def _in_mistrals_words(fields: Fields, where: object) -> dict[str, Any]:
    """The fields with those of `moe` among them, and in today's words.

    The first release of Mixtral-8x7B, for Mistral's program of then, has those that Hugging Face
    uses.
    """
    fields = dict(fields)
    for ours, theirs in (WORDS | EXPERTS).items():
        if theirs in fields and ours not in fields:
            fields[ours] = fields.pop(theirs)
    moe = fields.pop("moe", None) or {}
    if not isinstance(moe, dict) or moe.keys() - MOE.values():
        raise BadInput(
            f"{where} has moe = {short(moe)}; only {' and '.join(MOE.values())} are supported"
        )
    return fields | {ours: moe[theirs] for ours, theirs in MOE.items() if theirs in moe}


def _config(found: dict[str, Any], where: object) -> MistralConfig:
    """The config, with the file named when it is a bad one."""
    try:
        return MistralConfig.from_dict(found)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


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
    wanted = [*CLASSES.values(), SEEING_CLASS]
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
    return _uniform([window if layer == SLIDING else None for layer in layers])


def _pattern(window: Any, n_layers: Any, where: object) -> Any:
    """The window of `params.json`; a list is repeated until every layer has one."""
    if isinstance(window, str):
        try:
            window = json.loads(window)
        except ValueError:
            raise BadInput(f"{where} has sliding_window = {window!r}, which is no number") from None
    if not isinstance(window, list):
        return window
    if not window or type(n_layers) is not int or n_layers % len(window):
        raise BadInput(
            f"{where} has a sliding_window of {len(window)} layers, which does not repeat "
            f"evenly over its {n_layers}"
        )
    return _uniform(window * (n_layers // len(window)))


def _uniform(windows: list[Window]) -> Any:
    """One window if all layers have the same, else the list."""
    return windows[0] if windows and windows.count(windows[0]) == len(windows) else windows


def _quotient(dim: Any, n_heads: Any, where: object) -> int:
    """The head width that an absent `head_dim` means."""
    if type(dim) is not int or type(n_heads) is not int or n_heads < 1 or dim % n_heads:
        raise BadInput(
            f"{where} has no head_dim, and hidden_size {short(dim)} is no multiple of "
            f"num_attention_heads {short(n_heads)}"
        )
    return dim // n_heads
