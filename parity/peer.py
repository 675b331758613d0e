"""The way to the peer: its packages are optional and loaded only when it is measured."""

import contextlib
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from types import ModuleType

from lechat_jax.errors import BadInput


def load_peer(instead: str) -> ModuleType:
    """`parity.transformers_peer`, which imports PyTorch and transformers.

    Raises:
        BadInput: one of them is not installed; `instead` is how to measure without.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise BadInput(
                f"the peer needs {name}, which is not installed: "
                f'pip install -e ".[torch]", or measure lechat alone with {instead}'
            )
    return importlib.import_module("parity.transformers_peer")


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
