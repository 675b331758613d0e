"""What generation remembers: for each layer a ring of the last keys and values.

Of latent attention it is what they are made of: a latent, and a rotary key for all heads.

A chunk of T tokens is written first and attended to afterwards, so the ring must still hold
the W - 1 positions before it: W + T - 1 slots. With W = 3 and T = 2 these are 4, position p
stands in slot p % 4, and after the positions 0 to 5 they hold 4 5 2 3: position 5 sees
3 4 5, and position 4, which came in the same chunk, 2 3 4.

The slots are in no order, so no bias of xformers describes them. Who sees whom is worked out
from the positions in the slots, and attention is dense.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lechat_jax.config import MistralConfig, Window
from lechat_jax.errors import BadInput
from lechat_torch.attention import dense_attention

EMPTY = -1  # the position of padding, and of a slot where nothing was written yet


class Ring(NamedTuple):
    """Keys, values and positions of one layer, by slot; overwritten in place.

    Slot 0 is for padding: whatever stands there has the position `EMPTY`, so it is never seen.
    With latent attention keys are the latents, [B S 1 C], and values the rotary keys, [B S 1 R].
    """

    keys: Float[Tensor, "B S K H"]
    values: Float[Tensor, "B S K H"]
    positions: Int[Tensor, "B S"]

    @property
    def slots(self) -> int:
        """How many positions it can hold."""
        return self.positions.shape[1] - 1


Cache = tuple[Ring, ...]


def empty_cache(
    config: MistralConfig,
    batch: int,
    chunk: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Cache:
    """A ring for each layer, of `window + chunk - 1` slots, or of `context` without a window."""
    if latent := config.latent_attention:
        heads, widths = 1, (latent.kv_lora_rank, latent.qk_rope_head_dim)
    else:
        heads, widths = config.n_kv_heads, (config.head_dim, config.head_dim)

    def ring(window: Window) -> Ring:
        S = 1 + (context if window is None else window + chunk - 1)
        keys, values = (
            torch.zeros(batch, S, heads, width, dtype=dtype, device=device) for width in widths
        )
        return Ring(keys, values, torch.full((batch, S), EMPTY, device=device))

    return tuple(ring(window) for window in config.windows)


def remember(
    k: Float[Tensor, "B T heads k_lanes"],
    v: Float[Tensor, "B T heads v_lanes"],
    ring: Ring,
    positions: Int[Tensor, "B T"],
    window: Window,
) -> tuple[Float[Tensor, "B S heads k_lanes"], Float[Tensor, "B S heads v_lanes"]]:
    """Keys and values of all slots of the ring, with those of new positions written to it.

    Raises:
        BadInput: the chunk is longer than the one that the ring was made for.
    """
    T = k.shape[1]
    if window is not None and window + T - 1 > ring.slots:
        raise BadInput(
            f"{T} tokens at once need {window + T - 1} slots behind a window of {window}, but the "
            f"cache has {ring.slots}; make it with a chunk of {T}"
        )
    # Without a window nothing may be overwritten: a position beyond the context is an
    # IndexError, not the slot of another.
    slot = positions if window is None else positions % ring.slots
    slot = torch.where(positions < 0, 0, 1 + slot)
    row = torch.arange(len(positions), device=positions.device)[:, None]
    for store, new in zip(ring, (k, v, positions), strict=True):
        store[row, slot] = new
    return ring.keys, ring.values


def attend_cached(
    q: Float[Tensor, "B T N H"],
    k: Float[Tensor, "B S K H"],
    v: Float[Tensor, "B S K U"],
    ring: Ring,
    positions: Int[Tensor, "B T"],
    window: Window,
) -> Float[Tensor, "B T N U"]:
    """What each new position gathers from the keys and values of the ring's slots."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return dense_attention(q, k, v, position_bias(positions, ring.positions, window, wide))


def position_bias(
    q_positions: Int[Tensor, "B T"],
    k_positions: Int[Tensor, "B S"],
    window: Window,
    dtype: torch.dtype,
) -> Float[Tensor, "B 1 1 T S"]:
    """0 where a query may look; elsewhere the least number of the dtype.

    Not -inf, because padding sees nothing, and the softmax of nothing but -inf is NaN.

    >>> slots = torch.tensor([[EMPTY, 4, 5, 2, 3]])
    >>> bias = position_bias(torch.tensor([[4, 5]]), slots, 3, torch.float32)
    >>> (bias == 0).int().squeeze().tolist()
    [[0, 1, 0, 1, 1], [0, 1, 1, 0, 1]]
    """
    age = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (age >= 0) & (age < (math.inf if window is None else window))
    seen &= (k_positions != EMPTY)[:, None, :]
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill(~seen, torch.finfo(dtype).min)[:, None, None]
