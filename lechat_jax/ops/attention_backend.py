"""Choice of the attention kernel and of its blocks, by platform, dtype and shapes."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from lechat_jax.devices.platform import platform
from lechat_jax.ops.flash_attention import LANES, cudnn_works

Backend = Literal["dense", "banded", "cudnn", "splash"]

# Scores that the band holds at a time. On a CPU they then stay in its caches, which halves
# the time of a long text; an accelerator is better off with as many as fit.
CPU_SCORES, SCORES = 2**20, 2**26
SLOTS = 512  # of a ring in a block
FEW_QUERIES = 16  # positions, so few that copying keys takes as long as using them
WHOLE = 4608  # slots: a window of 4,096 and a chunk


def unsupported(
    backend: str, dtype: DTypeLike, window: int | None, head_dim: int, packed: bool = False
) -> str | None:
    """Reason why an attention backend does not support these shapes; `None` if it does.

    cuDNN's limit on head_dim is 128 before Hopper, and any T will do; splash takes any
    head_dim and T. `packed` rows hold several documents.

    >>> unsupported("cudnn", "float32", window=64, head_dim=24)
    'cudnn attention computes in bfloat16 or float16, not float32; use dense or banded'
    """
    name = jnp.dtype(dtype).name
    if backend not in get_args(Backend):
        return f"unknown attention {backend!r}; choose one of {', '.join(get_args(Backend))}"
    if backend == "banded" and window is None:
        return "banded attention needs a window, and this layer has none; use dense"
    if backend == "cudnn" and name not in ("bfloat16", "float16"):
        return f"cudnn attention computes in bfloat16 or float16, not {name}; use dense or banded"
    if backend == "cudnn" and (head_dim % 8 or head_dim > 256):
        return f"cudnn attention needs a head_dim of 8, 16, ... 256, not {head_dim}; use banded"
    if backend == "cudnn" and packed:
        return "cudnn attention cannot keep the documents of a row apart; use dense or banded"
    if backend == "splash" and name not in ("bfloat16", "float32"):
        return f"splash attention computes in bfloat16 or float32, not {name}; use dense or banded"
    return None


def choose_backend(
    platform: str,
    dtype: DTypeLike,
    T: int,
    window: int | None,
    head_dim: int,
    packed: bool = False,
) -> Backend:
    """Attention backend that is fastest for these shapes on a platform.

    >>> choose_backend("cpu", "float32", T=128, window=64, head_dim=24)
    'banded'
    """

    def able(backend: Backend) -> bool:
        return unsupported(backend, dtype, window, head_dim, packed) is None

    if platform in ("gpu", "cuda") and able("cudnn"):
        return "cudnn"
    # Below one block, splash would mostly compute padding.
    if platform == "tpu" and able("splash") and T >= LANES:
        return "splash"
    # Whichever makes fewer scores.
    return "dense" if window is None or T <= window + band_block(window) else "banded"


def best_backend(
    dtype: DTypeLike, T: int, window: int | None, head_dim: int, packed: bool = False
) -> Backend:
    """Attention backend that is fastest here; where cuDNN turns out not to work, XLA's own.

    On a GPU that is only compiled for, it cannot be tried, and is taken to work.
    """
    best = choose_backend(platform(), dtype, T, window, head_dim, packed)
    is_here = platform() == jax.default_backend()
    if best == "cudnn" and is_here and not cudnn_works(jnp.dtype(dtype).name, head_dim):
        return choose_backend("cpu", dtype, T, window, head_dim, packed)
    return best


def scores_at_once() -> int:
    """Scores of banded attention that are in memory at a time."""
    return CPU_SCORES if platform() == "cpu" else SCORES


def slots_at_once(S: int, T: int) -> int:
    """Slots of a ring of S whose scores T queries have in memory at a time; of a small one all.

    XLA for a CPU and a GPU copies a block before it is multiplied, which for few queries takes as
    long as the products, so rings of a usual window are read at once there. It depends on nothing
    but shapes, so that no row's rounding depends on how long its neighbours are.
    """
    most = WHOLE if platform() != "tpu" and T < FEW_QUERIES else 2 * SLOTS
    return S if S <= most else SLOTS


def cached_kernel(q: Array, k: Array) -> Callable[..., Array] | None:
    """The kernel for attention of these queries over a ring, where XLA would write their scores.

    A GPU has one; XLA for a TPU keeps the scores of a block on the chip by itself. XLA cannot
    split a custom kernel over devices, so on a mesh it does the work.
    """
    if platform() != "gpu" or not jax.sharding.get_abstract_mesh().empty:
        return None
    from lechat_jax.ops import cached_attention_gpu  # Pallas takes 0.7 s to import

    return cached_attention_gpu.attend_in_chunk if cached_attention_gpu.fits(q, k) else None


def band_block(window: int) -> int:
    """Positions of a block of banded attention: a quarter of the window."""
    return -(-window // 4)
