"""An answer depends on its request alone, and what goes wrong with one request harms no other."""

import itertools
import queue
import random
import re
import threading
import time
from typing import Any

import jax
import numpy as np
import psutil
import pytest

from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Sample, join
from lechat_jax.generate.continuous_batch import ContinuousBatch
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.generate.logits_processors import LogitsProcessing
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import bind
from lechat_jax.serve.engine import (
    Busy,
    ContextExceeded,
    Engine,
    Failure,
    GenerationRequest,
    Unavailable,
    Update,
)
from lechat_jax.serve.grammar import Grammars
from lechat_jax.tokenizer.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)


def requests(n: int, vocab_size: int, seed: int = 0) -> list[GenerationRequest]:
    """Requests of mixed lengths and sampling; some prompts begin alike."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(100, vocab_size, 30).tolist()
    made = []
    for number in range(n):
        own = rng.integers(100, vocab_size, int(rng.integers(1, 40))).tolist()
        prompt = [*shared[: int(rng.choice([0, 0, 17, 30]))], *own]
        temperature = float(rng.choice([0, 0.7, 1.3]))
        top_k, min_p = int(rng.choice([0, 40])), float(rng.choice([0, 0.02]))
        sampling = Sampling(temperature, top_k, float(rng.choice([0.9, 1])), min_p, number)
        processing = LogitsProcessing(
            {7: 2.0} if number % 5 == 0 else {},
            presence_penalty=0.5 * (number % 7 == 0),
            n_top=3 * (number % 4 == 0),
        )
        limit = int(rng.integers(1, 40))
        made.append(GenerationRequest(prompt, limit, sampling, number % 2, processing=processing))
    return made


class Listener:
    """Collects the updates of a request."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.done = threading.Event()

    def __call__(self, update: Update) -> None:
        self.updates.append(update)
        if update.is_last:
            self.done.set()

    @property
    def failure(self) -> Failure | None:
        return self.updates[-1].failure if self.updates else None

    def answer(self) -> tuple[Any, ...]:
        """All that was told, once it has ended."""
        assert self.done.wait(60)
        samples = [update.sample for update in self.updates if update.sample]
        top = [tokens for update in self.updates for tokens in update.top]
        whole = join(samples)
        return whole.ids, whole.logprobs, whole.text, whole.stopped, top


def submit(engine: Engine, request: GenerationRequest) -> Listener:
    listener = Listener()
    engine.enqueue([request], [listener])
    return listener


def settle(engine: Engine) -> None:
    """Waits until nobody has a row."""
    until = time.monotonic() + 250
    while engine.n_running or engine.n_waiting:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("n_rows", "n_requests"),
    [(8, 12), *(pytest.param(n, 64, marks=pytest.mark.slow) for n in (1, 2, 8))],
)
def test_an_answer_is_bit_for_bit_that_of_a_request_alone(
    model: LoadedModel, n_rows: int, n_requests: int
) -> None:
    """In any row, in any order of arrival, beside any others, with a prefix cache and without."""
    asked = requests(n_requests, model.config.vocab_size)
    with Engine(model, n_rows, max_queue=64) as engine:
        alone = [submit(engine, request).answer() for request in asked]
    arrivals, rng = [*enumerate(asked)], random.Random(n_rows)
    rng.shuffle(arrivals)
    with Engine(model, n_rows, max_queue=64, prefix_bytes=2**20) as engine:
        listeners = {}
        for number, request in arrivals:
            time.sleep(rng.expovariate(300))
            listeners[number] = submit(engine, request)
        together = [listeners[number].answer() for number in range(len(asked))]
    assert together == alone
    assert engine.metrics.registry.get_sample_value("lechat:prefix_cache_hits_total")


def test_an_answer_is_that_of_the_generator(model: LoadedModel, engine: Engine) -> None:
    """Up to rounding, which differs between programs of other shapes."""
    generator = Generator(bind(model.config, model.weights), model.tokenizer, context=256)
    said = join([*engine.submit("The cat", 20, Sampling(temperature=0.7, seed=3))])
    same = generator.generate("The cat", 20, Sampling(temperature=0.7, seed=3))
    assert (said.ids, said.text, said.stopped) == (same.ids, same.text, same.stopped)
    np.testing.assert_allclose(said.logprobs, same.logprobs, rtol=1e-5)


def test_drafts_change_no_text(model: LoadedModel) -> None:
    """Of prompts that repeat themselves, so that drafts are made, alone and beside others."""
    asked = [GenerationRequest([id_, 7, 8, 9] * 9, 30, GREEDY) for id_ in (5, 6, 900)]
    with Engine(model, 2) as plain, Engine(model, 2, draft=3) as drafting:
        right = [submit(plain, request).answer()[0] for request in asked]
        listeners = [submit(drafting, request) for request in asked]
        assert [listener.answer()[0] for listener in listeners] == right


def test_no_request_compiles_anything(
    model: LoadedModel, tokenizer: Tokenizer, engine: Engine
) -> None:
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event)
    )
    for request in requests(6, model.config.vocab_size, seed=9):
        submit(engine, request).answer()
    matcher = Grammars(tokenizer).regex("[a-z]{3}")
    eos = [tokenizer.eos_id]
    submit(engine, GenerationRequest([5, 6], 9, eos_ids=eos, matcher=matcher)).answer()
    submit(engine, GenerationRequest([5, 6, 7] * 9, 2, is_scored=True)).answer()
    shared = GenerationRequest([5, 6, 7] * 9, 2)
    listeners = [Listener(), Listener()]
    engine.enqueue([shared, shared], listeners)
    for listener in listeners:
        listener.answer()
    assert [name for name in compiled if "backend_compile" in name] == []


def test_choices_of_one_prompt_read_it_once(model: LoadedModel) -> None:
    reads = []
    with pytest.MonkeyPatch.context() as patch, Engine(model, 2) as engine:
        right = ContinuousBatch.read

        def read(self: ContinuousBatch) -> Any:
            reads.append(self.unread)
            return right(self)

        request = [GenerationRequest([9] * 41, 6, Sampling(seed=1), stream) for stream in range(5)]
        alone = [submit(engine, one).answer() for one in request]
        patch.setattr(ContinuousBatch, "read", read)
        listeners = [Listener() for _ in request]
        engine.enqueue(request, listeners)
        assert [listener.answer() for listener in listeners] == alone
    assert len({ids for ids, *_ in map(tuple, [(tuple(a[0]),) for a in alone])}) > 1
    assert max(reads) == 40
    assert sum(unread > 0 for unread in reads) == 5  # chunks of eight


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_a_request_that_is_cancelled_frees_its_row(engine: Engine, when: str) -> None:
    golden = GenerationRequest([11, 12, 13], 30, Sampling(seed=2))
    right = submit(engine, golden).answer()
    before = [submit(engine, GenerationRequest([5] * 30, 200)) for _ in range(3)]
    listener = Listener()
    length = 200 if when == "reading" else 20
    if when != "waiting":
        engine_free(engine, before)
    (ticket,) = engine.enqueue([GenerationRequest([6] * length, 50)], [listener])
    if when == "decoding":
        until = time.monotonic() + 30
        while not listener.updates and time.monotonic() < until:
            time.sleep(0.001)
    ticket.cancel()
    engine_free(engine, before)
    settle(engine)
    told = len(listener.updates)
    assert submit(engine, golden).answer() == right
    assert len(listener.updates) == told
    assert not listener.done.is_set()


def engine_free(engine: Engine, listeners: list[Listener]) -> None:
    """Waits until these have ended."""
    for listener in listeners:
        listener.answer()
    settle(engine)


def test_a_full_queue_refuses(model: LoadedModel) -> None:
    with Engine(model, 1, max_queue=2) as engine:
        request = GenerationRequest([5, 6], 200, GREEDY)
        with pytest.raises(BadInput, match="4 answers are asked for at once"):
            engine.enqueue([request] * 4, [Listener() for _ in range(4)])
        listeners = [Listener() for _ in range(3)]
        engine.enqueue([request] * 3, listeners)
        with pytest.raises(Busy, match="queue holds 2"):
            submit(engine, request)
        for listener in listeners:
            listener.answer()


@pytest.mark.parametrize(
    ("request_", "error", "why"),
    [
        (GenerationRequest([], 5), BadInput, "has no tokens"),
        (GenerationRequest([5] * 250, 7), ContextExceeded, "holds 256 in all"),
        (GenerationRequest([5] * 300, 0), ContextExceeded, "holds 256 in all"),
        (GenerationRequest([5, 10**6], 7), BadInput, "is not an id of the model"),
        (GenerationRequest([5], -1), BadInput, "max_tokens must be"),
        (
            GenerationRequest([5], 1, processing=LogitsProcessing({10**6: 1.0})),
            BadInput,
            "logit_bias has",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused_at_once(
    engine: Engine, request_: GenerationRequest, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        submit(engine, request_)


def test_an_iterator_that_is_closed_cancels(engine: Engine) -> None:
    pieces = engine.submit([5, 6, 7], 200, GREEDY)
    assert next(pieces).ids
    pieces.close()
    settle(engine)


def test_several_threads_can_submit(engine: Engine) -> None:
    answers: queue.SimpleQueue[Sample] = queue.SimpleQueue()

    def ask() -> None:
        answers.put(join([*engine.submit([8, 9], 12, Sampling(seed=4))]))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(answers.get().ids) for _ in threads}) == 1


def test_a_failure_ends_who_is_there_and_the_next_is_right(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model, 2, prefix_bytes=2**20) as engine:
        golden = GenerationRequest([11, 12, 13], 30, Sampling(seed=2))
        right = submit(engine, golden).answer()
        with monkeypatch.context() as patch:
            patch.setattr(ContinuousBatch, "start", fails)
            listener = submit(engine, golden)
            assert listener.done.wait(30)
            assert listener.failure
            assert listener.failure.kind == "internal"
        assert engine.state == "ready"
        assert submit(engine, golden).answer() == right
        with monkeypatch.context() as patch:  # again within a minute
            patch.setattr(ContinuousBatch, "start", fails)
            assert submit(engine, golden).done.wait(30)
        until = time.monotonic() + 30
        while engine.state != "failed" and time.monotonic() < until:
            time.sleep(0.005)
        with pytest.raises(Unavailable, match="failed"):
            submit(engine, golden)


def fails(*args: Any) -> Any:
    raise RuntimeError("this is not to be")


def test_numbers_that_are_not_finite_end_one_request(model: LoadedModel) -> None:
    weights = dict(model.weights)
    weights["embed.kernel"] = weights["embed.kernel"].at[96].set(np.nan)
    broken = LoadedModel(bind(model.config, weights), model.tokenizer, chunk=8, context=256)
    with Engine(broken, 2, prefix_bytes=2**20) as engine:
        golden = GenerationRequest(
            [11, 12, 13], 30, Sampling(seed=2), processing=LogitsProcessing({96: -99.0})
        )
        right = submit(engine, golden).answer()
        wrong, beside = submit(engine, GenerationRequest([96] * 20, 9)), submit(engine, golden)
        assert wrong.done.wait(30)
        assert wrong.failure
        assert "not finite" in wrong.failure.message
        assert beside.answer() == right
        again = [submit(engine, golden) for _ in range(4)]  # in its row, too
        assert [listener.answer() for listener in again] == [right] * 4


def test_draining_lets_those_who_have_a_row_end(model: LoadedModel) -> None:
    with Engine(model, 1) as engine:
        running, waiting = (
            submit(engine, GenerationRequest([5] * 20, 100, GREEDY)) for _ in range(2)
        )
        while not engine.n_running:
            time.sleep(0.001)
        engine.drain()
        assert waiting.failure
        assert waiting.failure.kind == "unavailable"
        assert len(running.answer()[0]) == 100
        with pytest.raises(Unavailable, match="draining"):
            submit(engine, GenerationRequest([5], 1))


def test_closing_fails_what_is_under_way(model: LoadedModel) -> None:
    engine = Engine(model, 1)
    listener = submit(engine, GenerationRequest([5] * 20, 200, GREEDY))
    while not listener.updates:
        time.sleep(0.001)
    engine.close()
    assert listener.done.is_set()


@pytest.mark.parametrize("n", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_of_many_requests_a_third_leave(model: LoadedModel, n: int) -> None:
    """Nothing is lost, and afterwards all is as it was."""
    with Engine(model, 4, max_queue=1000, prefix_bytes=2**18) as engine:
        golden = GenerationRequest([11, 12, 13], 30, Sampling(seed=2))
        right = submit(engine, golden).answer()
        asked = itertools.islice(itertools.cycle(requests(50, model.config.vocab_size)), n)
        listeners, tickets = [], []
        rng = random.Random(0)
        for request in asked:
            listener = Listener()
            tickets += engine.enqueue([request], [listener])
            listeners.append(listener)
            if rng.random() < 0.5:
                rng.choice(tickets[-8:]).cancel()
        settle(engine)
        for ticket, listener in zip(tickets, listeners, strict=True):
            assert listener.done.is_set() or ticket.is_cancelled
        assert submit(engine, golden).answer() == right


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_requests(model: LoadedModel) -> None:
    """After the first hundred, of which as of all others a third leaves before the end."""
    sizes = []
    with Engine(model, 4, max_queue=100, prefix_bytes=2**18) as engine:
        for _ in range(10):
            for i, request in enumerate(requests(100, model.config.vocab_size)):
                (ticket,) = engine.enqueue([request], [lambda update: None])
                if i % 3 == 0:
                    ticket.cancel()
            settle(engine)
            sizes.append(psutil.Process().memory_info().rss)
    assert max(sizes) < 1.05 * sizes[0]


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize(
    ("kind", "text", "allowed"),
    [("regex", "[0-9]{4}", r"\d{4}"), ("lark", 'start: "yes" | "no"', "yes|no")],
)
def test_a_grammar_is_kept(
    engine: Engine, tokenizer: Tokenizer, kind: str, text: str, allowed: str, temperature: float
) -> None:
    matcher = getattr(Grammars(tokenizer), kind)(text)
    sampling = Sampling(temperature, seed=5)
    said = join([*engine.submit("The", 30, sampling, matcher=matcher)])
    assert said.stopped == "eos"
    assert re.fullmatch(allowed, said.text)
