"""From requests of OpenAI's API to those of the engine: prompts, sampling, grammars, tools."""

import functools
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lechat_jax.errors import BadInput
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.generate.logits_processors import LogitsProcessing
from lechat_jax.generate.sampling import Sampling
from lechat_jax.serve import tools as tool_calls
from lechat_jax.serve.answers import Answer, ChatChoice, TextChoice
from lechat_jax.serve.engine import ContextExceeded, GenerationRequest, check_room
from lechat_jax.serve.grammar import Grammars, Matcher
from lechat_jax.serve.wire import MOST_PROMPTS, Chat, Completion, Generation, Refused, Structure
from lechat_jax.tokenizer.chat_template import ChatPrompt, ChatPrompts
from lechat_jax.tokenizer.image_template import TooManyImages
from lechat_jax.tokenizer.images import Image
from lechat_jax.tokenizer.tokenizer import Tokenizer

TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
MOST_CALLS = 16  # that a grammar lets a model make in one answer
MOST_LENGTH = 128  # characters of a token, more than any has
SEEDS = 2**32


class Prepared(NamedTuple):
    """A request that can be submitted: one engine request for each choice, and its answer."""

    requests: list[GenerationRequest]
    choices: list[ChatChoice] | list[TextChoice]
    answer: Answer
    body: Generation


class Requests:
    """Prepares requests for one model; its methods are called from any thread.

    Args:
        model: the loaded model.
        name: its name in answers.
        fingerprint: names weights and version.
    """

    def __init__(self, model: LoadedModel, name: str, fingerprint: str) -> None:
        if model.tokenizer is None:
            raise BadInput("there is no tokenizer beside the weights, so nothing can be served")
        self.tokenizer: Tokenizer = model.tokenizer
        self.name = name
        self._model, self._fingerprint = model, fingerprint
        self._template = ChatPrompts(self.tokenizer, model.config.vision, model.context)
        self._marks = tool_calls.marks(self.tokenizer)
        self._lock = threading.Lock()  # of what others have not made for several threads
        self._grammars = Grammars(self.tokenizer)  # takes seconds, for which no stream should wait
        self._compiling = threading.Lock()  # of grammars, which may take long

    def chat(self, body: Chat) -> Prepared:
        """Prepares the next message of a conversation; raises `Refused`."""
        self._check_model(body.model)
        choice, forced = self._tool_choice(body)
        tools = body.tools if body.tools and choice != "none" else None
        prompt, images = self.chat_prompt(body.messages, tools)
        most_calls = 1 if body.parallel_tool_calls is False else None
        most = body.max_completion_tokens or body.max_tokens
        most = self._model.context - len(prompt) if most is None else most
        if most < 1:
            raise Refused(
                f"the messages have {len(prompt)} tokens and the context holds "
                f"{self._model.context}, the answer included; send fewer, or start the server "
                "with a longer --context",
                code="context_length_exceeded",
                param="messages",
            )
        if body.top_logprobs and not body.logprobs:
            raise Refused("top_logprobs needs logprobs: true", param="top_logprobs")
        n_top = (body.top_logprobs or 0) if body.logprobs else None
        matcher = self._grammar(body, forced, most_calls)
        # What the model may not call it cannot begin to; a grammar says itself what may come.
        banned = {self._marks.calls: -float("inf")} if self._marks and not tools else {}
        choices = [
            ChatChoice(
                i,
                self.tokenizer,
                n_top,
                self._marks if tools else None,
                isinstance(choice, dict),
                most_calls,
            )
            for i in range(body.n or 1)
        ]
        requests = self._requests(
            body, prompt, most, n_top, matcher, banned, is_answer=True, images=images
        )
        return Prepared(requests, choices, self._answer("chat.completion"), body)

    def completion(self, body: Completion) -> Prepared:
        """Prepares continuations of prompts; raises `Refused`."""
        self._check_model(body.model)
        requests, choices = [], []
        most = 16 if body.max_tokens is None else body.max_tokens
        matcher = self._grammar(body)
        is_scored = bool(body.echo) and body.logprobs is not None
        if len(body.prompts) * (body.n or 1) > MOST_PROMPTS:
            raise Refused(
                f"{len(body.prompts)} prompts with n: {body.n} are more than {MOST_PROMPTS} "
                "answers",
                param="n",
            )
        for prompt in body.prompts:
            is_text = isinstance(prompt, str)
            ids = self._encoded(prompt) if is_text else [*prompt]
            self._check_ids(ids)
            try:  # before anything is done that takes long for each token
                check_room(len(ids), most, self._model.context)
            except ContextExceeded as error:
                raise context_error(error, "prompt") from error
            text = None
            if body.echo:
                text = prompt if is_text else self.tokenizer.decode(ids)
            made = self._requests(body, ids, most, body.logprobs, matcher, is_scored=is_scored)
            for request in made:
                choice = TextChoice(len(choices), self.tokenizer, ids, text, body.logprobs)
                choices.append(choice)
                requests.append(request)
        return Prepared(requests, choices, self._answer("text_completion"), body)

    def chat_prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> ChatPrompt:
        """The prompt ids of a conversation, and its images; raises `Refused`."""
        if tools and self._marks is None:
            raise Refused(
                f"this model's chat template, {self.tokenizer.version}, has no tools",
                param="tools",
            )
        context = self._model.context
        # An answer that ended at once says nothing, and the template would refuse it.
        told = [message for message in messages if not _is_empty_answer(message)]
        try:
            size = len(json.dumps([_without_images(messages), tools], ensure_ascii=False))
            if size > context * MOST_LENGTH:  # which would take long, while others wait
                raise Refused(
                    f"the messages have {size} characters, and the context holds {context} tokens",
                    code="context_length_exceeded",
                    param="messages",
                )
            with self._lock:
                return self._template.encode(tool_calls.with_usual_ids(told), tools)
        except BadInput as error:
            code = "context_length_exceeded" if isinstance(error, TooManyImages) else None
            raise Refused(str(error), code=code, param="messages") from error
        except RecursionError as error:
            raise Refused("the messages are nested too deeply", param="messages") from error

    def _encoded(self, prompt: str) -> list[int]:
        try:
            return self._model.encode(prompt)
        except BadInput as error:
            raise Refused(str(error), param="prompt") from error

    def _check_ids(self, ids: Sequence[int]) -> None:
        size = self._model.config.vocab_size
        if wrong := [id_ for id_ in ids if id_ >= size]:
            raise Refused(
                f"prompt token {wrong[0]} is not an id of the model, which has 0 to {size - 1}",
                param="prompt",
            )

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.name):
            raise Refused(
                f"the model {name!r} is not here; this server has {self.name!r}",
                404,
                code="model_not_found",
                param="model",
            )

    def _answer(self, kind: str) -> Answer:
        return Answer(kind, self.name, self._fingerprint)

    def _requests(
        self,
        body: Generation,
        prompt: Sequence[int],
        max_tokens: int,
        n_top: int | None,
        matcher: Matcher | None,
        banned: dict[int, float] | None = None,
        is_scored: bool = False,
        is_answer: bool = False,
        images: Sequence[Image] = (),
    ) -> list[GenerationRequest]:
        """One engine request for each choice; choice i has the random stream i of the seed."""
        processing = LogitsProcessing(
            self._bias(body) | ({} if matcher else banned or {}),
            body.presence_penalty or 0.0,
            body.frequency_penalty or 0.0,
            matcher is not None,
            n_top or 0,
        )
        if body.ignore_eos and matcher:
            raise Refused("ignore_eos and a grammar exclude each other", param="ignore_eos")
        return [
            GenerationRequest(
                prompt,
                max_tokens,
                sampling,
                stream,
                () if body.ignore_eos else self._model.eos_ids,
                body.stops,
                processing,
                matcher.copy() if matcher else None,
                is_scored,
                is_answer,
                images,
            )
            for sampling in [self._sampling(body)]
            for stream in range(body.n or 1)
        ]

    def _sampling(self, body: Generation) -> Sampling:
        """OpenAI's defaults, and a random seed unless one is given."""
        return Sampling(
            1.0 if body.temperature is None else body.temperature,
            max(body.top_k or 0, 0),
            1.0 if body.top_p is None else body.top_p,
            body.min_p or 0.0,
            secrets.randbelow(SEEDS) if body.seed is None else body.seed % SEEDS,
        )

    def _bias(self, body: Generation) -> dict[int, float]:
        biases = {}
        for name, bias in (body.logit_bias or {}).items():
            size = self._model.config.vocab_size
            if not re.fullmatch("[0-9]{1,9}", name) or int(name) >= size:
                raise Refused(
                    f"logit_bias has {name[:20]!r}, which is not an id of the model, which has "
                    f"0 to {size - 1}",
                    param="logit_bias",
                )
            biases[int(name)] = bias
        return biases

    def _tool_choice(self, body: Chat) -> tuple[Any, list[dict[str, Any]]]:
        """The choice of tools, and those of which one must be called."""
        tools, choice = body.tools or [], "auto" if body.tool_choice is None else body.tool_choice
        names = []
        for tool in tools:
            function = tool.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if tool.get("type", "function") != "function" or not isinstance(name, str):
                raise Refused("a tool is a function with a name", param="tools")
            if not TOOL_NAME.fullmatch(name):
                raise Refused(f"{name!r} is no name of a function", param="tools")
            if not isinstance(tool["function"].get("parameters") or {}, dict):
                raise Refused(f"the parameters of {name!r} are no JSON schema", param="tools")
            names.append(name)
        if choice in ("none", "auto"):
            return choice, []
        if not tools:
            raise Refused("tool_choice needs tools", param="tool_choice")
        if isinstance(choice, str):
            return choice, tools
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, dict) else None
        if wanted not in names:
            raise Refused(f"tool_choice names {wanted!r}, which is no tool", param="tool_choice")
        return choice, [tools[names.index(wanted)]]

    def _grammar(
        self,
        body: Generation,
        forced: Sequence[dict[str, Any]] = (),
        most_calls: int | None = None,
    ) -> Matcher | None:
        """The grammar of the answer, if one is asked for; raises `Refused`."""
        makers: list[Callable[[], Matcher]] = []
        form = body.response_format
        if form and form.type == "json_object":
            wanted = form.schema_
            makers.append(
                self._grammars.json_object
                if wanted is None
                else functools.partial(self._grammars.json_schema, wanted)
            )
        if form and form.type == "json_schema":
            if form.json_schema is None:
                raise Refused("response_format needs a json_schema", param="response_format")
            schema = form.json_schema.schema_
            makers.append(lambda: self._grammars.json_schema(schema))
        if forced and self._marks:
            most = most_calls or (1 if len(forced) == 1 else MOST_CALLS)
            make = functools.partial(tool_calls.grammar, forced, self.tokenizer, self._marks, most)
            makers.append(lambda: self._grammars.lark(make()))
        if body.structured_outputs:
            makers += self._structured(body.structured_outputs)
        if not makers:
            return None
        if len(makers) > 1:
            raise Refused("an answer has one grammar, and several are asked for")
        try:
            with self._compiling:
                return makers[0]()
        except BadInput as error:
            raise Refused(str(error)) from error
        except RecursionError as error:
            raise Refused("the grammar is nested too deeply") from error

    def _structured(self, wanted: Structure) -> list[Callable[[], Matcher]]:
        """What makes each grammar of vLLM's field."""
        fields = {
            "json_schema": _schema(wanted.json_) if isinstance(wanted.json_, str) else wanted.json_,
            "regex": wanted.regex,
            "choice": wanted.choice,
            "lark": wanted.grammar,
        }

        def make(name: str, value: Any) -> Matcher:
            return getattr(self._grammars, name)(value)

        return [
            functools.partial(make, name, value)
            for name, value in fields.items()
            if value is not None
        ]


def _schema(text: str) -> dict[str, Any] | bool:
    """A JSON schema that is sent as text; raises `Refused`."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"the JSON schema is not JSON: {error}", param="structured_outputs"
        ) from error
    if not isinstance(schema, dict | bool):
        raise Refused("the JSON schema is no object", param="structured_outputs")
    return schema


def _without_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without the images in them, which are not measured in characters."""

    def is_text(part: Any) -> bool:
        return not (isinstance(part, dict) and part.get("type") == "image_url")

    return [
        message | {"content": [part for part in content if is_text(part)]}
        if isinstance(content := message.get("content"), list)
        else message
        for message in messages
    ]


def _is_empty_answer(message: Mapping[str, Any]) -> bool:
    is_answer = message.get("role") == "assistant"
    return is_answer and not message.get("content") and not message.get("tool_calls")


def fingerprint(name: str, version: str, weights: Mapping[str, Any]) -> str:
    """Names a model's weights and the version of this program, for `system_fingerprint`."""
    shapes = sorted((key, str(leaf.dtype), leaf.shape) for key, leaf in weights.items())
    numbers = np.asarray(weights["norm.scale"], np.float32).tobytes()
    known = f"{name} {version} {shapes}".encode() + numbers
    return "fp_" + hashlib.sha256(known).hexdigest()[:12]


def context_error(error: ContextExceeded, param: str) -> Refused:
    """The error of OpenAI's API for a prompt that is too long."""
    return Refused(str(error), code="context_length_exceeded", param=param)
