"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): xformers, or the same dense.

Who sees whom is said once, by a bias of xformers' own. Where xformers has a kernel the bias
goes to it; elsewhere it is made a matrix and added to the scores. xformers has no kernel for
a CPU at all, none for float64, none for the gradient of a float32 window ("still some
infs/nans", says its source), and none for the gradient of grouped heads.
"""

import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lechat_jax.config import Window
from lechat_jax.errors import BadInput

if torch.version.cuda is None:
    # A PyTorch without CUDA cannot load the kernels, of which xformers would warn when it is
    # imported, in five lines. Here only its biases are wanted, which need no kernel.
    logging.getLogger("xformers").setLevel(logging.ERROR)

fmha: ModuleType | None = None  # where there is no xformers, only attention is missing
if importlib.util.find_spec("xformers"):
    fmha = importlib.import_module("xformers.ops.fmha")


@runtime_checkable
class Bias(Protocol):
    """One of xformers' `AttentionBias`: 0 where a query may look, -inf where it may not."""

    def materialize(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The matrix, whose last two axes are queries and keys, the last of both aligned."""
        ...


def causal_bias(window: Window) -> Bias:
    """Lets a query see itself and what came before: `window` keys, or all with `None`.

    xformers counts as the config does, the query's own key included. (Its
    `LocalAttentionFromBottomRightMask` does not: there, W keys are a `window_left` of W - 1.)

    Raises:
        BadInput: xformers is not installed.
    """
    causal = _xformers().attn_bias.LowerTriangularFromBottomRightMask()
    return causal if window is None else causal.make_local_attention(window)


def attend(
    q: Float[Tensor, "B T N H"],
    k: Float[Tensor, "B T K H"],
    v: Float[Tensor, "B T K U"],
    window: Window,
) -> Float[Tensor, "B T N U"]:
    """What each position of whole sequences gathers; query head n reads kv head n // G."""
    bias = causal_bias(window)
    mixed = kernel_attention(q, k, v, bias) if q.is_cuda else None
    if mixed is not None:
        return mixed
    T, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    return dense_attention(q, k, v, bias.materialize((T, T), dtype=wide, device=q.device))


def kernel_attention(
    q: Float[Tensor, "B T N H"],
    k: Float[Tensor, "B S K H"],
    v: Float[Tensor, "B S K U"],
    bias: Bias,
) -> Float[Tensor, "B T N U"] | None:
    """The same by `memory_efficient_attention`, or `None` where xformers has no kernel for it."""
    xformers = _xformers()
    K, G = k.shape[2], q.shape[2] // k.shape[2]
    needs_gradient = any(x.requires_grad for x in (q, k, v))
    if needs_gradient:  # no kernel for grouped heads goes backward
        grouped = q
        k, v = (x.repeat_interleave(G, dim=2) for x in (k, v))
    else:  # five axes; keys of stride 0 are how xformers recognises a group
        grouped = q.unflatten(2, (K, G))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, G, -1) for x in (k, v))
    inputs = xformers.Inputs(grouped, k, v, attn_bias=bias)
    families = (xformers.flash, xformers.cutlass)
    if not any(family.FwOp.supports(inputs) for family in families):
        return None
    if needs_gradient and not any(family.BwOp.supports(inputs) for family in families):
        return None
    mixed = xformers.memory_efficient_attention(grouped, k, v, attn_bias=bias)
    return mixed.reshape(*q.shape[:3], v.shape[-1])


def dense_attention(
    q: Float[Tensor, "B T N H"],
    k: Float[Tensor, "B S K H"],
    v: Float[Tensor, "B S K U"],
    bias: Float[Tensor, "... T S"],
) -> Float[Tensor, "B T N U"]:
    """Softmax of scores and bias, in at least float32; its weights are rounded for the mix."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("BTKGH,BSKH->BKGTS", grouped.to(wide), k.to(wide))
    weights = torch.softmax(scores * q.shape[-1] ** -0.5 + bias, dim=-1)
    return torch.einsum("BKGTS,BSKU->BTKGU", weights.to(v.dtype), v).flatten(2, 3)


def _xformers() -> ModuleType:
    if fmha is None:
        raise BadInput(
            "xformers is not installed, and lechat_torch says with its biases who sees whom; "
            "install lechat-jax[torch] on Linux on x86-64, which xformers is built for"
        )
    return fmha
