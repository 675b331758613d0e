"""The server is OpenAI's API to OpenAI's own client, and to whoever speaks HTTP without care."""

import json
import math
import socket
import time
from collections.abc import Callable
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from lechat_jax.generate.continuous_batch import ContinuousBatch
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.serve import api
from lechat_jax.serve.api import Access
from lechat_jax.serve.engine import Engine
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.serve.conftest import (
    HELLO,
    WEATHER,
    Live,
    chat,
    complete,
    is_idle,
    live,
    named,
    port,
)


def test_a_chat_answers(client: openai.OpenAI) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert (answer.object, answer.model, choice.index) == ("chat.completion", "tiny", 0)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.system_fingerprint == "fp_test"
    assert chat(client).choices == answer.choices
    assert chat(client, seed=2).choices != answer.choices


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = [*chat(client, stream=True, stream_options={"include_usage": True})]
    *others, last = chunks
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert {chunk.usage for chunk in others} == {None}
    assert others[0].choices[0].delta.role == "assistant"
    assert [chunk for chunk in others[1:] if chunk.choices[0].delta.role] == []
    texts = [chunk.choices[0].delta.content or "" for chunk in others]
    assert "".join(texts) == whole.choices[0].message.content
    assert [text for text in texts[1:-1] if not text] == []
    assert [chunk.choices[0].finish_reason for chunk in others[-2:]] == [None, "length"]


def test_choices_differ_and_the_first_is_that_of_one_alone(client: openai.OpenAI) -> None:
    one, three = chat(client), chat(client, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert texts[0] == one.choices[0].message.content
    assert len({*texts}) == 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 36
    said = {0: "", 1: "", 2: ""}
    for chunk in chat(client, n=3, stream=True):
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [*said.values()] == texts


def test_log_probs_of_a_chat_are_the_contents(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=4).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 4
        nats = [top.logprob for top in token.top_logprobs]
        assert nats == sorted(nats, reverse=True)
        assert token.logprob <= nats[0] <= 0
    greedy = chat(client, logprobs=True, top_logprobs=1, temperature=0).choices[0]
    assert all(t.logprob == t.top_logprobs[0].logprob for t in greedy.logprobs.content)


def test_log_probs_of_a_stream_are_those_of_the_whole(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    found = []
    for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs:
            found += chunk.choices[0].logprobs.content
    assert found == whole


def test_a_text_is_continued(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
    assert answer.choices[0].text
    said = "".join(chunk.choices[0].text for chunk in complete(client, stream=True))
    assert said == answer.choices[0].text
    assert complete(client, max_tokens=None).usage.completion_tokens == 16


def test_prompts_can_be_ids_and_several(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    one = complete(client).choices[0].text
    ids = [tokenizer.bos_id, *tokenizer.encode("The cat")]
    assert complete(client, prompt=ids).choices[0].text == one
    for prompts in (["The cat", "A dog"], [ids, [1, 900]]):
        answer = complete(client, prompt=prompts, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[0].text == one


def test_an_echo_has_the_prompts_log_probs(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """As an evaluation asks for them: the sum over a continuation, and whether it is greedy."""
    ids = [tokenizer.bos_id, *tokenizer.encode("The cat sat on the mat")]
    alone = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    (choice,) = alone.choices
    told = choice.logprobs
    assert choice.text.startswith("The cat sat on the mat")
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(ids) + 1
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    said = complete(client, prompt=ids[:4], echo=True, logprobs=3, max_tokens=len(ids) - 4)
    assert said.choices[0].logprobs.token_logprobs[1:4] == told.token_logprobs[1:4]
    assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values())
    at = [told.text_offset[i] for i in range(len(ids))]
    assert at == sorted(at)
    assert choice.text[at[3] :].startswith(tokenizer.decode(ids[3:4]))
    read = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=0)
    assert read.choices[0].logprobs.token_logprobs == told.token_logprobs[:-1]
    plain = complete(client, prompt=ids, echo=True, max_tokens=2)
    assert plain.choices[0].text.startswith("The cat sat on the mat")


def test_a_stop_text_is_cut_and_never_told(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=60).choices[0].text
    stop = whole[20:24]
    answer = complete(client, max_tokens=60, stop=[stop, "never"])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole[: whole.index(stop)]
    chunks = [*complete(client, max_tokens=60, stop=stop, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_a_bias_and_penalties_change_the_answer(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    (id_,) = tokenizer.encode("e")
    answer = complete(client, logit_bias={str(id_): 100})
    assert answer.choices[0].text == "e" * 12
    answer = complete(client, logit_bias={str(id_): 30}, frequency_penalty=2, max_tokens=60)
    assert "e" * 10 in answer.choices[0].text
    assert answer.choices[0].text != "e" * 60
    ends = {"logit_bias": {str(tokenizer.eos_id): 100}}
    assert complete(client, **ends).choices[0].finish_reason == "stop"
    ignoring = complete(client, **ends, extra_body={"ignore_eos": True})
    assert ignoring.choices[0].finish_reason == "length"


class Person(pydantic.BaseModel):
    name: Literal["Ann", "Bob"]
    is_old: bool


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Person, max_tokens=60, temperature=1.5
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    ("structure", "matches"),
    [
        ({"regex": "[0-9]{3}"}, str.isdecimal),
        ({"choice": ["yes", "no"]}, ["yes", "no"].__contains__),
        ({"grammar": 'start: "a" "b"*'}, lambda text: text.strip("b") == "a"),
        ({"json": {"type": "boolean"}}, ["true", "false"].__contains__),
    ],
)
def test_a_grammar_is_kept(client: openai.OpenAI, structure: Any, matches: Any) -> None:
    for seed in range(3):
        body = {"structured_outputs": structure}
        answer = chat(client, extra_body=body, max_tokens=200, seed=seed).choices[0]
        assert answer.finish_reason == "length" or matches(answer.message.content)


def test_an_object_is_an_object(client: openai.OpenAI) -> None:
    form = {"type": "json_object"}
    for seed in range(2):
        answer = chat(client, response_format=form, max_tokens=60, seed=seed).choices[0]
        assert answer.message.content.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize("choice", ["required", named("get_weather")])
def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI, choice: Any) -> None:
    asked = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 80}
    answer = chat(client, **asked).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    assert len(call.id) == 9
    assert call.id.isalnum()
    assert answer.message.content is None
    deltas = [
        delta
        for chunk in chat(client, **asked, stream=True)
        for delta in chunk.choices[0].delta.tool_calls or []
    ]
    assert (deltas[0].id is not None, deltas[0].function.name) == (True, "get_weather")
    assert {(delta.id, delta.function.name) for delta in deltas[1:]} == {(None, None)}
    written = "".join(delta.function.arguments for delta in deltas)
    assert written == call.function.arguments
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "Rain."},
    ]
    assert chat(client, messages=messages, tools=[WEATHER]).usage.completion_tokens == 12


def test_what_it_has_is_told(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200
    assert "default-src 'none'" in http.get("/").headers["content-security-policy"]
    chat(client)
    metrics = http.get("/metrics").text
    assert 'lechat:request_success_total{finished_reason="length"}' in metrics
    assert "lechat:time_to_first_token_seconds_count" in metrics


def test_texts_can_be_tokenized(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = http.post("/tokenize", json={"prompt": "The cat"}).json()
    assert ids["tokens"] == [tokenizer.bos_id, *tokenizer.encode("The cat")]
    assert ids["count"] == len(ids["tokens"])
    body = {"prompt": "The cat", "add_special_tokens": False}
    assert http.post("/tokenize", json=body).json()["tokens"] == tokenizer.encode("The cat")
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "The cat"}
    info = http.get("/tokenizer_info").json()
    named = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert http.post("/tokenize", json=named).json()["tokens"] == [tokenizer.eos_id]


def schema(**schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"temperature": -1}, None),
        ({"temperature": True}, None),
        ({"top_p": 0}, None),
        ({"n": 0}, None),
        ({"max_tokens": 300}, "context_length_exceeded"),
        ({"messages": []}, None),
        ({"messages": [{"role": "nobody", "content": "x"}]}, None),
        ({"messages": [{"role": "user", "content": "x " * 400}]}, "context_length_exceeded"),
        ({"stop": ["x"] * 10_000}, None),
        ({"stop": [""]}, None),
        ({"logit_bias": {"-1": 1}}, None),
        ({"logit_bias": {"5": 101}}, None),
        ({"top_logprobs": 3}, None),
        ({"tool_choice": "required"}, None),
        ({"tools": [WEATHER], "tool_choice": named("other")}, None),
        ({"response_format": {"type": "json_schema"}}, None),
        ({"response_format": schema(type="nothing")}, None),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, None),
        ({"extra_body": {"repetition_penalty": 1.2}}, None),
    ],
)
def test_what_cannot_be_done_is_refused(
    client: openai.OpenAI, fields: Any, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **fields)
    assert (refused.value.type, refused.value.code) == ("invalid_request_error", code)
    assert "Traceback" not in refused.value.message


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        chat(client, model="other")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": [-1]}', 400),
        (b'{"prompt": [99999999]}', 400),
        (b'{"prompt": []}', 400),
        (b'{"prompt": [[]]}', 400),
        (b'{"prompt": "x", "max_tokens": 1e400}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"prompt": "' + b"x" * 17_000_000 + b'"}', 413),
    ],
)
def test_a_body_that_is_none_is_an_error_in_openais_shape(
    http: httpx.Client, body: bytes, status: int
) -> None:
    kind = {"content-type": "application/json"}
    answer = http.post("/v1/completions", content=body, headers=kind)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_other_routes_methods_and_types_are_errors_in_openais_shape(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    assert http.post("/v1/completions", content=b"{}").status_code == 415
    assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert http.get("/v1//models").status_code == 200


def test_who_leaves_frees_the_row(server: Live, client: openai.OpenAI) -> None:
    golden = chat(client).choices
    with chat(client, max_tokens=200, stream=True) as stream:
        next(iter(stream))
    assert is_idle(server)
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.05), max_tokens=200)
    assert is_idle(server)
    assert chat(client).choices == golden


def test_a_request_that_never_ends_harms_nobody(server: Live, client: openai.OpenAI) -> None:
    with socket.create_connection(("127.0.0.1", port(server))) as half_open:
        half_open.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        assert chat(client).usage.completion_tokens == 12


def test_a_key_and_the_host_are_checked(engine: Engine) -> None:
    access = Access("secret", frozenset({"127.0.0.1"}), ("https://page.example",))
    with live(engine, access) as server, httpx.Client(base_url=server.url) as http:
        body = {"prompt": "x", "max_tokens": 1}
        assert http.post("/v1/completions", json=body).json()["error"]["code"] == "invalid_api_key"
        wrong, right = ({"authorization": f"Bearer {key}"} for key in ("no", "secret"))
        assert http.post("/v1/completions", json=body, headers=wrong).status_code == 401
        assert http.post("/v1/completions", json=body, headers=right).status_code == 200
        for path in ("/", "/health", "/ready", "/v1/models"):
            assert http.get(path).status_code == 200
        assert http.get("/metrics").status_code == 401
        rebound = http.get("/v1/models", headers={"host": "evil.example"})
        assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "host_not_allowed")
        asking = {
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, x-stainless-os",
        }
        preflight = http.options("/v1/completions", headers=asking)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        other = http.options("/v1/completions", headers=asking | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_full_queue_says_so_and_when_to_come_again(model: LoadedModel) -> None:
    with (
        Engine(model, 1, max_queue=0) as engine,
        live(engine) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        with complete(client, max_tokens=200, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as refused:
                complete(client)
        assert refused.value.response.headers["retry-after"] == "1"
        patient = client.with_options(max_retries=8)
        assert complete(patient).usage.completion_tokens == 12


def test_a_failure_in_mid_stream_is_an_error_event(
    server: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = chat(client).choices
    with chat(client, max_tokens=200, stream=True) as stream:
        pieces = iter(stream)
        next(pieces)
        with monkeypatch.context() as patch:
            patch.setattr(ContinuousBatch, "start", fails)
            with pytest.raises(openai.APIError, match="failed while it answered"):
                list(pieces)
    assert chat(client).choices == golden


def slowly(start: Callable[..., Any], seconds: float = 0.02) -> Callable[..., Any]:
    """The same call of the decode loop, as a large model makes it."""

    def starts(*args: Any) -> Any:
        time.sleep(seconds)
        return start(*args)

    return starts


def fails(*args: Any) -> Any:
    raise RuntimeError("this is not to be")


def test_a_client_that_stops_reading_loses_its_rows_and_harms_nobody(
    server: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, golden = aborted(server), chat(client).choices
    monkeypatch.setattr(api, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(ContinuousBatch, "start", slowly(ContinuousBatch.start))
    body = {"prompt": ["The"] * 6, "max_tokens": 200, "stream": True, "logprobs": 20, "echo": True}
    sent = json.dumps(body).encode()
    head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n"
    with live(server.engine, buffer=4096) as other, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port(other)))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + b"\r\n" + sent)
        assert chat(client).choices == golden
        assert is_idle(server)
        assert aborted(server) > before


def aborted(server: Live) -> float:
    """Requests whose client left before their end."""
    metrics = server.engine.metrics.registry
    return (
        metrics.get_sample_value("lechat:request_success_total", {"finished_reason": "abort"})
        or 0.0
    )


def test_silence_is_broken_by_comments(
    server: Live, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no proxy gives up while a long prompt is read or a row is awaited."""
    monkeypatch.setattr(api, "PING_SECONDS", 0.02)
    monkeypatch.setattr(ContinuousBatch, "start", slowly(ContinuousBatch.start, 0.2))
    body = {"prompt": "The", "max_tokens": 3, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = [*answer.iter_lines()]
    assert ": ping" in lines
    assert lines[-2] == "data: [DONE]"


def test_no_log_prob_is_a_number_that_json_lacks(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    banned = {str(id_): -100 for id_ in range(1000)}
    told = complete(client, logit_bias=banned, logprobs=5).choices[0].logprobs
    assert all(math.isfinite(nats) for nats in told.token_logprobs)
