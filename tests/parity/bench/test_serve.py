"""The benchmark of servers: times of literal events, seeded prompts, rows, and a small run."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer
from parity.bench import command, serve
from parity.bench.serve import Serve
from parity.bench.servers.client import Measured, Request, complete, measure, read_stream
from parity.bench.servers.processes import Server, free_port
from parity.bench.servers.prompts import Prompts
from parity.bench.servers.rows import compare, row_of, table
from parity.bench.servers.times import Span, Stream, percentile

KEYS = {
    *("work", "impl", "dtype", "model", "rows", "context", "users", "long_prompt", "mode"),
    *("tokens_per_s", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "itl_max_s"),
    *("long_ttft_s", "speedup", "ratio", "itl_max_to_p50", "itl_max_to_p99", "note"),
}
TINY = MistralConfig(
    dim=40,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=56,
    vocab_size=32000,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=7,
)


def event(text: str, **more: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]} | more).encode() + b"\n"


COUNTED = {"usage": {"prompt_tokens": 5, "completion_tokens": 6}}


def read(lines: Iterable[bytes]) -> Stream:
    """A stream of which each line arrives a second after the one before."""
    now = itertools.count()

    async def arriving() -> AsyncIterator[bytes]:
        for line in lines:
            yield line

    return asyncio.run(read_stream(arriving(), lambda: float(next(now))))


def test_events_with_text_are_timed_and_the_server_counts_the_tokens() -> None:
    head = [b"HTTP/1.1 200 OK\r\n", b"\r\n", b"a3\r\n", b": ping\n"]
    last = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6}}\n'
    stream = read([*head, event("a"), b"\n", event(""), event("bc"), last, b"data: [DONE]\n"])
    assert stream == Stream(sent=0.0, events=[1.0, 3.0], new_tokens=6, prompt_tokens=5)


def test_a_count_with_the_last_text_and_no_mark_of_the_end_will_do() -> None:
    assert read([event("a"), event("b", **COUNTED)]) == Stream(0.0, [1.0, 2.0], 6, 5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([event("a"), b'data: {"error": "out of memory"}\n'], "out of memory"),
        ([event("a"), event("b")], "ended early"),
        ([b"HTTP/1.1 422 Unprocessable\r\n", b'{"detail": "no such field"}'], "no such field"),
    ],
)
def test_an_answer_that_is_none_is_an_error(lines: list[bytes], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read(lines)


STREAMS = (
    Stream(0.0, [1.0, 2.0, 4.0, 5.0], 8, 5),  # two tokens an event
    Stream(3.0, [3.5, 9.0], 2, 5),
    Stream(6.0, [8.0, 8.5], 2, 5),
)


def test_a_span_has_what_came_within_it() -> None:
    span = Span(2.0, 6.0, STREAMS)
    assert span.tokens_per_s == (3 * 2 + 1) / 4  # of the events at 2, 4, 5 and 3.5
    assert span.firsts == [0.5]  # of the request that was sent within
    assert span.gaps == [1.0, 2.0, 1.0]  # whose later event came within


def test_a_stream_without_text_has_no_times() -> None:
    span = Span(0.0, 9.0, [Stream(1.0, [], 3, 5)])
    assert (span.tokens_per_s, span.firsts, span.gaps) == (0.0, [], [])


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]


def rows(*impls: str) -> list[serve.Row]:
    usual, loaded = Span(2.0, 6.0, STREAMS), Span(6.0, 10.0, STREAMS)
    measured = [Measured(usual, loaded, Stream(6.0, [9.0, 10.0], 2, 4000))]
    shared = {"dtype": "float32", "context": 4008, "model": "m", "rows": 8, "mode": ""}
    return [
        row_of(impl, users, measured, length, shared)
        for impl in impls
        for users in (1, 2)
        for length in (0, 4000)
    ]


def test_rows_compare_themselves_with_one_user_the_peer_and_usual_traffic() -> None:
    made = rows("lechat", "transformers")
    compare(made)
    usual, long = (row.to_dict() for row in made[2:4])
    assert usual.keys() >= KEYS
    assert (usual["tokens_per_s"], usual["ttft_p50_s"], usual["itl_max_s"]) == (1.75, 0.5, 2.0)
    assert (usual["itl_p50_s"], usual["itl_p99_s"]) == (1.0, 2.0)
    assert (usual["speedup"], usual["ratio"], usual["itl_max_to_p50"]) == (1.0, 1.0, None)
    assert (long["long_prompt"], long["long_ttft_s"], long["itl_max_s"]) == (4000, 3.0, 5.5)
    assert (long["itl_max_to_p50"], long["itl_max_to_p99"]) == (5.5, 2.75)
    assert len([*table(made).lines]) == 8


def test_a_server_that_does_not_start_has_a_row_that_says_why() -> None:
    shared = {"dtype": "float32", "context": 4008, "model": "m", "rows": None, "mode": ""}
    failed = row_of("transformers", 0, [], 0, shared, "it needs fastapi")
    compare([failed, *(lechat := rows("lechat"))])
    assert failed.to_dict().keys() >= KEYS
    assert (failed.tokens_per_s, failed.note) == (None, "it needs fastapi")
    assert [row.details["ratio"] for row in lechat] == [None] * 4


def test_prompts_have_the_very_number_of_tokens_and_depend_on_all_numbers() -> None:
    tokenizer = Tokenizer.mistral_v1()
    prompts = Prompts(tokenizer, 16, 8, seed=0)
    first = [*itertools.islice(prompts.user(0, 1), 50)]
    lengths = [len(tokenizer.encode(request.prompt)) + 1 for request in first]  # and BOS
    assert (min(lengths), max(lengths)) == (8, 24)
    assert {request.new_tokens for request in first} == {*range(4, 13)}
    assert len(tokenizer.encode(prompts.long(400, 0))) == 399
    again = Prompts(tokenizer, 16, 8, seed=0)
    assert [*itertools.islice(again.user(0, 1), 50)] == first
    assert next(again.user(1, 1)) != first[0]


def test_users_send_the_next_request_when_one_is_answered() -> None:
    under_way, most, sent = set[Request](), 0, list[Request]()

    async def send(request: Request) -> Stream:
        nonlocal most
        began = time.perf_counter()
        under_way.add(request)
        sent.append(request)
        most = max(most, len(under_way))
        await asyncio.sleep(0.01)
        under_way.remove(request)
        return Stream(began, [began + 0.005, began + 0.01], 2, 1)

    def requests(name: str) -> Iterator[Request]:
        return (Request(name, n) for n in itertools.count())

    users = [requests(name) for name in "ab"]
    result = asyncio.run(measure(send, users, warm_up=0.02, seconds=0.1, long_prompt="long"))
    assert most == 3  # two users, and then the long prompt
    assert [r.new_tokens for r in sent if r.prompt == "a"] == [*range(len(sent) // 2)]
    assert result.loaded is not None
    assert result.usual.ended <= result.loaded.began
    assert len(result.usual.streams) == len(sent) - 1  # without the long prompt, which is apart


def test_the_failure_of_one_request_ends_the_measurement() -> None:
    async def refuse(request: Request) -> Stream:
        raise BadInput("out of memory")

    with pytest.raises(BadInput, match="out of memory"):
        asyncio.run(measure(refuse, [iter([Request("a", 1)])], 0.01, 0.01))


def test_nobody_listening_is_an_error() -> None:
    with pytest.raises(BadInput, match="takes no request"):
        asyncio.run(complete(free_port(), {}, Request("a", 1)))


def test_a_server_that_ends_at_once_is_an_error_with_its_last_line() -> None:
    server = Server("lechat", "", ("python", "-c", "import sys; sys.exit('no room')"), "/", {})
    with pytest.raises(BadInput, match="lechat serve has ended: no room"), server.running():
        pass


def test_transformers_is_named_in_a_row_when_a_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(serve.PRESETS, "tiny", TINY)
    Tokenizer.mistral_v1().save(tmp_path)
    for step in ("random", "converted"):
        monkeypatch.setattr(Serve, step, lambda *_: tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    work = Serve(model=("tiny",), impl=("transformers",), read_gb=0.01)
    report = work.run(serve.Console(quiet=True))
    assert ["which is not installed" in row.note for row in report.rows] == [True]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--users", "0"], "--users must be at least 1"),
        (["--seconds", "0"], "--seconds must be more than 0"),
        (["--long-prompt", "-1"], "--long-prompt"),
        (["--model", "no-such"], "neither a preset nor a folder"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        command.main(["serve", *flags])


@pytest.mark.slow
def test_a_small_model_is_served_and_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(serve.PRESETS, "tiny", TINY)
    flags = "--model tiny --impl lechat --users 1 3 --rows 2 --prompt-tokens 8 --new-tokens 8"
    more = "--seconds 1 --warm-up 0.2 --long-prompt 100 --read-gb 0.01 --json"
    assert command.main(["serve", *flags.split(), *more.split(), str(tmp_path / "out.json")]) == 0
    made = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["users"], row["long_prompt"]) for row in made] == [
        (users, length) for users in (1, 3) for length in (0, 100)
    ]
    assert all(row.keys() >= KEYS and row["impl"] == "lechat" for row in made)
    assert all(row["tokens_per_s"] > 0 and row["itl_p50_s"] > 0 for row in made)
    assert all(row["ttft_p50_s"] > 0 for row in made if not row["long_prompt"])
    assert all(row["long_ttft_s"] > 0 for row in made if row["long_prompt"])
