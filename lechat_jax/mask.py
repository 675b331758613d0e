"""Who sees whom: the only definition of the sliding window."""

from jaxtyping import Array, Bool, Int


def window_mask(
    q_pos: Int[Array, "B T"], k_pos: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """True where a query may look: not ahead, not at an empty slot, not past the window.

    A function of absolute positions only, so the same lines serve training, chunked
    prefill and a ring whose slots are in no order at all. `window` counts the keys that
    a query sees, itself included; `None` is full causal attention. A negative key
    position marks an empty slot.

    >>> import jax.numpy as jnp
    >>> row = jnp.arange(4)[None]
    >>> window_mask(row, row, window=2).astype(int)[0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    seen = (distance >= 0) & (k_pos >= 0)[:, None, :]
    return seen if window is None else seen & (distance < window)
