"""Rotary positions (Su et al. 2021, arXiv:2104.09864) as they were thought of: complex turns."""

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor


def turns(
    positions: Int[Tensor, "B T"], head_dim: int, theta: float, dtype: torch.dtype
) -> Complex[Tensor, "B T 1 pairs"]:
    """Numbers of length one: pair p of position t is turned by t * theta ** (-2 p / head_dim).

    Speeds and angles are at least float32, and float64 for a `dtype` of float64. The third
    axis is that of the heads, which all turn alike.

    >>> quarters = turns(torch.tensor([[0, 1, 2]]), 2, 1e4, torch.float64) ** (torch.pi / 2)
    >>> quarters.flatten().real.round().int().tolist()
    [1, 0, -1]
    """
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device)
    angles = positions[:, :, None, None].to(wide) * theta ** (-pairs / head_dim)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(
    x: Float[Tensor, "B T N H"], turn: Complex[Tensor, "#B T 1 pairs"]
) -> Float[Tensor, "B T N H"]:
    """Each head turned: lane h is the real part of a number, lane h + H/2 the imaginary.

    That is the order of lanes in Hugging Face's files; Mistral's own have pairs side by side.

    >>> turn = torch.polar(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), torch.pi / 2))
    >>> rotate(torch.tensor([[[[3.0, 5.0]]]]), turn).round().tolist()
    [[[[-5.0, 3.0]]]]
    """
    real, imaginary = x.to(turn.real.dtype).chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
