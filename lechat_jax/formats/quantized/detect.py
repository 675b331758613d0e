"""Which quantisation a config names, quant_method and its fields: a reader for it, or a refusal.

Hugging Face's `quantization_config` has a `quant_method` and then that method's own words;
Mistral's `params.json` has `quantization`, or the same `quantization_config`.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lechat_jax.errors import BadInput
from lechat_jax.formats.quantized.fp8 import Block, scaled_store
from lechat_jax.formats.quantized.gptq import LAYOUTS, packed_store
from lechat_jax.formats.quantized.nvfp4 import GROUP, nvfp4_store
from lechat_jax.formats.stores import Store

Fields = Mapping[str, Any]
INSTEAD = "convert the model that it was made from"
KEYS = ("quantization_config", "quantization")  # of Hugging Face's config, and of params.json


class Quantization(NamedTuple):
    """How weights are stored, and how they are read.

    Attributes:
        name: for messages.
        read: the same tensors as weights.
    """

    name: str
    read: Callable[[Store], Store]


def take_quantization(fields: dict[str, Any], where: object) -> Quantization | None:
    """Takes the quantisation out of a config's `fields`; `None` if there is none.

    Of a model that sees some programs write it into the `text_config`, which it is about.

    >>> fields = {"dim": 40, "quantization": {"qformat_weight": "fp8_e4m3"}}
    >>> take_quantization(fields, "params.json").name, fields
    ('FP8', {'dim': 40})

    Raises:
        BadInput: it is in a way that is not read here; it is named.
    """
    text = fields.get("text_config")
    parts = (fields, text) if isinstance(text, dict) else (fields,)
    found = {key: value for part in parts for key in KEYS if (value := part.pop(key, None))}
    if not found:
        return None
    ((key, value),) = list(found.items())[:1]
    if not isinstance(value, dict):
        raise BadInput(f"{where} has {key} = {json.dumps(value)}, which is no JSON object")
    if "qformat_weight" in value:
        return _mistrals_own(value, where)
    method = value.get("quant_method")
    if method not in METHODS:
        raise BadInput(
            f"{where} says that its weights are quantised by {method}, which is not read here, "
            f"only {', '.join(METHODS)}; {INSTEAD}"
        )
    return METHODS[method](value, where)


def _mistrals_own(value: Fields, where: object) -> Quantization:
    if (kind := value["qformat_weight"]) != "fp8_e4m3":
        raise BadInput(
            f"{where} has weights of the type {kind}, and only fp8_e4m3 is read here; {INSTEAD}"
        )
    return Quantization("FP8", functools.partial(scaled_store, block=None))


def _fp8(value: Fields, where: object) -> Quantization:
    if (kind := value.get("fmt", "e4m3")) != "e4m3":
        raise BadInput(
            f"{where} has weights of the type {kind}, and only e4m3 is read here; {INSTEAD}"
        )
    return Quantization("FP8", functools.partial(scaled_store, block=_block(value, where)))


def _block(value: Fields, where: object, key: str = "weight_block_size") -> Block | None:
    sizes = value.get(key)
    if sizes is None:
        return None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(_is_size(n) for n in sizes):
        raise BadInput(f"{where} has {key} = {json.dumps(sizes)}, which is no height and width")
    return Block(*sizes)


def _is_size(n: Any) -> bool:
    return type(n) is int and n > 0


def _compressed_tensors(value: Fields, where: object) -> Quantization:
    """Several groups of layers may be stored alike; in different ways they are refused."""
    for key in ("sparsity_config", "transform_config"):
        if (there := value.get(key)) and there.get("format") != "dense":
            raise BadInput(
                f"{where} has a {key} of compressed-tensors, which is not read here; {INSTEAD}"
            )
    groups = value.get("config_groups") or {}
    kinds = {json.dumps(group.get("weights"), sort_keys=True) for group in groups.values()}
    weights = json.loads(kinds.pop()) if len(kinds) == 1 else None
    if not weights:
        raise BadInput(
            f"{where} has layers quantised in {len(kinds) + bool(groups)} ways by "
            f"compressed-tensors, and one is read here; {INSTEAD}"
        )
    kind, strategy = (weights.get("type"), weights.get("num_bits")), weights.get("strategy")
    size = weights.get("group_size") if strategy == "group" else None
    if value.get("format") == "pack-quantized" and kind in (("int", 4), ("int", 8)):
        return _grouped("compressed-tensors", kind[1], size, where)
    if value.get("format") == "nvfp4-pack-quantized" and kind == ("float", 4):
        if (strategy, weights.get("group_size")) != ("tensor_group", GROUP):
            raise BadInput(
                f"{where} has NVFP4 weights in groups of {weights.get('group_size')} by the "
                f"strategy {strategy}, and only {GROUP} by tensor_group are read here; {INSTEAD}"
            )
        return Quantization("NVFP4", nvfp4_store)
    if kind in (("float", 8), ("int", 8)) and weights.get("symmetric", True):
        block = _block(weights, where, "block_structure")
        if size is not None and _is_size(size):
            block = Block(1, size)
        name = "FP8" if kind[0] == "float" else "int8 of compressed-tensors"
        return Quantization(name, functools.partial(scaled_store, block=block))
    raise BadInput(
        f"{where} has {weights.get('num_bits')}-bit {weights.get('type')} weights of "
        f"compressed-tensors, which are not read here; {INSTEAD}"
    )


def _grouped(layout: str, bits: Any, size: Any, where: object) -> Quantization:
    size = None if size == -1 else size
    if bits not in (4, 8) or not (size is None or _is_size(size)):
        raise BadInput(
            f"{where} has weights of {bits} bits in groups of {size}, and 4 or 8 bits are read "
            f"here; {INSTEAD}"
        )
    read = functools.partial(packed_store, layout=LAYOUTS[layout], bits=bits, size=size)
    return Quantization(f"int{bits} of {layout.removesuffix('_v2').upper()}", read)


def _gptq(value: Fields, where: object) -> Quantization:
    layout = value.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise BadInput(
            f"{where} has the checkpoint_format {layout} of GPTQ, and gptq and gptq_v2 are read "
            f"here; {INSTEAD}"
        )
    return _grouped(layout, value.get("bits"), value.get("group_size"), where)


def _awq(value: Fields, where: object) -> Quantization:
    if (version := str(value.get("version", "gemm")).lower()) != "gemm":
        raise BadInput(
            f"{where} has the version {version} of AWQ, and gemm is read here; {INSTEAD}"
        )
    if (bits := value.get("bits", value.get("w_bit"))) != 4:
        raise BadInput(f"{where} has weights of {bits} bits of AWQ, and 4 are read here; {INSTEAD}")
    return _grouped("awq", bits, value.get("group_size", value.get("q_group_size")), where)


METHODS: dict[str, Callable[[Fields, object], Quantization]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
