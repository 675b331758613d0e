"""Mistral's own params.json, read and written.

What decides the arithmetic is read or refused by name, never skipped. Where Mistral's programs
disagree on what an absent field means, as on `rope_theta`, the user is asked.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from lechat_jax.config import MistralConfig
from lechat_jax.config.mistral import PARTS
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
from lechat_jax.formats.configs.rope import SQUARED
from lechat_jax.formats.configs.vision import to_vision_encoder, vision_of_params

MOE = {
    "n_experts": "num_experts",
    "n_experts_per_token": "num_experts_per_tok",
    "expert_hidden_dim": "expert_hidden_dim",
    "n_shared_experts": "num_shared_experts",
    "n_dense_layers": "first_k_dense_replace",
}
# Of the choices of a router those that are computed here, as in all releases: what files of models
# with latent attention say, and what programs take for what none says.
ROUTER = {
    "route_every_n": 1,
    "routed_scale": 1.0,
    "num_expert_groups": 1,
    "num_expert_groups_per_tok": 1,
}
UNSAID = {"renorm_strategy": "WEIGHTS", "use_load_balancing_bias": False}
DEVICES = ("expert_parallel", "expert_model_parallel")  # of the training
# What says nothing about the arithmetic, or only this.
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


def from_params(
    fields: Fields, where: object, rope_theta: float | None, text_only: bool = False
) -> MistralConfig:
    """Reads a `params.json` of Mistral's.

    Args:
        fields: the JSON object.
        where: for messages.
        rope_theta: for an old file without one; Mistral's own program has taken 1e4 and 1e6
            for that at different times, so nothing is assumed.
        text_only: without a vision tower.

    Raises:
        BadInput: it has parts that lechat does not have, or no `rope_theta`.
    """
    fields = _in_mistrals_words(fields, where)
    found = {name: fields[name] for name in (*WORDS, *MOE) if name in fields}
    is_latent = any(fields.get(name) is not None for name in LATENT)
    found |= latent_of(fields, where) if is_latent else {}
    known = {*found, *PARTS, "rope_theta", "sliding_window", "_sliding_window", "tied_embeddings"}
    known |= {"vision_encoder", *LATENT}
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
            f"{where} does not say rope_theta, on which releases differ; convert it by python -m "
            "parity.convert with --rope-theta 10000 for Mistral-7B v0.1, or 1000000 for v0.2 and "
            "later"
        )
    if None not in (theta, rope_theta) and theta != rope_theta:
        raise BadInput(f"{where} has rope_theta {short(theta)}; leave out --rope-theta")
    found["rope_theta"] = rope_theta if theta is None else theta
    sees = fields.get("vision_encoder") and not text_only
    vision = vision_of_params(fields, where) if sees else None
    return dataclasses.replace(config_of(found, where), vision=vision)


def contradiction(config: MistralConfig, params: Fields, where: object) -> str:
    """What a `params.json` beside a `config.json` says otherwise of windows, in a sentence.

    Ministral-8B's do: transformers gives every layer the window, Mistral three of four.
    """
    said = params.get("sliding_window", params.get("_sliding_window"))
    windows = _pattern(said, params.get("n_layers"), where)
    if config_of(config.to_dict() | {"sliding_window": windows}, where).windows == config.windows:
        return ""
    shown = config.sliding_window if type(config.sliding_window) is int else "another window"
    return (
        f"config.json is read, and {where} beside it says sliding_window {short(said)} instead of "
        f"{shown}: longer texts will differ from Mistral's own program; to follow that, take "
        "config.json away"
    )


def to_params(config: MistralConfig) -> dict[str, Any]:
    """A `params.json` for Mistral's own program; what a model has not goes unsaid.

    Raises:
        BadInput: it has no word for what the model does.
    """
    fields = config.to_dict()
    if fields["sliding_window"] is None:
        del fields["sliding_window"]
    if not fields["tied_embeddings"]:
        del fields["tied_embeddings"]
    moe = {theirs: fields.pop(ours) for ours, theirs in MOE.items() if ours in fields}
    if latent := config.latent_attention:
        if latent.squared_yarn_scale:
            raise BadInput(
                f"Mistral's programs have no word for {SQUARED}; convert to --to hf or --to lechat"
            )
        del fields["latent_attention"]
        fields |= {name: getattr(latent, name) for name in LATENT}
        fields["head_dim"] = latent.v_head_dim  # as releases say it, and no program reads it
        if moe:
            moe = {theirs: getattr(config, ours) for ours, theirs in MOE.items()}
            moe |= {"expert_hidden_dim": config.expert_dim, **ROUTER}
    if config.vision:
        fields["vision_encoder"] = to_vision_encoder(config.vision)
        del fields["vision"]
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
    if not isinstance(moe, dict) or moe.keys() - {*MOE.values(), *ROUTER, *UNSAID, *DEVICES}:
        known = ", ".join([*MOE.values(), *ROUTER, *UNSAID])
        raise BadInput(f"{where} has moe = {short(moe)}; only {known} are supported")
    moe = {key: value for key, value in moe.items() if value is not None}
    refuse_other(moe, ROUTER | UNSAID, where, " in its moe")
    if fields.get(LATENT[0]) and moe and (lacking := MOE.values() - moe.keys()):
        raise BadInput(
            f"{where} has no {', '.join(sorted(lacking))} in its moe, for which programs take "
            "different numbers"
        )
    if moe.get("expert_hidden_dim") == fields.get("hidden_dim"):  # as unsaid
        moe.pop("expert_hidden_dim", None)
    return fields | {ours: moe[theirs] for ours, theirs in MOE.items() if theirs in moe}


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
    return uniform(window * (n_layers // len(window)))
