"""Rotary positions (Su et al. 2021, arXiv:2104.09864) as they were thought of: complex turns."""

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from lechat_jax.config import Llama4Scaling, Yarn


def rotations(
    positions: Int[Tensor, "B T"],
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    yarn: Yarn | None = None,
) -> Complex[Tensor, "B T 1 pairs"]:
    """Numbers of length one: pair p of position t is turned by t * theta ** (-2 p / head_dim).

    Speeds and angles are at least float32, and float64 for a `dtype` of float64. The third
    axis is that of the heads, which all turn alike. With `yarn` pairs turn slower, and the
    numbers are longer: 0.1 ln(factor) + 1, if its scale is applied.

    >>> quarters = rotations(torch.tensor([[0, 1, 2]]), 2, 1e4, torch.float64) ** (torch.pi / 2)
    >>> quarters.flatten().real.round().int().tolist()
    [1, 0, -1]
    """
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device)
    speeds = theta ** (-pairs / head_dim)
    length = 1.0
    if yarn is not None:
        speeds = speeds * slowdown(len(pairs), theta, yarn).to(speeds)
        length += math.log(yarn.factor) / 10 if yarn.apply_scale else 0.0
    angles = positions[:, :, None, None].to(wide) * speeds
    return torch.polar(torch.full_like(angles, length), angles)


def slowdown(n_pairs: int, theta: float, yarn: Yarn) -> Float[Tensor, " pairs"]:
    """What the speed of each pair is multiplied by: 1 for the quick, 1 / factor for the slow.

    YaRN (Peng et al. 2023, arXiv:2309.00071) as transformers has it. In the original text of
    L tokens, pair p makes L / 2 pi * theta ** (-p / n_pairs) turns, so the one of n turns is
    the n_pairs-fold logarithm of L / 2 pi n to the base theta; the ramp ends on whole pairs.

    >>> yarn = Yarn(4.0, 64, 2.0, 1.0, apply_scale=False)
    >>> slowdown(4, 10.0, yarn).tolist()
    [1.0, 1.0, 1.0, 0.75]
    """
    L = yarn.original_max_position_embeddings
    quick, slow = (
        n_pairs * math.log(L / (2 * math.pi * n), theta) for n in (yarn.beta, yarn.alpha)
    )
    start, end = max(0, math.floor(quick)), min(2 * n_pairs - 1, math.ceil(slow))
    pairs = torch.arange(n_pairs, dtype=torch.float64)
    ramp = (pairs - start) / (end - start) if end != start else (pairs > start).double()
    return torch.lerp(
        torch.ones_like(ramp), torch.full_like(ramp, 1 / yarn.factor), ramp.clip(0, 1)
    )


def stretch(
    positions: Int[Tensor, "B T"], scaling: Llama4Scaling, dtype: torch.dtype
) -> Float[Tensor, "B T 1 1"]:
    """How many times as long each query is: more with every `original` tokens before it.

    >>> stretch(torch.tensor([[-1, 9, 10, 29]]), Llama4Scaling(1.0, 10), torch.float64).flatten()
    tensor([1.0000, 1.0000, 1.6931, 2.0986], dtype=torch.float64)
    """
    wide = positions[:, :, None, None].to(torch.promote_types(dtype, torch.float32))
    whole = torch.floor(wide.clip(min=0) / scaling.original_max_position_embeddings)
    return 1 + scaling.beta * torch.log(1 + whole)


def rotate(
    x: Float[Tensor, "B T N H"], rotary: Complex[Tensor, "#B T 1 pairs"]
) -> Float[Tensor, "B T N H"]:
    """Each head turned: lane h is the real part of a number, lane h + H/2 the imaginary.

    That is the order of lanes in Hugging Face's files; Mistral's own have pairs side by side, for
    `rotate_neighbours`.

    >>> rotary = torch.polar(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), torch.pi / 2))
    >>> rotate(torch.tensor([[[[3.0, 5.0]]]]), rotary).round().tolist()
    [[[[-5.0, 3.0]]]]
    """
    real, imaginary = x.to(rotary.real.dtype).chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * rotary
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def rotate_neighbours(
    x: Float[Tensor, "B T N R"], rotary: Complex[Tensor, "#B T 1 pairs"]
) -> Float[Tensor, "B T N R"]:
    """Each head turned in place: lane 2 p is the real part of a number, lane 2 p + 1 the imaginary.

    >>> rotary = torch.polar(torch.ones(1, 1, 1, 2), torch.tensor([[[[torch.pi / 2, 0.0]]]]))
    >>> rotate_neighbours(torch.tensor([[[[3.0, 5.0, 7.0, 9.0]]]]), rotary).round().tolist()
    [[[[-5.0, 3.0, 7.0, 9.0]]]]
    """
    numbers = x.to(rotary.real.dtype).unflatten(-1, (-1, 2)).contiguous()
    turned = torch.view_as_complex(numbers) * rotary
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
