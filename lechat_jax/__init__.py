"""Mistral in JAX: `import lechat_jax as lechat`, and `lechat.load("runs/NAME")`.

Each name is loaded when it is first asked for, so that `MistralConfig` comes without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lechat_jax.config import MistralConfig, preset
    from lechat_jax.errors import BadInput
    from lechat_jax.generate.generator import Generator, load
    from lechat_jax.generate.sampling import Sampling
    from lechat_jax.model import Mistral
    from lechat_jax.tokenizer.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "BadInput",
    "Generator",
    "Mistral",
    "MistralConfig",
    "Sampling",
    "Tokenizer",
    "__version__",
    "load",
    "preset",
]
_MODULES = {
    "BadInput": "errors",
    "Generator": "generate.generator",
    "Mistral": "model",
    "MistralConfig": "config",
    "Sampling": "generate.sampling",
    "Tokenizer": "tokenizer.tokenizer",
    "load": "generate.generator",
    "preset": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
