"""RoPE in the configs of each format: theta, YaRN, and queries that grow with their position.

Mistral's `params.json` has lechat's words. Hugging Face has one object for all three, called
`rope_scaling` in transformers 4 and `rope_parameters` since; of its many ways to say how long
queries and keys are after YaRN, Mistral's models use two, as they are and 0.1 ln(factor) + 1.

With latent attention transformers since 5.23 also multiplies scores by (0.1 ln(factor) + 1)^2 where
it reads a `mscale_all_dim`, as the config.json of Mistral Small 4 has it. Its weights were made
without, so it is read so, and whoever means that square says `squared_yarn_scale` besides.
"""

import math
from typing import Any

from lechat_jax.config import LatentConfig, MistralConfig, Yarn
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs.common import Fields, short

PLAIN = {"rope_type", "type", "rope_theta"}
ORIGINAL = "original_max_position_embeddings"
GROWTH = "llama_4_scaling_beta"  # read by transformers' Ministral3 alone
STRETCH = {"factor", ORIGINAL, "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
STRETCH |= {"attention_factor", "truncate"}
SQUARED, PARTIAL = "squared_yarn_scale", "partial_rotary_factor"
GROWING = {"ministral3": "Ministral 3", "mistral4": "Mistral 4"}  # whose queries may grow


def from_hugging_face(fields: Fields, where: object) -> dict[str, Any]:
    """`rope_theta`, `yarn` and `llama_4_scaling` of a `config.json`.

    Raises:
        BadInput: there is another kind of rotary embedding, or a number is missing.
    """
    rope = _parameters(fields, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = PLAIN | (STRETCH if kind == "yarn" else set())
    if model := GROWING.get(fields.get("model_type", "")):
        known = known | {GROWTH, ORIGINAL, "max_position_embeddings"}
        if rope.keys() == {"rope_theta"}:
            raise BadInput(f"{where} has no rope_parameters, in which {model} models differ")
    if kind not in ("default", "yarn"):
        raise BadInput(
            f"{where} has the rope_type {short(kind)}; only default and yarn are supported"
        )
    if unknown := sorted(rope.keys() - known):
        raise BadInput(
            f"{where} has rotary parameters that are not supported: {', '.join(unknown)}"
        )
    if (theta := rope["rope_theta"]) is None:
        theta = 1e6 if fields.get("model_type") == "mixtral" else 1e4  # transformers' defaults
    return {
        "rope_theta": theta,
        "yarn": _yarn(rope, where) if kind == "yarn" else None,
        "llama_4_scaling": _growth(rope),
    }


def latent_from_hugging_face(fields: Fields, latent: Fields, where: object) -> dict[str, Any]:
    """What `from_hugging_face` gives, and `squared_yarn_scale`, of a model with latent attention.

    A YaRN by the factor 1 is none: transformers' Mistral 4 has to have one.

    Args:
        fields: of the config.json.
        latent: its widths.
        where: for messages.

    Raises:
        BadInput: the rotary embedding is of another kind or of other lanes.
    """
    rope = _parameters(fields, where)
    lanes = latent["qk_rope_head_dim"]
    head_dim = latent["qk_nope_head_dim"] + lanes
    if PARTIAL in rope and int(head_dim * _number(rope, PARTIAL, where)) != lanes:
        raise BadInput(
            f"{where} has {PARTIAL} = {rope[PARTIAL]:g}, which is not {lanes} of {head_dim} lanes"
        )
    if rope.get("mscale_all_dim") not in (None, 0, 1):
        raise BadInput(
            f"{where} has mscale_all_dim = {short(rope['mscale_all_dim'])} in its YaRN; with "
            "latent attention it is 0 or 1"
        )
    rest = {key: value for key, value in rope.items() if key != PARTIAL}
    found = from_hugging_face({**fields, "rope_scaling": None, "rope_parameters": rest}, where)
    if not found["yarn"]:
        raise BadInput(f"{where} has no YaRN; transformers' Mistral 4 rotates nothing without")
    squared = fields.get(SQUARED, False)
    if squared and not rope.get("mscale_all_dim"):
        raise BadInput(f"{where} has {SQUARED} and no mscale_all_dim in its YaRN, which means it")
    yarn = None if found["yarn"]["factor"] == 1 else found["yarn"]
    return found | {"yarn": yarn, "latent_attention": {**latent, SQUARED: squared}}


def scale_note(fields: Fields, where: object) -> str:
    """What a config.json asks of transformers that its weights were made without, in a sentence."""
    rope = _parameters(fields, where) if fields.get("model_type") == "mistral4" else {}
    if not rope.get("mscale_all_dim") or fields.get(SQUARED):
        return ""
    square = (0.1 * math.log(max(1, rope["factor"])) + 1) ** 2
    return (
        f"attention has the plain scale, as Mistral's own weights and vLLM have it, where "
        f"transformers multiplies scores by {square:.3f} (mscale_all_dim in config.json); for "
        f'weights that were trained so, say "{SQUARED}": true there'
    )


def to_hugging_face(config: MistralConfig) -> dict[str, Any]:
    """The `rope_parameters` that transformers 5 reads as those of this model.

    Raises:
        BadInput: YaRN and the queries' growth have two original lengths; there is a word for one.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    yarn, growth = config.yarn, config.llama_4_scaling
    lengths = [part.original_max_position_embeddings for part in (yarn, growth) if part]
    if len(set(lengths)) > 1:
        raise BadInput(
            f"yarn and llama_4_scaling have the original lengths {lengths[0]} and {lengths[1]}, "
            "and transformers has one; convert to --to mistral or --to lechat instead"
        )
    if latent := config.latent_attention:
        return rope | _latent_to_hugging_face(latent, yarn, lengths)
    if yarn:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "beta_fast": yarn.beta,
            "beta_slow": yarn.alpha,
            "mscale": 1.0,
            "mscale_all_dim": 0.0 if yarn.apply_scale else 1.0,
        }
    return rope | ({ORIGINAL: lengths[0]} if lengths else {})


def _latent_to_hugging_face(
    latent: LatentConfig, yarn: Yarn | None, lengths: list[int]
) -> dict[str, Any]:
    """Likewise, of latent attention, whose scores transformers squares by `mscale_all_dim` alone.

    Without a YaRN it would rotate as many lanes as a head has, so it is given one by the factor 1.
    """
    yarn = yarn or Yarn(1.0, *(lengths or [8192]), beta=32.0, alpha=1.0, apply_scale=False)
    lanes, head_dim = latent.qk_rope_head_dim, latent.head_dim
    part = lanes / head_dim
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "beta_fast": yarn.beta,
        "beta_slow": yarn.alpha,
        "attention_factor": yarn.attention_factor,
        **({"mscale": 1.0, "mscale_all_dim": 1.0} if latent.squared_yarn_scale else {}),
        ORIGINAL: yarn.original_max_position_embeddings,
        # Transformers rounds the product with a head's width down.
        PARTIAL: part if int(head_dim * part) == lanes else math.nextafter(part, 1),
    }


def grows(config: MistralConfig) -> dict[str, float]:
    """How fast queries grow, in the word of transformers' Ministral 3, which must be told."""
    return {GROWTH: config.llama_4_scaling.beta if config.llama_4_scaling else 0.0}


def from_params(fields: Fields) -> dict[str, Any]:
    """`yarn` and `llama_4_scaling` of a `params.json`, which are lechat's but for a default.

    YaRN's scale is applied where nothing is said, as vLLM's reader has it.
    """
    yarn = fields.get("yarn")
    if isinstance(yarn, dict) and yarn:
        yarn = {"apply_scale": True} | yarn
    return {"yarn": yarn or None, "llama_4_scaling": fields.get("llama_4_scaling") or None}


def _parameters(fields: Fields, where: object) -> dict[str, Any]:
    """All that is said of the rotary embedding, under whatever name."""
    rope: dict[str, Any] = {"rope_theta": fields.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        said = fields.get(key) or {}
        if not isinstance(said, dict):
            raise BadInput(f"{where} has {key} = {short(said)}, which is no JSON object")
        rope |= said
    return rope


def _yarn(rope: Fields, where: object) -> dict[str, Any]:
    """The stretching; betas that are absent are transformers' own."""
    factor = _number(rope, "factor", where)
    if rope.get("truncate", True) is not True:
        raise BadInput(f"{where} has truncate = {short(rope['truncate'])} in its YaRN; only true")
    length, full = _length(rope, factor, where), 0.1 * math.log(max(factor, 1)) + 1
    if not (length == 1 or math.isclose(length, full, rel_tol=1e-6)):
        raise BadInput(
            f"{where} has a YaRN that makes queries and keys {length:g} times as long; only 1 "
            f"and 0.1 ln(factor) + 1, here {full:g}, are supported"
        )
    return {
        "factor": factor,
        ORIGINAL: rope.get(ORIGINAL),
        "beta": rope.get("beta_fast") or 32,
        "alpha": rope.get("beta_slow") or 1,
        "apply_scale": length != 1,
    }


def _length(rope: Fields, factor: float, where: object) -> float:
    """Transformers' attention factor: said, or a quotient of two, or the paper's."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor", where)

    def of(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscales = (_number(rope, key, where) for key in ("mscale", "mscale_all_dim"))
        over, under = map(of, mscales)
        return over / under
    return of(1.0)


def _growth(rope: Fields) -> dict[str, Any] | None:
    """How queries grow, if they do."""
    if not rope.get(GROWTH):
        return None
    return {"beta": rope[GROWTH], ORIGINAL: rope.get(ORIGINAL)}


def _number(rope: Fields, key: str, where: object) -> float:
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"{where} has {key} = {short(value)} in its YaRN, which is no number")
    return float(value)
