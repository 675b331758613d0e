"""The reference's attention: who sees whom, and what is made of it, against loops and literals."""

import math
import types

import pytest
import torch
from torch import Tensor

pytest.importorskip("xformers", reason="lechat_torch takes its masks from xformers")

from xformers.ops import fmha

from lechat_jax.config import Window
from lechat_jax.errors import BadInput
from lechat_torch import attention
from lechat_torch.attention import attend, causal_bias, dense_attention, kernel_attention
from lechat_torch.cache import EMPTY, position_bias
from lechat_torch.rotary import rotate, rotations

B, T, N, K, H = 2, 17, 6, 2, 8
EXACT = 1e-13  # of numbers of size 1, in float64; measured 9e-16
WINDOWS: list[Window] = [1, 2, 3, 7, T, None]


def drawn(heads: int, dtype: torch.dtype = torch.float64, length: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(B, length, heads, H, generator=generator, dtype=torch.float64).to(dtype)


def queries_keys_values(
    kv_heads: int = K, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Values unlike keys, or a mix-up of the two would not be seen."""
    return 2 * drawn(N, dtype), drawn(kv_heads, dtype), drawn(kv_heads, dtype).flip(1)


def by_loops(q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
    """Every number on its own, from the definition."""
    mixed = torch.zeros_like(q)
    G = q.shape[2] // k.shape[2]
    for b in range(B):
        for t in range(q.shape[1]):
            first = 0 if window is None else max(0, t - window + 1)
            for n in range(q.shape[2]):
                query = q[b, t, n].tolist()
                powers = []
                for s in range(first, t + 1):
                    key = k[b, s, n // G].tolist()
                    score = sum(x * y for x, y in zip(query, key, strict=True)) / math.sqrt(H)
                    powers.append(math.exp(score))
                for s, power in zip(range(first, t + 1), powers, strict=True):
                    mixed[b, t, n] += power / sum(powers) * v[b, s, n // G]
    return mixed


@pytest.mark.parametrize(
    ("window", "seen"),
    [
        (1, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        (2, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
        (3, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]),
        (4, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        (9, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
        (None, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_a_window_counts_the_keys_that_a_query_sees_itself_included(
    window: Window, seen: list[list[int]]
) -> None:
    bias = causal_bias(window).materialize((4, 4), torch.float64, torch.device("cpu"))
    assert bias.exp().tolist() == seen


def test_the_other_local_mask_of_xformers_counts_one_key_more() -> None:
    other = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=2, window_right=0)
    ours = causal_bias(3).materialize((4, 4), torch.float32, torch.device("cpu"))
    assert torch.equal(other.materialize((4, 4)), ours)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_is_what_the_definition_says(window: Window, kv_heads: int) -> None:
    q, k, v = queries_keys_values(kv_heads)
    torch.testing.assert_close(
        attend(q, k, v, window), by_loops(q, k, v, window), rtol=0, atol=EXACT
    )


def test_a_window_that_is_off_by_one_is_seen() -> None:
    q, k, v = queries_keys_values()
    mixed = attend(q, k, v, 7)
    for wrong in (6, 8):
        other = attend(q, k, v, wrong)
        assert (mixed - other).abs().max() > 0.01
        assert torch.equal(mixed[:, :6], other[:, :6])  # where no window is full, all agree


def test_a_bfloat16_model_mixes_in_bfloat16_but_weighs_in_float32() -> None:
    q, k, v = queries_keys_values(dtype=torch.bfloat16)
    q = 16 * q  # large scores, which bfloat16 would round to whole numbers
    mixed = attend(q, k, v, 7)
    truth = attend(q.double(), k.double(), v.double(), 7)
    assert mixed.dtype == torch.bfloat16
    error = (mixed.double() - truth).square().mean() / truth.square().mean()
    assert error.sqrt() < 3e-3  # measured 1.1e-3; with scores in bfloat16 1.1e-2


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = tuple(x[:1, :5].clone().requires_grad_() for x in queries_keys_values())
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda q, k, v: attend(q, k, v, 3), inputs, fast_mode=True)


def test_xformers_has_no_kernel_for_a_cpu() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert kernel_attention(*queries_keys_values(dtype=dtype), causal_bias(7)) is None


class Supports:
    """Stands for a kernel that takes everything."""

    @staticmethod
    def supports(inputs: fmha.Inputs) -> bool:
        inputs.validate_inputs()
        return True


def documented(query: Tensor, key: Tensor, value: Tensor, attn_bias: attention.Bias) -> Tensor:
    """What xformers says that its kernel computes; groups have an axis of their own."""
    query, key, value = (x.movedim(1, -2) for x in (query, key, value))
    bias = attn_bias.materialize((T, T), query.dtype, query.device)
    scores = query @ key.transpose(-2, -1) / math.sqrt(H) + bias
    return (scores.softmax(dim=-1) @ value).movedim(-2, 1)


@pytest.mark.parametrize("training", [False, True])
def test_a_kernel_is_given_heads_as_xformers_documents_them(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped in five axes, and in four when a gradient is wanted, which no kernel has of five."""
    axes: list[int] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, attn_bias: attention.Bias) -> Tensor:
        axes.append(query.ndim)
        return documented(query, key, value, attn_bias)

    family = types.SimpleNamespace(FwOp=Supports, BwOp=Supports)
    fake = types.ModuleType("fmha")
    vars(fake).update(vars(fmha), memory_efficient_attention=kernel, flash=family, cutlass=family)
    monkeypatch.setattr(attention, "fmha", fake)
    q, k, v = (x.requires_grad_(training) for x in queries_keys_values())
    mixed = kernel_attention(q, k, v, causal_bias(7))
    assert mixed is not None
    assert axes == [4 if training else 5]
    torch.testing.assert_close(mixed, by_loops(q, k, v, 7), rtol=0, atol=EXACT)


def test_without_xformers_only_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "fmha", None)
    q, k, v = queries_keys_values()
    with pytest.raises(BadInput, match=r"install lechat-jax\[torch\] on Linux on x86-64"):
        attend(q, k, v, 7)
    dense_attention(q, k, v, torch.zeros(T, T, dtype=q.dtype))


@pytest.mark.parametrize("window", WINDOWS)
def test_the_order_of_the_slots_does_not_matter(window: Window) -> None:
    q, k, v = queries_keys_values()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    place = torch.arange(T).expand(B, T)
    bias = position_bias(place, place[:, order], window, torch.float64)
    shuffled = dense_attention(q, k[:, order], v[:, order], bias)
    torch.testing.assert_close(shuffled, attend(q, k, v, window), rtol=0, atol=EXACT)


def test_padding_sees_nothing_and_is_not_seen() -> None:
    place = torch.tensor([[EMPTY, EMPTY, 0, 1]])
    seen = position_bias(place, place, None, torch.float32) == 0
    assert seen.squeeze().int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    q, k, v = (x[:1, :4] for x in queries_keys_values())
    assert dense_attention(q, k, v, position_bias(place, place, None, q.dtype)).isfinite().all()


def test_turning_keeps_lengths_and_only_distances_count() -> None:
    q, k, _ = queries_keys_values(N)

    def scores(first: int) -> Tensor:
        rotary = rotations(first + torch.arange(T)[None], H, 1e4, torch.float64)
        return torch.einsum("BTNH,BSNH->BNTS", rotate(q, rotary), rotate(k, rotary))

    turned = rotate(q, rotations(torch.arange(T)[None], H, 1e4, torch.float64))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned[:, 0], q[:, 0])
    torch.testing.assert_close(scores(0), scores(1000), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "inside"),
    [
        (torch.bfloat16, torch.complex64),
        (torch.float32, torch.complex64),
        (torch.float64, torch.complex128),
    ],
)
def test_turns_are_at_least_float32_and_leave_the_dtype(
    dtype: torch.dtype, inside: torch.dtype
) -> None:
    rotary = rotations(torch.arange(T)[None], H, 1e4, dtype)
    assert rotary.dtype == inside
    assert rotate(drawn(N, dtype), rotary).dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 37, None])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_the_kernel_computes_what_its_own_matrix_says(
    window: Window, training: bool, kv_heads: int
) -> None:
    """Forward and backward in bfloat16, 3 windows long, against the dense path in float64."""
    length, heads, width = 111, 8, 64
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, length, n, width, generator=generator)
        .to("cuda", torch.bfloat16)
        .requires_grad_(training)
        for n in (heads, kv_heads, kv_heads)
    )
    bias = causal_bias(window)
    mixed = kernel_attention(q, k, v, bias)
    assert mixed is not None, "xformers has no kernel here; `python -m xformers.info` says why"
    wide = q2, k2, v2 = [x.detach().double().requires_grad_(training) for x in (q, k, v)]
    matrix = bias.materialize((length, length), torch.float64, q.device)
    truth = dense_attention(q2, k2, v2, matrix)
    pairs = [(mixed, truth)]
    if training:
        toward = torch.randn(truth.shape, generator=generator).to("cuda", torch.bfloat16)
        gradients = torch.autograd.grad(mixed, (q, k, v), toward)
        pairs += zip(gradients, torch.autograd.grad(truth, wide, toward.double()), strict=True)
    for found, expected in pairs:
        error = (found.double() - expected).square().mean() / expected.square().mean()
        assert error.sqrt() < 2e-2


@pytest.mark.gpu
def test_a_float32_window_has_a_kernel_forward_but_none_backward() -> None:
    q, k, v = (x.to("cuda", torch.float32) for x in queries_keys_values())
    mixed = kernel_attention(q, k, v, causal_bias(7))
    assert mixed is not None
    torch.testing.assert_close(
        mixed, attend(q.cpu(), k.cpu(), v.cpu(), 7).cuda(), rtol=0, atol=3e-4
    )
    assert kernel_attention(q.requires_grad_(), k, v, causal_bias(7)) is None
    attend(q, k, v, 7).sum().backward()
