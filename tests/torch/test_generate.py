"""The reference's generation against the one thing it must equal: reading the text at once.

Prompts end before, at and after the window, whole chunks do not fill them, and three windows
of new tokens follow.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("xformers", reason="lechat_torch takes its masks from xformers")

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_torch import model as model_module
from lechat_torch.cache import EMPTY, Cache, attend_cached, empty_cache, position_bias
from lechat_torch.generate import Sample, choose, generate, left_padded
from lechat_torch.model import Mistral
from tests.torch.test_model import VARIANTS, random_model, text

W = 7
LENGTHS = (W - 1, W, W + 1, 2 * W + 3)
EXACT = 1e-11  # of each log-probability, in float64; measured 2e-15


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are computed three times as fast by one thread as by two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(97, (length,), generator=generator).tolist()


def one_pass(
    model: Mistral, prompt: Sequence[int], sample: Sample
) -> tuple[list[int], list[float]]:
    """The likeliest tokens where `sample` stands, and the log-probabilities of its own."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *sample.ids]]))[0]
    nats = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    own = nats.gather(1, torch.tensor(sample.ids)[:, None])
    return nats.argmax(dim=-1).tolist(), own[:, 0].tolist()


def pieces(model: Mistral, tokens: Tensor, lengths: Sequence[int], cache: Cache) -> Tensor:
    """Logits of a text that is read through the cache in pieces of these lengths."""
    found, start = [], 0
    for length in lengths:
        positions = torch.arange(start, start + length).expand(len(tokens), -1)
        with torch.no_grad():
            logits, cache = model.extend(tokens[:, start : start + length], positions, cache)
        found.append(logits)
        start += length
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("chunk", [4, 32])
def test_greedy_decoding_past_the_window_is_one_pass(
    tiny: MistralConfig, change: dict[str, Any], chunk: int
) -> None:
    model = random_model(dataclasses.replace(tiny, **change))
    prompts = [prompt_of(length) for length in LENGTHS]
    samples = generate(model, prompts, 3 * W, chunk=chunk, context=40)
    for prompt, sample in zip(prompts, samples, strict=True):
        likeliest, nats = one_pass(model, prompt, sample)
        assert sample.ids == likeliest
        assert sample.logprobs == pytest.approx(nats, rel=EXACT)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_each_row_of_a_ragged_batch_is_as_if_alone(tiny: MistralConfig, chunk: int) -> None:
    model = random_model(dataclasses.replace(tiny, sliding_window=(W, None, 3)))
    prompts = [prompt_of(length) for length in (17, 1, 8)]
    for prompt, together in zip(prompts, generate(model, prompts, W, chunk=chunk), strict=True):
        (alone,) = generate(model, [prompt], W, chunk=chunk)
        assert together.ids == alone.ids
        assert together.logprobs == pytest.approx(alone.logprobs, rel=EXACT)


@pytest.mark.parametrize("lengths", [[33], [5, 1, 4, 2, 5, 5, 5, 5, 1], [1] * 33])
@pytest.mark.parametrize("window", [1, 3, W, None])
def test_reading_in_pieces_is_reading_at_once(
    tiny: MistralConfig, lengths: list[int], window: int | None
) -> None:
    model, tokens = random_model(dataclasses.replace(tiny, sliding_window=window)), text(tiny)
    cache = empty_cache(model.config, 2, max(lengths), 33, torch.float64, "cpu")
    with torch.no_grad():
        whole = model(tokens)
    torch.testing.assert_close(
        pieces(model, tokens, lengths, cache), whole, rtol=0, atol=EXACT * whole.abs().max().item()
    )


def test_a_window_that_is_off_by_one_is_seen_while_decoding(
    tiny: MistralConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_sighted(*args: Any, window: int, **named: Any) -> Tensor:
        return attend_cached(*args, window=window - 1, **named)

    model, prompt = random_model(tiny), prompt_of(LENGTHS[-1])
    monkeypatch.setattr(model_module, "attend_cached", short_sighted)
    (sample,) = generate(model, [prompt], 3 * W, chunk=4)
    assert sample.logprobs != pytest.approx(one_pass(model, prompt, sample)[1], rel=1e-3)


def test_a_chunk_longer_than_the_cache_was_made_for_is_refused(tiny: MistralConfig) -> None:
    model, tokens = random_model(tiny), text(tiny)
    cache = empty_cache(tiny, 2, 10, 0, torch.float64, "cpu")
    with pytest.raises(BadInput, match="11 tokens at once need 17 slots behind a window of 7"):
        pieces(model, tokens, [11], cache)


def test_a_ring_has_no_slot_to_spare(tiny: MistralConfig) -> None:
    """With one slot fewer than W + T - 1, a chunk overwrites what its first token must see."""
    model, tokens = random_model(tiny), text(tiny)
    with torch.no_grad():
        whole = model(tokens)

    def error(slots: int) -> float:
        cache = empty_cache(tiny, 2, slots - W + 1, 0, torch.float64, "cpu")
        nearer = dataclasses.replace(tiny, sliding_window=W - 1)  # what the ring is told
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "config", nearer)
            patch.setattr("lechat_torch.cache.position_bias", one_further)
            return (pieces(model, tokens, [11, 11, 11], cache) - whole).abs().max().item()

    def one_further(q: Tensor, k: Tensor, window: int, dtype: torch.dtype) -> Tensor:
        return position_bias(q, k, window + 1, dtype)

    assert error(W + 11 - 1) < 1e-11
    assert error(W + 11 - 2) > 0.01


def test_memory_is_constant_however_long_the_text(tiny: MistralConfig) -> None:
    config = dataclasses.replace(tiny, sliding_window=(W, None, 3))
    cache = empty_cache(config, 2, 5, 33, torch.bfloat16, "cpu")
    assert [ring.slots for ring in cache] == [7 + 5 - 1, 33, 3 + 5 - 1]
    before = [leaf.data_ptr() for ring in cache for leaf in ring]
    positions = torch.arange(33).expand(2, -1)
    model, tokens = random_model(config, torch.bfloat16), text(config)
    with torch.no_grad():
        for t in range(33):
            _, cache = model.extend(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
    assert [leaf.data_ptr() for ring in cache for leaf in ring] == before
    assert {leaf.dtype for ring in cache for leaf in ring[:2]} == {torch.bfloat16}
    held = [sorted(set(ring.positions[0].tolist()) - {EMPTY}) for ring in cache]
    assert held == [list(range(22, 33)), list(range(33)), list(range(26, 33))]


def test_padding_leaves_what_a_row_remembers(tiny: MistralConfig) -> None:
    """Also in the middle of a text, as when one row of a batch has to wait for the others."""
    model, tokens = random_model(tiny), text(tiny)
    with torch.no_grad():
        whole = model(tokens)
        cache = empty_cache(tiny, 2, 4, 33, torch.float64, "cpu")
        pieces(model, tokens[:, :20], [4] * 5, cache)
        positions = torch.tensor([[20, 21, 22, 23], [EMPTY, 20, EMPTY, EMPTY]])
        ids = torch.stack([tokens[0, 20:24], tokens[1, 20].expand(4)])
        model.extend(ids, positions, cache)
        ids = torch.stack([tokens[0, 24], tokens[1, 21]])[:, None]
        logits, _ = model.extend(ids, torch.tensor([[24], [21]]), cache)
    expected = torch.stack([whole[0, 24], whole[1, 21]])
    torch.testing.assert_close(logits[:, 0], expected, rtol=0, atol=1e-11)


def test_a_text_ends_with_the_token_that_says_so(tiny: MistralConfig) -> None:
    model, prompts = random_model(tiny), [prompt_of(5), prompt_of(9)]
    endless = generate(model, prompts, 9)
    end = next(i for i in endless[0].ids[2:] if i not in endless[1].ids)
    ended = generate(model, prompts, 9, eos_ids=[end])
    length = endless[0].ids.index(end) + 1
    assert ended[0] == Sample(endless[0].ids[:length], endless[0].logprobs[:length])
    assert ended[1] == endless[1]
    assert len(generate(model, prompts[:1], 10**9, eos_ids=[end])[0].ids) == length


def test_nothing_is_generated_when_nothing_is_asked(tiny: MistralConfig) -> None:
    assert generate(random_model(tiny), [[1], [2]], 0) == [Sample([], []), Sample([], [])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_generates_in_its_own_dtype(tiny: MistralConfig, dtype: torch.dtype) -> None:
    model, prompt = random_model(tiny, dtype), prompt_of(17)
    (sample,) = generate(model, [prompt], 3 * W, chunk=4)
    _, nats = one_pass(model, prompt, sample)
    # Measured 7e-7, and 0; logits of 2 to 4 are rounded to multiples of 1/64 in bfloat16.
    assert sample.logprobs == pytest.approx(nats, abs=1e-5 if dtype == torch.float32 else 0.05)


FOUR = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, [0.05, 0.5, 0.15, 0.3]),
        (0.5, 0, 1.0, [0.0025 / 0.365, 0.25 / 0.365, 0.0225 / 0.365, 0.09 / 0.365]),
        (1.0, 2, 1.0, [0, 0.625, 0, 0.375]),
        (1.0, 99, 1.0, [0.05, 0.5, 0.15, 0.3]),
        (1.0, 0, 0.6, [0, 0.625, 0, 0.375]),
        (1.0, 2, 0.6, [0, 1, 0, 0]),  # of the two that are left, the first has 0.625
        (0.0, 0, 1.0, [0, 1, 0, 0]),
        (1.0, 1, 1.0, [0, 1, 0, 0]),
        (1.0, 0, 0.0, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(
    temperature: float, top_k: int, top_p: float, expected: list[float]
) -> None:
    n = 40_000
    draws = torch.Generator().manual_seed(0)
    drawn = choose(FOUR.expand(n, -1), temperature, top_k, top_p, draws)
    shares = torch.bincount(drawn.flatten(), minlength=4) / n
    assert shares.tolist() == pytest.approx(expected, abs=0.01)  # four deviations
    assert [share == 0 for share in shares.tolist()] == [share == 0 for share in expected]


@pytest.mark.parametrize(("top_p", "n"), [(0.24, 1), (0.25, 2), (0.5, 3), (0.75, 4), (1.0, 4)])
def test_what_has_just_p_before_it_stays(top_p: float, n: int) -> None:
    """Quarters are exact in floating point; of equals the lower id is first."""
    draws = torch.Generator().manual_seed(0)
    drawn = choose(torch.zeros(400, 4), 1.0, 0, top_p, draws)
    assert sorted(set(drawn.flatten().tolist())) == list(range(n))


def test_what_is_drawn_follows_from_the_seed_and_is_scored_by_the_model(
    tiny: MistralConfig,
) -> None:
    model, prompt = random_model(tiny), prompt_of(8)

    def drawn(seed: int) -> Sample:
        (sample,) = generate(model, [prompt], 20, temperature=2.0, top_k=50, top_p=0.9, seed=seed)
        return sample

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0).logprobs == pytest.approx(one_pass(model, prompt, drawn(0))[1], rel=EXACT)


def test_prompts_end_in_the_same_column() -> None:
    tokens, positions = left_padded([[5], [7, 8, 9]], torch.device("cpu"))
    assert tokens.tolist() == [[0, 0, 5], [7, 8, 9]]
    assert positions.tolist() == [[EMPTY, EMPTY, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"prompts": []}, "there is no prompt, or one without tokens"),
        ({"prompts": [[1], []]}, "there is no prompt, or one without tokens"),
        ({"prompts": [[1, 97]]}, "prompt token 97 is not an id of the model, which has 0 to 96"),
        ({"prompts": [[-1]]}, "prompt token -1 is not an id"),
        ({"max_tokens": -1}, "max_tokens must be at least 0, not -1"),
        ({"context": 7}, "a prompt and 5 new tokens are 8 positions, but the context has 7"),
        ({"chunk": 0}, "chunk (0) must be at least 1"),
        ({"temperature": -1.0}, "temperature (-1.0)"),
        ({"temperature": float("nan")}, "temperature (nan)"),
        ({"top_k": -1}, "top_k (-1)"),
        ({"top_p": 1.5}, "top_p (1.5) from 0 to 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    tiny: MistralConfig, asked: dict[str, Any], sentence: str
) -> None:
    model = Mistral(dataclasses.replace(tiny, sliding_window=None))
    usual: dict[str, Any] = {"prompts": [[1, 2, 3]], "max_tokens": 5}
    with pytest.raises(BadInput, match=re.escape(sentence)):
        generate(model, **(usual | asked))


def test_a_context_is_filled_to_the_last_position_and_never_overwritten(
    tiny: MistralConfig,
) -> None:
    config = dataclasses.replace(tiny, sliding_window=None)
    model = random_model(config)
    assert len(generate(model, [[1, 2, 3]], 5, context=8)[0].ids) == 5
    cache = empty_cache(config, 1, 1, 8, torch.float64, "cpu")
    one = torch.zeros(1, 1, dtype=torch.int64)
    model.extend(one, one + 7, cache)
    with pytest.raises(IndexError):
        model.extend(one, one + 8, cache)
    assert (
        len(generate(random_model(tiny), [[1, 2, 3]], 20, context=8)[0].ids) == 20
    )  # all windowed
