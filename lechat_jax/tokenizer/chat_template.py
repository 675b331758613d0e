"""Mistral's chat templates: the token ids of a conversation, as each tokenizer version has them.

The template is mistral-common's, except that an answer stays the ids that the model produced.
Encoded again from its text it might get other ids, and the ids in the KV cache would no longer
be a prefix of the next prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import ImageURLChunk, TextChunk
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

from lechat_jax.config import VisionConfig
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.image_template import NumberedImages
from lechat_jax.tokenizer.images import Image, ImageSource, read_image
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
    """One exchange of a chat: the user's question and the model's answer.

    Attributes:
        question: text of the user's message.
        answer: ids that the model produced, closed by EOS.
        images: images before the text.
    """

    question: str
    answer: list[int]
    images: Sequence[Image] = ()


class Conversation:
    """A chat history, and the prompt ids that the chat template makes of it for the next question.

    The ids for a question begin with those for the question before and its answer, so that only
    the rest needs prefill, with two exceptions: versions 2 and 3 put the system prompt into the
    last question, so it moves, and setting `system` changes the start.

    Attributes:
        exchanges: the questions and answers.

    Raises:
        BadInput: the system prompt is not Unicode.
    """

    def __init__(
        self, tokenizer: Tokenizer, system: str = "", vision: VisionConfig | None = None
    ) -> None:
        self.exchanges: list[Exchange] = []
        self._vision = vision
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
        """Replaces the system prompt, for the whole history."""
        self._tokenizer.encode(text)  # or refuses it
        self._system = text

    @property
    def images(self) -> list[Image]:
        """The images of the history, in its order."""
        return [image for exchange in self.exchanges for image in exchange.images]

    def read_images(self, sources: Sequence[ImageSource]) -> list[Image]:
        """Reads images for a question.

        Raises:
            BadInput: there is no such image, or the model sees none.
        """
        if sources and self._vision is None:
            raise BadInput("the model has no vision tower, so it cannot be shown images")
        return [read_image(one, self._vision) for one in sources if self._vision]

    def ask(self, question: str, images: Sequence[Image] = ()) -> list[int]:
        """The prompt ids of a question: the whole history from BOS on, which the answer continues.

        The question joins the history only with its answer (`add`). Its images come before it.

        Raises:
            BadInput: the question is not Unicode.
        """
        self._tokenizer.encode(question)
        messages = [
            *([SystemMessage(content=self.system)] if self.system else []),
            *self._earlier(),
            _user(question, len(images), len(self.images)),
        ]
        request = ChatCompletionRequest(messages=messages)
        template = self._template([*self.images, *images])
        return template.encode_chat_completion(request).tokens

    def add(self, question: str, answer: Sequence[int], images: Sequence[Image] = ()) -> None:
        """Appends an exchange to the history; an unfinished answer is closed with EOS."""
        eos_id = self._tokenizer.eos_id
        closed = [*answer] if answer and answer[-1] == eos_id else [*answer, eos_id]
        self.exchanges.append(Exchange(question, closed, images))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The history as chat messages (`role`, `content`), in order, the system prompt first.

        The content of a question with images is a list of parts, with their addresses.
        """
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": self.system})
        for question, answer, images in self.exchanges:
            content: Any = question
            if images:
                urls = [{"url": image.address} for image in images]
                content = [{"type": "image_url", "image_url": url} for url in urls]
                content += [{"type": "text", "text": question}] if question else []
            found.append({"role": "user", "content": content})
            found.append({"role": "assistant", "content": self._tokenizer.decode(answer)})
        return found

    def _earlier(self) -> list[UserMessage | AssistantMessage]:
        """The exchanges, with the number of each answer as its text, and so of each image."""
        messages, n_images = [], 0
        for number, exchange in enumerate(self.exchanges):
            messages.append(_user(exchange.question, len(exchange.images), n_images))
            messages.append(AssistantMessage(content=str(number)))
            n_images += len(exchange.images)
        return messages

    def _template(self, images: Sequence[Image]) -> MistralTokenizer:
        """mistral-common's encoder, which writes ids in place of numbers of answers and images."""
        seen = NumberedImages(self._vision, images) if self._vision and images else None
        if seen and self._version.value in ("v1", "v2"):
            raise BadInput(f"the chat template of this model, {self._version.value}, has no images")
        instruct = KINDS[self._version.value](self._base, image_encoder=seen)

        def answer(message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
            return self.exchanges[int(str(message.content))].answer

        instruct.encode_assistant_message = answer
        return MistralTokenizer(
            instruct,
            get_validator(self._version, ValidationMode.test),
            get_normalizer(self._version, self._base.model_settings_builder),
        )


def _user(text: str, n_images: int, first: int) -> UserMessage:
    """A user's message of images, by their numbers from `first` on, and a text."""
    if not n_images:
        return UserMessage(content=text)
    numbers = range(first, first + n_images)
    chunks = [ImageURLChunk(image_url=str(number)) for number in numbers]
    return UserMessage(content=[*chunks, *([TextChunk(text=text)] if text else [])])


class ChatPrompt(NamedTuple):
    """Prompt ids of a conversation, and the images whose ids are among them."""

    ids: list[int]
    images: list[Image]


class ChatPrompts:
    """Encodes whole conversations as a server is sent them, tools and tool calls included.

    Unlike `Conversation` it encodes earlier answers again, from their text. With a vision tower
    messages may have images, as data URLs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: VisionConfig | None = None,
        most_tokens: int | None = None,
    ) -> None:
        self._version, self._base = TokenizerVersion(tokenizer.version), base_of(tokenizer)
        self._vision, self._most_tokens = vision, most_tokens

    def encode(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> ChatPrompt:
        """The prompt of a conversation, from BOS on, which the answer continues.

        An assistant's message at the end is the beginning of the answer.

        Args:
            messages: in the format of OpenAI's API.
            tools: functions that may be called, in that format.

        Raises:
            BadInput: the template refuses them.
        """
        seen = self._sees(messages)
        try:
            request = ChatCompletionRequest.from_openai(
                messages,
                tools,
                continue_final_message=bool(messages) and messages[-1].get("role") == "assistant",
                model="lechat",
            )
            template = MistralTokenizer(
                KINDS[self._version.value](self._base, image_encoder=seen),
                get_validator(self._version, ValidationMode.serving),
                get_normalizer(self._version, self._base.model_settings_builder),
            )
            found = template.encode_chat_completion(request)
            return ChatPrompt(found.tokens, seen.images_of(found.images) if seen else [])
        except (MistralCommonException, ValueError, LookupError, TypeError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise BadInput(f"the chat template refuses the messages: {why[:300]}") from error
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise BadInput(
                f"the chat template cannot encode the messages: {str(error)[:300]}"
            ) from error

    def _sees(self, messages: list[dict[str, Any]]) -> NumberedImages | None:
        """What reads the images of these messages; `None` if they have none.

        Raises:
            BadInput: they have, and the model has no vision tower, or one has no address.
        """
        contents = [message.get("content") for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        images = [p for p in parts if isinstance(p, dict) and p.get("type") == "image_url"]
        if not images:
            return None
        if self._vision is None:
            raise BadInput("the model has no vision tower, so it cannot be sent images")
        for image in images:
            address = image.get("image_url")  # a string in Mistral's own API
            address = address.get("url") if isinstance(address, dict) else address
            if not isinstance(address, str):
                raise BadInput('an image_url must be {"url": "data:image/png;base64,…"}')
        return NumberedImages(self._vision, most_tokens=self._most_tokens)


def base_of(tokenizer: Tokenizer) -> Base:
    """mistral-common's own tokenizer object, of the version that the file's content says."""
    if isinstance(tokenizer.codec, Tekken):
        return tokenizer.codec.model
    return SentencePieceTokenizer(tokenizer.path, TokenizerVersion(tokenizer.version))
