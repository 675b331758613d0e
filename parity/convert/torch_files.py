"""Files of `torch.save`: tensors are memory-mapped, no pickled code runs, writing is streamed."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import sync
from lechat_jax.files.safetensors import OnSlab, Read, Wanted, in_pieces, write_piece
from lechat_jax.formats.stores import Store, Stored


def pickle_store(path: Path) -> Store:
    """The tensors of a file of `torch.save`, mapped, and without running any code in it.

    Raises:
        BadInput: PyTorch is missing, or the file is damaged or holds more than tensors.
    """
    torch = _torch(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{path} holds code beside its tensors, which was not run ({_first(error)}); "
            "get the weights as safetensors"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise BadInput(f"{path} is not a whole PyTorch file ({_first(error)})") from None
    if not isinstance(loaded, Mapping):
        raise BadInput(f"{path} holds a {type(loaded).__name__}, not tensors by name")
    tensors = {}
    for key, tensor in loaded.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise BadInput(f"{path} has a {type(tensor).__name__} at {key!r}, not a tensor")
        where = f"{key} in {path}"
        tensors[key] = Stored(
            _torch_dtype(str(tensor.dtype), where),
            tuple(tensor.shape),
            where,
            lambda tensor=tensor: _as_numpy(tensor),
        )
    return Store(tensors)


def write_pickle(
    path: Path,
    infos: Sequence[Wanted],
    aliases: Mapping[str, str],
    read: Read,
    *,
    on_bytes: Callable[[int], None],
    on_slab: OnSlab,
) -> None:
    """A state dict on the disk, as `torch.save` writes it, with memory for one tensor at most.

    PyTorch writes the file with the tensors left out, and says where each belongs.

    Args:
        path: the new file.
        infos: name, dtype and shape of each tensor.
        aliases: further names for some of them, which share their memory.
        read: gives a tensor by name.
        on_bytes: told how many more bytes were written.
        on_slab: given each slab of each tensor, flat, before it is written; it may raise.

    Raises:
        BadInput: PyTorch is missing, or the disk is full.
    """
    torch = _torch(path)
    from torch._subclasses.fake_tensor import FakeTensorMode

    state = {
        name: torch.empty(shape, dtype=getattr(torch, dtype.name)) for name, dtype, shape in infos
    }
    state |= {alias: state[name] for alias, name in aliases.items()}
    try:
        with torch.serialization.skip_data():
            torch.save(state, path)
        with FakeTensorMode():
            places = torch.load(path, weights_only=True)
        with path.open("r+b", buffering=0) as file:
            for name, dtype, shape in infos:
                file.seek(places[name].untyped_storage()._checkpoint_offset)
                for piece in in_pieces(name, read(name), dtype, shape):
                    write_piece(file, name, piece, on_slab)
                    on_bytes(piece.nbytes)
        sync(path)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"cannot write {path}: {_first(error)}") from error


def _torch(path: Path) -> Any:
    """The module of PyTorch, which takes two seconds to import and is only needed here."""
    try:
        import torch
    except ImportError:
        raise BadInput(
            f'{path} is a PyTorch file, which needs torch: pip install -e ".[torch]"'
        ) from None
    return torch


def _torch_dtype(name: str, where: str) -> np.dtype:
    """NumPy's dtype of that name of torch's."""
    plain = name.removeprefix("torch.")
    if plain == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    try:
        return np.dtype(plain)
    except TypeError:
        raise BadInput(f"{where} is {plain}, which is not read here") from None


def _as_numpy(tensor: Any) -> Shaped[np.ndarray, "..."]:
    """The same memory for NumPy, which does not know torch's bfloat16."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _first(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
