"""Reads GGUF: the config, and the tensors as the numbers that they stand for."""

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import EMBEDDING, HEAD, TABLE
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs.common import config_of, uniform
from lechat_jax.formats.gguf.architecture import (
    ARCHITECTURES,
    FLOATS,
    NO_SINK,
    SINKS,
    WINDOWED,
    library,
    read_positions,
)
from lechat_jax.formats.gguf.vocabulary import tokenizer_files
from lechat_jax.formats.stores import Store, Stored


class Opened(NamedTuple):
    """What a GGUF file holds.

    Attributes:
        config: the model.
        store: its tensors.
        tokenizer_files: its tokenizer, as Mistral's file.
        positions: how many the model was made for, if the file says it.
        control_ids: BOS and EOS ids.
    """

    config: MistralConfig
    store: Store
    tokenizer_files: tuple[Path, ...]
    positions: int | None
    control_ids: dict[str, Any]


def open_gguf(path: Path) -> Opened:
    """Opens a GGUF file; tensors are read one by one, and dequantised then.

    Raises:
        BadInput: it is none, is damaged, or its architecture computes another function.
        OSError: it cannot be read.
    """
    gguf = library()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: _short(field.contents()) for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise BadInput(f"{path} is no whole GGUF file: {error}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tensors, path)
    ids = {name: fields.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    if (turn := fields.get("tokenizer.ggml.eot_token_id")) not in (None, ids["eos_token_id"]):
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    return Opened(
        config,
        _store(gguf, reader, path),
        tokenizer_files(fields),
        fields.get(f"{fields['general.architecture']}.context_length"),
        {name: value for name, value in ids.items() if value is not None},
    )


def _short(value: Any) -> Any:
    """A float32 as the shortest number that is written so: 1e-5 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> MistralConfig:
    """The model that the fields describe."""
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise BadInput(
            f"{path} is of the architecture {arch!r}; only {', '.join(ARCHITECTURES)} are read"
        )

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{name}", default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            return value[0]
        if value is None or isinstance(value, list):
            raise BadInput(f"{path} says {arch}.{name} = {value}; one value for all layers is read")
        return value

    if f"{TABLE[EMBEDDING].gguf}.weight" not in tensors:
        raise BadInput(f"{path} has no embedding; a GGUF of a whole model is read")
    n_layers, n_heads, dim = map(field, ("block_count", "attention.head_count", "embedding_length"))
    found = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": field("attention.head_count_kv", n_heads),
        "head_dim": field("attention.key_length", dim // n_heads),
        "hidden_dim": field("feed_forward_length"),
        "vocab_size": int(tensors[f"{TABLE[EMBEDDING].gguf}.weight"].shape[-1]),
        "norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base", 10000.0),
        "sliding_window": None,
        "tied_embeddings": f"{TABLE[HEAD].gguf}.weight" not in tensors,
    }
    if n_experts := field("expert_count", 0):
        found |= {"n_experts": n_experts, "n_experts_per_token": field("expert_used_count")}
    if arch == WINDOWED:
        window = field("attention.sliding_window")
        pattern = fields.get(f"{arch}.attention.sliding_window_pattern") or [True] * n_layers
        found["sliding_window"] = uniform([window if is_here else None for is_here in pattern])
        _check_scales(fields, tensors, path)
    parts = {name: vars(part) for name, part in read_positions(field, path).items()}
    return config_of(found | parts, path)


def _check_scales(fields: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> None:
    """Raises `BadInput` for what Granite has and Mistral has not: sinks that weigh, and scales."""
    scales = ("logit_scale", "residual_scale", "embedding_scale", "attention.scale")
    said = [name for name in scales if fields.get(f"{WINDOWED}.{name}", 1.0) not in (0.0, 1.0)]
    sinks = (tensor.data for name, tensor in tensors.items() if name.endswith(SINKS))
    if any(np.max(sink) > NO_SINK / 2 for sink in sinks):
        said.append("attention sinks")
    if said:
        raise BadInput(f"{path} is a Granite with {' and '.join(said)}, and no Mistral")


def _store(gguf: Any, reader: Any, path: Path) -> Store:
    """The tensors by their keys, as numbers of one dtype: that of the kernels, if it is a float.

    Norms, which are float32 in a file of shorter floats, are read in the type of those.
    """
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    quantized = sorted(kinds - FLOATS.keys())
    dtype = FLOATS["F32" if quantized else next(kind for kind in FLOATS if kind in kinds)]

    def read_of(tensor: Any, shape: tuple[int, ...]) -> Callable[[], Shaped[np.ndarray, "..."]]:
        def read() -> Shaped[np.ndarray, "..."]:
            data, kind = tensor.data, tensor.tensor_type
            if kind.name == "BF16":
                data = data.reshape(-1).view(FLOATS["BF16"])
            elif kind.name in quantized:
                data = gguf.quants.dequantize(data, kind)
            return np.asarray(data).reshape(shape).astype(dtype, copy=False)

        return read

    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(map(int, reversed(tensor.shape)))
        if not tensor.name.endswith(SINKS):
            where = f"{tensor.name} in {path}"
            tensors[tensor.name] = Stored(dtype, shape, where, read_of(tensor, shape))

    def release() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            reader.data._mmap.madvise(mmap.MADV_DONTNEED)

    name = f"quantised ({', '.join(quantized)})" if quantized else None
    return Store(tensors, release, quantization=name, files=(path,))
