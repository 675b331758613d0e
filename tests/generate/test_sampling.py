"""Each rule on distributions written out, and draws against exact probabilities."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array

from lechat_jax.errors import BadInput
from lechat_jax.generate.sampling import (
    Controls,
    Sampling,
    filter_logits,
    largest,
    leading,
    sample,
    token_keys,
)

PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
jitted_sample = jax.jit(sample)
jitted_filter = jax.jit(filter_logits)


def controls(batch: int = 1, **changed: Any) -> Controls:
    """Temperature 1 and no filter, but for what is changed."""
    return dataclasses.replace(PLAIN, **changed).controls(batch)


def kept(probabilities: list[float], **changed: Any) -> list[int]:
    """The ids that the filters leave of a distribution."""
    logits = jnp.log(jnp.array([probabilities]))
    return np.flatnonzero(np.isfinite(jitted_filter(logits, controls(**changed))[0])).tolist()


def keys(n: int, seed: int = 0) -> Array:
    return token_keys(Sampling(seed=seed).streams(n), jnp.arange(n))


def drawn(probabilities: list[float], n: int = 20_000, **changed: Any) -> np.ndarray:
    """How often each id comes in n draws, made in one call."""
    logits = jnp.tile(jnp.log(jnp.array(probabilities)), (n, 1))
    ids, _ = jitted_sample(logits, keys(n), controls(n, **changed))
    return np.bincount(ids, minlength=len(probabilities))


def assert_drawn_from(counts: np.ndarray, expected: list[float]) -> None:
    """Chi-square over the ids that may come at all; the others never do."""
    probabilities = np.array(expected) / sum(expected)
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities > 0
    if possible.sum() == 1:
        return
    test = scipy.stats.chisquare(counts[possible], probabilities[possible] * counts.sum())
    assert test.pvalue > 1e-4, f"{counts} is not {probabilities}"


def test_a_temperature_of_zero_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    logits = jnp.array([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 5.0], [-9.0, -8.0, -8.5, -7.0]])
    for seed in range(3):
        ids, _ = jitted_sample(logits, keys(3, seed), controls(3, temperature=0, top_k=2))
        assert ids.tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, [0.25, 0.09, 0.0225, 0.0025]),  # squared
        (2.0, [0.70710678, 0.54772256, 0.38729833, 0.2236068]),  # square roots
        (1e30, [0.25, 0.25, 0.25, 0.25]),
        (1e-30, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_draws_follow_the_distribution_at_a_temperature(
    temperature: float, expected: list[float]
) -> None:
    assert_drawn_from(drawn([0.5, 0.3, 0.15, 0.05], temperature=temperature), expected)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.6}, [0.5, 0.3, 0, 0]),
        ({"min_p": 0.2}, [0.5, 0.3, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.5, "temperature": 0.5}, [1.0, 0, 0, 0]),
    ],
)
def test_draws_follow_what_the_filters_leave(
    changed: dict[str, Any], expected: list[float]
) -> None:
    assert_drawn_from(drawn([0.5, 0.3, 0.15, 0.05], **changed), expected)


def test_the_draws_would_not_pass_for_a_softmax_taken_twice() -> None:
    # Probabilities fed in as if they were logits: a mistake this must be able to see.
    p = np.exp([0.5, 0.3, 0.15, 0.05])
    with pytest.raises(AssertionError, match="is not"):
        assert_drawn_from(drawn([0.5, 0.3, 0.15, 0.05]), p.tolist())


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (4, [0, 1, 2, 4]), (0, range(6))]
)
def test_top_k_keeps_exactly_k_the_lower_ids_of_equals(k: int, expected: list[int]) -> None:
    assert kept([0.1, 0.3, 0.2, 0.1, 0.2, 0.1], top_k=k) == list(expected)


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    for k in (3, 4, 2**31, 2**63):
        assert kept([0.1, 0.3, 0.6], top_k=k) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),  # the token that crosses p stays
        (0.69, [1, 3]),
        (0.71, [1, 2, 3]),
        (0.91, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_likeliest_up_to_the_one_that_crosses_p(
    p: float, expected: list[int]
) -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=p) == expected


@pytest.mark.parametrize(("p", "n"), [(0.24, 1), (0.25, 2), (0.49, 2), (0.5, 3), (0.75, 4)])
def test_top_p_drops_only_what_has_more_than_p_before_it(p: float, n: int) -> None:
    # Quarters are exact in floating point, so this is the rule at its very edge.
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=p) == list(range(n))


def test_a_top_p_of_one_keeps_even_what_rounding_would_lose() -> None:
    logits = jnp.array([[0.0] + [-15.0] * 9])
    assert jnp.isfinite(jitted_filter(logits, controls(top_p=1.0))).all()


@pytest.mark.parametrize(("p", "expected"), [(0.0, [0, 1, 2, 3]), (0.2, [0, 1, 2]), (0.7, [0])])
def test_min_p_is_relative_to_the_likeliest(p: float, expected: list[int]) -> None:
    assert kept([0.5, 0.3, 0.15, 0.05], min_p=p) == expected


def test_each_filter_sees_what_the_one_before_it_left() -> None:
    # After top-k the two that are left have 4/7 and 3/7, and 4/7 is past 0.5.
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5) == [0, 1]
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5, top_k=2) == [0]
    # The temperature comes first: squared, 0.4 has 16/30 of the probability.
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5, temperature=0.5) == [0]
    assert kept([0.4, 0.3, 0.2, 0.1], min_p=0.45) == [0, 1, 2]
    assert kept([0.4, 0.3, 0.2, 0.1], min_p=0.45, temperature=0.5) == [0, 1]


def test_rows_are_sampled_each_in_its_own_way() -> None:
    logits = jnp.tile(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (4, 1))
    mixed = Controls(
        temperature=jnp.array([0.0, 1.0, 1.0, 1.0]),
        top_k=jnp.array([0, 3, 0, 0]),
        top_p=jnp.array([1.0, 1.0, 0.5, 1.0]),
        min_p=jnp.array([0.0, 0.0, 0.0, 0.9]),
    )
    left = jnp.isfinite(jitted_filter(logits, mixed)).sum(axis=1)
    assert left.tolist()[1:] == [3, 2, 1]
    assert int(jitted_sample(logits, keys(4), mixed)[0][0]) == 0


def test_log_probabilities_are_the_models_own() -> None:
    logits = jnp.tile(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])) + 7.0, (64, 1))
    exact = np.log([0.5, 0.3, 0.15, 0.05])
    for changed in ({"temperature": 0.0}, {"temperature": 5.0}, {"top_k": 2, "min_p": 0.1}):
        ids, logprobs = jitted_sample(logits, keys(64), controls(64, **changed))
        np.testing.assert_allclose(logprobs, exact[np.asarray(ids)], rtol=2e-6)


def test_controls_are_data_and_compile_nothing() -> None:
    traced = []

    @jax.jit
    def traced_sample(*arguments: Any) -> Any:
        traced.append(arguments)
        return sample(*arguments)

    logits = jnp.zeros((2, 9))
    for how in (
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=3, top_k=4, top_p=0.5, min_p=0.1, seed=7),
    ):
        traced_sample(logits, token_keys(how.streams(2), jnp.zeros(2, int)), how.controls(2))
    assert len(traced) == 1


LOGITS = st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=13, max_size=13)


def by_sorting(
    logits: np.ndarray, k: int, top_p: float, min_p: float, slack: float = 0.0
) -> set[int]:
    """The rules in their plainest form: sorted, cumulated, cut; ties by id.

    With `slack`, what is less than that beyond the edge of a rule stays as well.
    """
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: k or None]
    weights = np.exp(logits[order] - logits.max())
    before = np.cumsum(weights) / weights.sum() - weights / weights.sum()
    stays = (before <= top_p + slack) & (weights >= min_p - slack)
    return {i for i, stay in zip(order, stays, strict=True) if stay}


@given(LOGITS, st.integers(0, 14), st.floats(0.01, 0.999), st.floats(0, 0.99))
def test_filters_agree_with_sorting(logits: list[float], k: int, p: float, m: float) -> None:
    """But for what rounding may put on either side of an edge; see the next test for those."""
    found = jitted_filter(jnp.array([logits]), controls(top_k=k, top_p=p, min_p=m))[0]
    left = set(np.flatnonzero(np.isfinite(found)).tolist())
    surely, perhaps = (by_sorting(np.array(logits), k, p, m, by) for by in (-1e-5, 1e-5))
    assert surely <= left <= perhaps
    assert float(found.max()) == 0.0


# So many tokens are equally likely, and no other can come: each has a power of two as its
# probability, and no sum of them is rounded.
@given(
    st.permutations(range(16)),
    st.integers(0, 4).map(lambda i: 2**i),
    st.sampled_from([0, 1, 2, 4, 8, 16]),
    st.integers(1, 16).map(lambda i: i / 16),
    st.sampled_from([0.0, 0.5, math.nextafter(1, 0)]),
)
def test_at_the_very_edge_filters_are_those_of_sorting(
    ids: list[int], n: int, k: int, p: float, m: float
) -> None:
    logits = np.full(16, -200.0)
    logits[ids[:n]] = 0.0
    found = jitted_filter(
        jnp.asarray(logits[None], jnp.float32), controls(top_k=k, top_p=p, min_p=m)
    )
    left = set(np.flatnonzero(np.isfinite(found[0])).tolist())
    assert left == by_sorting(logits, k, math.inf if p == 1 else p, m)


def test_a_row_without_a_top_p_keeps_all_beside_one_that_has_it() -> None:
    """What is likelier than the last adds up to more than 1 in some of these, by rounding."""
    drawn = np.random.default_rng(0).normal(size=(64, 500)) * 4
    logits = jnp.asarray(drawn, jnp.float32)
    likelihoods = jax.nn.softmax(logits)
    assert int(jnp.sum(jnp.cumsum(likelihoods, axis=-1)[:, -1] > 1)) > 5
    some = controls(64)._replace(top_p=jnp.ones(64).at[0].set(0.5))
    left = jnp.isfinite(jitted_filter(logits, some)).sum(axis=1)
    assert left[0] < 50
    assert left[1:].tolist() == [500] * 63


@pytest.mark.parametrize("off", [{"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}], ids=str)
def test_a_filter_that_is_off_in_one_row_is_on_in_another(off: dict[str, Any]) -> None:
    """Whichever row it is; and each row has a temperature of its own."""
    logits = jnp.tile(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (2, 1))
    on = {"top_k": 2, "top_p": 0.6, "min_p": 0.7}
    word = next(iter(off))
    for rows in ((off[word], on[word]), (on[word], off[word])):
        mixed = controls(2)._replace(
            **{word: jnp.array(rows), "temperature": jnp.array([1.0, 2.0])}
        )
        left = jnp.isfinite(jitted_filter(logits, mixed)).sum(axis=1)
        squeezed = 3 if word == "min_p" else 2  # the square root of 0.2 / 0.4 is above 0.7
        kept = {off[word]: 4, on[word]: 2}
        assert left.tolist() == [kept[rows[0]], 4 if rows[1] == off[word] else squeezed]


def test_the_likeliest_stays_where_min_p_is_one_but_for_rounding() -> None:
    assert kept([0.5, 0.3, 0.2], min_p=math.nextafter(1, 0)) == [0]


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=5, max_size=5),
    st.floats(0, 1e300),
    st.integers(0, 2**70),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1, exclude_max=True),
)
def test_something_is_always_left_to_draw(
    logits: list[float], temperature: float, k: int, p: float, m: float
) -> None:
    how = controls(temperature=temperature, top_k=k, top_p=p, min_p=m)
    filtered = jitted_filter(jnp.array([logits]), how)[0]
    assert not jnp.isnan(filtered).any()
    ids, logprobs = jitted_sample(jnp.array([logits]), keys(1), how)
    assert filtered[int(ids[0])] > -jnp.inf
    assert not jnp.isnan(logprobs).any()


def test_zeros_of_either_sign_are_equal() -> None:
    logits = jnp.array([[-0.0, 0.0, -0.0]])
    first = leading(logits, jnp.ones_like(logits), jnp.array([[0.0]]))
    assert first[0].tolist() == [True, False, False]
    assert largest(logits).tolist() == [0]


def test_float64_stays_float64(x64: None) -> None:
    logits = jnp.log(jnp.array([[0.25, 0.25 + 1e-12, 0.5 - 1e-12]]))
    _, logprobs = sample(logits, keys(1), controls(temperature=0))
    assert logprobs.dtype == filter_logits(logits, controls(top_k=2)).dtype == jnp.float64
    assert float(logprobs[0]) == pytest.approx(math.log(0.5 - 1e-12), rel=1e-14)
    weights = jax.nn.softmax(logits)
    assert leading(logits, jnp.ones_like(logits), jnp.array([[1.0]]))[0].tolist() == [0, 1, 1]
    assert leading(logits, weights, jnp.array([[0.5 - 2e-12]]))[0].tolist() == [0, 0, 1]
    assert leading(logits, weights, jnp.array([[0.5]]))[0].tolist() == [0, 1, 1]


def test_a_stream_depends_on_seed_row_and_position_alone() -> None:
    def bits(seed: int, rows: int, position: int) -> list[list[int]]:
        made = token_keys(Sampling(seed=seed).streams(rows), jnp.full(rows, position))
        return jax.random.key_data(made).tolist()

    assert bits(3, 1, 5) == bits(3, 4, 5)[:1]
    later = Sampling(seed=3).streams(2, first_row=2)
    assert later.tolist() == Sampling(seed=3).streams(4)[2:].tolist() == [[2, 3], [3, 3]]
    everything = [
        tuple(k) for seed in (0, 1, 2**32 - 1) for p in (0, 1, 9) for k in bits(seed, 4, p)
    ]
    assert len(set(everything)) == 3 * 3 * 4


def test_a_seed_means_the_same_tokens_whatever_the_version_and_the_default_generator() -> None:
    with jax.default_prng_impl("rbg"):
        made = token_keys(Sampling(seed=42).streams(2), jnp.array([7, 7]))
        ids, _ = jitted_sample(jnp.zeros((2, 1000)), made, controls(2))
    assert ids.tolist() == [12, 462]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.0},
        {"min_p": math.nan},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_numbers_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Sampling(**wrong)
