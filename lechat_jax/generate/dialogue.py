"""A chat: a conversation, and the KV-cached text in which a model reads and continues it."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol, runtime_checkable

from lechat_jax.config import VisionConfig
from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Sample, UntilStop
from lechat_jax.generate.sampling import Sampling
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.tokenizer.images import Image, ImageSource
from lechat_jax.tokenizer.tokenizer import Tokenizer


@runtime_checkable
class Text(Protocol):
    """The interface of `Session` that a chat needs."""

    ids: list[int]
    images: list[Image]

    @property
    def room(self) -> int | None:
        """Tokens that still fit into the context; `None` is no limit."""

    def reset(self, length: int = 0) -> None:
        """Truncates the text to its first `length` tokens."""

    def feed(self, ids: Sequence[int], images: Sequence[Image] = ()) -> None:
        """Appends tokens, and the images whose ids are among them."""

    def stream(self, max_tokens: int, sampling: Sampling) -> Iterator[Sample]:
        """Generates the continuation of the text, piece by piece."""
        ...


class Dialogue:
    """A chat with a model: a question in, a streamed answer out; only new tokens need prefill.

    Attributes:
        conversation: the chat history.
        last: the streamed pieces of the last answer.
    """

    def __init__(
        self,
        text: Text,
        tokenizer: Tokenizer,
        *,
        system: str = "",
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        vision: VisionConfig | None = None,
    ) -> None:
        self.conversation = Conversation(tokenizer, system, vision)
        self.last: list[Sample] = []
        self._text, self._tokenizer = text, tokenizer
        self._max_tokens, self._sampling = max_tokens, sampling or Sampling(temperature=0.7)
        self._stop = stop

    def answer(
        self, question: str, images: Sequence[ImageSource] = ()
    ) -> Generator[str, None, None]:
        """Streams the answer to a question; closing the iterator cuts the answer short.

        What was output stays in the history; if nothing was, the question does not either.

        Args:
            question: a text.
            images: images that come before it.

        Raises:
            BadInput: the question does not fit into the context, or is not Unicode; or there is
                no such image, or the model sees none.
        """
        seen = self.conversation.read_images(images)
        ids = self.conversation.ask(question, seen)
        self._read(ids, [*self.conversation.images, *seen])
        self.last = []
        asked = len(self._text.ids)
        # Decoded without what came before, as Mistral does it.
        heard = UntilStop(self._tokenizer, stop=self._stop)
        said: list[int] = []
        try:
            for piece in self._text.stream(self._max_tokens, self._sampling):
                ids, _, text = heard.push(*self._own(piece))
                said += ids
                self.last.append(
                    dataclasses.replace(piece, stopped="stop") if heard.found else piece
                )
                yield text
                if heard.found:
                    break
            ids, _, text = heard.flush()
            said += ids
            yield text
        except KeyboardInterrupt:
            self._text.reset()  # it may have come amid a change of the text's state
            raise
        finally:
            if len(self._text.ids) > asked + len(said):  # a stop text, or what may become one
                self._text.reset(asked + len(said))
            if said:
                self.conversation.add(question, said, seen)

    def _own(self, piece: Sample) -> tuple[list[int], list[float]]:
        """The tokens of a piece, without an end token other than the template's EOS."""
        foreign = piece.stopped == "eos" and piece.ids[-1] != self._tokenizer.eos_id
        kept = slice(-1 if foreign else None)
        return piece.ids[kept], piece.logprobs[kept]

    def say(self, question: str, images: Sequence[ImageSource] = ()) -> str:
        """The complete answer to a question; `answer` streams it."""
        return "".join(self.answer(question, images))

    def reset(self) -> None:
        """Clears the history; the system prompt stays."""
        self.conversation.exchanges.clear()
        self._text.reset()

    def _read(self, ids: list[int], images: list[Image]) -> None:
        """Sets the text to these ids and images, keeping the KV cache of what is the same."""
        known = len(self._text.ids)
        room = self._text.room
        if room is not None and len(ids) >= room + known:
            raise BadInput(
                f"the conversation has {len(ids)} tokens and the context holds {room + known}: "
                "/reset begins a new one, and a larger --context has room for more"
            )
        seen = [image.digest for image in self._text.images]
        is_same = [image.digest for image in images[: len(seen)]] == seen
        if ids[:known] != self._text.ids or not is_same:
            self._text.reset()
            known, seen = 0, []
        self._text.feed(ids[known:], images[len(seen) :])
