"""Quantization scheme of a model: which weights are int8 or int4, their parts, and config.json.

A quantised kernel is stored as several tensors: int8 as `<name>` and `<name>.scale` (see `int8`),
int4 as `<name>`, `<name>.scale`, `<name>.zero` and, with an activation order, `<name>.order` (see
`int4`). Norms are never quantised: they are a ten-thousandth of a model. Nor is the router of a
mixture of experts, as small, in which rounding would send tokens to other experts. The embedding
and the head are int8 in either format, or floats.

JAX, which takes a second to load, is not needed to convert a model.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Shaped

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import (
    EMBEDDING,
    HEAD,
    ORDER,
    SCALE,
    ZERO,
    is_expert,
    is_kernel,
    is_part,
    is_scale,
    kernel_of,
    part_of,
)
from lechat_jax.errors import BadInput
from lechat_jax.quantize.int4 import Packed, packed, unpacked
from lechat_jax.quantize.int8 import dequantize, quantized, scale_shape

Format = Literal["int8", "int4"]
QUANTIZATION = "quantization"  # key of a config that names the form
TABLES = (EMBEDDING, HEAD)
GROUP = 128  # features that share a scale in int4, if they can be had
LEAST_GROUP = 8  # of 4 bits each; scale and zero are 5 bytes more

Spec = tuple[np.dtype, tuple[int, ...]]
Parts = Mapping[str, Shaped[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Form:
    """Quantization scheme of a model's weights.

    Attributes:
        format: "int8" or "int4", of the linear layers.
        group: int4's group size: input features that share a scale.
        is_ordered: whether int4 kernels have an activation order.
        has_int8_embeddings: whether embedding and head are int8, or else floats.
    """

    format: Format
    group: int = 0
    is_ordered: bool = False
    has_int8_embeddings: bool = True

    def __str__(self) -> str:
        return self.format

    def format_of(self, name: str) -> Format | None:
        """The format of a weight: "int8", "int4", or `None` if it is not quantised.

        >>> form = Form("int4", 128)
        >>> [form.format_of(n) for n in ("blocks.0.mlp.up.kernel", "embed.kernel", "norm.scale")]
        ['int4', 'int8', None]
        """
        if not is_kernel(name):
            return None
        if name in TABLES:
            return "int8" if self.has_int8_embeddings else None
        return self.format

    def is_fixed(self, name: str) -> bool:
        """Whether a tensor of that name has a fixed dtype and is never cast."""
        return is_part(name) or self.format_of(name) is not None

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
        """Dtype and shape of each tensor of a quantised kernel, by name; empty if it is a float.

        >>> parts = Form("int4", 8).parts("blocks.0.attn.o.kernel", (40, 6, 8))
        >>> for name, (dtype, shape) in parts.items():
        ...     print(name.removeprefix("blocks.0.attn.o"), dtype, shape)
        .kernel uint8 (40, 6, 4)
        .kernel.scale float32 (40, 6)
        .kernel.zero uint8 (40, 6)
        """
        float32, uint8 = np.dtype(np.float32), np.dtype(np.uint8)
        writes = scale_shape(name, shape)
        match self.format_of(name):
            case None:
                return {}
            case "int8":
                return {name: (np.dtype(np.int8), shape), name + SCALE: (float32, writes)}
            case "int4":
                features = math.prod(shape[len(writes) :])
                grid = (*writes, features // self.group)
                found = {name: (uint8, (*shape[:-1], shape[-1] // 2))}
                found |= {name + SCALE: (float32, grid), name + ZERO: (uint8, grid)}
                experts = shape[:1] if is_expert(name) else ()
                order: Spec = (np.dtype(np.int32), (*experts, features))
                return found | ({name + ORDER: order} if self.is_ordered else {})

    def to_dict(self) -> dict[str, Any]:
        """The scheme as JSON for config.json, without default values."""
        found: dict[str, Any] = {"format": self.format}
        found |= {"group": self.group} if self.format == "int4" else {}
        found |= {"ordered": True} if self.is_ordered else {}
        return found | ({} if self.has_int8_embeddings else {"tables": "float"})


INT8 = Form("int8")


def scheme_for(quantize: Format | None, config: MistralConfig) -> Form | None:
    """The scheme for `--quantize`: int8, int4 with a group size that fits the model, or `None`.

    The group size of int4 is the largest divisor of 128 that divides all input widths.

    >>> from lechat_jax.config import preset
    >>> [scheme_for("int4", preset(name)).group for name in ("mistral-7b-v0.1", "lechat-15m")]
    [128, 32]

    Raises:
        BadInput: the format is unknown, or the model's widths have too small a common divisor
            for int4.
    """
    check_format(quantize)
    if quantize != "int4":
        return INT8 if quantize else None
    kernels = (row for name, row in config.weights.items() if is_kernel(name))
    widths = sorted({math.prod(config.shape(row.reads)) for row in kernels})
    group = math.gcd(GROUP, *widths)
    if group < LEAST_GROUP:
        raise BadInput(
            f"int4 has groups of {LEAST_GROUP} features or more, which do not divide the widths of "
            f"this model, {', '.join(map(str, widths))}; choose int8"
        )
    return Form("int4", group)


def is_quantized(names: Iterable[str]) -> bool:
    """Whether a model is quantised: whether its names include scales of kernels.

    >>> is_quantized(["embed.kernel", "norm.scale"]), is_quantized(["embed.kernel.scale"])
    (False, True)
    """
    return any(map(is_scale, names))


def form_of(weights: Mapping[str, Any]) -> Form | None:
    """Detects the quantization scheme of weights by their names and shapes; `None` for floats."""
    if not is_quantized(weights):
        return None
    has_int8_embeddings = TABLES[0] + SCALE in weights
    name = next((kernel_of(name) for name in weights if part_of(name) == ZERO), None)
    if name is None:
        return Form("int8", has_int8_embeddings=has_int8_embeddings)
    kernel, scale = weights[name], weights[name + SCALE]
    group = kernel.shape[-1]  # of one that is by groups already
    if kernel.dtype == np.uint8:
        group = 2 * math.prod(kernel.shape) // math.prod(scale.shape)
    return Form("int4", group, name + ORDER in weights, has_int8_embeddings)


def in_parts(
    form: Form,
    name: str,
    kernel: Shaped[np.ndarray, "..."],
    where: object = "",
    release: Callable[[], None] = lambda: None,
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Quantizes a float kernel (round to nearest): its tensors by name; see `int8` and `int4`.

    Raises:
        BadInput: a weight is not finite; `where`, the name by default, is named.
    """
    if form.format_of(name) == "int8":
        numbers, scale = quantized(name, kernel, where, release)
        return {name: numbers, name + SCALE: scale}
    made = packed(name, kernel, form.group, where, release)
    found = {name: made.kernel, name + SCALE: made.scale, name + ZERO: made.zero}
    if form.is_ordered:
        dtype, shape = form.parts(name, kernel.shape)[name + ORDER]
        found[name + ORDER] = np.zeros(shape, dtype) + np.arange(shape[-1], dtype=dtype)
    return found


def numbers_of(name: str, parts: Parts, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Dequantizes the tensors of a kernel to float32, in the given shape."""
    if name + ZERO not in parts:
        return dequantize(parts[name], parts[name + SCALE])
    made = Packed(parts[name], parts[name + SCALE], parts[name + ZERO], parts.get(name + ORDER))
    return unpacked(made).reshape(shape)


def quantize_weights(weights: dict[str, Any], form: Form = INT8) -> dict[str, Any]:
    """Quantizes a model's `Weights` on the default device; the dict that is passed in is emptied.

    So there are never two models in memory: each kernel is released once it is quantised, unless
    there is another reference to it.

    Raises:
        BadInput: a weight is not finite; it is named.
    """
    import jax

    found = {}
    for name in list(weights):
        leaf = weights.pop(name)
        if form.format_of(name):
            parts = in_parts(form, name, np.asarray(leaf))
            found |= jax.block_until_ready(jax.device_put(parts))
        else:
            found[name] = leaf
        del leaf
    return found


def check_format(quantize: str | None) -> None:
    """Validates a quantization format: "int8", "int4" or `None`.

    Raises:
        BadInput: it is anything else.
    """
    if quantize not in (None, *get_args(Format)):
        raise BadInput(
            f"weights are quantised to {' or '.join(get_args(Format))} here, not to {quantize}; "
            "leave it out or say one of these"
        )


def pop_format(fields: dict[str, Any], path: Path) -> Form | None:
    """Removes `quantization` from a config read from `path` and parses it to a scheme, or `None`.

    >>> fields = {"dim": 40, "quantization": {"format": "int8"}}
    >>> str(pop_format(fields, Path("config.json"))), fields
    ('int8', {'dim': 40})

    Raises:
        BadInput: the scheme is not known.
    """
    said = fields.pop(QUANTIZATION, None)
    if said is None:
        return None
    if isinstance(said, dict) and said.get("format") in get_args(Format):
        has_int8_embeddings = said.get("tables") != "float"
        group = said.get("group", 0)
        if type(group) is int:
            form = Form(said["format"], group, said.get("ordered") is True, has_int8_embeddings)
            is_int8 = form.format == "int8"
            if form.to_dict() == said and (is_int8 or (group >= LEAST_GROUP and not group % 2)):
                return form
    raise BadInput(
        f"{path} says {QUANTIZATION} {json.dumps(said)}, and only int8 and int4 as lechat writes "
        "them are known here; convert the model from its original"
    )
