"""A conversation, and the text in which a model reads and continues it."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol, runtime_checkable

from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Sample, UntilStop
from lechat_jax.generate.sampling import Sampling
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.tokenizer.tokenizer import Tokenizer


@runtime_checkable
class Text(Protocol):
    """What a chat needs of a `Session`."""

    ids: list[int]

    @property
    def room(self) -> int | None:
        """Tokens that still fit; `None` is without end."""

    def reset(self, length: int = 0) -> None:
        """From here on the text is its first `length` tokens."""

    def feed(self, ids: Sequence[int]) -> None:
        """Appends tokens."""

    def stream(self, max_tokens: int, sampling: Sampling) -> Iterator[Sample]:
        """The next piece of the text, again and again until it stops."""
        ...


class Dialogue:
    """Questions in, answers out, and the text between kept as short as the template lets it be.

    Attributes:
        conversation: what was said.
        last: the samples that the last answer consists of.
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
    ) -> None:
        self.conversation = Conversation(tokenizer, system)
        self.last: list[Sample] = []
        self._text, self._tokenizer = text, tokenizer
        self._max_tokens, self._sampling = max_tokens, sampling or Sampling(temperature=0.7)
        self._stop = stop

    def answer(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece; whoever stops asking has cut it short.

        What was handed out stays part of the conversation; before that the question is
        none either.

        Raises:
            BadInput: the question does not fit into the context, or is not Unicode.
        """
        self._read(self.conversation.ask(question))
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
                self.conversation.add(question, said)

    def _own(self, piece: Sample) -> tuple[list[int], list[float]]:
        """The tokens of a piece but for an end that is not the template's, which closes it."""
        foreign = piece.stopped == "eos" and piece.ids[-1] != self._tokenizer.eos_id
        kept = slice(-1 if foreign else None)
        return piece.ids[kept], piece.logprobs[kept]

    def say(self, question: str) -> str:
        """The whole answer to a question; as `answer`, which gives it piece by piece."""
        return "".join(self.answer(question))

    def reset(self) -> None:
        """From here on nothing was said; the system prompt stays."""
        self.conversation.exchanges.clear()
        self._text.reset()

    def _read(self, ids: list[int]) -> None:
        """The text is these ids, of which only the new ones need be read if it can be so."""
        known = len(self._text.ids)
        room = self._text.room
        if room is not None and len(ids) >= room + known:
            raise BadInput(
                f"the conversation has {len(ids)} tokens and the context holds {room + known}: "
                "/reset begins a new one, and a larger --context has room for more"
            )
        if ids[:known] != self._text.ids:
            self._text.reset()
            known = 0
        self._text.feed(ids[known:])
