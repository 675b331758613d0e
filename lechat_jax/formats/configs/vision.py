"""The language model of a vision-language checkpoint, without its vision encoder.

Mistral Small 3.1, Ministral 3 and their kin are a language model behind a vision encoder.
The files have both; the text part is a model like any other once its names are.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lechat_jax.errors import BadInput
from lechat_jax.formats.stores import Store, Stored

SEEING = "mistral3"  # the model_type of transformers' Mistral3ForConditionalGeneration
# In files the language model is named first; a live model of transformers 5 is "model" first.
TEXT = re.compile(r"(?:language_model\.model|model\.language_model)\.(?=layers|embed|norm)")
HEAD = "language_model.lm_head."
VISION = re.compile(
    r"(?:model\.)?(vision_tower|multi_modal_projector|"  # Hugging Face's words, then Mistral's
    r"vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\."
)


def text_fields(fields: Mapping[str, Any], where: object) -> Mapping[str, Any]:
    """The language model's part of a `config.json`, with what is said of all of it.

    The head is the embedding where either says so, or nobody; see `without_vision`.

    Raises:
        BadInput: there is no such part.
    """
    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise BadInput(f"{where} is of a {SEEING} without a text_config, which is the part read")
    tie = "tie_word_embeddings"
    said = [part[tie] for part in (fields, text) if part.get(tie) is not None]
    return {"model_type": "mistral"} | text | {tie: any(said) or not said}


def without_vision(store: Store, where: object) -> Store:
    """The language model's tensors, named as if there were no other; a note says what is not there.

    Raises:
        BadInput: two tensors have one name, so nobody knows which is meant.
    """
    tensors: dict[str, Stored] = {}
    left_out = []
    for key, one in store.tensors.items():
        if VISION.match(key):
            left_out.append(key)
            continue
        name = TEXT.sub("model.", key, count=1) if TEXT.match(key) else key
        name = name.replace(HEAD, "lm_head.", 1) if name.startswith(HEAD) else name
        if name in tensors:
            raise BadInput(f"{where} has {name} twice: {one.where} and {tensors[name].where}")
        tensors[name] = one
    return dataclasses.replace(store, tensors=tensors, notes=(*store.notes, message_of(left_out)))


def message_of(left_out: Sequence[str]) -> str:
    """A sentence on what was left out.

    >>> message_of(["vision_tower.conv.weight", "vision_tower.norm.weight", "patch_merger.w"])
    'only the text part is read; tensors left out: 2 of vision_tower, 1 of patch_merger'
    """
    found = (VISION.match(key) for key in left_out)
    parts = collections.Counter(match[1] for match in found if match)
    counts = ", ".join(f"{n} of {part}" for part, n in parts.items()) or "none"
    return f"only the text part is read; tensors left out: {counts}"
