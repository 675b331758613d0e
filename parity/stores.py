"""Tensors on the disk by their own keys, whatever kind of file they lie in.

A store knows what it holds without reading it; a tensor is read when it is asked for, and
where the kind of file permits, as a view of it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from lechat_jax.errors import BadInput
from lechat_jax.quantize import SCALE, dequantize, is_kernel, is_scale, scale_shape
from lechat_jax.tensors import TensorFiles


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that has not been read.

    Attributes:
        dtype: of its elements.
        shape: as it is stored.
        where: the file and the key, for messages.
        read: gives it.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    where: str
    read: Callable[[], Shaped[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Store:
    """What one checkpoint holds, by key.

    Attributes:
        tensors: in the order in which they are best read.
        release: gives back the memory of the files that were read so far.
        metadata: what the files say beside the tensors.
        quantization: how the tensors are on the disk, which are read as the numbers that stands
            for; in words, for messages.
        notes: sentences for the user about what of the files is not in the tensors.
    """

    tensors: Mapping[str, Stored]
    release: Callable[[], None] = lambda: None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quantization: str | None = None
    notes: tuple[str, ...] = ()


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
    return Store(tensors, files.release, files.metadata)


def array_store(where: object, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> Store:
    """Tensors that are in memory already."""
    return Store(
        {
            key: Stored(array.dtype, array.shape, f"{key} in {where}", lambda array=array: array)
            for key, array in arrays.items()
        }
    )


def dequantized_store(store: Store) -> Store:
    """The weights that int8 kernels and their scales stand for, to be of the type of the norms.

    Each is made when it is read, in float32, so that whoever casts it rounds it once, and is the
    only one in memory.

    Raises:
        BadInput: a kernel is not int8, or has no scale that fits.
    """
    norms = (x.dtype for key, x in store.tensors.items() if not (is_kernel(key) or is_scale(key)))
    dtype = next(norms, np.dtype(np.float32))

    def whole(key: str, kernel: Stored) -> Stored:
        scale = store.tensors.get(key + SCALE)
        if kernel.dtype != np.int8 or scale is None or scale.dtype != np.float32:
            raise BadInput(f"{kernel.where} is not int8 with float32 scales beside it")
        if scale.shape != scale_shape(key, kernel.shape):
            raise BadInput(
                f"{scale.where} has the shape {list(scale.shape)} beside {list(kernel.shape)}"
            )
        return dataclasses.replace(
            kernel, dtype=dtype, read=lambda: dequantize(kernel.read(), scale.read())
        )

    tensors = {
        key: whole(key, one) if is_kernel(key) else one
        for key, one in store.tensors.items()
        if not is_scale(key)
    }
    return dataclasses.replace(store, tensors=tensors, quantization="int8")
