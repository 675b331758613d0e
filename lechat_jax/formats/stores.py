"""Lazily read tensors by their keys in the files, whatever kind of file that is.

A store knows what it holds without reading it; a tensor is read when it is asked for, and
where the kind of file permits, as a view of it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from lechat_jax.config.layout import is_expert, is_part
from lechat_jax.errors import BadInput
from lechat_jax.files.safetensors import TensorFiles
from lechat_jax.quantize.scheme import Form, Parts, numbers_of


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on the disk: its dtype and shape, and a function that reads it.

    Attributes:
        dtype: of its elements.
        shape: as it is stored.
        where: the file and the key, for messages.
        read: gives it.
        parts: gives the parts of a kernel that is quantised as lechat's can be, matrices by what is
            behind the kernel's name in theirs.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    where: str
    read: Callable[[], Shaped[np.ndarray, "..."]]
    parts: Callable[[], Parts] | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Store:
    """The tensors of one checkpoint, by key.

    Attributes:
        tensors: in the order in which they are best read.
        release: gives back the memory of the files that were read so far.
        metadata: what the files say beside the tensors.
        quantization: how the tensors are on the disk, which are read as the numbers that stands
            for; in words, for messages.
        form: of lechat's, that all kernels which have `parts` have.
        notes: sentences for the user about what of the files is not in the tensors.
        files: that hold the tensors.
    """

    tensors: Mapping[str, Stored]
    release: Callable[[], None] = lambda: None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quantization: str | None = None
    form: Form | None = None
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def safetensors_store(folder: Path, stem: str) -> Store:
    """The tensors of `<stem>.safetensors` or of the shards of its index.

    Raises:
        BadInput: see `TensorFiles.open`.
    """
    files = TensorFiles.open(folder, stem)
    tensors = {
        key: Stored(
            info.dtype, info.shape, f"{key} in {info.path}", lambda key=key: files.read(key)
        )
        for key, info in files.items()
    }
    return Store(tensors, files.release, files.metadata, files=files.paths)


def text_alone(n_left_out: int) -> str:
    """The note that so many tensors of a vision tower were left out."""
    return f"only the text part is read; tensors of the vision tower left out: {n_left_out}"


def array_store(where: object, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> Store:
    """Tensors that are in memory already."""
    return Store(
        {
            key: Stored(array.dtype, array.shape, f"{key} in {where}", lambda array=array: array)
            for key, array in arrays.items()
        }
    )


def dequantized_store(store: Store, form: Form) -> Store:
    """Dequantises lechat's int8 and int4 kernels as they are read, into the type of the norms.

    Each is made when it is read, in float32, so that whoever casts it rounds it once, and is the
    only one in memory. That of a layer's experts is kept until the next is read, since it may be
    asked for each of them.

    Raises:
        BadInput: a kernel lacks a part that fits.
    """
    floats = (x.dtype for key, x in store.tensors.items() if not form.is_fixed(key))
    dtype = next(floats, np.dtype(np.float32))
    kept: dict[str, np.ndarray] = {}

    def whole(key: str, kernel: Stored) -> Stored:
        double = 2 if form.format_of(key) == "int4" else 1
        shape = (*kernel.shape[:-1], double * kernel.shape[-1])
        wanted = form.parts(key, shape)
        for name, (its_dtype, its_shape) in wanted.items():
            part = store.tensors.get(name)
            if part is None or (part.dtype, part.shape) != (its_dtype, its_shape):
                raise BadInput(
                    f"{kernel.where} is not {form.format_of(key)} with {name} beside it as "
                    f"{its_dtype} {list(its_shape)}"
                )

        def read() -> Shaped[np.ndarray, "..."]:
            if key in kept:
                return kept[key]
            kept.clear()
            found = numbers_of(key, {name: store.tensors[name].read() for name in wanted}, shape)
            if is_expert(key):
                kept[key] = found
            return found

        return dataclasses.replace(kernel, dtype=dtype, shape=shape, read=read)

    tensors = {
        key: whole(key, one) if form.format_of(key) else one
        for key, one in store.tensors.items()
        if not is_part(key)
    }
    return dataclasses.replace(store, tensors=tensors, quantization=str(form))
