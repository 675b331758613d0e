"""Answers of OpenAI's API, as whole objects and as chunks of a stream."""

import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from lechat_jax.generate.continuous_batch import TopTokens
from lechat_jax.serve.engine import Update
from lechat_jax.serve.tools import CallPiece, Marks, ToolCallParser
from lechat_jax.tokenizer.tokenizer import StreamDecoder, Tokenizer

FINISHED = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
# The lists of a completion's log-probs.
LISTED = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
LEAST = -9999.0  # a log-probability of minus infinity, which JSON does not have

Json = dict[str, Any]


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST)


@dataclasses.dataclass
class Usage:
    """Tokens of a request: of its prompts, of those from the prefix cache, and of its answers."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def as_json(self) -> Json:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class ChatChoice:
    """One answer of a chat: text or tool calls, log-probs, and why it ended.

    Args:
        index: its number among the choices.
        tokenizer: the model's tokenizer.
        n_top: likeliest tokens to tell at each place; `None` tells no log-probs.
        calls: the marks of tool calls, if there are tools.
        is_forced: whether a certain tool was asked for, which ends with "stop".
        most_calls: calls that are told.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        n_top: int | None,
        calls: Marks | None,
        is_forced: bool = False,
        most_calls: int | None = None,
    ) -> None:
        self.index, self.reason, self.n_tokens = index, "", 0
        self._tokenizer, self._n_top = tokenizer, n_top
        self._parser = ToolCallParser(tokenizer, calls) if calls else None
        self._is_forced, self._most_calls = is_forced, most_calls
        self._text, self._sent = "", 0  # all text of the sample; characters told of it
        self._is_first = True  # no token with a text has come
        self._content = ""
        self._calls: list[Json] = []
        self._logprobs: list[Json] = []

    def begin(self) -> Json:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def take(self, update: Update) -> Iterator[Json]:
        """The chunks of an update, the last of which has a reason."""
        sample = update.sample
        if sample is None:
            return
        self.n_tokens += len(sample.ids)
        self._text += sample.text
        logprobs = self._told(sample.ids, sample.logprobs, update.top)
        pieces = [*self._parser.push(sample.ids)] if self._parser else []
        content = self._text if self._end is None else self._text[: self._end]
        if sample.stopped and self._parser:
            content += self._parser.flush()
        new = content[self._sent :]
        self._sent += len(new)
        self._content += new
        if new or logprobs:
            yield self._chunk({"content": new} if new else {}, logprobs=logprobs)
        for piece in pieces:
            if self._most_calls is None or piece.number < self._most_calls:
                yield self._chunk({"tool_calls": [self._call(piece)]})
        if sample.stopped:
            self.reason = FINISHED[sample.stopped]
            if self._calls and not self._is_forced and self.reason == "stop":
                self.reason = "tool_calls"
            yield self._chunk({}, self.reason)

    def complete(self) -> Json:
        """The choice as a part of a whole answer."""
        message: Json = {"role": "assistant", "content": self._content or None}
        if self._calls:
            message["tool_calls"] = self._calls
        else:
            message["content"] = self._content
        logprobs = None if self._n_top is None else {"content": self._logprobs}
        return {
            "index": self.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self.reason,
        }

    @property
    def _end(self) -> int | None:
        """Characters of content before tool calls."""
        return self._parser.n_content if self._parser else None

    def _chunk(self, delta: Json, reason: str | None = None, logprobs: Sequence[Json] = ()) -> Json:
        told = {"content": [*logprobs]} if logprobs else None
        return {"index": self.index, "delta": delta, "logprobs": told, "finish_reason": reason}

    def _call(self, piece: CallPiece) -> Json:
        """The delta of a piece of a tool call, which is noted, too."""
        if piece.name is None:
            self._calls[piece.number]["function"]["arguments"] += piece.arguments
            return {"index": piece.number, "function": {"arguments": piece.arguments}}
        function = {"name": piece.name, "arguments": piece.arguments}
        call = {"id": piece.id, "type": "function", "function": function}
        self._calls.append(call | {"function": dict(function)})
        return {"index": piece.number} | call

    def _told(
        self, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[TopTokens]
    ) -> list[Json]:
        """OpenAI's objects for the log-probs of tokens; those of control tokens have no text."""
        if self._n_top is None:
            return []
        found = []
        for i, (id_, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            if self._tokenizer.is_control(id_):
                continue
            entry = self._entry(id_, logprob)
            likeliest = zip(*top[i], strict=True) if i < len(top) else ()
            entry["top_logprobs"] = [self._entry(*pair) for pair in likeliest][: self._n_top]
            found.append(entry)
            self._is_first = False
        self._logprobs += found
        return found

    def _entry(self, id_: int, logprob: float) -> Json:
        raw = self._tokenizer.bytes_of(id_, self._is_first)
        token = raw.decode("utf-8", "replace")
        return {"token": token, "logprob": finite(logprob), "bytes": [*raw]}


class TextChoice:
    """One continuation of a prompt, the prompt itself included if it is echoed.

    Args:
        index: its number among all prompts' choices.
        tokenizer: the model's tokenizer.
        prompt: the prompt's ids.
        text: the prompt's text, if it is echoed.
        n_top: likeliest tokens to tell at each place; `None` tells no log-probs.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        text: str | None,
        n_top: int | None,
    ) -> None:
        self.index, self.reason, self.n_tokens = index, "", 0
        self._tokenizer, self._n_top, self._prompt = tokenizer, n_top, prompt
        self._echoed = text or ""
        self._text = ""
        self._offset = 0
        self._decoder = StreamDecoder(tokenizer, () if text is not None else prompt)
        self._told: Json = {name: [] for name in LISTED}

    def begin(self) -> Json | None:
        """The first chunk, of an echoed prompt without log-probs."""
        if not self._echoed or self._n_top is not None:
            return None
        self._text, text = self._echoed, self._echoed
        return self._chunk(text, None, None)

    def take(self, update: Update) -> Iterator[Json]:
        """The chunks of an update, the last of which has a reason."""
        if update.scores:
            self._text = self._echoed
            first = self._entries(self._prompt[:1], [None], [])
            ids, logprobs, top = update.scores
            rest = self._entries(ids, logprobs, top)
            together = {name: first[name] + rest[name] for name in LISTED}
            yield self._chunk(self._echoed, None, together)
        sample = update.sample
        if sample is None:
            return
        self.n_tokens += len(sample.ids)
        self._text += sample.text
        told = None
        if self._n_top is not None:
            told = self._entries(sample.ids, sample.logprobs, update.top)
        self.reason = FINISHED[sample.stopped] if sample.stopped else ""
        yield self._chunk(sample.text, self.reason or None, told)

    def complete(self) -> Json:
        """The choice as a part of a whole answer."""
        told = None if self._n_top is None else self._told
        return self._chunk(self._text, self.reason, told)

    def _chunk(self, text: str, reason: str | None, told: Json | None) -> Json:
        return {"index": self.index, "text": text, "logprobs": told, "finish_reason": reason}

    def _entries(
        self, ids: Sequence[int], logprobs: Sequence[float | None], top: Sequence[TopTokens]
    ) -> Json:
        """OpenAI's lists for the log-probs of tokens."""
        new: Json = {name: [] for name in LISTED}
        for i, (id_, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            likeliest: dict[str, float] | None = None
            if logprob is not None:
                likeliest = {}
                pairs = zip(*top[i], strict=True) if self._n_top else ()
                for other, nats in [*pairs][: self._n_top]:
                    likeliest.setdefault(self._name(other), finite(nats))
                likeliest.setdefault(self._name(id_), finite(logprob))
            new["tokens"].append(self._name(id_))
            new["token_logprobs"].append(None if logprob is None else finite(logprob))
            new["top_logprobs"].append(likeliest)
            new["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push([id_]))
        for name in LISTED:
            self._told[name] += new[name]
        return new

    def _name(self, id_: int) -> str:
        """A token's text; of a part of a character its bytes, of a control token its number."""
        raw = self._tokenizer.bytes_of(id_)
        if not raw:
            return f"<[{id_}]>"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclasses.dataclass
class Answer:
    """The frame of an answer: what all its chunks have in common.

    Attributes:
        kind: "chat.completion" or "text_completion".
        model: the model's name.
        fingerprint: names weights and version; with the same and a seed, answers are the same.
    """

    kind: str
    model: str
    fingerprint: str
    usage: Usage = dataclasses.field(default_factory=Usage)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def complete(self, choices: Sequence[Json]) -> Json:
        """The whole answer."""
        return self._frame([*choices]) | {"usage": self.usage.as_json()}

    def chunk(self, choice: Json, with_usage: bool) -> Json:
        """A chunk of a stream."""
        frame = self._frame([choice], ".chunk" if self.kind == "chat.completion" else "")
        return frame | {"usage": None} if with_usage else frame

    def last(self) -> Json:
        """The chunk after the last choice, which counts tokens."""
        frame = self._frame([], ".chunk" if self.kind == "chat.completion" else "")
        return frame | {"usage": self.usage.as_json()}

    def _frame(self, choices: list[Json], suffix: str = "") -> Json:
        return {
            "id": f"{'chatcmpl' if self.kind == 'chat.completion' else 'cmpl'}-{self.id}",
            "object": f"{self.kind}{suffix}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }
