"""What clients of vLLM's server and of llama.cpp's rely on holds here, too.

The cases are those of their own tests that apply to this server and are not in test_api.py.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

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
)

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {
    CHAT: {"messages": HELLO, "max_tokens": 4, "seed": 1},
    TEXT: {"prompt": "The cat", "max_tokens": 4, "seed": 1},
}
BRIEF = {"role": "system", "content": "Be brief"}
SURE = {"role": "assistant", "content": "Sure"}


def post(http: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    """What a chat or a completion with these fields, and defaults that can be left out, gets."""
    return http.post(path, json=ASKED[path] | fields)


def answered(http: httpx.Client, path: str, **fields: Any) -> tuple[Any, int]:
    """The choices of an answer, and the tokens of its prompt."""
    answer = post(http, path, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"], answer.json()["usage"]["prompt_tokens"]


def refusal(http: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    """The error object of a request that is refused."""
    answer = post(http, path, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def events(http: httpx.Client, path: str, **fields: Any) -> list[Any]:
    """The objects of a stream, as they are sent."""
    lines = [line for line in post(http, path, stream=True, **fields).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# Log-probabilities


@pytest.mark.parametrize(("n", "least", "most"), [(0, 1, 1), (5, 5, 6)])
def test_likeliest_tokens_of_a_text_have_the_chosen_one_among_them(
    client: openai.OpenAI, n: int, least: int, most: int
) -> None:
    told = complete(client, logprobs=n, echo=True).choices[0].logprobs
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    for token, logprob, likeliest in zip(
        told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True
    ):
        assert least <= len(likeliest) <= most
        assert likeliest[token] == logprob


def test_log_probs_are_told_if_they_are_asked_for(client: openai.OpenAI) -> None:
    assert chat(client).choices[0].logprobs is None
    assert chat(client, logprobs=False).choices[0].logprobs is None
    assert complete(client, logprobs=None).choices[0].logprobs is None
    told = chat(client, logprobs=True, top_logprobs=0).choices[0].logprobs.content
    assert [token.top_logprobs for token in told] == [[]] * len(told)


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_log_probs_are_refused_before_a_stream_begins(
    http: httpx.Client, stream: bool
) -> None:
    error = refusal(http, CHAT, logprobs=True, top_logprobs=21, stream=stream)
    assert error["param"] == "top_logprobs"
    assert refusal(http, TEXT, logprobs=21, stream=stream)["param"] == "logprobs"


def test_offsets_are_those_of_the_tokens_and_the_same_in_a_stream(client: openai.OpenAI) -> None:
    """Though text that may begin a stop text is told later than its tokens."""
    asked = {"logprobs": 0, "max_tokens": 40, "stop": ["\n\nnever"], "temperature": 1.5}
    choice = complete(client, **asked).choices[0]
    told, found = choice.logprobs, []
    for chunk in complete(client, **asked, stream=True):
        found += chunk.choices[0].logprobs.text_offset if chunk.choices[0].logprobs else []
    assert found == told.text_offset
    plain = 0
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith(("bytes:", "<[")):
            plain += choice.text[offset:].startswith(token)
    assert plain > 20


def test_what_a_grammar_forbids_has_a_log_prob_in_json(client: openai.OpenAI) -> None:
    wanted = {"structured_outputs": {"choice": ["yes", "no"]}}
    tokens = chat(client, logprobs=True, top_logprobs=20, extra_body=wanted).choices[0].logprobs
    assert min(top.logprob for token in tokens.content for top in token.top_logprobs) >= -9999


# Streams and usage


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_a_stream_counts_tokens_only_if_it_is_asked_to(
    http: httpx.Client, path: str, options: Any
) -> None:
    assert all("usage" not in chunk for chunk in events(http, path, stream_options=options))


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_last_chunk_counts_as_the_whole_answer_does(http: httpx.Client, path: str) -> None:
    *others, last = events(http, path, stream_options={"include_usage": True})
    assert {chunk["usage"] for chunk in others} == {None}
    assert last["choices"] == []
    whole = post(http, path).json()["usage"]
    told = [usage.pop("prompt_tokens_details") for usage in (whole, last["usage"])]
    assert last["usage"] == whole
    assert whole["total_tokens"] == whole["prompt_tokens"] + whole["completion_tokens"]
    assert all(0 <= details["cached_tokens"] < whole["prompt_tokens"] for details in told)


def test_tokens_of_the_prefix_cache_are_counted(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "How many of these words have you read before?"}]
    first, second = (chat(client, messages=messages).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens > 0
    *_, last = chat(client, messages=messages, stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details == second.prompt_tokens_details


def test_each_choice_of_a_stream_has_one_reason(client: openai.OpenAI) -> None:
    texts, reasons = [""] * 6, []
    asked = {"prompt": ["The cat", "A dog"], "n": 3}
    for chunk in complete(client, **asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons.append((choice.index, choice.finish_reason))
    assert sorted(reasons) == [(i, "length") for i in range(6)]
    assert texts == [choice.text for choice in complete(client, **asked).choices]


@pytest.mark.parametrize("prompt", ["The cat", [1, 900, 901]])
def test_a_prompt_that_comes_twice_is_answered_alike(client: openai.OpenAI, prompt: Any) -> None:
    one, two = complete(client, prompt=[prompt] * 2, temperature=0).choices
    assert one.text == two.text


def test_more_requests_than_rows_are_answered_as_alone(client: openai.OpenAI) -> None:
    prompts = [f"{word} and so on" for word in "One Two Three Four Five Six".split()]

    def text(prompt: str) -> str:
        return complete(client, prompt=prompt).choices[0].text

    alone = [text(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert [*pool.map(text, prompts)] == alone


def test_many_that_give_up_leave_room_for_the_next(server: Live, client: openai.OpenAI) -> None:
    hasty = client.with_options(timeout=0.1)

    def gives_up(seed: int) -> None:
        with pytest.raises(openai.APITimeoutError):
            chat(hasty, max_tokens=240, seed=seed, n=1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(gives_up, range(8)))
    assert is_idle(server)
    assert chat(client).usage.completion_tokens == 12


def test_nothing_in_a_delta_is_null(http: httpx.Client) -> None:
    """Some clients add up whatever keys a delta has."""
    asked = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 80}
    first, *deltas = [chunk["choices"][0]["delta"] for chunk in events(http, CHAT, **asked)]
    assert first == {"role": "assistant", "content": ""}
    calls = [call for delta in deltas for call in delta.pop("tool_calls", [])]
    assert {key for delta in deltas for key in delta} == set()
    assert set(calls[0]) == {"index", "id", "type", "function"}
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    for call in calls[1:]:
        assert call == {"index": 0, "function": {"arguments": call["function"]["arguments"]}}


# Messages


@pytest.mark.parametrize(
    ("messages", "same"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], HELLO),
        ([{**HELLO[0], "extra_field": "0", "name": "Ann"}], HELLO),
        ([{**BRIEF, "content": [{"type": "text", "text": "Be brief"}]}, *HELLO], [BRIEF, *HELLO]),
        ([{**BRIEF, "role": "developer"}, *HELLO], [BRIEF, *HELLO]),
        (
            [*HELLO, {**SURE, "refusal": None, "audio": None, "tool_calls": None}, *HELLO],
            [*HELLO, SURE, *HELLO],
        ),
        ([*HELLO, {"role": "assistant", "content": ""}], HELLO),
        ([*HELLO, {"role": "assistant", "content": None, "tool_calls": []}], HELLO),
    ],
)
def test_messages_are_understood_however_clients_write_them(
    http: httpx.Client, messages: Any, same: Any
) -> None:
    assert answered(http, CHAT, messages=messages) == answered(http, CHAT, messages=same)


def test_a_conversation_goes_on_after_an_empty_answer(http: httpx.Client) -> None:
    empty = {"role": "assistant", "content": ""}
    choices, _ = answered(http, CHAT, messages=[BRIEF, *HELLO, empty, *HELLO])
    assert choices[0]["message"]["content"]


def test_an_answer_that_has_begun_is_continued(http: httpx.Client, tokenizer: Tokenizer) -> None:
    begun = {"messages": [*HELLO, SURE]}
    ids = http.post("/tokenize", json=begun).json()["tokens"]
    assert ids[-len(tokenizer.encode("Sure")) :] == tokenizer.encode("Sure")
    assert answered(http, CHAT, **begun)[1] == len(ids)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "Hello",
        [123],
        [{}],
        [{"content": "Hello"}],
        [{"role": 123, "content": "Hello"}],
        [{"role": "my-own-role", "content": "Hello"}],
        [{"role": "system", "content": 123}],
        [{"role": "user", "content": None}],
        [BRIEF, {}],
        [{"role": "assistant", "content": ""}],
    ],
)
def test_messages_that_are_none_are_refused(http: httpx.Client, messages: Any) -> None:
    assert refusal(http, CHAT, messages=messages)["param"] == "messages"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.com/image.png"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "https://example.com/video.mp4"}},
    ],
)
def test_what_is_no_text_is_refused_and_never_fetched(http: httpx.Client, part: Any) -> None:
    for role in ("user", "system"):
        message = {"role": role, "content": [{"type": "text", "text": "What is it?"}, part]}
        assert refusal(http, CHAT, messages=[message, *HELLO])["param"] == "messages"


# Tools


@pytest.mark.parametrize("id_", ["call_6789", "call_abcdefghijklmnopqrst", "chatcmpl-tool-1", ""])
@pytest.mark.parametrize("arguments", ["{}", ""])
def test_a_call_of_another_server_is_history_as_well(
    http: httpx.Client, id_: str, arguments: str
) -> None:
    def history(id_: str, arguments: str) -> Any:
        function = {"name": "get_weather", "arguments": arguments}
        call = {"id": id_, "type": "function", "function": function, "index": 0}
        result = {"role": "tool", "name": "get_weather", "tool_call_id": id_, "content": "Rain"}
        return [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]

    usual = answered(http, CHAT, messages=history("abcdefgh1", "{}"), tools=[WEATHER])
    assert answered(http, CHAT, messages=history(id_, arguments), tools=[WEATHER]) == usual


@pytest.mark.parametrize("arguments", ["{", "[1]", "Paris", None])
def test_a_call_whose_arguments_are_none_is_refused(http: httpx.Client, arguments: Any) -> None:
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "call_123", "type": "function", "function": function}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, *HELLO]
    assert refusal(http, CHAT, messages=messages)["param"] == "messages"


@pytest.mark.parametrize("choice", ["required", named("get_weather")])
def test_a_call_that_is_cut_off_is_none(http: httpx.Client, choice: Any) -> None:
    ((answer,), _) = answered(http, CHAT, tools=[WEATHER], tool_choice=choice, max_tokens=1)
    assert answer["finish_reason"] == "length"
    assert answer["message"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER], "tool_choice": {}},
        {"tools": [WEATHER], "tool_choice": "bogus"},
        {"tools": [WEATHER], "tool_choice": {"type": "function"}},
        {"tool_choice": named("get_weather")},
        {"tools": [{"type": "code_interpreter"}]},
    ],
)
def test_a_choice_of_no_tool_is_refused(http: httpx.Client, fields: Any) -> None:
    assert refusal(http, CHAT, **fields)["param"] in ("tools", "tool_choice")


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": None, "tool_choice": None}])
def test_without_tools_an_answer_is_text(http: httpx.Client, fields: Any) -> None:
    assert answered(http, CHAT, **fields) == answered(http, CHAT)


def test_a_model_that_may_not_call_does_not(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    eager = {str(tokenizer.control_id("[TOOL_CALLS]")): 100}
    asked = {"tools": [WEATHER], "tool_choice": "none", "logit_bias": eager}
    message = chat(client, **asked).choices[0].message
    assert message.tool_calls is None
    assert message.content


# Fields


def test_a_field_that_is_null_is_as_one_that_is_absent(http: httpx.Client) -> None:
    common = "model temperature top_p top_k min_p n seed stop stream stream_options logit_bias "
    common += "presence_penalty frequency_penalty structured_outputs response_format user "
    nulls = dict.fromkeys(common.split()) | {"seed": 1}
    tools = dict.fromkeys("tools tool_choice parallel_tool_calls max_completion_tokens".split())
    assert answered(http, CHAT, **nulls, **tools, logprobs=None) == answered(http, CHAT)
    assert answered(http, TEXT, **nulls, echo=None, suffix=None) == answered(http, TEXT)


@pytest.mark.parametrize("body", [b'"Hello"', b"42", b"null", b"{", b"messages=Hello"])
def test_a_body_that_is_no_object_is_refused(http: httpx.Client, body: bytes) -> None:
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, None)


@pytest.mark.parametrize(
    "prompt",
    [None, [], 42, {"a": 1}, [[]], [True], [1.0], [-1], [[-1]], ["a", None], [1, "a"], [[1], "a"]],
)
def test_a_prompt_that_is_none_is_refused(http: httpx.Client, prompt: Any) -> None:
    assert refusal(http, TEXT, prompt=prompt)["param"] == "prompt"


@pytest.mark.parametrize(
    ("bias", "why"),
    [
        ({"99999": 1}, "'99999', which is not an id of the model, which has 0 to 2099"),
        ({"Hello": 50}, "'Hello'"),
        ({"9" * 5000: 50}, "'9999"),
        ({"1": "much"}, "valid number"),
    ],
)
def test_a_bias_of_no_token_is_refused(http: httpx.Client, bias: Any, why: str) -> None:
    error = refusal(http, CHAT, logit_bias=bias)
    assert why in error["message"]
    assert error["param"] == "logit_bias"


def test_a_bias_keeps_tokens_out(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    likely = chat(client, temperature=0).choices[0].message.content
    banned = tokenizer.encode(likely)
    bias = dict.fromkeys(map(str, banned), -100) | {str(tokenizer.vocab_size - 1): 1}
    other = chat(client, temperature=0, logit_bias=bias, logprobs=True).choices[0]
    written = {bytes(token.bytes) for token in other.logprobs.content}
    assert not written & {*map(tokenizer.bytes_of, banned)}


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_choice": ["yes"]},
        {"guided_json": {"type": "object"}},
        {"grammar": 'root ::= "a"'},
        {"json_schema": {"const": "42"}},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": -1},
        {"stop_token_ids": [5]},
        {"min_tokens": 5},
        {"truncate_prompt_tokens": 4},
        {"use_beam_search": True},
        {"bad_words": ["cat"]},
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_would_change_an_answer_and_is_not_understood_is_refused(
    http: httpx.Client, path: str, fields: Any
) -> None:
    assert refusal(http, path, **fields)["param"] in fields


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_a_seed_has_64_bits(http: httpx.Client, seed: int) -> None:
    assert answered(http, CHAT, seed=seed) == answered(http, CHAT, seed=seed)
    assert refusal(http, CHAT, seed=seed * 4)["param"] == "seed"


def test_the_newer_name_of_the_limit_counts(client: openai.OpenAI) -> None:
    assert chat(client, max_completion_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("n", [0, -1])
def test_a_message_of_no_tokens_is_refused(http: httpx.Client, n: int) -> None:
    assert refusal(http, CHAT, max_tokens=n)["param"] == "max_tokens"


def test_without_a_limit_an_answer_fills_the_context(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Hello " * 80}]
    asked = {"messages": messages, "max_tokens": None, "extra_body": {"ignore_eos": True}}
    answer = chat(client, **asked)
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_never_cut(http: httpx.Client, stream: bool) -> None:
    long = "Lorem ipsum dolor sit amet, " * 40
    for path, fields in (
        (CHAT, {"messages": [{"role": "user", "content": long}]}),
        (TEXT, {"prompt": long}),
    ):
        error = refusal(http, path, **fields, stream=stream)
        assert error["code"] == "context_length_exceeded"
        assert "256" in error["message"]


def test_an_error_is_short_whatever_was_sent(http: httpx.Client) -> None:
    for fields in ({"model": "x" * 50_000}, {"messages": [{"role": "x" * 50_000}]}):
        assert len(post(http, CHAT, **fields).content) < 3000


# Grammars

UNFIT = {"type": "object", "properties": {"year": {"type": "integer"}, "foo": "bar"}}


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": UNFIT},
        {"json": '{"type": '},
        {"json": "[1]"},
        {"regex": "[.*"},
        {"regex": {"1": "Python"}},
        {"grammar": 'root ::= "a" unknown'},
        {"grammar": ""},
        {"choice": []},
        {"choice": ["a"], "regex": "b"},
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_grammar_that_is_none_is_refused(http: httpx.Client, path: str, wanted: Any) -> None:
    assert refusal(http, path, structured_outputs=wanted)["message"]


@pytest.mark.parametrize(
    "form",
    [
        {"type": "sound"},
        {"type": "json_schema"},
        {"type": "json_object", "schema": 123},
        {"type": "json_object", "schema": {"type": 123}},
        {"type": "json_object", "schema": {"type": "hiccup"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": UNFIT}},
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_format_that_is_none_is_refused(http: httpx.Client, path: str, form: Any) -> None:
    assert refusal(http, path, response_format=form)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object", "schema": {"const": "42"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "42"}}}},
        {"structured_outputs": {"json": '{"const": "42"}'}, "tool_choice": None},
    ],
)
def test_a_schema_can_be_written_in_several_ways(http: httpx.Client, fields: Any) -> None:
    ((message,), _) = answered(http, CHAT, **fields, max_tokens=12)
    ((text,), _) = answered(http, TEXT, **fields, max_tokens=12)
    assert message["message"]["content"] == text["text"] == '"42"'


def test_a_format_of_text_is_none(http: httpx.Client) -> None:
    plain = {"response_format": {"type": "text"}}
    assert answered(http, CHAT, **plain) == answered(http, CHAT)


# Tokens


@pytest.mark.parametrize("text", ["What is the capital of France ?", "unicode 媽 and emoji 🤗", ""])
def test_a_text_comes_back_from_its_tokens(http: httpx.Client, text: str) -> None:
    body = {"prompt": text, "add_special_tokens": False, "model": "tiny"}
    told = http.post("/tokenize", json=body).json()
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 256)
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER]}])
@pytest.mark.parametrize("messages", [HELLO, [BRIEF, *HELLO, SURE, *HELLO], [*HELLO, SURE]])
def test_a_conversation_has_the_tokens_that_its_answer_counts(
    http: httpx.Client, messages: Any, fields: Any
) -> None:
    told = http.post("/tokenize", json={"messages": messages, **fields}).json()
    assert answered(http, CHAT, messages=messages, **fields)[1] == told["count"]


@pytest.mark.parametrize("body", [{}, {"content": "Hello"}, {"prompt": None}, {"prompt": 5}])
def test_nothing_has_no_tokens(http: httpx.Client, body: Any) -> None:
    answer = http.post("/tokenize", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("tokens", [None, "Hello", [-1], [99999], [1.5]])
def test_tokens_that_are_none_have_no_text(http: httpx.Client, tokens: Any) -> None:
    answer = http.post("/detokenize", json={"tokens": tokens})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")


def test_the_tokenizer_is_described(http: httpx.Client) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["tokenizer_class"]
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")


# Access


@pytest.mark.parametrize(("key", "is_right"), [("secret", True), ("invalid", False)])
def test_openais_client_sends_the_key(engine: Engine, key: str, is_right: bool) -> None:
    access = Access("secret", frozenset({"127.0.0.1"}))
    with (
        live(engine, access) as server,
        openai.OpenAI(base_url=f"{server.url}/v1/", api_key=key, max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["tiny"]
        if is_right:
            assert chat(client).choices
            return
        with pytest.raises(openai.AuthenticationError) as refused:
            chat(client)
        assert refused.value.type == "authentication_error"


def test_a_path_may_end_with_a_slash_and_opens_nothing_by_that(engine: Engine) -> None:
    access = Access("secret", frozenset({"127.0.0.1"}), ("https://page.example",))
    with live(engine, access) as server, httpx.Client(base_url=server.url) as http:
        for path in ("/health/", "/ready/", "/v1/models/"):
            assert http.get(path).status_code == 200
        assert http.get("/metrics/").status_code == 401
        assert http.options("/metrics").status_code == 401
        asking = {"access-control-request-method": "GET"}
        assert http.options("/metrics", headers=asking).status_code == 401
        preflight = http.options("/metrics", headers=asking | {"origin": "https://page.example"})
        assert (preflight.status_code, preflight.text) == (200, "OK")
