"""Configs and tensor names of models that see: a decoder behind a vision tower.

Mistral Small 3.1, Ministral 3 and their kin are transformers' `Mistral3ForConditionalGeneration`,
Pixtral 12B its `LlavaForConditionalGeneration`, and Mistral's own files have a `vision_encoder` in
their `params.json`. What decides the arithmetic is read or refused by name.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lechat_jax.config import MistralConfig, VisionConfig
from lechat_jax.config.mistral import vision_from_dict
from lechat_jax.config.vision import CHANNELS
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs.common import Fields, short
from lechat_jax.formats.stores import Store, Stored, text_alone

# The model_type of each class of transformers, and what the class is called.
SEEING = {
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
# Ours, and Mistral's words in `vision_encoder`, which are Hugging Face's in `vision_config` too.
WORDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "patch_size": "patch_size",
}
# What transformers' PixtralVisionConfig takes for what a config leaves out.
ABSENT = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 16,
    "image_size": 1024,
}
IDS = ("image_token_id", "image_break_token_id", "image_end_token_id")
THETA = 1e4  # of all towers, which files may leave unsaid
PATCH_MERGE = "patch_merge"

# In files the language model is named first; a live model of transformers 5 is "model" first.
TEXT = re.compile(r"(?:language_model\.model|model\.language_model)\.(?=layers|embed|norm)")
HEAD = re.compile(r"(?:language_model\.)?lm_head\.")
LIVE = re.compile(r"model\.(?=vision_tower\.|multi_modal_projector\.)")
VISION = re.compile(
    r"(?:model\.)?(?:vision_tower|multi_modal_projector|"  # Hugging Face's words, then Mistral's
    r"vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\."
)


def text_fields(fields: Fields, where: object) -> Mapping[str, Any]:
    """The language model's part of a `config.json`, with what is said of all of it.

    The head is the embedding where either says so, or nobody; see `without_vision`.

    Raises:
        BadInput: there is no such part.
    """
    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise BadInput(f"{where} is of a {fields['model_type']} without a text_config")
    tie = "tie_word_embeddings"
    said = [part[tie] for part in (fields, text) if part.get(tie) is not None]
    is_tied = any(said) or (not said and fields["model_type"] == "mistral3")
    return {"model_type": "mistral"} | text | {tie: is_tied}


def vision_of_hugging_face(fields: Fields, where: object) -> VisionConfig:
    """Reads `vision_config` of a `config.json`, and what is said of the projector beside it.

    Raises:
        BadInput: there is none, or it has parts that lechat does not have.
    """
    tower = fields.get("vision_config")
    if not isinstance(tower, dict):
        raise BadInput(f"{where} is of a {fields['model_type']} without a vision_config")
    is_merged = fields["model_type"] == "mistral3"
    # What transformers takes for what is absent, which may not be what lechat computes.
    layer, strategy = (-1, "full") if is_merged else (-2, "default")
    wanted = {
        "model_type": (tower.get("model_type", "pixtral"), "pixtral"),
        "hidden_act": (tower.get("hidden_act", "gelu"), "silu"),
        "num_channels": (tower.get("num_channels", CHANNELS), CHANNELS),
        "projector_hidden_act": (fields.get("projector_hidden_act", "gelu"), "gelu"),
        "vision_feature_layer": (fields.get("vision_feature_layer", layer), -1),
        "vision_feature_select_strategy": (
            fields.get("vision_feature_select_strategy", strategy),
            "full",
        ),
    }
    for key, (value, known) in wanted.items():
        if value != known:
            raise BadInput(
                f"{where} has {key} {short(value)} in its vision tower; only {known} is read"
            )
    theta = _theta(tower, where)
    tower = ABSENT | tower
    found = {ours: tower[theirs] for ours, theirs in WORDS.items()}
    found |= {
        "max_image_size": tower["image_size"],
        "rope_theta": theta,
        "spatial_merge_size": fields.get("spatial_merge_size", 2) if is_merged else 1,
        "projector_norm": is_merged,
        "projector_bias": fields.get("multimodal_projector_bias", not is_merged),
    }
    image_id = fields.get("image_token_index", fields.get("image_token_id"))
    return _vision(found | ({} if image_id is None else {IDS[0]: image_id}), where)


def _theta(tower: Fields, where: object) -> Any:
    """The base of the 2D rotary frequencies; "axial" is what transformers 5 calls them."""
    rope = tower.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput(
            f"{where} has rope_parameters = {short(rope)} in its vision tower, which is no JSON "
            "object"
        )
    if (kind := rope.get("rope_type", "axial")) not in ("axial", "default"):
        raise BadInput(
            f"{where} has the rope_type {short(kind)} in its vision tower; only axial is read"
        )
    if unknown := sorted(rope.keys() - {"rope_type", "rope_theta"}):
        raise BadInput(
            f"{where} has rotary parameters in its vision tower that are not supported: "
            f"{', '.join(unknown)}"
        )
    return rope.get("rope_theta", tower.get("rope_theta", THETA))


def vision_of_params(fields: Fields, where: object) -> VisionConfig:
    """Reads `vision_encoder` of a `params.json`, of which mistral-inference says what is absent.

    Raises:
        BadInput: it has parts that lechat does not have.
    """
    tower = fields["vision_encoder"]
    if not isinstance(tower, dict):
        raise BadInput(f"{where} has vision_encoder = {short(tower)}, which is no object")
    tower = dict(tower)
    merge, kind = tower.pop("spatial_merge_size", 1), tower.pop("mm_projector_id", "")
    if kind not in ("", None, PATCH_MERGE) or (merge != 1) != (kind == PATCH_MERGE):
        raise BadInput(f"{where} has mm_projector_id {short(kind)} and spatial_merge_size {merge}")
    if (channels := tower.pop("num_channels", CHANNELS)) != CHANNELS:
        raise BadInput(
            f"{where} has num_channels {short(channels)} in its vision tower, not {CHANNELS}"
        )
    found = {ours: tower.pop(theirs, None) for ours, theirs in WORDS.items()}
    size = tower.pop("image_size", None)
    found |= {
        "max_image_size": tower.pop("max_image_size", size),
        "rope_theta": tower.pop("rope_theta", THETA),
        "spatial_merge_size": merge,
        "projector_norm": tower.pop("add_pre_mm_projector_layer_norm", False),
        "projector_bias": tower.pop("adapter_bias", True),
    }
    found |= {name: tower.pop(name) for name in IDS if name in tower}
    if tower:
        key, value = next(iter(tower.items()))
        raise BadInput(f"{where} has {key} = {short(value)} in its vision_encoder: not supported")
    return _vision(found, where)


def to_vision_encoder(tower: VisionConfig) -> dict[str, Any]:
    """The `vision_encoder` of a `params.json`."""
    return {
        **{theirs: getattr(tower, ours) for ours, theirs in WORDS.items()},
        "num_channels": CHANNELS,
        "image_size": tower.max_image_size,
        "max_image_size": tower.max_image_size,
        "rope_theta": tower.rope_theta,
        "spatial_merge_size": tower.spatial_merge_size,
        "mm_projector_id": PATCH_MERGE if tower.spatial_merge_size > 1 else "",
        "add_pre_mm_projector_layer_norm": tower.projector_norm,
        "adapter_bias": tower.projector_bias,
        **{name: getattr(tower, name) for name in IDS},
    }


def seeing_fields(config: MistralConfig, text: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of a decoder, whose own is `text`, behind its tower.

    Raises:
        BadInput: transformers has no word for such a projector.
    """
    tower = config.vision
    assert tower is not None
    is_merged = tower.projector_norm
    if not is_merged and tower.spatial_merge_size > 1:
        raise BadInput(
            "transformers has no model whose projector merges patches without a norm before; "
            "convert to --to mistral or --to lechat instead"
        )
    kind = "mistral3" if is_merged else "llava"
    text = dict(text)
    del text["architectures"]
    shared = ("dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    return {
        "architectures": [SEEING[kind]],
        "model_type": kind,
        "text_config": text,
        "vision_config": {
            "model_type": "pixtral",
            **{theirs: getattr(tower, ours) for ours, theirs in WORDS.items()},
            "head_dim": tower.head_dim,
            "num_channels": CHANNELS,
            "image_size": tower.max_image_size,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_theta": tower.rope_theta,  # transformers 4
            "rope_parameters": {"rope_type": "axial", "rope_theta": tower.rope_theta},
            "initializer_range": 0.02,
        },
        **({"spatial_merge_size": tower.spatial_merge_size} if is_merged else {}),
        "multimodal_projector_bias": tower.projector_bias,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        **({} if is_merged else {"vision_feature_select_strategy": "full"}),
        "image_token_index": tower.image_token_id,
        **{key: text[key] for key in shared},
    }


def in_file_names(store: Store, where: object) -> Store:
    """The tensors of Hugging Face's seeing models by the names that they have in files.

    Those of a live model of transformers 5, which some tools save, begin otherwise.

    Raises:
        BadInput: two tensors have one name, so nobody knows which is meant.
    """
    return _renamed(store, where, "language_model.")


def without_vision(store: Store, where: object) -> Store:
    """The language model's tensors, named as if there were no other; a note says what is not there.

    Raises:
        BadInput: two tensors have one name, so nobody knows which is meant.
    """
    text = {key: one for key, one in store.tensors.items() if not VISION.match(key)}
    note = text_alone(len(store.tensors) - len(text))
    store = dataclasses.replace(store, tensors=text, notes=(*store.notes, note))
    return _renamed(store, where, "")


def _renamed(store: Store, where: object, beginning: str) -> Store:
    tensors: dict[str, Stored] = {}
    for key, one in store.tensors.items():
        name = TEXT.sub(f"{beginning}model.", key, count=1) if TEXT.match(key) else key
        name = HEAD.sub(f"{beginning}lm_head.", name, count=1) if HEAD.match(name) else name
        name = LIVE.sub("", name, count=1) if LIVE.match(name) else name
        if name in tensors:
            raise BadInput(f"{where} has {name} twice: {one.where} and {tensors[name].where}")
        tensors[name] = one
    return dataclasses.replace(store, tensors=tensors)


def _vision(found: dict[str, Any], where: object) -> VisionConfig:
    try:
        return vision_from_dict(found)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
