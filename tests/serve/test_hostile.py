"""Requests that are meant to harm: each is refused clearly, and none harms another."""

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lechat_jax.errors import BadInput
from lechat_jax.generate.continuous_batch import ContinuousBatch
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.generate.sampling import Sampling
from lechat_jax.serve.command import ServeConfig
from lechat_jax.serve.engine import Engine, GenerationRequest, Ticket, log
from lechat_jax.serve.grammar import Grammars
from lechat_jax.serve.tools import Marks, ToolCallParser
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.serve.conftest import Live
from tests.serve.test_engine import Listener, fails, settle, submit
from tests.support import tokenizers

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
DEEP = "[" * 980 + "]" * 980  # as deep as the body's parser goes


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (TEXT | {"logit_bias": {"9" * 5000: 1}}, "which is not an id"),
        (TEXT | {"prompt": ["a"] * 1024, "n": 128}, "more than 1024 answers"),
        (TEXT | {"prompt": "a" * 10**6}, "the context holds 256 in all"),
        (TEXT | {"n": 12}, "12 answers are asked for at once"),
        (CHAT | {"max_tokens": 0}, "max_tokens: input should be greater"),
        (CHAT | {"messages": [{"role": "user", "content": "a" * 10**6}]}, "characters"),
        (CHAT | {"messages": [{"role": "\ud800", "content": "a"}]}, "role"),
        (CHAT | {"\ud800": 1}, "a field: "),
        (CHAT | form({"const": "\ud800"}), "the JSON schema cannot be used"),
        (CHAT | form({"const": json.loads("[" * 300 + "]" * 300)}), "the JSON schema"),
        (CHAT | form({"$ref": "#"}), "allows no text"),
        (CHAT | form({"title": "a" * 60_000}), "at most 60000 are compiled"),
        (CHAT | {"structured_outputs": {"grammar": "start: start"}}, "allows no text"),
        (CHAT | {"structured_outputs": {"regex": "(" * 10_000 + ")" * 10_000}}, "invalid regex"),
    ],
    ids=range(14),
)
def test_what_would_harm_is_refused(client: httpx.Client, asked: Any, why: str) -> None:
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    headers = {"Content-Type": "application/json"}
    answer = client.post(path, content=json.dumps(asked), headers=headers)
    assert answer.status_code == 400
    assert why in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        f'"messages": [{{"role": "user", "content": "a", "tool_calls": {DEEP}}}]',
        f'"messages": [{{"role": "user", "content": "a"}}], "tools": [{DEEP}]',
        '"messages": [{"role": "user", "content": "a"}], "response_format": {"type": '
        f'"json_schema", "json_schema": {{"schema": {{"const": {DEEP}}}}}}}',
        '"messages": [{"role": "user", "content": "a"}], "tool_choice": "required", "tools": '
        f'[{{"function": {{"name": "f", "parameters": {{"const": {DEEP}}}}}}}]',
    ],
    ids=["message", "tools", "schema", "parameters"],
)
def test_what_is_nested_deeply_is_no_failure(client: httpx.Client, fields: str) -> None:
    headers = {"Content-Type": "application/json"}
    body = f'{{{fields}, "max_tokens": 1}}'
    answer = client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code in (200, 400)


def test_a_schema_of_true_allows_everything(client: httpx.Client) -> None:
    asked = CHAT | {"response_format": {"type": "json_schema", "json_schema": {}}}
    assert client.post("/v1/chat/completions", json=asked).status_code == 200


def test_a_grammar_may_demand_what_is_banned_without_it(
    client: httpx.Client, tokenizer: Tokenizer
) -> None:
    calls = tokenizer.control_id("[TOOL_CALLS]")
    asked = CHAT | {"structured_outputs": {"grammar": f'start: <[{calls}]> "a"'}, "max_tokens": 9}
    answer = client.post("/v1/chat/completions", json=asked).json()
    assert answer["choices"][0]["message"]["content"] == "a"


def test_a_client_that_leaves_at_the_last_update_counts_once(model: LoadedModel) -> None:
    with Engine(model, 1) as engine:
        tickets: list[Ticket] = []
        done = threading.Event()

        def leave(update: Any) -> None:
            if update.is_last:
                tickets[0].cancel()
                done.set()

        tickets += engine.enqueue([GenerationRequest([5, 6], 3)], [leave])
        assert done.wait(30)
        settle(engine)
        sample = engine.metrics.registry.get_sample_value
        name = "lechat:request_success_total"
        assert sample(name, {"finished_reason": "length"}) == 1
        assert not sample(name, {"finished_reason": "abort"})


def test_the_batch_that_failed_is_gone_before_the_next_is_made(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model, 1) as engine:
        old, was_there = weakref.ref(engine._batch), []
        right = LoadedModel.continuous_batch

        def made(*args: Any, **fields: Any) -> ContinuousBatch:
            gc.collect()
            was_there.append(old() is not None)
            return right(*args, **fields)

        monkeypatch.setattr(LoadedModel, "continuous_batch", made)
        # pytest keeps what is logged, with the exception and so the batch.
        monkeypatch.setattr(log, "exception", lambda *_: None)
        with monkeypatch.context() as patch:
            patch.setattr(ContinuousBatch, "start", fails)
            assert submit(engine, GenerationRequest([5, 6], 3)).done.wait(30)
        submit(engine, GenerationRequest([5, 6], 3)).answer()
        assert was_there == [False]


def test_a_common_prompt_is_dropped_when_all_have_begun(model: LoadedModel) -> None:
    with Engine(model, 2) as engine:
        listeners = [Listener() for _ in range(4)]
        asked = [GenerationRequest([9] * 20, 5, Sampling(seed=1), stream) for stream in range(4)]
        tickets = engine.enqueue(asked, listeners)
        for listener in listeners:
            listener.answer()
        assert all(ticket.shared and ticket.shared.snapshot is None for ticket in tickets)


def test_calls_with_surrogates_and_deep_ones_do_not_end_an_answer() -> None:
    tokenizer = tokenizers.tokenizer("v3")
    calls = tokenizer.control_id("[TOOL_CALLS]")
    assert calls is not None
    for text, told in (
        ('[{"name": "f", "arguments": {"x": "\\ud800"}}]', '{"x": "?"}'),
        ('[{"name": "f", "arguments": ' + "[" * 3_000, ""),
    ):
        parser = ToolCallParser(tokenizer, Marks(calls, None, None))
        pieces = [*parser.push([calls, *tokenizer.encode(text)])]
        assert "".join(piece.arguments for piece in pieces) == told


@pytest.mark.parametrize("key", ["clé", "a b", "a\n"])
def test_a_key_that_cannot_be_sent_is_refused(key: str, tmp_path: Any) -> None:
    with pytest.raises(BadInput, match="must be of ASCII"):
        ServeConfig(tmp_path, api_key=key).check()


def test_compiling_a_grammar_keeps_no_chat_waiting(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    right = Grammars.regex

    def slow(self: Grammars, pattern: str) -> Any:
        begun.set()
        go_on.wait(30)
        return right(self, pattern)

    monkeypatch.setattr(Grammars, "regex", slow)
    asked = CHAT | {"structured_outputs": {"regex": "[a-z]"}}
    answers: list[int] = []
    url = client.base_url.join("/v1/chat/completions")
    other = threading.Thread(
        target=lambda: answers.append(httpx.post(url, json=asked, timeout=60).status_code)
    )
    other.start()
    assert begun.wait(30)
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert not answers
    go_on.set()
    other.join()
    assert answers == [200]
