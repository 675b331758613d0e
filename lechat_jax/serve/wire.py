"""Requests of OpenAI's API: their fields, types and bounds."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

Body = TypeVar("Body", bound=BaseModel)

MOST_STOPS, MOST_CHOICES, MOST_BIASES = 64, 128, 1024
MOST_PROMPTS = 1024
MOST_MESSAGE = 2000  # characters of an error's message, which may repeat what was sent

Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]

# Fields that would change an answer and are not understood here, and the values that do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none",),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": ({},),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class Refused(Exception):
    """A request that cannot be answered as it is.

    Attributes:
        status: HTTP status.
        kind: `type` of OpenAI's error object.
        code: `code` of it.
        param: field that is at fault.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        fields = {"type": self.kind, "param": self.param, "code": self.code}
        message = str(self)[:MOST_MESSAGE].encode(errors="replace").decode()  # no lone surrogates
        return {"error": {"message": message, **fields}}


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None


class Structure(BaseModel):
    """A grammar as vLLM's API has it; one of its fields."""

    model_config = ConfigDict(extra="forbid")
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=1000)
    grammar: str | None = None


class JsonSchema(BaseModel):
    """A schema in `response_format`."""

    name: str = ""
    schema_: dict[str, Any] | bool = Field(True, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The format of an answer; `schema` beside "json_object" is llama.cpp's."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class Generation(BaseModel):
    """The fields that chat and completions have in common; `None` is the default everywhere."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, lt=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MOST_BIASES)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Structure | None = None
    max_tokens: int | None = Field(None, ge=0, lt=2**31)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the last chunk of a stream is to count tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Chat(Generation):
    """A request for the next message of a conversation."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class Completion(Generation):
    """A request for the continuation of prompts."""

    prompt: (
        str
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[
            list[str] | list[Annotated[Ids, Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_PROMPTS),
        ]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or more."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class Tokenize(BaseModel):
    """A request for the ids of a text, or of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None


class Detokenize(BaseModel):
    """A request for the text of ids."""

    model_config = ConfigDict(strict=True, extra="ignore")
    tokens: Ids


def parse(body: bytes, form: type[Body]) -> Body:
    """Parses and validates the JSON body of a request.

    Raises:
        Refused: it is no JSON object, or a field is missing, of another type or out of range.
    """
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Refused("the body is not UTF-8") from error
    except RecursionError as error:
        raise Refused("the body is nested too deeply") from error
    except ValueError as error:
        raise Refused(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refused("the body is not a JSON object")
    for name, harmless in REFUSED.items():
        value = fields.get(name)
        if value is not None and value not in harmless and issubclass(form, Generation):
            raise Refused(f"{name} is not supported; leave it out", param=name)
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = [str(part) for part in first["loc"] if isinstance(part, int) or part in fields]
        param = ".".join(map(str, first["loc"][:1])) or None
        why = first["msg"][:1].lower() + first["msg"][1:]
        raise Refused(f"{'.'.join(where) or param or 'a field'}: {why}", param=param) from error
    except RecursionError as error:
        raise Refused("the body is nested too deeply") from error


def _no_number(name: str) -> Mapping[str, Any]:
    raise ValueError(f"{name} is no number in JSON")
