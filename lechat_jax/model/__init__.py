"""The Mistral decoder, read in one sitting: rope, mask, attention, cache, layers, mistral.

`lechat_jax.model.Mistral` is loaded when it is asked for: a mask is read without Flax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lechat_jax.model.mistral import Mistral

__all__ = ["Mistral"]


def __getattr__(name: str) -> Any:
    if name == "Mistral":
        from lechat_jax.model.mistral import Mistral

        return Mistral
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
