"""Opens weights of any format and checks that its tensors are there and fit its config.

A repository often holds the same weights twice; Hugging Face's index is preferred to
Mistral's consolidated file, and safetensors to a pickle. Files are never looked for by a
pattern, which would mix them.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.safetensors_header import check_inside, parse_json
from lechat_jax.formats.configs.hugging_face import from_hugging_face
from lechat_jax.formats.configs.mistral import contradiction, from_params
from lechat_jax.formats.configs.rope import scale_note
from lechat_jax.formats.configs.vision import SEEING, in_file_names, without_vision
from lechat_jax.formats.folder import (
    ADAPTERS,
    CONFIG,
    OF_TEXT,
    PARAMS,
    PICKLED,
    Kind,
    fault_of,
    has_safetensors,
    kind_of,
    read_config,
)
from lechat_jax.formats.fused_experts import unfused
from lechat_jax.formats.gguf.read import Opened, open_gguf
from lechat_jax.formats.names import match, names, shapes, tied_head
from lechat_jax.formats.quantized.detect import Quantization, take_quantization
from lechat_jax.formats.source import Source, SourceFormat, format_of
from lechat_jax.formats.stores import Store, Stored, dequantized_store, safetensors_store
from lechat_jax.shell import command
from lechat_jax.tokenizer.vocabulary import control_ids

DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32), np.dtype(float))
POSITIONS = "max_position_embeddings"
KEPT = ("source", "revision", "step", POSITIONS)  # of the metadata, from copy to copy
SLAB = 1 << 22  # elements compared at once

# Reads the tensors of PyTorch's pickles, for which lechat has no code: parity's conversion has.
ReadPickles = Callable[[Sequence[Path], MistralConfig], Store]


def open_model(
    path: Path,
    *,
    rope_theta: float | None = None,
    metadata: dict[str, str] | None = None,
    verify: bool = True,
    read_pickles: ReadPickles | None = None,
    text_only: bool = False,
) -> Source:
    """Opens the weights in a folder of lechat's, Hugging Face's or Mistral's, or in a GGUF file.

    Args:
        path: the folder or file.
        rope_theta: for a `params.json` that does not say it.
        metadata: where the weights come from, if that is known.
        verify: compare what has checksums with them, at half a second a GB; without, the
            caller does it with `fault_of`.
        read_pickles: reads files of `torch.save`; by default they are refused.
        text_only: without the vision tower, if there is one.

    Raises:
        BadInput: there is nothing there that can be read, or it is damaged, or its config
            and its weights do not fit.
    """
    metadata = metadata or {}
    try:
        kind: Kind = kind_of(path)
        if kind == "gguf":
            return _gguf(path)
        if kind == "lechat":
            source = _lechat(path, verify)
            return source.text if text_only else source
        if kind == "torch":
            config, _ = read_config(path)
            store = _pickled([path / PICKLED], config, read_pickles)
            source = _source("torch", path, config, store, metadata)
            return source.text if text_only else source
        if kind == "hf":
            return _hugging_face(path, metadata, text_only)
        if kind == "mistral":
            return _mistral(path, rope_theta, metadata, read_pickles, text_only)
    except OSError as error:
        raise BadInput(f"{error.filename or path} cannot be read: {error.strerror}") from error
    raise BadInput(f"{path} is a training run, whose weights are in its checkpoints")


def _hugging_face(folder: Path, metadata: dict[str, str], text_only: bool) -> Source:
    path = folder / CONFIG
    fields = parse_json(path.read_bytes(), path)
    quantization = take_quantization(fields, path)
    config = from_hugging_face(fields, path, text_only)
    if not has_safetensors(folder, "model"):
        for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
            if (folder / name).is_file():
                raise BadInput(
                    f"{folder} has its weights in {name}, a pickle; save the model as safetensors"
                )
    sees = fields["model_type"] in SEEING
    text = fields["text_config"] if sees else fields
    if type(positions := text.get(POSITIONS)) is int:
        metadata = {**metadata, POSITIONS: str(positions)}
    store = safetensors_store(folder, "model")
    if sees:
        store = (without_vision if text_only else in_file_names)(store, folder)
        if tied_head(config, "hf") in store.tensors:  # transformers believes the weights, too
            config = dataclasses.replace(config, tied_embeddings=False)
    store = unfused(store, config)
    notes = [scale_note(text, path)]
    if (params := folder / PARAMS).is_file():
        notes.append(contradiction(config, parse_json(params.read_bytes(), params), params))
    store = dataclasses.replace(store, notes=(*store.notes, *filter(None, notes)))
    source = _source("hf", folder, config, _as_weights(store, quantization), metadata)
    said = fields | {key: value for key, value in text.items() if value is not None}
    return dataclasses.replace(source, control_ids=control_ids(folder, said))


def _mistral(
    folder: Path,
    rope_theta: float | None,
    metadata: dict[str, str],
    read_pickles: ReadPickles | None,
    text_only: bool,
) -> Source:
    path = folder / PARAMS
    fields = parse_json(path.read_bytes(), path)
    quantization = take_quantization(fields, path)
    config = from_params(fields, path, rope_theta, text_only)
    old = folder / "consolidated.00.pth"
    first = sorted(folder.glob("consolidated.[0-9][0-9].pt"))  # of the first Mixtral, all are read
    if has_safetensors(folder, "consolidated") or not (old.is_file() or first):
        if old.is_file():
            print(f"{folder} has {old.name} too; the safetensors are read", file=sys.stderr)
        store = safetensors_store(folder, "consolidated")
    elif old.is_file() and (folder / "consolidated.01.pth").exists():
        raise BadInput(f"{folder} has its weights cut into consolidated.00.pth, .01.pth and so on")
    else:
        store = _pickled([old] if old.is_file() else first, config, read_pickles)
    if fields.get("vision_encoder") and text_only:
        store = without_vision(store, folder)
    if (folder / ADAPTERS[1]).is_file():
        said = f"{ADAPTERS[1]} beside it is not merged; for that say --adapter {folder}"
        store = dataclasses.replace(store, notes=(*store.notes, said))
    return _source("mistral", folder, config, _as_weights(store, quantization), metadata)


def _pickled(files: Sequence[Path], config: MistralConfig, read: ReadPickles | None) -> Store:
    """The tensors of files of `torch.save`.

    Raises:
        BadInput: nobody here reads them; the message gives the conversion.
    """
    for path in files:
        check_inside(path.parent, path)
    if read is None:
        folder = files[0].parent
        convert = command("parity.convert", folder, f"{folder}-lechat", to="lechat")
        raise BadInput(
            f"{files[0]} is a file of PyTorch, which is not read here; convert it with: {convert}"
        )
    return read(files, config)


def _gguf(path: Path) -> Source:
    """A file of llama.cpp's, whose kernels may be quantised."""
    opened = open_gguf(path)
    metadata = {} if opened.positions is None else {POSITIONS: str(opened.positions)}
    return _source("gguf", path, opened.config, opened.store, metadata, opened)


def _as_weights(store: Store, quantization: Quantization | None) -> Store:
    """The numbers that quantised tensors stand for, each when it is read."""
    if quantization is None:
        return store
    return dataclasses.replace(quantization.read(store), quantization=quantization.name)


def _lechat(folder: Path, verify: bool) -> Source:
    """Lechat's own folder, its quantised kernels as the numbers they stand for."""
    config, form = read_config(folder)
    if verify:
        check_complete(folder)
    store = safetensors_store(folder, "model")
    return _source("lechat", folder, config, dequantized_store(store, form) if form else store, {})


def check_complete(folder: Path) -> None:
    """Compares a folder of lechat's with its checksums; nothing is returned.

    Raises:
        BadInput: one is not; it is named.
    """
    if reason := fault_of(folder):
        raise BadInput(f"{folder} is damaged: {reason}; make or download it again")


def _source(
    kind: SourceFormat,
    folder: Path,
    config: MistralConfig,
    store: Store,
    metadata: dict[str, str],
    opened: Opened | None = None,
) -> Source:
    """The source, once every weight has been found in the shape and dtype it must have.

    A GGUF that was `opened` has tokenizer and ids in itself, and not in files beside it.
    """
    fmt = format_of(kind)
    keys = match(config, fmt, store.tensors.keys(), folder)
    by_key = {key: name for name, key in keys.items()}
    stored = {by_key[key]: one for key, one in store.tensors.items() if key in by_key}
    sizes = shapes(config, fmt)
    for name, one in stored.items():
        if one.shape != (wanted := sizes[name]):
            raise BadInput(f"{one.where} has the shape {list(one.shape)} instead of {list(wanted)}")
        if one.dtype not in DTYPES:
            raise BadInput(
                f"{one.where} is {one.dtype}; a weight must be bfloat16, float16 or float32"
            )
    if (head := store.tensors.get(tied_head(config, fmt) or "")) is not None:
        _check_equal(head, store.tensors[names(config, fmt)["embed.kernel"]])
    tokenizer = opened.tokenizer_files if opened else tokenizer_of(folder)
    metadata = {key: store.metadata[key] for key in KEPT if key in store.metadata} | metadata
    return Source(
        kind,
        folder,
        config,
        tokenizer,
        metadata,
        stored,
        store,
        store.quantization,
        opened.control_ids if opened else control_ids(folder),
    )


def tokenizer_of(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files beside the weights."""
    paths = folder.iterdir()
    found = tuple(sorted(path for path in paths if OF_TEXT.fullmatch(path.name)))
    for path in found:
        check_inside(folder, path)
    return found


def _check_equal(head: Stored, embedding: Stored) -> None:
    """Raises `BadInput` if the head of a model that claims to be tied is not its embedding."""
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        a, b = (x.read().reshape(-1).view(np.uint8) for x in (head, embedding))
        parts = (slice(start, start + SLAB) for start in range(0, a.size, SLAB))
        if np.may_share_memory(a, b) or all(np.array_equal(a[part], b[part]) for part in parts):
            return
    raise BadInput(f"{head.where} differs from the embedding, though the config says they are tied")
