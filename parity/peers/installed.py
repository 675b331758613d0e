"""Optional packages of the peers: whether they are installed, and loading them when asked for."""

import contextlib
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from types import ModuleType

from lechat_jax.errors import BadInput


def load_peer(module: str, instead: str) -> ModuleType:
    """The module of that name, which imports PyTorch and transformers.

    Raises:
        BadInput: one of them is not installed; `instead` is how to measure without.
    """
    need("torch", "transformers", instead=instead)
    return importlib.import_module(module)


def need(*packages: str, instead: str = "") -> None:
    """Nothing, if all of them are installed.

    Raises:
        BadInput: one is not; the message is how to get it, or what measures lechat alone.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            extra = "" if name != "xformers" else " (it exists for Linux on x86-64 only)"
            raise BadInput(
                f"PyTorch's side of the comparison needs {name}, which is not installed{extra}: "
                'pip install -e ".[torch]"'
                + (f", or measure lechat alone with {instead}" if instead else "")
            )


@contextlib.contextmanager
def cold_torch_compiler() -> Iterator[None]:
    """Within it, torch.compile finds nothing that an earlier run compiled, and leaves nothing.

    lechat's benchmarks use no compilation cache either, so both compile from cold. A folder
    that the user named in `TORCHINDUCTOR_CACHE_DIR` is respected.
    """
    variable = "TORCHINDUCTOR_CACHE_DIR"
    if variable in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="parity-", ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            del os.environ[variable]
