"""Weights in lechat's own format (safetensors): loading into JAX, sharded or not, and saving.

<folder>/
  config.json         the model, in the words of `MistralConfig`
  model.safetensors   or shards and their index; names and shapes are those of `weights_of`
                      or, if config.json has `"quantization": {"format": "int8"}` or int4 beside
                      the model, those of the parts that `quantize` makes of them
  tokenizer.model.v1  the tokenizer, or another of Mistral's; optional
  SHA256SUMS          every other file, as `sha256sum -c SHA256SUMS` reads it
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from lechat_jax.checkpoint.stored_weights import StoredWeights
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_part
from lechat_jax.devices.host_memory import host_empty
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import MANIFEST, sync, write_manifest
from lechat_jax.files.safetensors import write_tensors
from lechat_jax.formats.folder import CONFIG
from lechat_jax.model.binding import Weights, shapes_of
from lechat_jax.quantize.scheme import QUANTIZATION, Form, Format, form_of, in_parts, scheme_for
from lechat_jax.tokenizer.tokenizer import Tokenizer

FLOATS = tuple(np.dtype(name) for name in (jnp.bfloat16, "float16", "float32", "float64"))
PIECE = 1 << 24  # bytes of a tensor that are copied at once
SHARD_BYTES = 5_000_000_000  # of a file, as in Hugging Face's repositories

# Where each weight goes: all to one sharding, or each to its own, by name.
Placement = Sharding | Mapping[str, Sharding] | Callable[[str], Sharding]


def load_weights(
    path: Path | StoredWeights,
    *,
    dtype: DTypeLike | None = None,
    shardings: Placement | None = None,
    check: bool = True,
    quantize: Format | None = None,
) -> tuple[MistralConfig, Weights]:
    """Loads weights of any format: the model's config, and its weights on their devices.

    One tensor is in transit at a time, and pages of the file are released once read. A cast
    from 2 to 4 GB on a CPU took 1.00 models of memory and 1.7 s; reading all and then placing
    took 2.0 models and 9 s. With a sharding each device gets its own slice, and unless the
    files are verified, nothing else of them is read.

    No array shares memory with the files, which may be deleted at once: a device array on a CPU
    can be a view of its source, and truncating or rewriting a mapped file would crash the
    process or change the model. The copy that this takes is the only one, since JAX adopts
    aligned memory, and it casts on the way.

    Args:
        path: a folder of lechat's, Hugging Face's or Mistral's, a GGUF file, or what was opened
            of them.
        dtype: dtype to cast to; by default each tensor stays as stored. Of a quantised model
            only the norms are cast.
        shardings: by default unsharded and uncommitted on the default device, like new arrays.
        check: also verify SHA256SUMS, which lechat's format has, at 0.7 s per GB and core, a file
            per core. Otherwise only damage of headers is noticed.
        quantize: quantise the kernels to int8 or int4 on the way, one at a time on the host, at
            1e9 weights per second. Kernels that are stored quantised stay as they are.

    Raises:
        BadInput: a file is damaged, it is named; tensors are missing, unexpected, or of another
            shape or dtype than the model's, all are named; or a number overflows the dtype, or
            the dtype is not enabled in JAX (float64).
    """
    stored = path if isinstance(path, StoredWeights) else StoredWeights.open(path)
    wanted = scheme_for(quantize, stored.config)
    load = functools.partial(_load, stored, dtype, shardings, wanted)
    if not check:
        return stored.config, load()
    with ThreadPoolExecutor(1) as thread:  # hashing keeps one core busy, and placing another
        checked = thread.submit(stored.fault)
        try:
            weights = load()
        finally:  # what is damaged may also be why it could not be read
            if reason := checked.result():
                raise BadInput(
                    f"{stored.path} is not as it was saved: {reason}; copy or convert it again"
                )
    return stored.config, weights


def _load(
    source: StoredWeights,
    dtype: DTypeLike | None,
    shardings: Placement | None,
    wanted: Form | None,
) -> Weights:
    """Loads the weights for `load_weights`, without verifying SHA256SUMS."""
    folder, stored, tensors = source.path, source.form, source.store.tensors
    release = source.store.release
    _check_fit(folder, weight_shapes(source.config, stored), tensors)
    weights: Weights = {}

    def place(name: str, view: Shaped[np.ndarray, "..."], dtype: np.dtype) -> None:
        placed = _place(view, dtype, _sharding(shardings, name), release)
        weights[name] = jax.block_until_ready(placed)

    for name, tensor in tensors.items():  # as they lie on the disk
        view = tensor.read()
        is_fixed = stored is not None and stored.is_fixed(name)
        if wanted and not stored and wanted.format_of(name):
            parts = in_parts(wanted, name, view, tensor.where, release)
            for key, part in parts.items():
                place(key, part, part.dtype)
        else:
            target = np.dtype(tensor.dtype if dtype is None or is_fixed else dtype)
            if jax.dtypes.canonicalize_dtype(target) != target:
                raise BadInput(f"{tensor.where} is {target}, which needs jax_enable_x64")
            try:
                place(name, view, target)
            except FloatingPointError:
                raise BadInput(f"{tensor.where} has numbers too large for {target}") from None
        release()
    return {name: weights[name] for name in weight_shapes(source.config, stored or wanted)}


def save_weights(
    folder: Path,
    config: MistralConfig,
    weights: Weights,
    tokenizer_file: Path | None,
    *,
    shard_bytes: int | None = SHARD_BYTES,
) -> None:
    """Saves weights as a new folder in lechat's format, atomically.

    Raises:
        BadInput: the folder exists or cannot be written, or the weights are not the model's.
    """
    if folder.exists():
        raise BadInput(f"{folder} exists already; choose another folder")
    how = form_of(weights)
    _check_fit(folder, weight_shapes(config, how), weights)
    infos = [(name, np.dtype(leaf.dtype), leaf.shape) for name, leaf in weights.items()]
    partial = folder.with_name(f".{folder.name}.partial")
    digests: dict[str, str] = {}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fields = config.to_dict() | ({QUANTIZATION: how.to_dict()} if how else {})
        text = json.dumps(fields, indent=2) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        if tokenizer_file:
            name = Tokenizer.from_file(tokenizer_file).file_name
            shutil.copyfile(tokenizer_file, partial / name)
        write_tensors(
            partial,
            "model",
            infos,
            lambda name: np.asarray(weights[name]),
            shard_bytes=shard_bytes,
            metadata={"format": "lechat"},
            on_file=lambda path, digest: digests.update({path.name: digest}),
        )
        write_manifest(partial, digests)
        for path in (partial / MANIFEST, partial / CONFIG, partial):
            sync(path)
        os.rename(partial, folder)
        sync(folder.parent)
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.filename}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def weight_shapes(
    config: MistralConfig, form: Form | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each weight by name, as initialised or quantised."""
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for name, leaf in shapes_of(config).items():
        parts = form.parts(name, leaf.shape) if form else {}
        for key, (dtype, shape) in parts.items():
            shapes[key] = jax.ShapeDtypeStruct(shape, dtype)
        if not parts:
            shapes[name] = leaf
    return shapes


def weights_bytes(config: MistralConfig, dtype: DTypeLike, form: Form | None = None) -> int:
    """Bytes of memory of the weights in a dtype; quantised kernels have their own.

    >>> from lechat_jax.config import preset
    >>> config = preset("mistral-7b-v0.1")
    >>> [round(weights_bytes(config, dtype) / 1e9, 2) for dtype in ("float32", "bfloat16")]
    [28.97, 14.48]
    >>> of_gptq = Form("int4", 128, is_ordered=True, has_int8_embeddings=False)
    >>> forms = scheme_for("int8", config), scheme_for("int4", config), of_gptq
    >>> [round(weights_bytes(config, "bfloat16", form) / 1e9, 2) for form in forms]
    [7.25, 4.03, 4.29]
    >>> round(weights_bytes(preset("mixtral-8x7b-v0.1"), "bfloat16", of_gptq) / 1e9, 2)
    25.59
    """
    total = 0
    for name, leaf in weight_shapes(config, form).items():
        is_fixed = form is not None and form.is_fixed(name)
        total += leaf.size * np.dtype(leaf.dtype if is_fixed else dtype).itemsize
    return total


def _check_fit(
    folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], found: Mapping[str, Any]
) -> None:
    """Raises `BadInput` that lists all missing, unexpected and mismatched tensors."""
    both = [name for name in wanted if name in found]
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is left over" for name in found if name not in wanted]
    faults += [
        f"{name} is {list(found[name].shape)} instead of {list(wanted[name].shape)}"
        for name in both
        if found[name].shape != wanted[name].shape
    ]
    faults += [
        f"{n} is {found[n].dtype}" for n in both if not _may_be(wanted[n].dtype, n, found[n])
    ]
    if faults:
        raise BadInput(
            f"the weights of {folder} are not those of its {CONFIG}: {', '.join(faults)}"
        )


def _may_be(dtype: np.dtype, name: str, found: Any) -> bool:
    """Whether a stored dtype is allowed: a quantised part's own, or else any float."""
    if np.issubdtype(dtype, np.integer) or is_part(name):
        return np.dtype(found.dtype) == dtype
    return np.dtype(found.dtype) in FLOATS


def _sharding(shardings: Placement | None, name: str) -> Sharding | None:
    if shardings is None or isinstance(shardings, Sharding):
        return shardings
    return shardings[name] if isinstance(shardings, Mapping) else shardings(name)


def _place(
    view: Shaped[np.ndarray, "..."],
    dtype: np.dtype,
    sharding: Sharding | None,
    release: Callable[[], None],
) -> Array:
    if sharding is None:
        return jax.device_put(_copy(view, dtype, release))
    return jax.make_array_from_callback(
        view.shape, sharding, lambda index: _copy(view[index], dtype, release), dtype=dtype
    )


def _copy(
    view: Shaped[np.ndarray, "..."], dtype: np.dtype, release: Callable[[], None]
) -> Shaped[np.ndarray, "..."]:
    """Copies a tensor into aligned memory of its own, which JAX on a CPU adopts without a copy.

    Cast by numpy, at 7 GB/s; XLA on a CPU does 0.2 (two cores, bfloat16 to float32). Only a
    piece of the file is in memory at a time, since `release` frees what was read.
    """
    copy = host_empty(view.shape, dtype)
    rows = max(1, PIECE * len(view) // max(1, view.nbytes)) if view.ndim else 1
    for first in range(0, len(view) if view.ndim else 1, rows):
        part = slice(first, first + rows) if view.ndim else ()
        piece = view[part]
        if (view.dtype, dtype) == (jnp.bfloat16, np.float16):
            piece = piece.astype(np.float32)  # numpy notices when a number becomes infinite
        with np.errstate(over="raise"):
            np.copyto(copy[part], piece, casting="unsafe")
        release()
    return copy
