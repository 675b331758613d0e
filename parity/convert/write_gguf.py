"""Writes GGUF: one file of the model's fields, its tokenizer and its tensors, quantised or not."""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import EMBEDDING, HEAD, is_kernel
from lechat_jax.files.safetensors import OnSlab, Read, Wanted, in_pieces
from lechat_jax.formats.configs.hugging_face import positions_of
from lechat_jax.formats.gguf.architecture import (
    FLOATS,
    NO_SINK,
    SINKS,
    WINDOWED,
    add_positions,
    architecture,
    library,
)
from lechat_jax.formats.gguf.vocabulary import add_vocabulary
from lechat_jax.formats.names import names
from lechat_jax.formats.open_model import POSITIONS
from lechat_jax.formats.source import Source
from lechat_jax.tokenizer.jinja_template import chat_template_in
from parity.convert.write import control_ids_of, write_tokenizer

Quantized = Literal["q8_0", "q5_0", "q4_0"]
BLOCK = 32  # numbers that share a scale
LONG_ROW = (
    4096  # numbers that the library quantises at once, a multiple of BLOCK; short ones are slow
)


def write_gguf(
    path: Path,
    source: Source,
    dtype: np.dtype,
    quantized: Quantized | None,
    infos: Sequence[Wanted],
    read: Read,
    on_bytes: Callable[[int], None],
    on_slab: OnSlab,
) -> None:
    """Writes a model as a GGUF file, a piece of a tensor at a time.

    Norms and routers are float32, as llama.cpp wants them. With `quantized` kernels, embedding and
    head are q8_0, and a kernel whose rows are no whole blocks of 32 is float32.

    Args:
        path: the new file.
        source: the model and its tokenizer.
        dtype: of kernels that are not quantised; float64 becomes float32, the longest in GGUF.
        quantized: of kernels that are.
        infos: name, dtype and shape of each tensor.
        read: gives a tensor by name.
        on_bytes: called with the number of bytes just read.
        on_slab: called with each piece of each tensor, flat, before it is written; may raise.

    Raises:
        BadInput: the package `gguf` or a tokenizer is missing, or llama.cpp has no architecture
            for the model.
    """
    gguf, config = library(), source.config
    writer = gguf.GGUFWriter(path, architecture(config))
    kind = quantized or next((name for name, of in FLOATS.items() if of == dtype), "F32")
    _add_model(gguf, writer, source, kind)
    with tempfile.TemporaryDirectory(prefix="lechat-") as made:
        folder = Path(made)
        write_tokenizer(folder, "lechat", source)
        bos_id, eos_id = control_ids_of(source)
        eos_ids = eos_id if isinstance(eos_id, list) else [eos_id]
        add_vocabulary(gguf, writer, folder, config.vocab_size, bos_id, eos_ids)
        if template := chat_template_in(folder):
            writer.add_chat_template(template)
    ours = {key: name for name, key in names(config, "gguf").items()}
    kinds = {
        key: gguf.GGMLQuantizationType[_kind(ours[key], shape, kind)] for key, _, shape in infos
    }
    for key, _, shape in infos:
        block, size = gguf.GGML_QUANT_SIZES[kinds[key]]
        in_bytes = (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(key, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), kinds[key])
    sinks = _sinks(config)
    for key, sink in sinks.items():
        writer.add_tensor_info(key, sink.shape, sink.dtype, sink.nbytes)
    writer.open_output_file()
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        for key, dtype_read, shape in infos:
            writer.write_padding(file, file.tell())
            for piece in in_pieces(key, read(key), dtype_read, shape):
                on_slab(key, piece)
                numbers = piece.astype(np.float32, copy=False)
                rows = numbers.reshape(-1, math.gcd(numbers.size, LONG_ROW))
                gguf.quants.quantize(rows, kinds[key]).tofile(file)
                on_bytes(piece.nbytes)
        for sink in sinks.values():
            writer.write_padding(file, file.tell())
            sink.tofile(file)
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _kind(name: str, shape: Sequence[int], kind: str) -> str:
    """The type of a tensor in GGUF's words, where kernels are of that kind."""
    if kind not in FLOATS and name in (EMBEDDING, HEAD):
        kind = "q8_0"
    is_cut = kind in FLOATS or shape[-1] % BLOCK == 0
    return kind.upper() if is_kernel(name) and is_cut else "F32"


def _sinks(config: MistralConfig) -> dict[str, Float[np.ndarray, "N"]]:
    """The attention sinks of each layer, which a windowed model must have and which do nothing."""
    if architecture(config) != WINDOWED:
        return {}
    sink = np.full(config.n_heads, NO_SINK, np.float32)
    return {f"blk.{i}.{SINKS}": sink for i in range(config.n_layers)}


def _add_model(gguf: Any, writer: Any, source: Source, kind: str) -> None:
    """Writes the fields of the model's shape."""
    config = source.config
    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind.upper()}"
    writer.add_type("model")
    writer.add_name(source.path.resolve().name.removesuffix(".gguf"))
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(positions_of(config, source.metadata.get(POSITIONS)))
    writer.add_block_count(config.n_layers)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.n_experts:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.n_experts_per_token)
    if any(config.windows):
        writer.add_logit_scale(1.0)
        writer.add_sliding_window(next(filter(None, config.windows)))
        writer.add_sliding_window_pattern([window is not None for window in config.windows])
    add_positions(gguf, writer, config)
