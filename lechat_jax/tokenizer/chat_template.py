"""Mistral's chat templates: a conversation as the ids that the model of a tokenizer was taught.

All of it is mistral-common's, except that an answer stays the ids that the model produced.
Encoded again from its text it might get others, and what the model has read would no longer
be the beginning of what it is to read.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import Tokenizer as Base
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerV1,
    InstructTokenizerV2,
    InstructTokenizerV3,
    InstructTokenizerV7,
    InstructTokenizerV11,
    InstructTokenizerV13,
    InstructTokenizerV15,
)
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from lechat_jax.tokenizer.tekken import Tekken
from lechat_jax.tokenizer.tokenizer import Tokenizer

KINDS: dict[str, type[InstructTokenizerV1]] = {
    "v1": InstructTokenizerV1,
    "v2": InstructTokenizerV2,
    "v3": InstructTokenizerV3,
    "v7": InstructTokenizerV7,
    "v11": InstructTokenizerV11,
    "v13": InstructTokenizerV13,
    "v15": InstructTokenizerV15,
}


class Exchange(NamedTuple):
    """A question and its answer.

    Attributes:
        question: what the user said.
        answer: the ids that the model produced, closed by EOS.
    """

    question: str
    answer: list[int]


class Conversation:
    """What was said so far, and what the model reads when more is said.

    The ids for a question begin with those for the question before and with its answer,
    so that only the rest need be read, with two exceptions: versions 2 and 3 put the
    system prompt into the last question, so it moves, and whoever sets `system` anew
    changes the beginning.

    Attributes:
        exchanges: the questions and answers.

    Raises:
        BadInput: the system prompt is not Unicode.
    """

    def __init__(self, tokenizer: Tokenizer, system: str = "") -> None:
        self.exchanges: list[Exchange] = []
        self._tokenizer = tokenizer
        self._version = TokenizerVersion(tokenizer.version)
        self._base = base_of(tokenizer)
        self.system = system

    @property
    def system(self) -> str:
        """The system prompt; empty for none."""
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        """Set anew, it is as if it had been so from the beginning."""
        self._tokenizer.encode(text)  # or refuses it
        self._system = text

    def ask(self, question: str) -> list[int]:
        """All ids from BOS on, to which the model's answer to the question is the continuation.

        The question is not part of the conversation until it is answered (`add`).

        Raises:
            BadInput: the question is not Unicode.
        """
        self._tokenizer.encode(question)
        messages = [
            *([SystemMessage(content=self.system)] if self.system else []),
            *self._earlier(),
            UserMessage(content=question),
        ]
        request = ChatCompletionRequest(messages=messages)
        return self._template().encode_chat_completion(request).tokens

    def add(self, question: str, answer: Sequence[int]) -> None:
        """From here on the exchange is part of the conversation; an answer cut short is closed."""
        eos_id = self._tokenizer.eos_id
        closed = [*answer] if answer and answer[-1] == eos_id else [*answer, eos_id]
        self.exchanges.append(Exchange(question, closed))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the messages that chat programs exchange, in order."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.exchanges:
            found.append({"role": "user", "content": question})
            found.append({"role": "assistant", "content": self._tokenizer.decode(answer)})
        return found

    def _earlier(self) -> list[UserMessage | AssistantMessage]:
        """The exchanges, with the number of each answer in its place."""
        return [
            message
            for number, exchange in enumerate(self.exchanges)
            for message in (
                UserMessage(content=exchange.question),
                AssistantMessage(content=str(number)),
            )
        ]

    def _template(self) -> MistralTokenizer:
        """mistral-common's encoder, that writes for the number of an answer its ids."""
        instruct = KINDS[self._version.value](self._base)

        def answer(message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
            return self.exchanges[int(str(message.content))].answer

        instruct.encode_assistant_message = answer
        return MistralTokenizer(
            instruct,
            get_validator(self._version, ValidationMode.test),
            get_normalizer(self._version, self._base.model_settings_builder),
        )


def base_of(tokenizer: Tokenizer) -> Base:
    """The tokenizer as mistral-common has it, of the version that its content says."""
    if isinstance(tokenizer.codec, Tekken):
        return tokenizer.codec.model
    return SentencePieceTokenizer(tokenizer.path, TokenizerVersion(tokenizer.version))
